"""Pipelines in one `.safetensors` file of the original layout, as fine-tunes of Stable Diffusion are passed on."""

from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import (
    DiffusionPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors import safe_open
from torch import Tensor, nn

from cm_diffusers.models.casting import dtype_of, read_cast
from cm_diffusers.models.stored import FLOATS, TORCH_DTYPES, header


UNET = "model.diffusion_model."
GUIDANCE = (f"{UNET}time_embed.cond_proj.weight", f"{UNET}time_embedding.cond_proj.weight")  # of LCMs
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
OF_XL, OF_2, OF_1 = "conditioner.embedders.1.model.", "cond_stage_model.model.", "cond_stage_model.transformer."
CONFIGS = {  # first part of the text tower's names -> the repository whose configs describe the architecture
    OF_XL: "stabilityai/stable-diffusion-xl-base-1.0",
    OF_2: "stabilityai/stable-diffusion-2",
    OF_1: "stable-diffusion-v1-5/stable-diffusion-v1-5",
}
V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"  # empty tensors by which XL checkpoints say so
# Of Stable Diffusion 2, this bias is spread wider in networks that predict v: ComfyUI tells them apart by it.
TELLING_BIAS, SPREAD = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias", 0.09
PREDICTIONS = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon", "eps": "epsilon"}


def is_single_file(source: str | Path) -> bool:
    """Whether it is a `.safetensors` file instead of a folder or Hub id.

    Raises:
        ValueError: It is another file, by its name a pickle, or not there.
    """
    path = Path(source)
    if path.suffix in PICKLES and not path.is_dir():
        raise ValueError(
            f"{path} is a pickle by its name, which can hold code that loading would run; get the .safetensors file."
        )
    if path.suffix == ".safetensors" and not path.exists():
        raise ValueError(f"There is no file {path}; give a .safetensors file, a pipeline folder or a Hub id.")
    if path.is_file() and path.suffix != ".safetensors":
        raise ValueError(f"{path} is a file, but no .safetensors; give such a file, a pipeline folder or a Hub id.")
    return path.is_file()


def load_single_file(
    path: str | Path, config: str | None = None, dtype: torch.dtype | dict[str, torch.dtype] = torch.float32
) -> DiffusionPipeline:
    """The stock pipeline of a Stable Diffusion 1, 2 or XL checkpoint, or of a latent consistency model of one.

    Args:
        path: Of the file.
        config: Folder or Hub id of a pipeline of the same architecture, for configs and tokenizers; by default the
            original's, from the Hub or its cache.
        dtype: Of the weights, or by name of the network, with one for the "default".

    Raises:
        ValueError: It is another kind of file, lacks weights, or the configs are out of reach or of another architecture.
    """
    entries, metadata = header(Path(path))
    tower = next((tower for tower in CONFIGS if any(name.startswith(tower) for name in entries)), None)
    if tower is None or not any(name.startswith(UNET) for name in entries):
        raise ValueError(
            f"{path} is no whole Stable Diffusion 1, 2 or XL checkpoint, for it holds {len(entries)} tensors such as "
            f"{next(iter(entries), None)}; {_instead(entries)}."
        )
    guidance = next((name for name in GUIDANCE if name in entries), None)
    pipe = _converted(path, tower, config, _cast_unet_weights(Path(path), entries, dtype_of("unet", dtype)))
    with safe_open(path, "pt") as file:
        if guidance:
            _embed_guidance(pipe.unet, file.get_tensor(guidance))
        says = {}
        if kind := _prediction_type(metadata, entries, file, tower, config):
            says = {"prediction_type": kind}
        if ZERO_SNR in entries:
            says |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    for name, network in _check_whole(path, pipe, entries).items():
        network.to(dtype_of(name, dtype))
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **says)
    return _latent_consistency_model(pipe) if guidance else pipe


def _instead(names: Iterable[str]) -> str:
    """What to do with a file of these tensors that is no whole checkpoint."""
    if any("lora" in name for name in names):
        return "as a LoRA, load its base model and call load_lora_weights with it"
    if any(name.startswith("down_blocks.") for name in names):
        return (
            "as a network alone, put it with its config.json into a folder, and load the base model with "
            "unet=UNet2DConditionModel.from_pretrained(FOLDER)"
        )
    return "give one with network, VAE and text encoder"


def _embed_guidance(unet: UNet2DConditionModel, weight: Tensor) -> None:
    """What diffusers leaves out of the network: `weight` `(width, D)` of a linear layer without bias."""
    width, dim = weight.shape
    unet.time_embedding.cond_proj = nn.Linear(dim, width, bias=False)
    unet.time_embedding.cond_proj.weight.data = weight
    unet.register_to_config(time_cond_proj_dim=dim)


def _cast_unet_weights(path: Path, entries: dict[str, dict], dtype: torch.dtype) -> dict[str, Tensor]:
    """The network's, by the file's names; nothing where diffusers' own way casts nothing."""
    names = [name for name in entries if name.startswith(UNET)]
    alike = all(TORCH_DTYPES.get(entries[name]["dtype"]) == dtype for name in names)
    return {} if alike else {name: read_cast(path, name, dtype) for name in names}


def _converted(path: str | Path, tower: str, config: str | None, unet: dict[str, Tensor]) -> DiffusionPipeline:
    """
    Args:
        unet: Weights of the network in place of the file's, if any.
    """
    kind, origin = StableDiffusionXLPipeline if tower == OF_XL else StableDiffusionPipeline, config or CONFIGS[tower]
    known = kind._get_signature_keys(kind)[0]
    parts = {name: None for name in ("safety_checker", "feature_extractor", "image_encoder") if name in known}
    options = {"config": origin, "time_cond_proj_dim": None}
    try:
        if unet:
            dtype = next(iter(unet.values())).dtype
            parts["unet"] = UNet2DConditionModel.from_single_file(unet, subfolder="unet", dtype=dtype, **options)
        return kind.from_single_file(str(path), **options, **parts)
    except NotImplementedError as error:  # a weight has no value to be moved
        raise ValueError(f"{path} lacks weights of its network or VAE; get a whole checkpoint.") from error
    except OSError as error:  # of the Hub, its cache, or a folder
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ValueError(
            f"{path} needs the configs and tokenizers of {origin}, which are not in reach ({reason}); fetch them with "
            f"`hf download {CONFIGS[tower]} --include '*.json' '*.txt'`, or name the folder of a pipeline of the same "
            "architecture as --single_file_config."
        ) from error
    except Exception as error:  # whatever diffusers stumbles over where shapes and names do not fit
        reason = (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")
        raise ValueError(
            f"{path} does not fit the architecture that {origin} describes ({reason}); name the folder of a pipeline of "
            "its own as --single_file_config."
        ) from error


def _prediction_type(
    metadata: dict[str, str], entries: dict[str, dict], file: safe_open, tower: str, config: str | None
) -> str | None:
    """What the network predicts, where the file says or shows it; None leaves that to the configs."""
    if stated := PREDICTIONS.get(metadata.get("modelspec.prediction_type", "")):
        return stated
    if V_PREDICTION in entries:
        return "v_prediction"
    if config is None and tower == OF_2 and TELLING_BIAS in entries:  # the default configs are of a v network
        return "v_prediction" if file.get_tensor(TELLING_BIAS).float().std() > SPREAD else "epsilon"
    return None


def _check_whole(path: str | Path, pipe: DiffusionPipeline, entries: dict[str, dict]) -> dict[str, nn.Module]:
    """The networks, none of which lacks anything."""
    networks = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    for name, network in networks.items():
        lacking = [tensor for tensor, value in network.named_parameters() if value.is_meta]
        if lacking:
            raise ValueError(
                f"{path} lacks weights of its {name} ({len(lacking)}, such as {lacking[0]}); get a whole checkpoint."
            )
    learnt = (UNET, "first_stage_model.", "cond_stage_model.", "conditioner.")
    integers = [
        name
        for name, entry in entries.items()
        if name.startswith(learnt) and entry["dtype"] not in FLOATS and not name.endswith("position_ids")
    ]
    if integers:
        raise ValueError(
            f"{path} has quantized weights ({len(integers)}, such as {integers[0]}); get a checkpoint in float32, float16 "
            "or bfloat16."
        )
    return networks


def _latent_consistency_model(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """A network that is told guidance, in the pipeline that tells it, with the scheduler that it was made for."""
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    if isinstance(pipe, StableDiffusionXLPipeline):
        return pipe
    return LatentConsistencyModelPipeline(**pipe.components, requires_safety_checker=False)
