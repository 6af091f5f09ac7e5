"""Qwen-Image: guided by a second pass, after which each token's velocity gets back the length that it had before."""

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from cm_diffusers.diffusion.guidance import Conditions, combine_linear
from cm_diffusers.diffusion.process import Prediction, RectifiedFlow, diffuse, interpret
from cm_diffusers.errors import UserError
from cm_diffusers.models.families.base import Family, default_of
from cm_diffusers.models.families.latents import per_channel_latents
from cm_diffusers.models.families.shared import JOINT_ATTENTION, pack, padded, unpack


def _call(transformer: nn.Module, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
    """Velocity of latents `(B, C, h, w)`, h and w even. The end of the text that no prompt of the batch has is cut."""
    batch, _, height, width = x_t.shape
    longest = int(cond["prompt_embeds_mask"].sum(1).max())
    output = transformer(
        hidden_states=pack(x_t),
        encoder_hidden_states=cond["prompt_embeds"][:, :longest],
        encoder_hidden_states_mask=cond["prompt_embeds_mask"][:, :longest],
        timestep=t,
        img_shapes=[[(1, height // 2, width // 2)]] * batch,
        return_dict=False,
    )[0]
    return unpack(output, like=x_t)


def combine_rescaled(conditional: Prediction, unconditional: Prediction, w: Tensor, t: Tensor) -> Prediction:
    """Guidance of w `(B,)` that keeps the length of the conditional velocity, in each token of 2 x 2 latents.

    With v = noise - x0: `v_w |v_c| / |v_w|`. That is not linear, so it is not the same in data and noise.
    """
    before = conditional.noise - conditional.x0
    linear = combine_linear(conditional, unconditional, w, t)
    guided, lengths = pack(linear.noise - linear.x0), pack(before).norm(dim=-1, keepdim=True)
    velocity = unpack(guided * (lengths / guided.norm(dim=-1, keepdim=True)), like=before)
    process = RectifiedFlow()
    return interpret(process, velocity, diffuse(process, *conditional, t), t, "flow_prediction")


def _guided(scale: float) -> dict[str, float | str]:
    """The pipeline runs its second pass only for a negative prompt; one is enough for all rows."""
    return {"true_cfg_scale": scale, "negative_prompt": ""} if scale > 1 else {"true_cfg_scale": scale}


def _encode(pipe: DiffusionPipeline, prompts: list[str]) -> Conditions:
    length = default_of(pipe, "max_sequence_length")
    states, mask = pipe.encode_prompt(prompts, max_sequence_length=length)
    lengths = [states.shape[1]] * len(prompts) if mask is None else mask.sum(1).tolist()
    return padded([text[:end] for text, end in zip(states, lengths, strict=True)], length)


def _silent(transformer: nn.Module) -> list[str]:
    """What its last block makes of the text."""
    last = f"transformer_blocks.{len(transformer.transformer_blocks) - 1}"
    return [f"{last}.{name}" for name in ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")]


def _check(path: str, pipe: DiffusionPipeline) -> None:
    if pipe.transformer.config.guidance_embeds:
        raise UserError(
            f"The transformer of {path} has guidance_embeds, but its class in diffusers has no layer that reads them and fails "
            "when it is told a guidance; give a Qwen-Image without."
        )


FAMILY = Family(
    pipeline=lambda transformer: "QwenImagePipeline",
    lora_targets=(
        *JOINT_ATTENTION,
        *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    ),
    guidance=lambda transformer: "cfg",
    call=_call,
    encode=_encode,
    latents=lambda vae: per_channel_latents(vae, patch=2),
    combine=combine_rescaled,
    guided=_guided,
    check=_check,
    silent=_silent,
    rounded_time="time_text_embed.time_proj",
    lora_name=lambda path, network: path,
    comfyui="ModelSamplingAuraFlow",
)
