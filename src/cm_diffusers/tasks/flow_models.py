"""The parts of a new, small Stable Diffusion 3 pipeline, for training a flow-matching teacher from scratch."""

import copy
import json
from dataclasses import dataclass

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from transformers.hf_argparser import HfArg

from cm_diffusers.engine.recipes import shipped
from cm_diffusers.errors import UserError, read_text
from cm_diffusers.models.casting import part_dtypes
from cm_diffusers.models.families.latents import kl_latents
from cm_diffusers.models.merged_text import merge_zero_text, silent_t5, silent_tokenizer
from cm_diffusers.models.single_file import is_single_file
from cm_diffusers.models.teachers import frozen, load_stock
from cm_diffusers.ranges import check_ranges


@dataclass
class SmallFlowConfig:
    """The network to train, and what the pipeline is built around."""

    pretrained_pipeline: str = HfArg(
        help="Folder or Hub id of a Stable Diffusion pipeline (1.x or 2.x) whose VAE and text tower are taken, as they are."
    )
    transformer_config: str = HfArg(
        help="JSON file with the settings of an SD3Transformer2DModel, by its path or, beside a recipe, by its name; sizes, "
        "channels and widths of the text follow the pipeline."
    )
    text_length: int = HfArg(default=16, help="Tokens of a prompt, the two marks included.")

    def __post_init__(self) -> None:
        check_ranges(self)


def new_flow_pipeline(config: SmallFlowConfig, resolution: int, shift: float) -> StableDiffusion3Pipeline:
    """A fresh transformer around a trained VAE and text tower, which are frozen; its T5 says nothing.

    Of the two CLIP towers that the pipeline has, the first is the given one, and the second its first layer.

    Args:
        config: See `SmallFlowConfig`.
        resolution: Side of the images in pixels.
        shift: Of the scheduler's times.

    Raises:
        ValueError: The pipeline lacks a part, or the settings are not those of the network.
    """
    source = config.pretrained_pipeline
    base = load_stock(source, part_dtypes(torch.float32 if is_single_file(source) else None))  # without its network
    vae, tower = getattr(base, "vae", None), getattr(base, "text_encoder", None)
    if not isinstance(vae, AutoencoderKL) or not isinstance(tower, CLIPTextModel):
        raise UserError(
            f"{config.pretrained_pipeline} lacks an AutoencoderKL or a CLIP text tower; give a pipeline with both."
        )
    vae.register_to_config(shift_factor=vae.config.get("shift_factor") or 0.0)  # which the pipeline adds as it is
    towers = [projecting(tower, layers) for layers in (tower.config.num_hidden_layers, 1)]
    transformer = _new_transformer(config.transformer_config, vae, resolution, 2 * tower.config.hidden_size)
    pipe = StableDiffusion3Pipeline(
        vae=vae,
        text_encoder=towers[0],
        tokenizer=_shorter(base, config.text_length),
        text_encoder_2=towers[1],
        tokenizer_2=_shorter(base, config.text_length),
        text_encoder_3=silent_t5(2 * tower.config.hidden_size),
        tokenizer_3=silent_tokenizer(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
    )
    pipe.set_progress_bar_config(disable=True)
    frozen(pipe)
    pipe.transformer.requires_grad_(True).train()
    merge_zero_text(pipe)
    return pipe


def projecting(tower: CLIPTextModel, layers: int) -> CLIPTextModelWithProjection:
    """The first layers of a text tower, and its pooled state as it is: the projection is the identity."""
    settings = tower.config.to_dict() | {"projection_dim": tower.config.hidden_size, "num_hidden_layers": layers}
    new = CLIPTextModelWithProjection(CLIPTextConfig(**settings))
    weights = getattr(tower, "text_model", tower).state_dict()
    new.text_model.load_state_dict({name: weights[name] for name in new.text_model.state_dict()})
    new.text_projection.weight.data = new.text_projection.weight.new_ones(tower.config.hidden_size).diag()
    return new


def _shorter(base: DiffusionPipeline, length: int) -> object:
    """Its tokenizer, for prompts of that length.

    Raises:
        ValueError: The text tower has fewer positions.
    """
    if not 2 < length <= (most := base.text_encoder.config.max_position_embeddings):
        raise UserError(
            f"--text_length is {length}; give at least 3, and at most the {most} that the text tower reads."
        )
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.model_max_length = length
    return tokenizer


def _new_transformer(name: str, vae: AutoencoderKL, resolution: int, text_width: int) -> SD3Transformer2DModel:
    path = shipped("--transformer_config", name, ".json")
    try:
        settings = json.loads(read_text(path))
    except (OSError, ValueError) as error:
        raise UserError(f"--transformer_config {path} cannot be read as JSON: {error}") from error
    derived = {
        "sample_size": resolution // kl_latents(vae).downscale,
        "in_channels": vae.config.latent_channels,
        "out_channels": vae.config.latent_channels,
        "joint_attention_dim": text_width,
        "pooled_projection_dim": text_width,
    }
    if clash := sorted(settings.keys() & {*derived, "caption_projection_dim"}):
        follow = "which follow from the pipeline and the data: leave them out."
        raise UserError(f"--transformer_config {path} sets {', '.join(clash)}, {follow}")
    try:
        width = settings["num_attention_heads"] * settings["attention_head_dim"]
        network = SD3Transformer2DModel(**settings, **derived, caption_projection_dim=width)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"--transformer_config {path} is no SD3Transformer2DModel: {error}") from error
    if resolution % (multiple := kl_latents(vae).downscale * network.config.patch_size):
        raise UserError(
            f"--resolution {resolution} is no multiple of the {multiple} pixels that the network takes as one."
        )
    return network
