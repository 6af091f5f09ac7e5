"""AnimateLCM-SVD (2402.00769): Stable Video Diffusion in 1 to 8 steps.

The stock pipeline samples it, with the scheduler and the weights from here::

    file = hf_hub_download("wangfuyun/AnimateLCM-SVD-xt", "AnimateLCM-SVD-xt-1.1.safetensors")
    pipe = StableVideoDiffusionPipeline.from_pretrained(
        "stabilityai/stable-video-diffusion-img2vid-xt", scheduler=animatelcm_svd_scheduler()
    )
    load_animatelcm_svd(pipe.unet, file)
    frames = pipe(image, num_inference_steps=4, min_guidance_scale=1.0, max_guidance_scale=1.2).frames[0]
"""

from pathlib import Path

from diffusers import UNetSpatioTemporalConditionModel
from diffusers.utils.torch_utils import randn_tensor
from safetensors.torch import load_file
from torch import Generator

from cm_diffusers.errors import UserError
from cm_diffusers.schedulers import EDMConsistencyScheduler


def animatelcm_svd_scheduler(generator: Generator | None = None) -> EDMConsistencyScheduler:
    """The scheduler that AnimateLCM-SVD is trained and sampled with.

    Args:
        generator: Draws the noise between the steps, as the stock pipeline hands its own only to the start; by default
            torch's global one does.
    """
    scheduler = EDMConsistencyScheduler(
        num_train_timesteps=40,
        sigma_min=0.002,
        sigma_max=700.0,
        sigma_data=1.0,
        rho=7.0,
        clip_denoised=False,
        boundary_scalings="edm",
        noise_conditioning="edm",
        prediction_type="v_prediction",
    )
    if generator is not None:
        scheduler.noise_sampler = lambda shape, _, device, dtype: randn_tensor(shape, generator, device, dtype)
    return scheduler


def load_animatelcm_svd(unet: UNetSpatioTemporalConditionModel, path: str | Path) -> None:
    """Replace all weights of Stable Video Diffusion's UNet by those of a safetensors file.

    Raises:
        ValueError: Tensors are missing, unknown, or of another shape; the UNet is as it was.
    """
    given = load_file(path)
    shapes, own = ({name: w.shape for name, w in weights.items()} for weights in (given, unet.state_dict()))
    if shapes != own:
        differing = sorted(name for name in shapes.keys() | own.keys() if shapes.get(name) != own.get(name))
        raise UserError(
            f"{path} does not fit this UNet: {len(differing)} tensors, the first {differing[0]}, are missing, unknown or "
            "of another shape; take a file of wangfuyun/AnimateLCM-SVD-xt for stable-video-diffusion-img2vid-xt."
        )
    unet.load_state_dict(given)
