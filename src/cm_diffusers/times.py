"""Which times a method trains at: pure functions, no state."""

import torch
from torch import Tensor


def solver_grid(num_train_timesteps: int, num_solver_steps: int) -> Tensor:
    """The N ascending times k-1, 2k-1, ..., Nk-1 with k = T // N of LCM (2310.04378, Sec. 4.3) and `LCMScheduler`."""
    if not 1 <= num_solver_steps <= num_train_timesteps:
        raise ValueError(
            f"The grid has {num_solver_steps} steps (num_ddim_timesteps, original_inference_steps) but the model has "
            f"{num_train_timesteps} timesteps; choose between 1 and {num_train_timesteps}."
        )
    skip = num_train_timesteps // num_solver_steps
    return torch.arange(1, num_solver_steps + 1) * skip - 1


def sample_solver_pairs(batch_size: int, grid: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Times t `(B,)` drawn uniformly from the grid and s `(B,)`, one grid spacing below and at least 0."""
    index = torch.randint(len(grid), (batch_size,), device=device)
    t = grid.to(device)[index]
    skip = int(grid[0]) + 1
    return t, (t - skip).clamp(min=0)
