"""Times as they are, for networks that would round them.

Flux.1 and Qwen-Image bring their time to the precision that they compute in before they embed it: bfloat16 leaves 26 or 27 of
100 times between 0.9 and 0.999, and makes 752 of 750. What they are shown has the noise of the time itself.
"""

from functools import partial

from torch import Tensor, nn

from cm_diffusers.models.families.base import family_of


def embed_exactly(network: nn.Module) -> None:
    """Times `timestep` in float32 are embedded in float32, whatever the network computes in; in float32 nothing changes.

    Those of a network whose class rounds none stay with it.
    """
    path = family_of(network).rounded_time
    if path is not None:
        network.register_forward_pre_hook(partial(_keep, path), with_kwargs=True)
        layer = network.get_submodule(path)
        layer.exact = None
        layer.register_forward_pre_hook(_restore)


def _keep(path: str, network: nn.Module, args: tuple, told: dict[str, object]) -> None:
    network.get_submodule(path).exact = told.get("timestep")


def _restore(layer: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
    """In the place of rounded times; what comes after them in a pass is guidance."""
    exact, layer.exact = layer.exact, None
    if exact is None or args[0].dtype.itemsize >= 4:
        return None
    return (exact * (1000 / layer.scale),)
