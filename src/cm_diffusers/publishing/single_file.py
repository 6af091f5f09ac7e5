"""A whole student in one file, for programs that read Stable Diffusion in its original layout."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

from cm_diffusers.errors import UserError
from cm_diffusers.models import ldm_layout as ldm
from cm_diffusers.models.families.unet import is_xl
from cm_diffusers.models.single_file import V_PREDICTION, ZERO_SNR
from cm_diffusers.places import public
from cm_diffusers.record import RECORD, Record


def original_layout(pipe: DiffusionPipeline) -> dict[str, Tensor]:
    """The weights of a Stable Diffusion 1, 2 or XL pipeline under the names of its original layout.

    Raises:
        ValueError: The network is told guidance as a number, or has parts that the layout knows nothing of.
    """
    unet, vae = pipe.unet, pipe.vae
    if unet.config.time_cond_proj_dim:
        raise UserError(
            "This student is told guidance as an embedding, for which ComfyUI and A1111 have no input, so it would draw "
            "without guidance there; distil one with --unet_time_cond_proj_dim 0, or a LoRA."
        )
    levels = len(vae.config.block_out_channels)
    network = {ldm.unet_name(name, unet.config): value for name, value in unet.state_dict().items()}
    coder = {ldm.vae_name(name, levels): ldm.as_convolution(name, value) for name, value in vae.state_dict().items()}
    weights = ldm.prefixed(ldm.UNET, network) | ldm.prefixed(ldm.VAE, coder)
    first = ldm.without_prefix(pipe.text_encoder.state_dict())
    if is_xl(unet):
        second = ldm.open_clip(ldm.without_prefix(pipe.text_encoder_2.state_dict()))
        return weights | ldm.prefixed(ldm.XL_CLIP, first) | ldm.prefixed(ldm.XL_OPEN_CLIP, second)
    if _is_version_2(pipe):
        return weights | ldm.prefixed(ldm.OPEN_CLIP, ldm.open_clip(first))
    return weights | ldm.prefixed(ldm.CLIP, first)


def write_single_file(pipe: DiffusionPipeline, path: Path, record: Record) -> None:
    """
    Args:
        path: Of the file; its stem is the title.
        record: Travels in the metadata.

    Raises:
        ValueError: As `original_layout`.
    """
    weights, config = original_layout(pipe), pipe.scheduler.config
    if is_xl(pipe.unet) and config.prediction_type == "v_prediction":
        weights[V_PREDICTION] = torch.empty(0)
        if config.get("rescale_betas_zero_snr"):
            weights[ZERO_SNR] = torch.empty(0)
    shared = asdict(replace(record, base_model=public(record.base_model)))
    metadata = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": _architecture(pipe),
        "modelspec.implementation": "sgm",
        "modelspec.title": path.stem,
        "modelspec.prediction_type": "v" if config.prediction_type == "v_prediction" else config.prediction_type,
        RECORD: json.dumps(shared),
    }
    save_file({name: value.contiguous() for name, value in weights.items()}, path, metadata)


def _is_version_2(pipe: DiffusionPipeline) -> bool:
    """Stable Diffusion 2 has a text tower of open_clip, whose activation is exact; 1 has OpenAI's."""
    return pipe.text_encoder.config.hidden_act == "gelu"


def _architecture(pipe: DiffusionPipeline) -> str:
    """As the model spec names it."""
    if is_xl(pipe.unet):
        return "stable-diffusion-xl-v1-base"
    if not _is_version_2(pipe):
        return "stable-diffusion-v1"
    return f"stable-diffusion-v2-{'768-v' if pipe.scheduler.config.prediction_type == 'v_prediction' else '512'}"
