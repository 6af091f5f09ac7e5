"""A critic that sees decoded images through a frozen, pretrained network: Vision-aided GAN (2112.09130)."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import MODEL_FOR_BACKBONE_MAPPING, AutoConfig, PreTrainedConfig
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils import IMAGE_PROCESSOR_NAME, SAFE_WEIGHTS_NAME, cached_file

from cm_diffusers.diffusion.feature_networks import in_float32, move
from cm_diffusers.errors import UserError, readable
from cm_diffusers.extras import TIMM, missing
from cm_diffusers.models.decoding import in_chunks
from cm_diffusers.models.families.latents import kl_latents
from cm_diffusers.models.heads import head_body, zeroed


LEVELS = 4
STATES = {"encoder_hidden_states": "encoder_attention_mask", "prompt_embeds": "prompt_embeds_mask"}  # -> their mask
ADDED_NORM = "hidden_states_norms."  # what some backbones put on their maps: the identity, and in no file


class FeatureNetwork(nn.Module):
    """A frozen network of images, and how they were prepared when it was trained.

    Args:
        network: (B, 3, S, S) -> feature maps, from early to late: a list, or a `BackboneOutput`.
        widths: Channels of each map.
        mean: Of the three colours, subtracted from images in [0, 1].
        std: By which they are then divided.
        side: S, in pixels; None takes images of any size as they are.
    """

    def __init__(
        self, network: nn.Module, widths: list[int], mean: list[float], std: list[float], side: int | None
    ) -> None:
        super().__init__()
        self.network, self.widths, self.side = network, widths, side
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Feature maps `(B, C, H', W')` of images `(B, 3, H, W)` in [0, 1], which are squeezed into squares of S pixels."""
        if self.side is not None:
            images = interpolate(images, (self.side, self.side), mode="bicubic", antialias=True)
        found = self.network((images - self.mean) / self.std)
        maps = found if isinstance(found, list) else found.feature_maps
        maps = [m if m.shape[1] == width else m.movedim(-1, 1) for m, width in zip(maps, self.widths, strict=True)]
        return [m.contiguous() for m in maps]  # the backward pass of a GroupNorm on the CPU crashes on channels_last


def load_backbone(source: str) -> FeatureNetwork:
    """A pretrained network in float32 that gives feature maps of four levels, evenly spaced and the last among them.

    Images are prepared as the image processor saved beside the weights (or timm's `pretrained_cfg`) says: mean, standard
    deviation and size after cropping. Where there is none, mean and standard deviation are ImageNet's and the size is
    the `image_size` of the configuration, if any.

    Args:
        source: Folder or Hub id of a network that `AutoBackbone` knows (dinov2, convnext, resnet, swin ...), or of any
            network of timm in timm's format. safetensors only, no remote code.

    Raises:
        ValueError: No such network, no safetensors, weights of another network, or timm is missing.
    """
    with readable(f"The backbone {source} (a folder, or a Hub id)"):
        kind = PreTrainedConfig.get_config_dict(source)[0].get("model_type")
        if kind is None:
            raise UserError("it has no config.json that tells its model_type")
        return (_load_timm if kind == "timm_wrapper" else _load_transformers)(source)  # so timm's format is called


def _load_transformers(source: str) -> FeatureNetwork:
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if type(config) not in MODEL_FOR_BACKBONE_MAPPING:
        raise UserError(
            f"transformers' AutoBackbone does not know its type {config.model_type}; take one that it knows, such as "
            "dinov2, convnext, resnet or swin, or a network in timm's format"
        )
    config.out_features = [config.stage_names[i] for i in levels(len(config.stage_names))]
    options = {"config": config, "dtype": torch.float32, "output_loading_info": True}
    # AutoBackbone itself would ask the Hub even for a folder
    network, report = MODEL_FOR_BACKBONE_MAPPING[type(config)].from_pretrained(source, use_safetensors=True, **options)
    if missing := sorted(name for name in report["missing_keys"] if not name.startswith(ADDED_NORM)):
        raise UserError(f"its file lacks {len(missing)} of its weights, such as {missing[0]}; get it anew")
    file = cached_file(source, IMAGE_PROCESSOR_NAME, _raise_exceptions_for_missing_entries=False)
    settings = json.loads(Path(file).read_text("utf-8")) if file else {"size": getattr(config, "image_size", None)}
    return FeatureNetwork(network, network.channels, *_preparation(settings))


def _preparation(settings: dict) -> tuple[list[float], list[float], int | None]:
    """Mean, standard deviation and side in pixels, of an image processor's configuration."""
    mean = settings.get("image_mean") or IMAGENET_DEFAULT_MEAN
    std = settings.get("image_std") or IMAGENET_DEFAULT_STD
    if not settings.get("do_normalize", True):
        mean, std = [0.0] * 3, [1.0] * 3
    size = (settings.get("do_center_crop") and settings.get("crop_size")) or settings.get("size")
    return mean, std, size.get("height") or size.get("shortest_edge") if isinstance(size, dict) else size


def _load_timm(source: str) -> FeatureNetwork:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise UserError(missing("It", TIMM)) from error
    except (ImportError, RuntimeError) as error:  # timm imports torchvision, which raises RuntimeError if mismatched
        raise UserError(f"it needs timm with a matching torchvision: {error}") from error
    name = f"local-dir:{Path(cached_file(source, SAFE_WEIGHTS_NAME)).parent}"  # config.json is there, too
    with torch.device("meta"):
        stages = timm.create_model(name, features_only=True).feature_info.info
    options = {"pretrained": True, "features_only": True, "out_indices": levels(len(stages))}
    network = timm.create_model(name, **options)  # takes safetensors where it finds them
    prepared, widths = network.pretrained_cfg, network.feature_info.channels()
    return FeatureNetwork(network, widths, prepared["mean"], prepared["std"], prepared["input_size"][-1])


def levels(stages: int) -> list[int]:
    """Which of a network's stages are looked at, counted from 0: of five 1 to 4, of thirteen 3, 6, 9 and 12."""
    return sorted({math.ceil(stages * k / LEVELS) - 1 for k in range(1, LEVELS + 1)})


class VisionCritic(nn.Module):
    """Heads on the features of decoded images, and on how well they go with the text.

    VAE and network are called, not owned: they are neither trained nor saved with the critic, and follow the latents
    from device to device. The VAE decodes in its own precision also under autocast: several overflow in float16. The network
    looks in float32.

    Args:
        vae: Of the latents; frozen.
        network: What sees the images; see `load_backbone`.
        channels: Width of the heads.
        text_width: Of the text embeddings.
        decode: As that of `Latents`; that of an AutoencoderKL if not given.
    """

    def __init__(
        self,
        vae: nn.Module,
        network: FeatureNetwork,
        channels: int,
        text_width: int,
        decode: Callable[[nn.Module, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self._called, self.text_width = [vae, network], text_width  # a list: not registered
        self._decode = decode or kl_latents(vae).decode
        self.heads = nn.ModuleList(TextHead(width, channels, text_width) for width in network.widths)

    def forward(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """Logits `(B, N)` of clean latents x `(B, C, h, w)`, zero at first, whatever their times t.

        Raises:
            ValueError: The text embeddings are of another width.
        """
        text = mean_text(cond)
        if text.shape[1] != self.text_width:
            raise UserError(
                f"The critic reads text embeddings of width {self.text_width}, as the teacher's network does by its config, "
                f"but these are {text.shape[1]} wide; give a teacher whose parts fit."
            )
        logits = [head(m, text).flatten(1) for head, m in zip(self.heads, self.features(x), strict=True)]
        return torch.cat(logits, dim=1).float()

    @torch.compiler.disable
    def features(self, x: Tensor) -> list[Tensor]:
        """Feature maps `(B, C', H', W')` of latents x `(B, C, h, w)`. A gradient decodes each chunk a second time."""
        return [torch.cat(maps) for maps in zip(*in_chunks(self._look, x), strict=True)]

    def _look(self, x: Tensor) -> list[Tensor]:
        vae, network = self._called
        move(vae, x.device)
        with torch.autocast(x.device.type, enabled=False):
            images = self._decode(vae, x)
        return in_float32(network, (images + 1) / 2)


def mean_text(cond: dict[str, Tensor]) -> Tensor:
    """The mean `(B, D)` of a prompt's states, without those that a mask hides."""
    name = next(name for name in STATES if name in cond)
    states, mask = cond[name], cond.get(STATES[name])
    if mask is None:
        return states.mean(dim=1)
    share = mask.to(states.dtype)[..., None]
    return (states * share).sum(dim=1) / share.sum(dim=1).clamp(min=1)


class TextHead(nn.Module):
    """A map of logits: of the features alone, plus those that the text asks for (projection, 1802.05637)."""

    def __init__(self, width: int, channels: int, text_width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*head_body(width, channels))
        self.alone = zeroed(nn.Conv2d(channels, 1, 1))
        self.text = zeroed(nn.Linear(text_width, channels, bias=False))

    def forward(self, features: Tensor, text: Tensor) -> Tensor:
        """Logits `(B, 1, H', W')` of features `(B, C, H, W)` and text `(B, D)`."""
        hidden = self.body(features)
        wanted = self.text(text)[:, :, None, None] / math.sqrt(hidden.shape[1])
        return self.alone(hidden) + (wanted * hidden).sum(dim=1, keepdim=True)
