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

from collections.abc import Callable

import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DiffusionPipeline,
    ImagePipelineOutput,
    SCMScheduler,
    UNet2DModel,
)
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d

from cm_diffusers.models.double_norm import double_normed
from cm_diffusers.schedulers.scheduling_edm_consistency import EDMConsistencyScheduler


TASKS = ("inpainting", "colorization", "super-resolution")
GREY = (0.299, 0.587, 0.114)  # of red, green and blue: ITU-R BT.601, as PIL has it; the paper's 0.2989 is this, cut
STEPS = 40  # of the paper's grids for images
IN_EDM = {"boundary_scalings": "edm", "num_train_timesteps": STEPS}  # the same network as one of sCM
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
        scheduler: Carries the fields that `EDMConsistencyScheduler` or `TrigFlowConsistencyScheduler` samples by.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: UNet2DModel, scheduler: CMStochasticIterativeScheduler | SCMScheduler) -> None:
        super().__init__()
        if unet.config.in_channels not in (1, 3):
            raise ValueError(
                f"Zero-shot editing holds pixels fast, and this network of {unet.config.in_channels} channels sees none; "
                "take a consistency model of pixels."
            )
        self.register_modules(unet=double_normed(unet), scheduler=scheduler)
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
            x = replace(scheduler.step(output.float(), t, x).denoised)
            if i + 1 < len(scheduler.timesteps):
                std = (levels[i + 1] ** 2 - levels[-1] ** 2) ** 0.5
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
    ) -> EDMConsistencyScheduler:
        """One whose steps draw no noise, with its noise levels chosen."""
        changes = IN_EDM if isinstance(self.scheduler, SCMScheduler) else {}
        scheduler = EDMConsistencyScheduler.from_config(self.scheduler.config, gamma=0.0, **changes)
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
