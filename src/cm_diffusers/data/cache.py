"""VAE posteriors and text embeddings of a data set, encoded once."""

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from diffusers import AutoencoderKL
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from cm_diffusers.data.framing import Framing
from cm_diffusers.data.kept import Kept, Wanted, keep
from cm_diffusers.data.keys import keys_of, taken
from cm_diffusers.data.preprocessing import PIXELS, decode_image, preprocess
from cm_diffusers.data.ragged import Tensors, joined, packed, row_of
from cm_diffusers.data.shards import row_ranges, shard_key
from cm_diffusers.data.sources import DataConfig
from cm_diffusers.errors import UserError
from cm_diffusers.models.families.base import Latents
from cm_diffusers.models.families.latents import kl_latents


VOLATILE = {"architectures", "dtype", "torch_dtype", "transformers_version"}  # of a config: what saving it may change


@dataclass(frozen=True)
class Vae:
    """A VAE that is loaded only when something has to be encoded.

    Attributes:
        load: returns the model; it may be moved and cast.
        fingerprint: names its class, configuration and weights.
        latents: how it encodes, and what the network sees of that.
    """

    load: Callable[[], nn.Module]
    fingerprint: str
    latents: Latents

    @classmethod
    def from_model(cls, vae: nn.Module, latents: Callable[[nn.Module], Latents] = kl_latents) -> "Vae":
        """Wraps a loaded model, whose latents are those of its family; encoding works on a copy of it."""
        return cls(lambda: copy.deepcopy(vae), module_fingerprint(vae), latents(vae))

    @classmethod
    def from_pretrained(cls, path: str, subfolder: str | None = "vae", revision: str | None = None) -> "Vae":
        """Finds a VAE in a local pipeline folder or on the Hub and hashes its files without loading it."""
        folder = Path(path).expanduser()
        if not folder.is_dir():
            prefix = f"{subfolder}/" if subfolder else ""
            names = [f"{prefix}config.json", f"{prefix}diffusion_pytorch_model.safetensors"]
            folder = Path(snapshot_download(path, revision=revision, allow_patterns=names))
        folder = folder / (subfolder or "")
        fingerprint = folder_fingerprint(folder)
        config = json.loads((folder / "config.json").read_text("utf-8"))
        if (kind := config.get("_class_name", AutoencoderKL.__name__)) != AutoencoderKL.__name__:
            raise UserError(
                f"The VAE in {folder} is {kind}, whose latents training cannot draw; give an AutoencoderKL."
            )
        with torch.device("meta"):
            latents = kl_latents(AutoencoderKL.from_config(config))
        return cls(lambda: AutoencoderKL.from_pretrained(folder, use_safetensors=True), fingerprint, latents)

    def encoder(self, config: DataConfig, device: torch.device | str) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """Pixels `(B, 3, ...)` in [-1, 1] to mean and standard deviation, each `(B, C, ...)`; loads the model at once."""
        model, dtype = self.load().eval().to(device), getattr(torch, config.vae_dtype)
        model = model if model.dtype == dtype else model.to(dtype)
        return lambda pixels: self.latents.encode(model, pixels.to(model.device, dtype))


def module_fingerprint(module: nn.Module) -> str:
    """sha256 of a module's weights, and of its class and configuration."""
    config = getattr(module, "config", {})
    values = config.to_dict() if hasattr(config, "to_dict") else config
    settings = {k: v for k, v in values.items() if not k.startswith("_") and k not in VOLATILE}
    digest = hashlib.sha256(f"{module!r} {json.dumps(settings, sort_keys=True, default=repr)}".encode())
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def folder_fingerprint(folder: str | Path) -> str:
    """sha256 of config.json and the safetensors weights in a model's folder.

    Raises:
        ValueError: the folder lacks either.
    """
    paths = [path for pattern in ("config.json", "*.safetensors") for path in sorted(Path(folder).glob(pattern))]
    if len({path.suffix for path in paths}) < 2:
        raise UserError(f"{folder} must hold config.json and .safetensors weights; use save_pretrained to write them.")
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


class Posteriors:
    """VAE posteriors by row and variant, unscaled as the VAE gives them.

    Attributes:
        valid: which rows hold an image or a clip that is readable in every variant (N,).

    Args:
        kept: of each variant.
    """

    def __init__(self, kept: list[Kept]) -> None:
        self.kept = kept
        self.valid = np.logical_and.reduce([one.fill("valid", np.zeros(len(one.shard), bool)) for one in kept])

    def __getitem__(self, key: tuple[np.ndarray, np.ndarray]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, each (B, C, h, w) float16, of `rows, variants`, each (B,), of one size."""
        rows = [self.kept[variant].row(row) for row, variant in zip(*key, strict=True)]
        return torch.stack([t["mean"][i] for t, i in rows]), torch.stack([t["std"][i] for t, i in rows])


class Embeddings:
    """Conditions by caption number: `embeddings[numbers]` holds (B, ...) of each, float32; masks as they were encoded."""

    def __init__(self, kept: Kept) -> None:
        self.kept = kept

    def __getitem__(self, numbers: np.ndarray) -> Tensors:
        return in_float32(joined([row_of(*self.kept.row(number)) for number in numbers]))

    def with_empty(self, numbers: np.ndarray, empty: int) -> tuple[Tensors, Tensors]:
        """Of both branches, each (B, ...) and as long as each other: `numbers` and as often `empty`."""
        return both_branches(self[np.array([*numbers, empty])])


def in_float32(conditions: Tensors) -> Tensors:
    """Floats only: masks and ids stay what they are."""
    return {name: value.float() if value.is_floating_point() else value for name, value in conditions.items()}


def both_branches(rows: Tensors) -> tuple[Tensors, Tensors]:
    """All (B + 1, ...) but the last, and the last B times."""
    cond = {name: value[:-1] for name, value in rows.items()}
    return cond, {name: rows[name][-1:].expand_as(value) for name, value in cond.items()}


def cached_posteriors(
    dataset: datasets.Dataset, framing: Framing, vae: Vae, device: torch.device | str = "cpu"
) -> Posteriors:
    """Encodes every image in every variant, or reads what an earlier run encoded.

    Args:
        dataset: rows with `config.image_column` undecoded, as `load_image_text` gives them.
        framing: of the same rows; its configuration says where the shards are kept.
        vae: loaded only when a shard is missing.
        device: where the VAE runs.

    Raises:
        ValueError: the VAE overflows, or cannot encode images of this size.
    """
    config = framing.config
    check_sides(config, vae.latents)
    records = dataset.select_columns(config.image_column)
    encoder = cache(lambda: vae.encoder(config, device))

    def encode(numbers: Sequence[int], rows: np.ndarray, variant: int) -> Iterator[Tensors]:
        target = framing.targets[framing.assigned[rows[0]]]
        for part in row_ranges(len(numbers), config.encode_batch_size):
            chosen = [int(rows[numbers[i]]) for i in part]
            found = records[chosen][config.image_column]
            images = [_image(record, framing, i, variant) for record, i in zip(found, chosen, strict=True)]
            yield encode_images(images, target, encoder(), config)

    there = framing.digests.there
    parts = [np.flatnonzero(there & (framing.assigned == number)) for number in np.unique(framing.assigned[there])]
    wanted = [
        Wanted(
            _setting(framing, rows[0], variant, vae),
            taken(framing.digests.table, rows),
            partial(encode, rows=rows, variant=variant),
        )
        for variant in range(framing.variants)
        for rows in parts
    ]
    kept = iter(keep(wanted, config, "images"))
    return Posteriors(
        [Kept.together(len(there), [(rows, next(kept)) for rows in parts]) for _ in range(framing.variants)]
    )


def check_sides(config: DataConfig, latents: Latents) -> None:
    """
    Raises:
        ValueError: The sides of the images are not whole numbers of what the network sees as one.
    """
    name, factor = "bucket_step" if config.aspect_ratio_buckets else "resolution", latents.multiple
    side = getattr(config, name)
    if side % factor:
        below = side // factor * factor
        sizes = " or ".join(str(size) for size in (below, below + factor) if size)
        who = "the VAE needs" if latents.patch == 1 else f"the VAE and patches of {latents.patch} latents need"
        raise UserError(f"--{name} {side} is not a multiple of {factor}, as {who}: take {sizes}.")


def _setting(framing: Framing, row: int, variant: int, vae: Vae) -> str:
    """sha256 of all that decides the posteriors of images of one size, beside the images."""
    config, target = framing.config, framing.targets[framing.assigned[row]]
    size = target.height if target.height == target.width else list(target)
    settings = (size, config.interpolation_type, config.vae_dtype, *framing.crop_and_flip(variant))
    return shard_key("posterior", PIXELS, vae.fingerprint, *settings)


def _image(record: dict[str, Any], framing: Framing, row: int, variant: int) -> Tensor | None:
    image, target = decode_image(record), framing.targets[framing.assigned[row]]
    return None if image is None else preprocess(image, framing.config, framing.view(row, variant), target)


@torch.no_grad()
def encode_images(
    images: list[Tensor | None],
    target: Sequence[int],
    encode: Callable[[Tensor], tuple[Tensor, Tensor]],
    config: DataConfig,
) -> Tensors:
    """Posteriors of images or clips `(3, *target)` by a VAE's `encoder`, each (B, C, ...), and which there are, (B,)."""
    blank = torch.zeros(3, *target)  # holds the place of an unreadable image
    mean, std = encode(torch.stack([blank if image is None else image for image in images]))
    tensors = {"mean": mean.half().cpu(), "std": std.half().cpu()}
    check_finite_latents(config, *tensors.values())
    return {**tensors, "valid": torch.tensor([image is not None for image in images])}


def check_finite_latents(config: DataConfig, *tensors: Tensor) -> None:
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise UserError(f"The VAE's latents are not finite in {config.vae_dtype}: pass --vae_dtype float32.")


def cached_embeddings(
    captions: Sequence[str], encode: Callable[[list[str]], Tensors], fingerprint: str, config: DataConfig
) -> Embeddings:
    """Encodes every caption, or reads what an earlier run encoded.

    Args:
        captions: distinct texts.
        encode: texts to conditions, each (N, ...) and of one shape for every call, but for the length of what has a
            mask, see `packed`; called only when a shard is missing.
        fingerprint: names the text tower and tokenizer behind `encode`.
        config: where the shards are kept.

    Raises:
        ValueError: the embeddings are not finite.
    """

    def encode_parts(numbers: Sequence[int]) -> Iterator[Tensors]:
        for part in row_ranges(len(numbers), config.encode_batch_size):
            with torch.no_grad():
                encoded = encode([captions[numbers[i]] for i in part])
            yield {name: _in_half(value) for name, value in packed(encoded).items()}

    wanted = Wanted(shard_key("conditions", fingerprint), keys_of(captions), encode_parts)
    return Embeddings(keep([wanted], config, "captions")[0])


def _in_half(values: Tensor) -> Tensor:
    """Floats in float16, or in bfloat16 where a value is beyond its range, as those of large language models may be."""
    if not values.is_floating_point():
        return values.cpu()
    if not (half := values.half()).isfinite().all() and not (half := values.bfloat16()).isfinite().all():
        raise UserError("The text embeddings are not finite: encode prompts in float32.")
    return half.cpu()
