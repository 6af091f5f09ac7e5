"""Networks seen as denoisers: their arguments, and predictions in float32."""

from collections.abc import Callable

from torch import Tensor

from cm_diffusers.diffusion.guidance import ConditionalDenoiser, Conditions
from cm_diffusers.diffusion.process import Prediction, Process, as_like, interpret, moved_to


XL_CONDITIONS = ("text_embeds", "time_ids")  # the UNet's added_cond_kwargs


def unet_arguments(cond: dict[str, Tensor]) -> dict[str, Tensor | dict[str, Tensor]]:
    """Conditions as a UNet takes them: Stable Diffusion XL's `text_embeds` and `time_ids`, flat in a batch, in one dict."""
    added = {name: cond[name] for name in XL_CONDITIONS if name in cond}
    arguments = {name: value for name, value in cond.items() if name not in added}
    return arguments | ({"added_cond_kwargs": added} if added else {})


def for_frames(cond: dict[str, Tensor], x_t: Tensor) -> dict[str, Tensor]:
    """Conditions of clips `(B, C, F, h, w)`: text states `(B, S, D)` become `(B F, S, D)`, as a motion UNet wants them."""
    if x_t.ndim < 5 or "encoder_hidden_states" not in cond:
        return cond
    return cond | {"encoder_hidden_states": cond["encoder_hidden_states"].repeat_interleave(x_t.shape[2], 0)}


Call = Callable[[Callable, Tensor, Tensor, Conditions], Tensor]  # (network, x_t, t, conditions) -> output


def call_unet(network: Callable, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
    """The output `(B, ...)` of a UNet at x_t, which is told t `(B,)`."""
    return network(x_t, t, **unet_arguments(for_frames(cond, x_t)), return_dict=False)[0]


def as_denoiser(
    network: Callable, process: Process, prediction_type: str, call: Call = call_unet
) -> ConditionalDenoiser:
    """View a network as (x_t, t, conditions) -> Prediction, in float32.

    Args:
        call: How networks of its architecture are called: with x_t `(B, ...)` and times `(B,)` of `process`, both on one
            device; floating times have the dtype of x_t.
    """

    def denoise(x_t: Tensor, t: Tensor, cond: Conditions) -> Prediction:
        told = as_like(t, x_t) if t.is_floating_point() else moved_to(t, x_t)
        return interpret(process, call(network, x_t, told, cond).float(), x_t, t, prediction_type)

    return denoise
