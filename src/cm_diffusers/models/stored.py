"""Whether the files of a pipeline hold every weight of its networks: the libraries fill gaps at random, or not at all."""

import json
import re
import struct
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import nn

from cm_diffusers.errors import UserError


NETWORKS = ("unet", "transformer", "transformer_2", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
# Counted instead of learnt, or of the other tower of a whole CLIP model, which the text tower may be stored with.
UNUSED = re.compile(
    r"position_ids$|num_batches_tracked$|^logit_scale$|^vision_model\.|^visual_projection\.|^text_projection\."
)
FORMER_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}  # of VAEs
TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # of safetensors
FLOATS = ("F64", *TORCH_DTYPES, "F8_E4M3", "F8_E5M2")
WEIGHTS = re.compile(  # of diffusers and transformers; a variant stands before or after the number of a shard
    r"(?:(?:diffusion_)?pytorch_)?model(?:\.(?P<variant>[\w-]+?))?(?:-\d+-of-\d+(?:\.(?P<after>[\w-]+))?)?"
    r"(?P<suffix>\.safetensors|\.bin)"
)
OPTIONAL = ("model", "language_model", "text_model")  # first parts of names, which releases of transformers leave out


def check_stored(
    pipe: DiffusionPipeline,
    source: str | Path,
    variant: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    given: Collection[str] = (),
) -> None:
    """Compares the loaded networks with the headers of the files that they came from, where these are safetensors.

    Args:
        source: Folder or Hub id.
        variant, revision, cache_dir: As for `from_pretrained`.
        given: Names of networks that came from elsewhere.

    Raises:
        ValueError: A file lacks weights, holds unknown ones, or integers in place of numbers; or a tokenizer its words.
    """
    _check_tokenizers(pipe, source)
    folder = Path(source)
    if not folder.is_dir():
        try:
            options = {"revision": revision, "cache_dir": cache_dir, "local_files_only": True}
            folder = Path(snapshot_download(str(source), **options))
        except LocalEntryNotFoundError:
            return
    for name in set(NETWORKS) - set(given):
        network = getattr(pipe, name, None)
        dtypes = _stored(folder / name, variant) if _is_of(network, folder / name) else None
        if dtypes is not None:
            check_weights(f"The {name} of {source}", network, dtypes)


def absent_parts(index: Mapping[str, Any]) -> dict[str, None]:
    """Parts that a pipeline's index says are None, of which diffusers asks some of whoever loads it.

    Args:
        index: The content of model_index.json.
    """
    return {name: None for name, entry in index.items() if entry == [None, None]}


def _check_tokenizers(pipe: DiffusionPipeline, source: str | Path) -> None:
    """transformers makes one of two words where there is no file of it."""
    for suffix in ("", "_2", "_3"):
        words, tower = getattr(pipe, f"tokenizer{suffix}", None), getattr(pipe, f"text_encoder{suffix}", None)
        known = getattr(getattr(tower, "config", None), "vocab_size", 0)
        if words is not None and 2 * len(words) < known:
            raise UserError(
                f"The tokenizer{suffix} of {source} has {len(words)} words of the {known} that its text encoder knows, so its "
                "files are missing; get a whole checkpoint."
            )


def check_weights(what: str, network: nn.Module, dtypes: dict[str, str]) -> None:
    """
    Args:
        what: Begins the sentence.
        dtypes: Of the stored tensors by name, as safetensors spells them: "F32", "I8".

    Raises:
        ValueError: As `check_stored`.
    """
    tied: dict[int, set[str]] = {}  # a tensor of several names, as the words of T5, is stored once
    for name, value in network.state_dict(keep_vars=True).items():
        if value.is_floating_point():
            tied.setdefault(id(value), set()).add(_plain(name))
    wanted, found = set().union(*tied.values()), {_plain(name) for name in dtypes}
    integers = sorted(name for name, dtype in dtypes.items() if dtype not in FLOATS)
    faults = {
        "lacks": sorted(min(names) for names in tied.values() if not names & found),
        "has unknown": sorted(name for name in found - wanted if not UNUSED.search(name)),
        "has quantized": [name for name in integers if _plain(name) in wanted],
    }
    for fault, names in faults.items():
        if names:
            raise UserError(
                f"{what} {fault} weights ({len(names)}, such as {names[0]}); get a whole checkpoint in float32, float16 or "
                "bfloat16."
            )


def weights_by_variant(folder: Path) -> dict[str | None, list[str]]:
    """Of a network's folder: suffixes of the weights by their variant, None for those without.

    `{None: [".safetensors"], "fp16": [".safetensors"]}`, where a pickle has ".bin".
    """
    found: dict[str | None, list[str]] = {}
    for path in sorted(folder.iterdir()):
        if match := WEIGHTS.fullmatch(path.name):
            found.setdefault(match["variant"] or match["after"], []).append(match["suffix"])
    return found


def only_variant(folders: Iterable[Path]) -> str | None:
    """The one variant in which all have safetensors that have none without a variant; None otherwise."""
    found = [weights_by_variant(folder) for folder in folders]
    safe = [{variant for variant in files if ".safetensors" in files[variant]} for files in found]
    variants = [of_one for of_one in safe if of_one and None not in of_one]
    common = set.intersection(*variants) if variants else set()
    return common.pop() if len(common) == 1 else None


def header(path: Path) -> tuple[dict[str, dict], dict[str, str]]:
    """Entries of the tensors in a safetensors file by name (`dtype`, `shape`), and its metadata.

    Raises:
        ValueError: It is no safetensors file.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise UserError("its header is longer than the file")
            entries = json.loads(file.read(length))
        if not isinstance(entries, dict):
            raise UserError(f"its header holds a {type(entries).__name__}")
    except (ValueError, struct.error) as error:  # of the length, UTF-8 or JSON
        raise UserError(f"{path} is no whole safetensors file ({error}); get it anew.") from error
    metadata = entries.pop("__metadata__", {})
    return entries, metadata


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """Of a network: those of the variant where it has such, in one piece or in shards; none if they are no safetensors."""
    for suffix in (rf"\.{re.escape(variant)}", "") if variant else ("",):
        shard = r"-\d+-of-\d+"
        pattern = re.compile(rf"(diffusion_pytorch_)?model({suffix}({shard})?|{shard}{suffix})\.safetensors")
        if files := [path for path in sorted(folder.glob("*.safetensors")) if pattern.fullmatch(path.name)]:
            return files
    return []


def _is_of(network: nn.Module | None, folder: Path) -> bool:
    """Whether the folder's config is the network's: of clips, a pipeline makes the network from an image model's."""
    if network is None or not (folder / "config.json").is_file():
        return False
    kind = type(network).__name__
    return json.loads((folder / "config.json").read_text("utf-8")).get("_class_name", kind) == kind


def _stored(folder: Path, variant: str | None) -> dict[str, str] | None:
    """Dtypes of the tensors of a network, by name; None without such files."""
    files = weight_files(folder, variant)
    return {name: entry["dtype"] for path in files for name, entry in header(path)[0].items()} if files else None


def _plain(name: str) -> str:
    for former, present in FORMER_NAMES.items():
        if ".attentions." in name:
            name = name.replace(former, present)
    while name.partition(".")[0] in OPTIONAL:
        name = name.partition(".")[2]
    return name
