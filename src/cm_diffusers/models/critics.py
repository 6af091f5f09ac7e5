"""Critics: what tells real from generated, given text and time. They start without an opinion."""

import logging
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from torch import Tensor, nn
from transformers.hf_argparser import HfArg

from cm_diffusers.diffusion.denoisers import Call, call_unet, unet_arguments
from cm_diffusers.diffusion.views import View
from cm_diffusers.errors import UserError
from cm_diffusers.models.adapters import WithoutAdapters
from cm_diffusers.models.block_outputs import block_outputs
from cm_diffusers.models.families.base import family_of
from cm_diffusers.models.families.unet import LCM_LORA_TARGETS
from cm_diffusers.models.heads import head_body, zeroed
from cm_diffusers.models.students import frozen_copy
from cm_diffusers.models.token_critic import TokenFeatureCritic
from cm_diffusers.models.vision_critic import VisionCritic, load_backbone
from cm_diffusers.ranges import check_ranges
from cm_diffusers.types import Networks


logger = logging.getLogger(__name__)
# What configs call the width of the text; Sana's last one is that of its blocks.
TEXT_WIDTHS = ("caption_channels", "joint_attention_dim", "cap_feat_dim", "text_dim", "cross_attention_dim")


@dataclass
class CriticConfig:
    """The network that judges, and how it learns; for the rest as the student does, at a constant rate."""

    critic: Literal["heads", "lora_decoder", "vision", "none"] = HfArg(
        default="heads",
        help="heads: small heads on features of the frozen teacher. lora_decoder: a copy of the teacher, a UNet, with adapters "
        "in its decoder, as SCott's paper has it; for distill_scott.py and distill_pcm.py. vision: heads on features of the "
        "decoded images, by --critic_backbone; for distill_scott.py alone, with --critic_inputs clean. none: no adversarial "
        "term.",
    )
    critic_channels: int = HfArg(default=128, help="Width of each head.")
    critic_backbone: str = HfArg(
        default="facebook/dinov2-small",
        help="Frozen network of --critic vision, as safetensors: folder or Hub id of a backbone of transformers (dinov2, "
        "convnext, resnet, swin ...) or, with timm installed, of timm (timm/resnet50.a1_in1k). It sees the images in "
        "the size and with the mean and standard deviation saved beside its weights; ImageNet's if there are none. "
        "training/rank_critics.py helps to choose.",
    )
    critic_lora_rank: int = HfArg(default=48, help="Rank of the decoder's adapters; 48 trains 3.5 percent of SD 1.5.")
    critic_learning_rate: float = HfArg(default=1e-5, help="Learning rate of the critic.")
    critic_adam_beta1: float = HfArg(default=0.0, help="Decay of its first moment.")
    critic_adam_beta2: float = HfArg(default=0.99, help="Decay of its second moment.")

    def __post_init__(self) -> None:
        check_ranges(self)


def unused_flags(config: CriticConfig) -> str:
    """The fields, separated by spaces, that do nothing for this kind of critic."""
    unused = {
        "heads": "critic_lora_rank critic_backbone",
        "lora_decoder": "critic_channels critic_backbone",
        "vision": "critic_lora_rank",
    }
    learning = "critic_learning_rate critic_adam_beta1 critic_adam_beta2"
    return unused.get(config.critic, f"critic_channels critic_lora_rank critic_backbone {learning}")


def make_critic(nets: Networks, config: CriticConfig, vae: nn.Module | None = None) -> nn.Module | None:
    """The critic of a distillation, from its teacher; None if there shall be none.

    Args:
        nets: As `make_networks` gives them. The teacher may be the student without its adapters, or in half precision.
        vae: The teacher's, for the vision critic.

    Raises:
        ValueError: The teacher's network does not read text where the critic looks at it, or has no decoder to copy, or the
            backbone does not load.
    """
    if config.critic == "none":
        return None
    network = nets.student if isinstance(nets.teacher, WithoutAdapters) else nets.teacher
    critic = _critic(config, nets, network, vae)
    numbers = [p.numel() for p in critic.parameters()]
    training = sum(p.numel() for p in critic.parameters() if p.requires_grad)
    logger.info(
        "The critic trains %d of its %d parameters (%.2f %%)", training, sum(numbers), 100 * training / sum(numbers)
    )
    return critic


def check_critic(config: CriticConfig, network: nn.Module, vae: nn.Module) -> None:
    """As `make_critic`, of a teacher whose network need not have its weights yet.

    Raises:
        ValueError: As there.
    """
    if config.critic != "none":
        _critic(config, Networks(network, teacher=network), network, vae)


def _critic(config: CriticConfig, nets: Networks, network: nn.Module, vae: nn.Module | None) -> nn.Module:
    is_unet = isinstance(network, UNet2DConditionModel)
    if config.critic == "heads":
        kind = TeacherFeatureCritic if is_unet else TokenFeatureCritic
        return kind(nets.teacher, network, config.critic_channels)
    if config.critic == "lora_decoder":
        if not is_unet:
            raise UserError(
                f"--critic lora_decoder trains the decoder of a UNet, but the teacher is a {type(network).__name__}: take "
                "heads, vision or none."
            )
        return LoRADecoderCritic(network, config.critic_lora_rank)
    if config.critic == "vision":
        backbone, text_width = load_backbone(config.critic_backbone), _text_width(network)
        return VisionCritic(vae, backbone, config.critic_channels, text_width, family_of(network).latents(vae).decode)
    raise UserError(f"Unknown --critic {config.critic!r}; one of heads, lora_decoder, vision, none.")


def _text_width(network: nn.Module) -> int:
    return next(network.config[name] for name in TEXT_WIDTHS if network.config.get(name))


class TeacherFeatureCritic(nn.Module):
    """Heads on the frozen teacher's last two down blocks and its mid block.

    The teacher is called, not owned: it costs no memory, and is neither trained nor saved with the critic.

    Args:
        teacher: What to call, as a UNet.
        unet: The network inside it, whose blocks are looked at.
        channels: Width of the heads.
        call: How it is called.
    """

    def __init__(
        self, teacher: nn.Module, unet: UNet2DConditionModel | UNet2DModel, channels: int, call: Call = call_unet
    ) -> None:
        super().__init__()
        down, widths = list(unet.down_blocks)[-2:], list(unet.config.block_out_channels)[-2:]
        mid = [] if unet.mid_block is None else [unet.mid_block]
        if isinstance(unet, UNet2DConditionModel):
            _require_text([*unet.down_blocks, *mid], "down and mid blocks")
        self._teacher, self._unet, self._blocks = [teacher], [unet], [*down, *mid]  # lists: not registered
        self._call = call
        self.heads = nn.ModuleList(_head(width, channels) for width in [*widths, *widths[-1:] * len(mid)])

    def forward(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """Logits `(B, N)` of x `(B, C, H, W)` at times t `(B,)`, zero at first."""
        features = self.features(x, t, cond)
        logits = [head(feature).flatten(1) for head, feature in zip(self.heads, features, strict=True)]
        return torch.cat(logits, dim=1).float()

    def features(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> list[Tensor]:
        """What the blocks answer `(B, C', H', W')` each, in float32. The teacher stops after the last of them."""

        def run() -> None:
            self._call(self._teacher[0], x, t, cond)

        found = block_outputs(self._unet[0], self._blocks, run)
        found = [output[0] if isinstance(output, tuple) else output for output in found]
        return [
            output.float().contiguous() for output in found
        ]  # of others GroupNorm of torch 2.13 crashes backward on CPUs


class LoRADecoderCritic(nn.Module):
    """A copy of the teacher that trains adapters in its decoder and a new end: one logit per latent pixel (2403.01505).

    Args:
        unet: The network to copy, without its adapters if it has any.
        rank: Of the adapters, on the layers LCM-LoRA adapts.
    """

    def __init__(self, unet: UNet2DConditionModel, rank: int) -> None:
        super().__init__()
        self.unet = frozen_copy(unet).eval()
        _require_text([*self.unet.down_blocks, self.unet.mid_block, *self.unet.up_blocks], "blocks")
        if hasattr(self.unet, "peft_config"):
            self.unet.unload_lora()
        names = "|".join(name.replace(".", r"\.") for name in LCM_LORA_TARGETS)
        self.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=rf"up_blocks\.(.*\.)?({names})"))
        width, groups = self.unet.config.block_out_channels[0], self.unet.config.norm_num_groups
        self.unet.conv_norm_out, self.unet.conv_act = nn.GroupNorm(groups, width), nn.SiLU()
        self.unet.conv_out = zeroed(nn.Conv2d(width, 1, 1))
        cast_training_params(self.unet, torch.float32)

    def forward(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """Logits `(B, H W)` of x `(B, C, H, W)` at times t `(B,)`, zero at first."""
        return self.unet(x, t, **unet_arguments(cond), return_dict=False)[0].flatten(1).float()


def make_view_critic(teacher: nn.Module, view: View, config: CriticConfig) -> nn.Module | None:
    """The critic of a distillation without prompts, which is told noise levels; None if there shall be none.

    Raises:
        ValueError: It is of a kind that reads text.
    """
    if config.critic == "none":
        return None
    if config.critic != "heads":
        raise UserError(
            f"--critic {config.critic} judges images with their text, but this teacher reads none: take heads or none."
        )
    return TeacherFeatureCritic(teacher, teacher, config.critic_channels, view)


def _head(width: int, channels: int) -> nn.Sequential:
    return nn.Sequential(*head_body(width, channels), zeroed(nn.Conv2d(channels, 1, 1)))


def _require_text(blocks: list[nn.Module | None], where: str) -> None:
    if not any(getattr(block, "has_cross_attention", False) for block in blocks):
        kinds = ", ".join(dict.fromkeys(type(block).__name__ for block in blocks if block is not None))
        raise UserError(
            f"The critic would judge images without their text: the teacher's {where} have no cross-attention ({kinds}); "
            "take another teacher, or --critic none."
        )
