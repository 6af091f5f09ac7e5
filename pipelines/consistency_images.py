# Written by `make single-files` in cm_diffusers, from pipeline_sources/consistency_images.py: change that, not this.
"""Images without prompts from students in EDM's coordinates, as they were trained, without installing cm_diffusers.

A single file for `custom_pipeline`. It needs diffusers alone and serves the consistency models that cm_diffusers makes
without prompts, of pixels and latents, with classes or without, and published folders of `ConsistencyModelPipeline`. Put
it beside the weights as `pipeline.py`, or name it:

    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(
        "runs/ect/pipeline", custom_pipeline="pipelines/consistency_images.py", trust_remote_code=True
    )
    image = pipe().images[0]  # at the noise levels that the student recommends
    image = pipe(class_labels=3, sigmas=[80.0, 0.821]).images[0]

What the stock pipeline lacks: it reads neither `cm_diffusers.json` nor what the scheduler's config says of boundary,
network and noise levels, and knows no latents. Images are those of `ConsistencyImagesPipeline`.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    CMStochasticIterativeScheduler,
    ConfigMixin,
    DiffusionPipeline,
    ImagePipelineOutput,
    LCMScheduler,
    SchedulerMixin,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.configuration_utils import register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers.scheduling_lcm import LCMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from torch import Generator, Tensor


def exact(times: Tensor) -> Tensor:
    """Times, or what is computed of them, in float64 on the CPU."""
    return times.cpu().double()


def input_scaling(sigma: Tensor, sigma_data: float) -> Tensor:
    """c_in `(B,)` of EDM (2206.00364, Table 1): c_in x has unit variance."""
    return 1 / (exact(sigma) ** 2 + sigma_data**2).sqrt()


def cm_scalings(sigma: Tensor, sigma_min: float, sigma_data: float) -> tuple[Tensor, Tensor]:
    """c_skip and c_out `(B,)` of consistency models (2303.01469, Appendix C); exactly (1, 0) at sigma = sigma_min."""
    shifted = exact(sigma) - sigma_min
    return 1 / (1 + (shifted / sigma_data) ** 2), shifted * sigma_data * input_scaling(sigma, sigma_data)


def edm_scalings(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """c_skip and c_out `(B,)` of EDM's denoiser (2206.00364, Table 1); exactly (1, 0) at sigma = 0."""
    sigma = exact(sigma)
    return 1 / (1 + (sigma / sigma_data) ** 2), sigma * sigma_data * input_scaling(sigma, sigma_data)


# (sigma, sigma_min, sigma_data) -> (c_skip, c_out): where f(x, sigma) = x, at sigma_min or at 0
BOUNDARY_SCALINGS: dict[str, Callable[[Tensor, float, float], tuple[Tensor, Tensor]]] = {
    "cm": cm_scalings,
    "edm": lambda sigma, sigma_min, sigma_data: edm_scalings(sigma, sigma_data),
}
# c_noise, what a network is told of sigma: part of its architecture. "adm" as `CMStochasticIterativeScheduler`.
NOISE_CONDITIONINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "edm": lambda sigma: sigma.log() / 4,
    "adm": lambda sigma: 1000 * torch.log(sigma + 1e-44) / 4,
}


def karras_grid(points: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """`(points,)` ascending sigmas of EDM (2206.00364, Eq. 5), float64: even in sigma^(1 / rho), with exact ends."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    grid = torch.linspace(low, high, points, dtype=torch.float64) ** rho
    grid[0], grid[-1] = sigma_min, sigma_max
    return grid


PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def vp_scalings(sigma: Tensor, sigma_data: float, prediction_type: str) -> tuple[Tensor, Tensor]:
    """on_x and on_output `(B,)` with F = on_x x + on_output output, for the output of a variance-preserving network.

    The network is shown x / sqrt(1 + sigma^2). F is (D - c_skip x) / c_out with its denoiser D and EDM's scalings,
    simplified by hand: no two terms cancel that need not.

    Args:
        prediction_type: What the output is: "epsilon", "v_prediction" or "sample".
    """
    sigma = exact(sigma)
    edm, vp = (sigma**2 + sigma_data**2).sqrt(), (1 + sigma**2).sqrt()
    if prediction_type == "epsilon":  # D = x - sigma output
        return sigma / (sigma_data * edm), -edm / sigma_data
    if prediction_type == "v_prediction":  # D = (x - sigma vp output) / vp^2
        return sigma * (1 - sigma_data**2) / (sigma_data * vp**2 * edm), -edm / (sigma_data * vp)
    if prediction_type == "sample":  # D = output
        return -sigma_data / (sigma * edm), edm / (sigma * sigma_data)
    raise ValueError(f"Unknown prediction_type {prediction_type!r}; one of {', '.join(PREDICTION_TYPES)}.")


class StudentScheduler(SchedulerMixin, ConfigMixin):
    """Consistency sampling (2303.01469, Algorithm 1) in x = x0 + sigma noise, by all that the scheduler's config says.

    Such students are saved with `CMStochasticIterativeScheduler`, which reads a part of the fields and keeps the others.
    They mean what they mean to `EDMConsistencyScheduler` of cm_diffusers, whose steps these are.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 40,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        s_noise: float = 1.0,
        rho: float = 7.0,
        clip_denoised: bool = True,
        boundary_scalings: str = "cm",
        noise_conditioning: str = "adm",
        gamma: float = 1.0,
        network: str = "edm",
        prediction_type: str = "epsilon",
        num_vp_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        recommended_sigmas: list[float] | None = None,
    ) -> None:
        self.grid = karras_grid(num_train_timesteps, sigma_min, sigma_max, rho).flip(0).tolist()
        self.floor = sigma_min if boundary_scalings == "cm" else 0.0  # the noise level of f
        if network == "vp":
            betas = (beta_start, beta_end, beta_schedule, trained_betas)
            stock = LCMScheduler(num_vp_timesteps, *betas, rescale_betas_zero_snr=rescale_betas_zero_snr)
            signal = stock.alphas_cumprod[stock.alphas_cumprod > 0].double()
            self.log_sigmas = -torch.logit(signal).numpy() / 2

    @classmethod
    def of(cls, scheduler: SchedulerMixin, **changes: Any) -> "StudentScheduler":
        """Samples by the config of a scheduler."""
        fields = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
        return cls.from_config(fields, **changes)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Choose the noise levels: some of the grid, its places counted from the end, these, or the recommended ones."""
        points = len(self.grid)
        if num_inference_steps is None and timesteps is None and sigmas is None:
            sigmas = self.config.recommended_sigmas
        if sum(way is not None for way in (num_inference_steps, timesteps, sigmas)) != 1:
            raise ValueError("Give exactly one of num_inference_steps, timesteps and sigmas.")
        if num_inference_steps is not None:
            if not isinstance(num_inference_steps, Integral) or not 1 <= num_inference_steps <= points:
                raise ValueError(
                    f"num_inference_steps must be a whole number from 1 to {points}, got {num_inference_steps!r}."
                )
            sigmas = self.grid[:: points // num_inference_steps][:num_inference_steps]
        elif timesteps is not None:
            if not all(isinstance(place, Integral) and 0 <= place < points for place in timesteps):
                raise ValueError(f"timesteps must be whole numbers from {points - 1} down to 0, got {timesteps}.")
            sigmas = [self.grid[place] for place in reversed(timesteps)]
        levels, low, high = [float(sigma) for sigma in sigmas], self.config.sigma_min, self.config.sigma_max
        known = bool(levels) and all(low <= level <= high for level in levels)
        if not known or any(a <= b for a, b in pairwise(levels)):
            raise ValueError(f"Noise levels must descend, from at most {high} to at least {low}; got {levels}.")
        self.sigmas = torch.tensor([*levels, self.floor], dtype=torch.float64)
        times = self._told(self.sigmas[:-1])
        self.timesteps = times.to(device, torch.float32) if str(device).startswith("mps") else times.to(device)
        self.init_noise_sigma, self.num_inference_steps, self.done = levels[0], len(levels), 0

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """What the network is shown `(B, ...)`."""
        std = 1.0 if self.config.network == "vp" else self.config.sigma_data
        return sample * float(input_scaling(self.sigmas[self.done], std))

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor,
        sample: Tensor,
        generator: Generator | list[Generator] | None = None,
        return_dict: bool = True,
    ) -> LCMSchedulerOutput | tuple[Tensor, Tensor]:
        """The next step of the schedule; all tensors `(B, ...)`: f = c_skip x + c_out F, and noise to the level after it."""
        sigma, following = self.sigmas[self.done], self.sigmas[self.done + 1]
        x = sample.to(torch.float32 if sample.device.type == "mps" else torch.float64)
        denoised = result = self._consistency(model_output.to(x.dtype), sigma, x)
        self.done += 1
        if self.done < self.num_inference_steps:
            gamma = self.config.gamma
            fresh = (1 - (1 - gamma) ** 2) ** 0.5 * self.config.s_noise
            above, level = ((float(one) ** 2 - self.floor**2) ** 0.5 for one in (sigma, following))
            if gamma < 1:
                result = result + level * (1 - gamma) / above * (x - denoised)
            if fresh > 0:
                noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
                result = result + level * fresh * noise.to(x.dtype)
        output = LCMSchedulerOutput(result.to(sample.dtype), denoised.to(sample.dtype))
        return output if return_dict else output.to_tuple()

    def _told(self, sigmas: Tensor) -> Tensor:
        """What the network is told of noise levels `(N,)`: its own time, or a logarithm."""
        if self.config.network == "vp":
            times = np.interp(sigmas.log().numpy(), self.log_sigmas, np.arange(len(self.log_sigmas)))
            return torch.as_tensor(times)
        return NOISE_CONDITIONINGS[self.config.noise_conditioning](sigmas)

    def _consistency(self, output: Tensor, sigma: Tensor, x: Tensor) -> Tensor:
        """f(x, sigma), exactly x at sigma = floor."""
        on_x, on_output = 0.0, 1.0  # F = on_x x + on_output output
        if self.config.network == "vp":
            on_x, on_output = map(float, vp_scalings(sigma, self.config.sigma_data, self.config.prediction_type))
        scalings = BOUNDARY_SCALINGS[self.config.boundary_scalings]
        c_skip, c_out = map(float, scalings(sigma, self.config.sigma_min, self.config.sigma_data))
        f = (c_skip + c_out * on_x) * x + c_out * on_output * output
        return f.clamp(-1, 1) if self.config.clip_denoised else f


Generators = Generator | list[Generator] | None


def _drawn(classes: int, batch: int, generator: Generators) -> Tensor:
    """Labels `(B,)`, each by its generator if there is a list."""
    if isinstance(generator, list):
        return torch.cat([_drawn(classes, 1, one) for one in generator])
    device = "cpu" if generator is None else generator.device
    return torch.randint(classes, (batch,), generator=generator, device=device).cpu()


RECORD = "cm_diffusers.json"


def read_record(source: str) -> dict[str, Any]:
    """The record of a folder or Hub repository; {} where there is none, or none in reach."""
    path = Path(source) / RECORD
    if not Path(source).exists():
        try:
            path = Path(hf_hub_download(source, RECORD))
        except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
            return {}
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


@dataclass
class PortableImagesOutput(ImagePipelineOutput):
    """Images, and the classes `(B,)` they show; None for a network without classes."""

    class_labels: Tensor | None = None


class PortableImagesPipeline(DiffusionPipeline):
    """Samples a student without prompts by what its folder says.

    Args:
        unet: A `UNet2DConditionModel` must not read text.
        scheduler: Carries the fields that `StudentScheduler` samples by.
        vae: For a student of latents.
        latents_mean, latents_std, sigma_data: The student's latents are (latents - mean) / std * sigma_data, of latents as
            Stable Diffusion scales them; None for those as they are.
        record: `cm_diffusers.json`, read where the folder is if None.
    """

    model_cpu_offload_seq = "unet->vae"
    _optional_components = ["vae"]

    def __init__(
        self,
        unet: UNet2DModel | UNet2DConditionModel,
        scheduler: CMStochasticIterativeScheduler,
        vae: AutoencoderKL | None = None,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        sigma_data: float = 0.5,
        record: dict | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)
        statistics = {"latents_mean": latents_mean, "latents_std": latents_std, "sigma_data": sigma_data}
        self.register_to_config(**statistics, record=record)
        self.image_processor = VaeImageProcessor()

    @property
    def record(self) -> dict[str, Any]:
        """How the student was made; {} where nothing tells."""
        return self.config.record or read_record(self.config.get("_name_or_path") or "")

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: int | list[int] | Tensor | None = None,
        num_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        generator: Generator | list[Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> PortableImagesOutput | tuple:
        """Images.

        Args:
            batch_size: Number of images; by default as many as there are labels, latents or generators, else 1.
            class_labels: One for all images or one for each; drawn by the generators if None.
            num_inference_steps, timesteps, sigmas: How many noise levels of the training grid, which places on it, or these,
                descending; by default what the student recommends.
            generator: Draws noise, then labels, then the noise of each step; one for each image makes it independent of
                its batch.
            latents: Noise (B, C, H, W) of variance 1 to start from.
            output_type: "pil", "np" (B, H, W, C), "pt" (B, C, H, W), both in [0, 1], or "latent".
            return_dict: False for a tuple.

        Raises:
            ValueError: The request is malformed, or the student cannot fulfil it.
        """
        wanted = class_labels.tolist() if hasattr(class_labels, "tolist") else class_labels
        batch = _batch(batch_size=batch_size, class_labels=wanted, latents=latents, generator=generator)
        size = self.unet.config.sample_size
        shape = (batch, self.unet.config.in_channels, *((size, size) if isinstance(size, int) else size))
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"latents must have the shape {shape}, got {tuple(latents.shape)}.")
        labels = self._labels(wanted, batch)
        device, dtype = self._execution_device, self.unet.dtype
        scheduler = StudentScheduler.of(self.scheduler)
        if num_inference_steps is None and timesteps is None and sigmas is None:
            if scheduler.config.recommended_sigmas is None:
                num_inference_steps = self.record.get("recommended_num_inference_steps", 1)
        scheduler.set_timesteps(num_inference_steps, device, timesteps, sigmas)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        if labels is None and self.unet.config.num_class_embeds is not None:
            labels = _drawn(self.unet.config.num_class_embeds, batch, generator)
        labels = None if labels is None else labels.to(device)
        x = latents.to(device, dtype) * scheduler.init_noise_sigma
        text = {"encoder_hidden_states": None} if isinstance(self.unet, UNet2DConditionModel) else {}
        for t in self.progress_bar(scheduler.timesteps):
            shown = scheduler.scale_model_input(x, t)
            output = self.unet(shown, t, **text, class_labels=labels, return_dict=False)[0]
            x = scheduler.step(output, t, x, generator=generator).prev_sample
        images = self._output(x, output_type)
        self.maybe_free_model_hooks()
        return PortableImagesOutput(images, labels) if return_dict else PortableImagesOutput(images, labels).to_tuple()

    def _output(self, latents: Tensor, output_type: str) -> Any:
        if self.config.latents_std is not None:
            mean, std = (
                torch.tensor(self.config[name]).view(1, -1, 1, 1).to(latents)
                for name in ("latents_mean", "latents_std")
            )
            latents = latents * std / self.config.sigma_data + mean
        if output_type == "latent":
            return latents
        images = latents if self.vae is None else self._decoded(latents)
        return self.image_processor.postprocess(images, output_type=output_type)

    def _decoded(self, latents: Tensor) -> Tensor:
        """Images (B, C, H, W) around [-1, 1]; a VAE that overflows in half precision is float32 for the while."""
        vae = self.vae
        overflows = vae.dtype == torch.float16 and vae.config.get("force_upcast")
        if overflows:
            vae.to(dtype=torch.float32)
        latents = latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
        images = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        if overflows:
            vae.to(dtype=torch.float16)
        return images

    def _labels(self, labels: int | list[int] | None, batch: int) -> Tensor | None:
        """The labels `(B,)` that were given."""
        classes = self.unet.config.num_class_embeds
        if labels is None:
            return None
        if classes is None:
            raise ValueError("This student knows no classes; leave class_labels out.")
        values = labels if isinstance(labels, list) else [labels] * batch
        if not all(isinstance(value, Integral) and 0 <= value < classes for value in values):
            raise ValueError(f"class_labels must be whole numbers from 0 to {classes - 1}, got {labels!r}.")
        return torch.tensor(values)


def _batch(**given: Any) -> int:
    """How many images are asked for: the number, or the length of everything that is given for each."""
    counts = {name: len(value) for name, value in given.items() if isinstance(value, list | Tensor)}
    if (size := given["batch_size"]) is not None:
        if not isinstance(size, Integral) or size < 1:
            raise ValueError(f"batch_size must be a whole number of at least 1, got {size!r}.")
        counts["batch_size"] = size
    if len(set(counts.values())) > 1:
        raise ValueError(f"batch_size, class_labels, latents and generator must be equally many, got {counts}.")
    return next(iter(counts.values()), 1)
