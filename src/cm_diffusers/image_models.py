"""Networks in EDM's coordinates: the diffusion model that is distilled or tuned, or a new one, trained from data.

With the network goes all that is needed to train and publish it: its view, VAE, statistics, or text-to-image pipeline.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKL, ConsistencyModelPipeline, DiffusionPipeline, ModelMixin, UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from transformers.hf_argparser import HfArg

from cm_diffusers.data.cache import Vae
from cm_diffusers.data.encoders import Encoders
from cm_diffusers.data.sources import DataConfig
from cm_diffusers.data.streaming import streaming_batches
from cm_diffusers.data.text_image import text_image_batches
from cm_diffusers.data.unprompted import LatentStatistics, measure_statistics, unprompted_batches
from cm_diffusers.networks import LOADING, TeacherConfig, load_teacher
from cm_diffusers.pipelines import ConsistencyImagesPipeline, ConsistencyPipeline
from cm_diffusers.pipelines.loading import WITHOUT_PROMPT
from cm_diffusers.process import DiscreteVP
from cm_diffusers.publish_images import images_pipeline, text_pipeline
from cm_diffusers.schedulers import EDMConsistencyScheduler
from cm_diffusers.sigma_views import EDMView, View, VPView
from cm_diffusers.types import Batch


@dataclass
class StartConfig:
    """The diffusion model to start from."""

    pretrained_teacher_model: str = HfArg(
        help="Folder or Hub id of a diffusion model: of train_edm.py, DDPM or DDIM (UNet2DModel), Stable Diffusion (XL)."
    )
    teacher_revision: str | None = HfArg(default=None, help="Branch, tag or commit on the Hub.")
    teacher_variant: str | None = HfArg(default=None, help='Variant of the weight files, e.g. "fp16".')
    sigma_data: float | None = HfArg(
        default=None,
        help="Standard deviation of what the network sees as data; if not given, 0.5, for Stable Diffusion's latents 1. "
        "Models of train_edm.py have their own.",
    )


@dataclass
class NewModelConfig:
    """The network to train from data alone."""

    unet_config: str = HfArg(help="JSON file with the settings of a UNet2DModel; sizes and channels follow the data.")
    sigma_data: float = HfArg(default=0.5, help="Standard deviation of the data; latents are scaled to it.")
    noise_conditioning: Literal["adm", "edm"] = HfArg(
        default="adm", help="What the network is told of sigma: adm, 250 ln sigma; edm, ln sigma / 4."
    )
    pretrained_vae: str | None = HfArg(
        default=None, help="Folder or Hub id of an AutoencoderKL, to train on its latents; pixels if not given."
    )


@dataclass
class ClassConfig:
    """Classes of the images."""

    label_column: str | None = HfArg(
        default=None, help="Integer column with the class of an image; without, the network learns no classes."
    )
    num_classes: int | None = HfArg(default=None, help="Number of classes; that of the pretrained model by default.")


@dataclass
class DropoutConfig:
    """Dropout of the trained network: both sides of a pair draw the same masks."""

    dropout: float | None = HfArg(
        default=None, help="Of the residual blocks; if not given, what the network's own settings say."
    )
    dropout_max_resolution: int | None = HfArg(
        default=None, help="Only blocks of feature maps up to this size get --dropout, the others none."
    )

    def __post_init__(self) -> None:
        if self.dropout is None and self.dropout_max_resolution is not None:
            raise ValueError("--dropout_max_resolution says where --dropout acts, which is not given: give both.")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout is {self.dropout}; give a probability of at least 0 and below 1.")


NEW_MODEL_CONFIGS = (NewModelConfig, DataConfig, ClassConfig, DropoutConfig)  # what `new_image_model` takes


@dataclass(frozen=True)
class ImageModel:
    """A network, how it is called, and what is around it.

    Attributes:
        vae: Where it works in latents.
        statistics: Of these latents; None for a network of the latents as they are.
        pipe: The text-to-image pipeline that it is in, where it reads text.
    """

    unet: ModelMixin
    view: View
    vae: AutoencoderKL | None = None
    statistics: LatentStatistics | None = None
    pipe: DiffusionPipeline | None = None

    def pipeline(self, unet: nn.Module, scheduler: EDMConsistencyScheduler) -> DiffusionPipeline:
        """What a student made of it is published in."""
        if self.pipe is not None:
            return text_pipeline(self.pipe, unet, scheduler)
        return images_pipeline(unet, scheduler, self.vae, self.statistics)

    def sampler(self, unet: nn.Module, scheduler: EDMConsistencyScheduler) -> DiffusionPipeline:
        """The same with our own class, which takes any noise levels, where `pipeline` has a stock one."""
        pipe = self.pipeline(unet, scheduler)
        if isinstance(pipe, ConsistencyModelPipeline):
            pipe = ConsistencyImagesPipeline(unet, scheduler)
            pipe.set_progress_bar_config(disable=True)
        return pipe

    def batches(
        self,
        data: DataConfig,
        classes: ClassConfig,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> Callable[[int], Iterator[Batch]]:
        """The data source that its network trains on."""
        if self.pipe is not None:
            if classes.label_column or classes.num_classes:
                raise ValueError("--label_column has no effect on a model that reads text: leave it out.")
            source = streaming_batches if data.streaming else text_image_batches
            return source(data, Encoders.from_pipeline(self.pipe), seed, rank, world_size, device)
        known = self.unet.config.num_class_embeds
        if classes.num_classes not in (None, known) or (classes.label_column and known is None):
            found = "takes no classes" if known is None else f"has {known} classes"
            raise ValueError(f"The network {found}: leave out --num_classes{' and --label_column' * (known is None)}.")
        options = {"label_column": classes.label_column, "num_classes": known}
        if self.vae is not None:
            options |= {"vae": Vae.from_model(self.vae), "statistics": self.statistics}
        return unprompted_batches(data, seed, rank, world_size, device, **options, sigma_data=self.view.sigma_data)


def load_image_model(config: StartConfig) -> ImageModel:
    """A diffusion model in float32, frozen, seen in EDM's coordinates.

    Raises:
        ValueError: Out of reach, or not a model that this can be.
    """
    path = config.pretrained_teacher_model
    index = _index(config)
    if any(name.startswith("text_encoder") for name in index):
        pipe = load_teacher(TeacherConfig(path, config.teacher_revision, config.teacher_variant))
        view = _vp_view(pipe.scheduler, config.sigma_data or 1.0)
        return ImageModel(pipe.unet, view, vae=pipe.vae, pipe=pipe)
    loader = ConsistencyPipeline if index["_class_name"] in WITHOUT_PROMPT else DiffusionPipeline
    pipe = loader.from_pretrained(path, revision=config.teacher_revision, variant=config.teacher_variant, **LOADING)
    unet = getattr(pipe, "unet", None)
    if not isinstance(unet, UNet2DModel) or unet.config.in_channels != unet.config.out_channels:
        raise ValueError(
            f"{path} is a {type(pipe).__name__} with {type(unet).__name__}; give a model with a UNet2DModel that predicts "
            "as many channels as it sees, or a Stable Diffusion pipeline."
        )
    unet.requires_grad_(False).eval()
    if loader is DiffusionPipeline:
        return ImageModel(unet, _vp_view(pipe.scheduler, config.sigma_data or 0.5))
    return _of_images(path, pipe, config.sigma_data)


def _index(config: StartConfig) -> dict:
    path = config.pretrained_teacher_model
    try:
        return DiffusionPipeline.load_config(path, revision=config.teacher_revision)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is neither a pipeline folder here nor a Hub id within reach: {reason}") from error


def _vp_view(scheduler: object, sigma_data: float) -> VPView:
    return VPView(DiscreteVP.from_scheduler(scheduler), scheduler.config.prediction_type, sigma_data)


def _of_images(path: str, pipe: DiffusionPipeline, sigma_data: float | None) -> ImageModel:
    """A model of this package."""
    settings = pipe.scheduler.config
    if sigma_data is not None and sigma_data != settings.sigma_data:
        raise ValueError(
            f"--sigma_data is {sigma_data}, but {path} was trained with {settings.sigma_data}: leave it out."
        )
    view = EDMView(settings.sigma_data, settings.noise_conditioning)
    if settings.network == "vp":
        view = _vp_view(pipe.scheduler, settings.sigma_data)
    mean, std = pipe.config.get("latents_mean"), pipe.config.get("latents_std")
    vae = None if pipe.vae is None else pipe.vae.requires_grad_(False).eval()
    return ImageModel(pipe.unet, view, vae=vae, statistics=None if std is None else LatentStatistics(mean, std))


def set_dropout(unet: ModelMixin, config: DropoutConfig) -> None:
    """Sets the dropout of the residual blocks, in place.

    Raises:
        ValueError: No block is as small as the config says.
    """
    if config.dropout is None:
        return
    side, lowest = unet.config.sample_size, len(unet.down_blocks) - 1
    most = side if config.dropout_max_resolution is None else config.dropout_max_resolution
    if (least := side >> lowest) > most:
        raise ValueError(
            f"--dropout_max_resolution is {most}, but no block is smaller than {least}: give at least that."
        )
    levels = [*enumerate(unet.down_blocks), *enumerate(reversed(unet.up_blocks)), (lowest, unet.mid_block)]
    for level, block in levels:
        for module in block.modules() if block is not None else ():
            if isinstance(module, ResnetBlock2D):
                module.dropout.p = config.dropout if side >> level <= most else 0.0


def new_image_model(
    config: NewModelConfig,
    data: DataConfig,
    classes: ClassConfig,
    dropout: DropoutConfig,
    device: torch.device | str = "cpu",
) -> ImageModel:
    """A network with random weights for the images, or for their latents, which are measured.

    Raises:
        ValueError: The settings are not those of a `UNet2DModel`, or do not fit the data.
    """
    if (classes.label_column is None) != (classes.num_classes is None):
        raise ValueError("--label_column and --num_classes go together: give both for classes, or neither.")
    vae = statistics = None
    size, channels = data.resolution, 3
    if config.pretrained_vae is not None:
        vae = _load_vae(config.pretrained_vae)
        encoder = Vae.from_model(vae)
        statistics = measure_statistics(data, encoder, device)
        size, channels = size // encoder.downscale, vae.config.latent_channels
    unet = _new_unet(config.unet_config, size, channels, classes.num_classes)
    set_dropout(unet, dropout)
    return ImageModel(unet.train(), EDMView(config.sigma_data, config.noise_conditioning), vae, statistics)


def _load_vae(path: str) -> AutoencoderKL:
    folder = "vae" if (Path(path) / "vae").is_dir() or not Path(path).exists() else None
    try:
        return AutoencoderKL.from_pretrained(path, subfolder=folder, **LOADING).requires_grad_(False).eval()
    except (OSError, ValueError) as error:
        raise ValueError(f"--pretrained_vae {path} does not load: {str(error).splitlines()[0]}") from error


def _new_unet(path: str, size: int, channels: int, num_classes: int | None) -> UNet2DModel:
    try:
        settings = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--unet_config {path} cannot be read as JSON: {error}") from error
    derived = {"sample_size": size, "in_channels": channels, "out_channels": channels, "num_class_embeds": num_classes}
    if clash := sorted(settings.keys() & derived.keys()):
        raise ValueError(f"--unet_config {path} sets {', '.join(clash)}, which follow from the data: leave them out.")
    try:
        return UNet2DModel(**settings, **derived)
    except (TypeError, ValueError) as error:
        raise ValueError(f"--unet_config {path} is no UNet2DModel: {error}") from error
