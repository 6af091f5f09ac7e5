"""Which passes of its networks a method makes for each sample of a step, from its settings: what a step costs."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from cm_diffusers.data.rollouts import RolloutConfig
from cm_diffusers.diffusion.distribution_matching import LONGEST_ROLLOUT
from cm_diffusers.objectives.autoencoder import AutoencoderConfig
from cm_diffusers.objectives.boot import BOUNDARY_EVERY, BOOTConfig
from cm_diffusers.objectives.cd import CDConfig
from cm_diffusers.objectives.classification import ClassificationConfig
from cm_diffusers.objectives.ct import CTConfig
from cm_diffusers.objectives.ctm import CTMConfig
from cm_diffusers.objectives.diffusion import DiffusionConfig
from cm_diffusers.objectives.direct_reward import DirectRewardConfig
from cm_diffusers.objectives.ect import ECTConfig
from cm_diffusers.objectives.edm import EDMConfig
from cm_diffusers.objectives.flow import FlowConfig
from cm_diffusers.objectives.ict import ICTConfig
from cm_diffusers.objectives.lcf import LCFConfig
from cm_diffusers.objectives.lcm import LCMConfig
from cm_diffusers.objectives.mean_flow import MeanFlowConfig
from cm_diffusers.objectives.pcm import PCMConfig
from cm_diffusers.objectives.rlcm import RLCMConfig
from cm_diffusers.objectives.scm import SCMConfig
from cm_diffusers.objectives.scott import SCottConfig
from cm_diffusers.objectives.slct import SLCTConfig
from cm_diffusers.objectives.tcd import TCDConfig
from cm_diffusers.objectives.time_rescaling import TimeRescalingConfig
from cm_diffusers.tasks.reward_runs import RewardModelConfig


class Pass(NamedTuple):
    """Of one network.

    Attributes:
        network: Its field of `Networks`.
        samples: For each of the batch; guidance by a second branch makes two, a jump of some of the batch a share.
        gradient: Of what: of nothing, of the weights that train, or of what the network is given.
    """

    network: str
    samples: float
    gradient: Literal["none", "weights", "input"] = "none"


LEARNS = Pass("student", 1, "weights")
PAIR = [Pass("target", 1), LEARNS]  # a jump from t, and one from below it
JUDGED = [Pass("critic", 2, "weights"), Pass("critic", 1, "input")]  # real and fake in its turn, fake in the student's
EVALUATIONS = {"ddim": 1, "euler": 1, "heun": 2, "dpm_2s": 2}  # of the teacher, by the solver
TANGENTS = {"jvp": 2, "central": 3, "one_sided": 2, "semi": 4}  # a pass of dual numbers costs two


def passes_of(method: Any, branches: int = 2, critic: bool = False) -> list[Pass]:
    """
    Args:
        method: The config of its objective.
        branches: Of the teacher for guidance: 1 where it is told the scale, or not guided; 0 without one.
        critic: Whether it plays.
    """
    return METHODS[type(method)](method, branches, critic)


def _alone(method: Any, branches: int, critic: bool) -> list[Pass]:
    return [LEARNS]


def _pair(method: Any, branches: int, critic: bool) -> list[Pass]:
    return PAIR


def _taught(method: LCMConfig | CDConfig, branches: int, critic: bool) -> list[Pass]:
    return [Pass("teacher", branches * EVALUATIONS[getattr(method, "solver", "heun")]), *PAIR]


def _tcd(method: TCDConfig, branches: int, critic: bool) -> list[Pass]:
    jumps = [Pass(one.network, method.order, one.gradient) for one in PAIR]
    return [Pass("teacher", branches * EVALUATIONS[method.solver]), *jumps]


def _pcm(method: PCMConfig, branches: int, critic: bool) -> list[Pass]:
    goal = [Pass("teacher", branches * EVALUATIONS[method.solver]), Pass("target", 1)]
    return [*goal, LEARNS, *([*goal, Pass("student", 1), *JUDGED] if critic else [])]


def _scott(method: SCottConfig, branches: int, critic: bool) -> list[Pass]:
    goal = [Pass("teacher", branches * method.solver_steps), Pass("target", 1)]
    real = [] if method.real_source == "data" else goal
    return [*goal, LEARNS, *([*real, Pass("student", 1), *JUDGED] if critic else [])]


def _boot(method: BOOTConfig, branches: int, critic: bool) -> list[Pass]:
    share = 1 / BOUNDARY_EVERY
    way = [Pass("student", 1), Pass("teacher", branches * EVALUATIONS[method.solver]), LEARNS]
    return [*way, Pass("teacher", branches * share), Pass("student", share, "weights")]


def _ctm(method: CTMConfig, branches: int, critic: bool) -> list[Pass]:
    """m intervals have the probability 2 m / (M (M + 1)), so that their mean is (2 M + 1) / 3."""
    intervals = (2 * method.teacher_intervals + 1) / 3
    fake = [Pass("student", 1), Pass("target", 1)]
    found = [Pass("teacher", 2 * intervals), *fake, Pass("target", 1, "input"), LEARNS]
    return [*found, *([LEARNS] if method.dsm_weight > 0 else []), *([*fake, *JUDGED] if critic else [])]


def _scm(method: SCMConfig, branches: int, critic: bool) -> list[Pass]:
    """The critic is the fake score: both turns draw samples in 1 to 4 steps, of which the student learns in the last."""
    steps, taught = (1 + LONGEST_ROLLOUT) / 2, Pass("teacher", branches)
    found = [taught, Pass("student", TANGENTS[method.tangent]), LEARNS]
    matched = [Pass("student", steps - 1), LEARNS, taught, Pass("critic", 1)]
    scored = [Pass("student", steps), Pass("critic", 1, "weights")]
    return found + ([*matched, *scored] if critic else [])


def _mean_flow(method: MeanFlowConfig, branches: int, critic: bool) -> list[Pass]:
    guiding = (1 + (method.guidance_mix > 0)) if method.w else 0
    return [Pass("student", guiding + TANGENTS[method.tangent]), LEARNS]


def passes_for_rewards(
    model: RewardModelConfig, method: RLCMConfig | DirectRewardConfig, drawn: RolloutConfig | None = None
) -> list[Pass]:
    """Of fine-tuning; rewards and the VAE, which draw no line to the network's size, are left out.

    Args:
        drawn: Of policy gradients, whose roll-outs are shared by the transitions that are learnt from.
    """
    steps, branches = (
        model.num_inference_steps,
        1 + (model.sampler == "ddim" and model.guidance_scale not in (None, 1)),
    )
    learns, before = Pass("student", branches, "weights"), [Pass("teacher", branches)] * (method.kl_coef > 0)
    if drawn is not None:
        learnt = max(1, steps - (method.final_step == "drop")) * drawn.inner_epochs
        return [Pass("student", branches * steps / learnt), learns, *before]
    if method.through == "single_step":
        return [Pass("teacher", 2), *PAIR]
    learnt = steps if method.through == "trajectory" else 1
    return [Pass("student", branches * (steps - learnt)), *[learns] * learnt, *before * learnt]


METHODS: dict[type, Callable[[Any, int, bool], list[Pass]]] = {
    **dict.fromkeys((DiffusionConfig, EDMConfig, FlowConfig, AutoencoderConfig, ClassificationConfig), _alone),
    **dict.fromkeys((LCFConfig, CTConfig, ICTConfig, SLCTConfig, ECTConfig), _pair),
    **dict.fromkeys((LCMConfig, CDConfig), _taught),
    TimeRescalingConfig: lambda method, branches, critic: [Pass("teacher", 1), LEARNS],
    TCDConfig: _tcd,
    PCMConfig: _pcm,
    SCottConfig: _scott,
    BOOTConfig: _boot,
    CTMConfig: _ctm,
    SCMConfig: _scm,
    MeanFlowConfig: _mean_flow,
}
