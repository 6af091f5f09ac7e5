"""Teachers: loaded whole, checked, frozen."""

from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, PipelineQuantizationConfig, StableDiffusion3Pipeline
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.hf_argparser import HfArg

from cm_diffusers.errors import UserError
from cm_diffusers.models.casting import Dtypes, load_cast_networks, part_dtypes
from cm_diffusers.models.exact_times import embed_exactly
from cm_diffusers.models.families.base import FAMILIES, family_of, network_of
from cm_diffusers.models.merged_text import merge_zero_text, merge_zeros, merges_zeros, text_lengths
from cm_diffusers.models.single_file import is_single_file, load_single_file
from cm_diffusers.models.stored import absent_parts, check_stored, only_variant, weights_by_variant


LOADING = {"dtype": torch.float32, "use_safetensors": True}  # never a pickle
# What diffusers and transformers raise about files: also of shapes, of names in configs, and of missing packages.
LOADING_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError, SafetensorError)
SINGLE_FILE_CONFIG = (
    "Folder or Hub id of a pipeline of the same architecture, for configs and tokenizers of a .safetensors file; by default "
    "the original Stable Diffusion's, from the Hub."
)


@dataclass
class TeacherConfig:
    """The diffusion model to distil."""

    pretrained_teacher_model: str = HfArg(
        help="Folder or Hub id of a text-to-image pipeline of a known family (Stable Diffusion 1, 2, XL, 3; Sana, Flux, "
        "Qwen-Image, Z-Image, Wan ...), or a .safetensors file of Stable Diffusion 1, 2 or XL."
    )
    teacher_revision: str | None = HfArg(default=None, help="Branch, tag or commit on the Hub.")
    teacher_variant: str | None = HfArg(default=None, help='Variant of the weight files, e.g. "fp16".')
    pretrained_vae_model_name_or_path: str | None = HfArg(
        default=None, help="Folder or Hub id of another VAE than the teacher's, such as one that is stable in float16."
    )
    single_file_config: str | None = HfArg(default=None, help=SINGLE_FILE_CONFIG)


def load_teacher(
    config: TeacherConfig,
    network_dtype: torch.dtype = torch.float32,
    late: bool = False,
    text_dtype: torch.dtype = torch.float32,
) -> DiffusionPipeline:
    """The teacher's pipeline in float32 whatever its files hold, frozen.

    Args:
        network_dtype: Of its network, if another.
        text_dtype: Of the text towers of a transformer, which are large; those of UNets stay in float32.
        late: Leave its network on "meta" until `load_network`, so that VAE and text towers can be used up before; not of a
            single file, which is read at once.

    Raises:
        ValueError: Not a text-to-image pipeline of a known family, out of reach, or with missing or non-finite weights.
    """
    path, parts = config.pretrained_teacher_model, {}
    if config.pretrained_vae_model_name_or_path:
        parts["vae"] = _load_vae(config.pretrained_vae_model_name_or_path, config.teacher_variant)
    small = text_dtype != torch.float32 and not is_single_file(path) and "transformer" in _index(config)
    waits = late and not is_single_file(path)
    dtype = part_dtypes(None if waits else network_dtype, text_dtype if small else torch.float32)
    pipe = load_stock(path, dtype, config.single_file_config, **_hub(config), **parts)
    _check_teacher(path, pipe)
    pipe = stock_pipeline(pipe)
    pipe.set_progress_bar_config(disable=True)
    return frozen(pipe)


def load_network(
    pipe: DiffusionPipeline,
    config: TeacherConfig,
    dtype: torch.dtype = torch.float32,
    quantization: PipelineQuantizationConfig | None = None,
) -> None:
    """The network of a teacher, or a student, that was loaded late, into its pipeline; nothing where it is there already.

    Args:
        config: As `load_teacher` was given it.
        dtype: Of its weights.
        quantization: Of its linear layers.

    Raises:
        ValueError: It does not load, or has non-finite weights.
    """
    if not is_late(known := network_of(pipe)):
        return
    name, path = network_name(pipe), config.pretrained_teacher_model
    others = {other: part for other, part in pipe.components.items() if other != name}
    dtypes = {name: dtype, "default": torch.float32}
    loaded = getattr(load_stock(path, dtypes, quantization=quantization, **_hub(config), **others), name)
    if merges_zeros(known):  # which the text towers told, that may be gone by now
        merge_zeros(loaded, *text_lengths(pipe))
    pipe.register_modules(**{name: loaded})
    frozen(pipe)
    check_finite(path, pipe)


def is_late(network: nn.Module) -> bool:
    """Whether it is only known, and not loaded."""
    return any(p.is_meta for p in network.parameters())


def _index(config: TeacherConfig) -> dict[str, object]:
    """A pipeline's parts; none where `load_stock` will say why."""
    try:
        return DiffusionPipeline.load_config(config.pretrained_teacher_model, revision=config.teacher_revision)
    except LOADING_ERRORS:
        return {}


def _hub(config: TeacherConfig) -> dict[str, str | None]:
    return {"revision": config.teacher_revision, "variant": config.teacher_variant}


def frozen(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline, no part of which trains."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    return pipe


def stock_pipeline(pipe: DiffusionPipeline, **parts: object) -> DiffusionPipeline:
    """The same parts in the stock text-to-image pipeline of the network's class, without a ControlNet or the like.

    An index may name what else a model was used for: image-to-image, inpainting by its text-to-image network, ControlNet.

    Args:
        parts: In place of its own, such as a student and its scheduler.
    """
    network = parts.get(network_name(pipe), network_of(pipe))
    kind = getattr(diffusers, family_of(network).pipeline(network))
    if not parts and type(pipe) in (kind, diffusers.LatentConsistencyModelPipeline):
        return pipe
    modules, options = kind._get_signature_keys(kind)
    own = {name: getattr(pipe, name, None) for name in modules}
    made = kind(**own | parts, **{name: pipe.config[name] for name in options if name in pipe.config})
    made.register_to_config(_name_or_path=pipe.config.get("_name_or_path"))
    return made


def network_name(pipe: DiffusionPipeline) -> str:
    """What a pipeline calls its network: "unet" or "transformer"."""
    return family_of(network_of(pipe)).network


def release_encoders(pipe: DiffusionPipeline) -> None:
    """Gives the memory of VAE and text towers back; of the pipeline, only the network can compute from here on."""
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and (name == "vae" or name.startswith("text_encoder")):
            part.to("meta")


def load_stock(
    source: str | Path,
    dtype: Dtypes = torch.float32,
    single_file_config: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    quantization: PipelineQuantizationConfig | None = None,
    **parts: object,
) -> DiffusionPipeline:
    """Any pipeline that diffusers has a class for, with all of its weights.

    Args:
        source: Folder, Hub id, or `.safetensors` file of Stable Diffusion.
        dtype: Of the weights, or by name of the network, with one for the "default"; None leaves it on "meta".
        single_file_config: As `load_single_file`'s `config`.
        revision, variant: Of a Hub id, and of the weights.
        quantization: Of networks among those that are loaded here.
        parts: In place of its own.

    Raises:
        ValueError: It is out of reach, is a pickle, does not load, or lacks weights.
    """
    if is_single_file(source):
        if given := revision or variant:
            raise UserError(f"{source} is a single file, which has no revision or variant {given}: leave that out.")
        pipe = load_single_file(source, single_file_config, dtype)
        pipe.register_modules(**parts)
        return pipe
    if single_file_config is not None:
        raise UserError(f"--single_file_config is for a .safetensors file, but {source} is none: leave it out.")
    if Path(source).exists() and not (Path(source) / "model_index.json").exists():
        raise UserError(f"{source} is not a diffusers pipeline folder: there is no model_index.json in it.")
    if variant is None and Path(source).is_dir():
        variant = only_variant(path.parent for path in Path(source).glob("*/config.json"))
    try:
        pipe = _from_folder(source, dtype, {"revision": revision, "variant": variant}, quantization, parts)
    except LOADING_ERRORS as error:
        trouble = (
            "does not load" if Path(source).exists() else "is neither a pipeline folder here nor a Hub id within reach"
        )
        raise UserError(f"{source} {trouble}: {first_line(error)}") from error
    check_stored(pipe, source, variant, revision, given=parts)
    if isinstance(pipe, StableDiffusion3Pipeline):
        merge_zero_text(pipe)
    for part in pipe.components.values():
        if type(part).__name__ in FAMILIES:
            embed_exactly(part)
    return pipe


def _from_folder(
    source: str | Path,
    dtype: Dtypes,
    where: dict[str, str | None],
    quantization: PipelineQuantizationConfig | None,
    parts: dict[str, object],
) -> DiffusionPipeline:
    """As `load_stock`, of a folder or Hub id; `where` has revision and variant."""
    here = Path(source).exists()
    folder = source if here else DiffusionPipeline.download(source, use_safetensors=True, **where, **parts)
    made = absent_parts(DiffusionPipeline.load_config(folder)) | parts
    if quantization is None:
        made |= load_cast_networks(Path(folder), where["variant"], dtype, given=parts)
    dtypes = {name: of for name, of in dtype.items() if of} if isinstance(dtype, dict) else dtype
    options = {"dtype": dtypes, "quantization_config": quantization, **where, **made}
    pipe = DiffusionPipeline.from_pretrained(source, use_safetensors=True, **options)
    for name in made.keys() & pipe.components.keys():
        if getattr(pipe, name) is not made[name]:  # diffusers reads optional ones, as Wan's are, though they are given
            pipe.register_modules(**{name: made[name]})
    return pipe


def _load_vae(path: str, variant: str | None) -> AutoencoderKL:
    """The variant of the teacher's weights where it has that, or the one that its folder has alone."""
    if Path(path).is_dir():
        variant = variant if variant in weights_by_variant(Path(path)) else only_variant([Path(path)])
    try:
        return stored_vae(path, variant=variant)
    except LOADING_ERRORS as error:
        raise UserError(f"--pretrained_vae_model_name_or_path {path} does not load: {first_line(error)}") from error


def stored_vae(path: str, variant: str | None = None, **place: str) -> AutoencoderKL:
    """
    Args:
        path: Folder or Hub id.
        variant: Of the weights.
        place: `subfolder`, if it is in one.

    Raises:
        ValueError: It is of another class, whose weights diffusers would replace by random ones.
    """
    kind = AutoencoderKL.load_config(path, **place).get("_class_name", AutoencoderKL.__name__)
    if kind != AutoencoderKL.__name__:
        raise UserError(f"it is {kind}; give an AutoencoderKL")
    return AutoencoderKL.from_pretrained(path, variant=variant, **place, **LOADING)


def first_line(error: Exception) -> str:
    """Of what it says, without a full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _check_teacher(path: str, pipe: DiffusionPipeline) -> None:
    network = network_of(pipe, path)
    if missing := [name for name in ("vae", "text_encoder") if getattr(pipe, name, None) is None]:
        kind = type(pipe).__name__
        raise UserError(f"{path} is a {kind} without {' and '.join(missing)}; give a text-to-image pipeline.")
    family = family_of(network)
    if family.network == "transformer" and "gamma" in pipe.scheduler.config:  # which rides in a student's
        raise UserError(f"{path} is a student already; give the diffusion model that it came from.")
    family.check(path, pipe)
    check_finite(f"The teacher {path}", pipe)


def check_finite(what: str, pipe: DiffusionPipeline) -> None:
    """
    Args:
        what: Begins the sentence.

    Raises:
        ValueError: A weight of a network is not a finite number.
    """
    networks = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    tensors = {f"{name}.{key}": p for name, part in networks.items() for key, p in part.named_parameters()}
    if broken := [name for name, p in tensors.items() if _is_broken(p)]:
        small = any(tensors[name].dtype == torch.float16 for name in broken)
        raise UserError(
            f"{what} holds {len(broken)} tensors that are not finite, such as {broken[0]}; get it anew"
            f"{', or load it in float32, whose range is wider' if small else ''}."
        )


def _is_broken(values: Tensor) -> bool:
    """Not where weights lie elsewhere, or are packed."""
    if values.is_meta or not values.is_floating_point() or type(values.data) is not Tensor:
        return False
    return not (values.float() if values.itemsize == 1 else values).isfinite().all()
