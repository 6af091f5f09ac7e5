"""The embedding of a network's time, taught another time without images."""

import torch
from torch import Tensor, nn

from cm_diffusers.models.teachers import is_late


STEPS, LEARNING_RATE = 400, 2e-3  # seconds; more barely brings it nearer


def teach_time(unet: nn.Module, was: Tensor, told: Tensor) -> None:
    """Trains the embedding, in place, to make of times `told` what it made of `was`, both `(N,)`.

    It comes as near as waves as slow as those of `told` can; the rest of the network stays. One on "meta" takes its weights from
    a process that does this.
    """
    if is_late(unet):
        return

    def embedded(times: Tensor) -> Tensor:
        return unet.time_embedding(unet.time_proj(times.float()))

    with torch.no_grad():
        wanted = embedded(was)
    optimizer = torch.optim.Adam(unet.time_embedding.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    for _ in range(STEPS):
        (embedded(told) - wanted).square().mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
