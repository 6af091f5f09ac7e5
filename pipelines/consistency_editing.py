# Written by `make single-files` in cm_diffusers, from pipeline_sources/consistency_editing.py: change that, not this.
"""Zero-shot editing with consistency models: inpainting, colorization and super-resolution, without installing cm_diffusers.

A single file for `custom_pipeline` (2303.01469, Algorithm 4 and Appendix D). It needs diffusers alone and takes folders of
`ConsistencyModelPipeline` in pixels, and those of cm_diffusers:

    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(
        "openai/diffusers-cd_bedroom256_l2", custom_pipeline="pipelines/consistency_editing.py", trust_remote_code=True
    )
    image = pipe("inpainting", photo, mask_image=mask).images[0]  # new where the mask is white
    image = pipe("colorization", photo.convert("L")).images[0]
    image = pipe("super-resolution", photo.resize((64, 64))).images[0]  # to the size of the network

What is given stays: the pixels outside the mask, the grey of every pixel, the mean of every block. The paper writes it as
A^-1 [(A y)(1 - mask) + (A x) mask] with an orthogonal A whose first rows are what is known of y; only the plane that they
span matters, so here x moves onto it by the shortest way.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from numbers import Integral
from typing import Any

import numpy as np
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConfigMixin,
    DiffusionPipeline,
    ImagePipelineOutput,
    LCMScheduler,
    SchedulerMixin,
    UNet2DModel,
)
from diffusers.configuration_utils import register_to_config
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.schedulers.scheduling_lcm import LCMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d


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


TASKS = ("inpainting", "colorization", "super-resolution")
GREY = (0.299, 0.587, 0.114)  # of red, green and blue: ITU-R BT.601, as PIL has it; the paper's 0.2989 is this, cut
STEPS = 40  # of the paper's grids for images
Change = Callable[[Tensor], Tensor]


def inpainting(image: Tensor, mask: Tensor) -> tuple[Change, Change]:
    """What puts the known into x `(B, C, H, W)`, and what also keeps it there in [-1, 1].

    Args:
        image: `(B, C, H, W)` in [-1, 1].
        mask: `(B, 1, H, W)`, above 0.5 where it is unknown.
    """

    def replace(x: Tensor) -> Tensor:
        return torch.where(mask > 0.5, x, image)

    return replace, lambda x: replace(x).clamp(-1, 1)


def colorization(grey: Tensor) -> tuple[Change, Change]:
    """As `inpainting`, for a known grey `(B, 1, H, W)` in [-1, 1] of x `(B, 3, H, W)`."""
    weights = torch.tensor(GREY).view(1, 3, 1, 1).to(grey)

    def replace(x: Tensor) -> Tensor:
        return x + weights * (grey - (weights * x).sum(1, keepdim=True)) / weights.square().sum()

    return replace, lambda x: _within(replace(x), grey, lambda shares: shares.amin(1, keepdim=True))


def super_resolution(small: Tensor, factor: int) -> tuple[Change, Change]:
    """As `inpainting`, for known means `(B, C, h, w)` in [-1, 1] of the blocks of x `(B, C, h * factor, w * factor)`."""

    def enlarged(values: Tensor) -> Tensor:
        return interpolate(values, scale_factor=factor)

    def replace(x: Tensor) -> Tensor:
        return x + enlarged(small - avg_pool2d(x, factor))

    return replace, lambda x: _within(
        replace(x), enlarged(small), lambda shares: -enlarged(max_pool2d(-shares, factor))
    )


def _within(x: Tensor, known: Tensor, least: Change) -> Tensor:
    """x, drawn to `known` as far as it takes to come into [-1, 1]; `least` makes one share of those that belong together."""
    shares = torch.where(x.abs() > 1, (x.sign() - known) / (x - known), 1.0)
    return known + least(shares) * (x - known)


class ConsistencyEditingPipeline(DiffusionPipeline):
    """Edits images with a consistency model that was not trained for it.

    Args:
        unet: Of pixels, 1 or 3 channels.
        scheduler: Carries the fields that `StudentScheduler` samples by.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: UNet2DModel, scheduler: CMStochasticIterativeScheduler) -> None:
        super().__init__()
        if unet.config.in_channels not in (1, 3):
            raise ValueError(
                f"Zero-shot editing holds pixels fast, and this network of {unet.config.in_channels} channels sees none; "
                "take a consistency model of pixels."
            )
        self.register_modules(unet=unet, scheduler=scheduler)
        how = {"do_resize": False, "vae_scale_factor": 1}
        colored = unet.config.in_channels == 3
        self.image_processor = VaeImageProcessor(do_convert_rgb=colored, do_convert_grayscale=not colored, **how)
        self.mask_processor = VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True, **how)

    @torch.no_grad()
    def __call__(
        self,
        task: str,
        image: PipelineImageInput,
        mask_image: PipelineImageInput | None = None,
        class_labels: int | list[int] | None = None,
        num_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        generator: Generator | list[Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Edited images.

        Args:
            task: "inpainting", "colorization" or "super-resolution".
            image: PIL images, arrays (N, H, W, C) or tensors (N, C, H, W) in [0, 1], of the network's size; for
                super-resolution a whole number of times smaller.
            mask_image: For inpainting, white where the image is to be made anew.
            class_labels: One for all images or one for each, where the network knows classes.
            num_inference_steps: By default those of the training grid, at most 40.
            timesteps, sigmas: As for the scheduler, instead of a number of steps.
            generator: Draws all noise; one for each image makes it independent of its batch.
            output_type: "pil", "np" (N, H, W, C) or "pt" (N, C, H, W), both in [0, 1].
            return_dict: False for a tuple.

        Raises:
            ValueError: The request is malformed, or the network cannot fulfil it.
        """
        device = self._execution_device
        replace, finish = self._known(task, image, mask_image, device)
        scheduler = self._silent_scheduler(device, num_inference_steps, timesteps, sigmas)
        known = replace(torch.zeros(1, self.unet.config.in_channels, *self._size, device=device))
        labels = self._labels(class_labels, len(known), device)
        if isinstance(generator, list) and len(generator) != len(known):
            raise ValueError(
                f"Found {len(generator)} generators for {len(known)} images; give one for each, or a single."
            )
        levels = scheduler.sigmas.tolist()
        x = known + levels[0] * randn_tensor(known.shape, generator=generator, device=device)
        for i, t in enumerate(self.progress_bar(scheduler.timesteps)):
            shown = scheduler.scale_model_input(x, t).to(self.unet.dtype)
            output = self.unet(shown, t, class_labels=labels, return_dict=False)[0]
            x = replace(scheduler.step(output.float(), t, x).prev_sample)
            if i + 1 < len(scheduler.timesteps):
                std = (levels[i + 1] ** 2 - scheduler.floor**2) ** 0.5
                x = x + std * randn_tensor(x.shape, generator=generator, device=device)
        images = self.image_processor.postprocess(finish(x), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @property
    def _size(self) -> tuple[int, int]:
        size = self.unet.config.sample_size
        return (size, size) if isinstance(size, int) else tuple(size)

    def _known(
        self, task: str, image: PipelineImageInput, mask: PipelineImageInput | None, device: torch.device
    ) -> tuple[Change, Change]:
        if task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}; got {task!r}.")
        if (mask is None) == (task == "inpainting"):
            raise ValueError(
                "Inpainting needs a mask_image, white where the image is to be made anew; others take none."
            )
        pixels, channels = self.image_processor.preprocess(image).to(device), self.unet.config.in_channels
        if task == "colorization":
            if channels != 3:
                raise ValueError("This network sees grey images only; colorization needs one of 3 channels.")
            self._check_size("image", pixels)
            return colorization((torch.tensor(GREY, device=device).view(1, 3, 1, 1) * pixels).sum(1, keepdim=True))
        if pixels.shape[1] != channels:
            raise ValueError(f"The image must have {channels} channels, but it has {pixels.shape[1]}.")
        if task == "super-resolution":
            return super_resolution(pixels, self._factor(pixels))
        unknown = self.mask_processor.preprocess(mask).to(device)
        self._check_size("image", pixels)
        self._check_size("mask", unknown)
        return inpainting(pixels, unknown)

    def _check_size(self, name: str, pixels: Tensor) -> None:
        if (found := tuple(pixels.shape[2:])) != self._size:
            raise ValueError(f"The {name} must have the network's size {self._size}, but it is {found}; resize it.")

    def _factor(self, small: Tensor) -> int:
        size, found = self._size, tuple(small.shape[2:])
        factor = size[0] // found[0]
        if factor < 2 or (found[0] * factor, found[1] * factor) != size:
            raise ValueError(f"The image must be a whole number of times smaller than {size}, but it is {found}.")
        return factor

    def _silent_scheduler(
        self, device: torch.device, steps: int | None, timesteps: list[int] | None, sigmas: list[float] | None
    ) -> StudentScheduler:
        """One whose steps end at f(x, sigma), with its noise levels chosen."""
        scheduler = StudentScheduler.of(self.scheduler, s_noise=0.0, gamma=1.0)
        if steps is None and timesteps is None and sigmas is None:
            steps = min(STEPS, scheduler.config.num_train_timesteps)
        scheduler.set_timesteps(steps, device, timesteps, sigmas)
        return scheduler

    def _labels(self, labels: int | list[int] | None, batch: int, device: torch.device) -> Tensor | None:
        classes = self.unet.config.num_class_embeds
        if (labels is None) != (classes is None):
            raise ValueError("Give class_labels exactly where the network knows classes.")
        if labels is None:
            return None
        values = [labels] * batch if isinstance(labels, int) else list(labels)
        if len(values) != batch or not all(0 <= value < classes for value in values):
            raise ValueError(f"class_labels must be {batch} numbers from 0 to {classes - 1}, or one; got {labels}.")
        return torch.tensor(values, device=device)
