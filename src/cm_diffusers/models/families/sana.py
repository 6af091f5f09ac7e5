"""Sana (2410.10629) and SANA-Sprint (2503.09641): one class of network, which Sprint tells its guidance.

Sprint's pipeline speaks of TrigFlow, but its network does not: it sees x = (1 - t) x0 + t noise, is told t in [0, 1] and
answers with noise - x0, as every flow network. TrigFlow's coefficients are put around it in the pipeline's loop
(2503.09641, Sec. 3), where they cancel. So both are `RectifiedFlow` here, and only the unit of the time differs.
"""

import torch
from diffusers import DiffusionPipeline, SanaPipeline
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

from cm_diffusers.diffusion.guidance import Conditions
from cm_diffusers.diffusion.teaching import Told
from cm_diffusers.models.families.base import Family, config_of, default_of
from cm_diffusers.models.families.latents import dc_latents
from cm_diffusers.models.families.shared import refuse_distilled


# Attention, the convolutions of 1 x 1 that are half of a block here, and what the time modulates.
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "conv_inverted", "conv_point", "time_embed.linear")


def _time_unit(config: FrozenDict) -> float:
    """What the network is told at t = 1."""
    return 1.0 if config.guidance_embeds else 1000 * config.timestep_scale


def _call(network: nn.Module, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
    """The velocity `(B, C, h, w)`.

    Args:
        cond: `encoder_hidden_states` `(B, L, D)`, `encoder_attention_mask` `(B, L)`, and `guidance` `(B,)` of a network that is
            told it.
    """
    return network(x_t, timestep=_time_unit(config_of(network)) * t, **cond, return_dict=False)[0]


def _told(network: nn.Module) -> Told:
    """Guidance as Sprint's network knows it, 0.1 of the pipeline's `guidance_scale`."""
    unit = config_of(network).guidance_embeds_scale
    return lambda cond, w: cond | {"guidance": unit * (w + 1)}


def _encode(pipeline: DiffusionPipeline, prompts: list[str]) -> Conditions:
    """As the pipeline's call does: prompts follow its instruction to enhance them, the empty one of guidance does not."""
    options = {"device": pipeline.text_encoder.device}
    if isinstance(pipeline, SanaPipeline):
        options["do_classifier_free_guidance"] = False
    instruction = default_of(pipeline, "complex_human_instruction")
    states, mask, *_ = pipeline.encode_prompt(prompts, complex_human_instruction=instruction, **options)
    if "" in prompts:
        empty = torch.tensor([prompt == "" for prompt in prompts], device=states.device)
        no_states, no_mask, *_ = pipeline.encode_prompt([""], **options)
        states, mask = torch.where(empty[:, None, None], no_states, states), torch.where(empty[:, None], no_mask, mask)
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask}


def _check(path: str, pipe: DiffusionPipeline) -> None:
    if pipe.transformer.config.guidance_embeds:
        refuse_distilled(path, pipe, "guidance_embeds of its transformer, as Sprint's")


FAMILY = Family(
    pipeline=lambda network: "SanaSprintPipeline" if network.config.guidance_embeds else "SanaPipeline",
    lora_targets=LORA_TARGETS,
    guidance=lambda network: "embedded" if network.config.guidance_embeds else "cfg",
    call=_call,
    encode=_encode,
    latents=dc_latents,
    told=_told,
    guided=lambda scale: {"guidance_scale": scale, "use_resolution_binning": False},  # the size that is asked for
    check=_check,
    sigmas="accepted",
)
