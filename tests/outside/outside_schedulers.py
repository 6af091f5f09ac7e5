"""diffusers' own scheduler suites on our schedulers; `run.py` puts this file into a copy of diffusers' tests."""

import pytest

from cm_diffusers import ConsistencyScheduler, EDMConsistencyScheduler

from ..schedulers import test_scheduler_consistency_model as cm
from ..schedulers import test_scheduler_lcm as lcm
from ..schedulers import test_scheduler_tcd as tcd


NO_SUCH_METHOD = "previous_timestep is a helper of LCMScheduler and TCDScheduler that no pipeline calls"


class TestAsLCM(lcm.LCMSchedulerTest):
    """Including LCM's sums over its full loops, to 1e-3."""

    scheduler_classes = (ConsistencyScheduler,)

    def test_custom_timesteps(self):
        pytest.skip(NO_SUCH_METHOD)


class TestAsTCD(tcd.TCDSchedulerTest):
    """Including TCD's sums over its deterministic loops, to 1e-3."""

    scheduler_classes = (ConsistencyScheduler,)

    def get_scheduler_config(self, **config):
        settings = {"boundary_scalings": "none", "set_alpha_to_one": False, "gamma": 0.0}
        return super().get_scheduler_config(**settings, **config)

    def full_loop(self, num_inference_steps=10, seed=0, **config):
        """TCD's hands eta = 0 to `step`, where ours has gamma in the config."""
        return lcm.LCMSchedulerTest.full_loop(self, num_inference_steps, seed, **config)

    def test_custom_timesteps(self):
        pytest.skip(NO_SUCH_METHOD)


class TestAsCM(cm.CMStochasticIterativeSchedulerTest):
    """Including its sums over its full loops, to 1e-3."""

    scheduler_classes = (EDMConsistencyScheduler,)

    def check_over_configs(self, time_step=0, **config):
        """From sigma_max, as the suite has it for the stock class by name."""
        first = EDMConsistencyScheduler(**self.get_scheduler_config(**config)).timesteps[0]
        super().check_over_configs(float(first), **config)

    def test_trained_betas(self):
        pytest.skip("the suite leaves the stock class out, too: it has no betas")
