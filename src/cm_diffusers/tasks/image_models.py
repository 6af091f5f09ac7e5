"""Networks in EDM's coordinates: the diffusion model that is distilled or tuned, or a new one, trained from data.

With the network goes all that is needed to train and publish it: its view, VAE, statistics, or text-to-image pipeline.
"""

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from diffusers import (
    AutoencoderKL,
    ConsistencyModelPipeline,
    DiffusionPipeline,
    ModelMixin,
    UNet2DModel,
)
from torch import nn
from transformers.hf_argparser import HfArg

from cm_diffusers.data.cache import Vae
from cm_diffusers.data.encoders import Encoders
from cm_diffusers.data.sources import DataConfig
from cm_diffusers.data.streaming import streaming_batches
from cm_diffusers.data.text_image import text_image_batches
from cm_diffusers.data.unprompted import LatentStatistics, measure_statistics, unprompted_batches
from cm_diffusers.diffusion.views import EDMView, View
from cm_diffusers.engine.cli import refuse_changed
from cm_diffusers.engine.recipes import shipped
from cm_diffusers.engine.sharding import comes_from_the_first
from cm_diffusers.errors import UserError, read_text
from cm_diffusers.models.classes import classes_of
from cm_diffusers.models.double_norm import add_double_norm
from cm_diffusers.models.dropout import DropoutConfig, set_dropout
from cm_diffusers.models.families.base import network_of
from cm_diffusers.models.families.unet import check_vae
from cm_diffusers.models.single_file import is_single_file
from cm_diffusers.models.teachers import (
    LOADING,
    SINGLE_FILE_CONFIG,
    TeacherConfig,
    load_stock,
    load_teacher,
    stored_vae,
)
from cm_diffusers.models.two_times import TwoTimeUNet2DModel
from cm_diffusers.pipelines import ConsistencyImagesPipeline, ConsistencyPipeline
from cm_diffusers.pipelines.loading import WITHOUT_PROMPT
from cm_diffusers.publishing.images import images_pipeline, text_pipeline, view_of
from cm_diffusers.schedulers.stepping import ToldScheduler
from cm_diffusers.tasks.image_starts import check_diffusion, check_start, text_view, vp_view
from cm_diffusers.types import Batch


logger = logging.getLogger(__name__)
UNETS = {kind.__name__: kind for kind in (UNet2DModel, TwoTimeUNet2DModel)}  # of models without prompts


@dataclass
class StartConfig:
    """The diffusion model to start from."""

    pretrained_teacher_model: str = HfArg(
        help="Folder or Hub id of a diffusion model: of train_edm.py, DDPM or DDIM (UNet2DModel), Stable Diffusion (XL) or a "
        "text-to-image flow (Stable Diffusion 3, Sana, Flux, Qwen-Image, Z-Image ...); or a .safetensors file of Stable "
        "Diffusion (XL). distill_ctm.py takes models without prompts, and evaluate_likelihood.py also a student of its."
    )
    teacher_revision: str | None = HfArg(default=None, help="Branch, tag or commit on the Hub.")
    teacher_variant: str | None = HfArg(default=None, help='Variant of the weight files, e.g. "fp16".')
    single_file_config: str | None = HfArg(default=None, help=SINGLE_FILE_CONFIG)
    sigma_data: float | None = HfArg(
        default=None,
        help="Standard deviation of what the network sees as data; if not given, 0.5, for latents of text-to-image models 1. "
        "Models of train_edm.py have their own.",
    )


@dataclass
class NewModelConfig:
    """The network to train from data alone."""

    unet_config: str = HfArg(
        help="JSON file with the settings of a UNet2DModel, by its path or, beside a recipe, by its name; sizes and "
        "channels follow the data."
    )
    sigma_data: float = HfArg(default=0.5, help="Standard deviation of the data; latents are scaled to it.")
    noise_conditioning: Literal["adm", "edm", "trigflow"] = HfArg(
        default="adm",
        help="What the network is told of sigma: adm, 250 ln sigma; edm, ln sigma / 4; trigflow, atan(sigma / sigma_data).",
    )
    double_norm: bool = HfArg(
        default=False, help="Normalise what the time makes of the blocks' scale and shift, as sCM does."
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


NEW_MODEL_CONFIGS = (NewModelConfig, DataConfig, ClassConfig, DropoutConfig)  # what `new_image_model` takes


@dataclass(frozen=True)
class ImageModel:
    """A network, how it is called, and what is around it.

    Attributes:
        vae: Where it works in latents.
        statistics: Of these latents; None for a network of the latents as they are.
        pipe: The text-to-image pipeline that it is in, where it reads text.
    """

    network: ModelMixin
    view: View
    vae: AutoencoderKL | None = None
    statistics: LatentStatistics | None = None
    pipe: DiffusionPipeline | None = None

    def pipeline(self, network: nn.Module, scheduler: ToldScheduler) -> DiffusionPipeline:
        """What a student made of it is published in."""
        if self.pipe is not None:
            return text_pipeline(self.pipe, network, scheduler)
        return images_pipeline(network, scheduler, self.vae, self.statistics)

    def sampler(self, network: nn.Module, scheduler: ToldScheduler) -> DiffusionPipeline:
        """The same with our own class, which takes any noise levels, where `pipeline` has a stock one."""
        pipe = self.pipeline(network, scheduler)
        if isinstance(pipe, ConsistencyModelPipeline):
            pipe = ConsistencyImagesPipeline(network, scheduler)
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
                raise UserError("--label_column has no effect on a model that reads text: leave it out.")
            source = streaming_batches if data.streaming else text_image_batches
            return source(data, Encoders.from_pipeline(self.pipe), seed, rank, world_size, device)
        known = classes_of(self.network)
        if classes.num_classes not in (None, known) or (classes.label_column and known is None):
            found = "takes no classes" if known is None else f"has {known} classes"
            raise UserError(f"The network {found}: leave out --num_classes{' and --label_column' * (known is None)}.")
        options, downscale = {"label_column": classes.label_column, "num_classes": known}, 1
        if self.vae is not None:
            vae = Vae.from_model(self.vae)
            options, downscale = options | {"vae": vae, "statistics": self.statistics}, vae.latents.downscale
        if (side := self.network.config.sample_size * downscale) != data.resolution:
            raise UserError(f"The network is made for images of {side} pixels: give --resolution {side}.")
        return unprompted_batches(data, seed, rank, world_size, device, **options, sigma_data=self.view.sigma_data)


def load_image_model(config: StartConfig) -> ImageModel:
    """A diffusion model in float32, frozen, seen in EDM's coordinates; its network is on "meta" where it `comes_from_the_first`.

    Raises:
        ValueError: Out of reach, or not a model that this can be.
    """
    path = config.pretrained_teacher_model
    index = {} if is_single_file(path) else _index(config)
    if not index or any(name.startswith("text_encoder") for name in index):
        where = {"teacher_variant": config.teacher_variant, "single_file_config": config.single_file_config}
        pipe = load_teacher(TeacherConfig(path, config.teacher_revision, **where), late=comes_from_the_first())
        return ImageModel(network_of(pipe), text_view(path, pipe, config.sigma_data), vae=pipe.vae, pipe=pipe)
    refuse_changed(config, "single_file_config", "for a model that is no .safetensors file")
    ours = index["_class_name"] in WITHOUT_PROMPT
    hub = {"revision": config.teacher_revision, "variant": config.teacher_variant}
    parts = _known_parts(config, index) if comes_from_the_first() else {}
    load = partial(ConsistencyPipeline.from_pretrained, **LOADING) if ours else load_stock
    pipe = load(path, **hub, **parts)
    check_start(path, pipe, ours)
    pipe.unet.requires_grad_(False).eval()
    return (
        _edm_model(path, pipe, config.sigma_data)
        if ours
        else ImageModel(pipe.unet, vp_view(pipe.scheduler, config.sigma_data, 0.5))
    )


def _index(config: StartConfig) -> dict:
    path = config.pretrained_teacher_model
    try:
        return DiffusionPipeline.load_config(path, revision=config.teacher_revision)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is neither a pipeline folder here nor a Hub id within reach: {reason}") from error


def _known_parts(config: StartConfig, index: dict) -> dict[str, UNet2DModel]:
    """The network on "meta", if it is one that `check_start` takes."""
    if (kind := UNETS.get(index.get("unet", ("", ""))[1])) is None:
        return {}
    with torch.device("meta"):
        where = {"subfolder": "unet", "revision": config.teacher_revision}
        return {"unet": kind.from_config(kind.load_config(config.pretrained_teacher_model, **where))}


def _edm_model(path: str, pipe: DiffusionPipeline, sigma_data: float | None) -> ImageModel:
    """A diffusion model of this package."""
    settings = pipe.scheduler.config
    check_diffusion(path, settings, sigma_data)
    if pipe.record is not None and pipe.record.guidance == "distilled":
        logger.warning(
            "%s has guidance of %.3g in its weights: so will have what comes of it.", path, pipe.record.w_max + 1
        )
    mean, std = pipe.config.get("latents_mean"), pipe.config.get("latents_std")
    statistics = None if std is None else LatentStatistics(mean, std)
    vae = None if pipe.vae is None else pipe.vae.requires_grad_(False).eval()
    return ImageModel(pipe.unet, view_of(settings), vae, statistics)


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
        raise UserError("--label_column and --num_classes go together: give both for classes, or neither.")
    vae = statistics = None
    size, channels = data.resolution, 3
    if config.pretrained_vae is not None:
        vae = load_vae(config.pretrained_vae)
        encoder = Vae.from_model(vae)
        statistics = measure_statistics(data, encoder, device)
        size, channels = size // encoder.latents.downscale, vae.config.latent_channels
    unet = new_unet(config.unet_config, size, channels, classes.num_classes)
    if config.double_norm:
        add_double_norm(unet)
    set_dropout(unet, dropout)
    return ImageModel(unet.train(), EDMView(config.sigma_data, config.noise_conditioning), vae, statistics)


def load_vae(path: str) -> AutoencoderKL:
    """Of a folder or repository of its own, or of a pipeline's."""
    try:
        vae = stored_vae(path)
    except (OSError, ValueError) as alone:
        try:
            vae = stored_vae(path, subfolder="vae")
        except (OSError, ValueError):
            raise UserError(f"--pretrained_vae {path} does not load: {str(alone).splitlines()[0]}") from alone
    check_vae(path, vae)
    return vae.requires_grad_(False).eval()


def new_unet(name: str, size: int, channels: int, num_classes: int | None) -> UNet2DModel:
    """Of the settings in a file, see `NewModelConfig`.

    Raises:
        ValueError: They are not those of such a network, or do not fit the data.
    """
    path = shipped("--unet_config", name, ".json")
    try:
        settings = json.loads(read_text(path))
    except (OSError, ValueError) as error:
        raise UserError(f"--unet_config {path} cannot be read as JSON: {error}") from error
    derived = {"sample_size": size, "in_channels": channels, "out_channels": channels, "num_class_embeds": num_classes}
    if clash := sorted(settings.keys() & derived.keys()):
        raise UserError(f"--unet_config {path} sets {', '.join(clash)}, which follow from the data: leave them out.")
    try:
        unet = UNet2DModel(**settings, **derived)
    except (TypeError, ValueError) as error:
        raise UserError(f"--unet_config {path} is no UNet2DModel: {error}") from error
    if size % (factor := 2 ** (len(unet.down_blocks) - 1)):
        raise UserError(
            f"The network of --unet_config {path} halves {size} to fractions: give it a multiple of {factor}."
        )
    if unet.config.time_embedding_type != "positional":
        raise UserError(
            f"--unet_config {path}: time_embedding_type must be positional, for noise is told as a logarithm."
        )
    return unet
