"""Objectives of latent consistency on the grid of their config, for UNets."""

from cm_diffusers.diffusion.process import DiscreteVP
from cm_diffusers.diffusion.teaching import vp_teaching
from cm_diffusers.objectives.boot import BOOTConfig, BOOTObjective
from cm_diffusers.objectives.lcf import LCFConfig, LCFObjective
from cm_diffusers.objectives.lcm import LCMConfig, LCMObjective
from cm_diffusers.objectives.scott import SCottConfig, SCottObjective


def lcm_of(config: LCMConfig, process: DiscreteVP, prediction_type: str, dim: int | None) -> LCMObjective:
    grid = config.num_ddim_timesteps, config.timestep_scaling_factor
    return LCMObjective(config, vp_teaching(process, prediction_type, dim, *grid))


def boot_of(
    config: BOOTConfig, process: DiscreteVP, prediction_type: str, dim: int | None, shape: tuple[int, ...]
) -> BOOTObjective:
    return BOOTObjective(config, vp_teaching(process, prediction_type, dim, config.num_ddim_timesteps), shape)


def lcf_of(
    config: LCFConfig, process: DiscreteVP, prediction_type: str, dim: int | None, *grid: float
) -> LCFObjective:
    return LCFObjective(config, vp_teaching(process, prediction_type, dim, *grid))


def scott_of(
    config: SCottConfig, process: DiscreteVP, prediction_type: str, dim: int | None, critic: bool
) -> SCottObjective:
    grid = config.num_ddim_timesteps, config.timestep_scaling_factor
    return SCottObjective(config, vp_teaching(process, prediction_type, dim, *grid), critic)
