"""What a network is called with to count what its pass takes: inputs of the right sizes, made from its config alone."""

from typing import Any

import torch
from diffusers import ModelMixin, UNet2DModel
from torch import Tensor, nn

from cm_diffusers.diffusion.denoisers import call_unet
from cm_diffusers.errors import UserError
from cm_diffusers.models.counting import Ask
from cm_diffusers.models.examples import image_text, joint_text
from cm_diffusers.models.families.base import FAMILIES, family_of
from cm_diffusers.models.families.shared import pack
from cm_diffusers.models.time_weight import without_weight


Conditions = dict[str, Tensor]
# Tokens of a prompt where the stock pipelines attend to them, and latents along the side of a token, where not 2.
CONTEXT = {"SanaTransformer2DModel": 300, "WanTransformer3DModel": 512}
CLIP_TOKENS = 77
PATCHES = {"UNet2DModel": 1, "UNet2DConditionModel": 1, "UNetMotionModel": 1, "SanaTransformer2DModel": 1}
TEXT_WIDTHS = ("joint_attention_dim", "caption_channels", "cap_feat_dim", "text_dim")
PACKED = ("FluxTransformer2DModel", "QwenImageTransformer2DModel")  # whose channels are those of 2 x 2 latents


def asking(side: int, frames: int | None = None, tokens: int = 0) -> Ask:
    """One sample, as the objectives call a network.

    Args:
        side: Of the latents, or of an image without a VAE.
        frames: Of latent clips; None for images.
        tokens: Of a prompt; the stock pipeline's if 0.

    Returns:
        (network) -> its output; or (critic, network whose samples it judges) -> its logits.
    """

    def ask(network: nn.Module, judged: nn.Module | None = None) -> Tensor:
        core, network = core_of(judged or network), without_weight(network)
        kind, config = "UNet2DModel" if isinstance(core, UNet2DModel) else type(core).__name__, core.config
        channels = config.in_channels // (4 if kind in PACKED else 1)
        x = torch.randn(1, channels, *([frames] if frames else []), side, side)
        cond = _conditions(kind, config, tokens or CONTEXT.get(kind, CLIP_TOKENS))
        if judged is not None:
            return network(x, torch.ones(1), cond)
        call = DIRECT.get(kind) or (family_of(core).call if kind in FAMILIES else call_unet)
        return call(network, x, torch.ones(1), cond)

    return ask


def core_of(network: nn.Module) -> ModelMixin:
    """The network of diffusers that a module is or holds."""
    return next(module for module in network.modules() if isinstance(module, ModelMixin))


def _qwen_image(network: nn.Module, x: Tensor, t: Tensor, cond: Conditions) -> Tensor:
    shapes = [[(1, x.shape[-2] // 2, x.shape[-1] // 2)]]
    return network(hidden_states=pack(x), timestep=t, img_shapes=shapes, return_dict=False, **cond)[0]


def _z_image(network: nn.Module, x: Tensor, t: Tensor, cond: Conditions) -> Tensor:
    return network(list(x[:, :, None]), t, list(cond["encoder_hidden_states"]), return_dict=False)[0][0]


# For families whose call reads the lengths of prompts from masks, of which "meta" has none.
DIRECT = {"QwenImageTransformer2DModel": _qwen_image, "ZImageTransformer2DModel": _z_image}


def _conditions(kind: str, config: Any, tokens: int) -> Conditions:
    """Named as those that the family encodes."""
    if kind == "UNet2DModel":
        return {"class_labels": torch.zeros(1, dtype=torch.int64)} if config.num_class_embeds else {}
    if kind in ("UNet2DConditionModel", "UNetMotionModel"):
        return image_text(config, 1, tokens)
    if kind == "SD3Transformer2DModel":
        return joint_text(config, 1, tokens)
    width = next((config[name] for name in TEXT_WIDTHS if config.get(name)), None)
    if width is None:
        raise UserError(f"What a {kind} is called with is not known; known are UNet2DModel, {', '.join(FAMILIES)}.")
    states = torch.randn(1, tokens, width)
    told = {"guidance": torch.ones(1)} if config.get("guidance_embeds") else {}
    if not kind.startswith("Flux"):
        return {"encoder_hidden_states": states, **told}
    pooled = config.get("pooled_projection_dim")
    return {"prompt_embeds": states, **told} | ({"pooled_prompt_embeds": torch.randn(1, pooled)} if pooled else {})
