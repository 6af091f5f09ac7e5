"""From a network that is told its time to one that is told where its jump ends, too."""

import copy

from diffusers import UNet2DModel

from cm_diffusers.errors import UserError
from cm_diffusers.models.double_norm import double_normed
from cm_diffusers.models.two_times import TwoTimeUNet2DModel


def with_target(unet: UNet2DModel) -> TwoTimeUNet2DModel:
    """A network with the same weights that is told where to jump, and does not heed it yet; a copy of one that is told already.

    On "meta" if that is.

    Raises:
        ValueError: Something else stands where the second embedding goes, or it is no UNet2DModel.
    """
    if isinstance(unet, TwoTimeUNet2DModel):
        return copy.deepcopy(unet)
    if not isinstance(unet, UNet2DModel) or unet.config.class_embed_type is not None:
        found = type(unet).__name__
        raise UserError(
            f"The network is a {found}{' with a class_embed_type' if isinstance(unet, UNet2DModel) else ''}, which cannot be told "
            "where to jump; give a model without prompts, whose UNet2DModel takes classes by num_class_embeds or none."
        )
    with unet.device:
        network = TwoTimeUNet2DModel.from_config(dict(unet.config) | {"_class_name": TwoTimeUNet2DModel.__name__})
    weights = {
        name.replace("class_embedding.", "class_embedding.classes."): w for name, w in unet.state_dict().items()
    }
    ours = {name: w for name, w in network.state_dict().items() if name.startswith("class_embedding.target.")}
    network.load_state_dict(weights | ours)
    return double_normed(network)
