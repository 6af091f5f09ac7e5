"""The scheduler in TrigFlow's coordinates: the stock one's in 1 and 2 steps, exact on Gaussian data, in any number."""

import itertools
import math

import pytest
import torch
from diffusers import AutoencoderDC, DDIMScheduler, SanaSprintPipeline, SanaTransformer2DModel, SCMScheduler
from oracles import Gaussian

from cm_diffusers.diffusion.process import DiscreteVP, RectifiedFlow, TrigFlow, diffuse
from cm_diffusers.diffusion.trigflow import TrigFlowView
from cm_diffusers.schedulers import EDMConsistencyScheduler, TrigFlowConsistencyScheduler


SHAPE = (2, 3, 4, 4)
VP = {"network": "vp", "sigma_max": 14.0}
PROCESS = DiscreteVP.from_scheduler(DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear"))
EDM = {"network": "edm", "sigma_max": 80.0}
NETWORKS = [  # config -> how training sees the same network
    *(
        ({**EDM, "noise_conditioning": told, "prediction_type": kind}, (output, told))
        for told in ("edm", "adm", "trigflow")
        for kind, output in (("epsilon", "edm"), ("v_prediction", "trigflow"), ("trigflow", "trigflow"))
    ),
    *(({**VP, "prediction_type": kind}, (kind, "own", PROCESS)) for kind in ("epsilon", "v_prediction", "sample")),
    ({"network": "flow", "prediction_type": "flow_prediction"}, ("flow_prediction", "own", RectifiedFlow(), 1000.0)),
    (
        {"network": "flow", "prediction_type": "flow_prediction", "time_scale": 1.0},
        ("flow_prediction", "own", RectifiedFlow()),
    ),
]


def normal(seed, shape=SHAPE, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def network(x, t, **conditions):
    """Some answer that depends on all it is given."""
    return (torch.sin(3 * x) + torch.cos(t / 100).reshape(-1, *[1] * (x.ndim - 1)),)


def asked(scheduler, x, t):
    return network(scheduler.scale_model_input(x, t), t)[0]


def sampled(scheduler, z, generator=None):
    """What a pipeline makes of standard normal z."""
    x = z * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(asked(scheduler, x, t), t, x, generator=generator).prev_sample
    return x


class TestEqualsStock:
    @pytest.mark.parametrize("sigma_data", [0.5, 1.0])
    @pytest.mark.parametrize(
        "asked",
        [
            {"num_inference_steps": 2},
            {"num_inference_steps": 2, "max_timesteps": 1.5, "intermediate_timesteps": 1.1},
            *({"num_inference_steps": count, "intermediate_timesteps": None} for count in (1, 2, 3, 8)),
            {"num_inference_steps": 2, "timesteps": [1.57080, 1.0, 0], "max_timesteps": None},
        ],
    )
    def test_steps(self, asked, sigma_data):
        stock = SCMScheduler(sigma_data=sigma_data)
        ours = TrigFlowConsistencyScheduler.from_config(stock.config)
        if "timesteps" in asked:
            asked = {**asked, "intermediate_timesteps": None}
        stock.set_timesteps(**asked)
        ours.set_timesteps(**asked)
        assert ours.timesteps.dtype == stock.timesteps.dtype == torch.float32
        torch.testing.assert_close(ours.timesteps, stock.timesteps, rtol=1e-7, atol=1e-7)
        assert (ours.init_noise_sigma, ours.order, len(ours)) == (stock.init_noise_sigma, stock.order, len(stock))
        generators = [torch.Generator().manual_seed(3) for _ in range(2)]
        x = sigma_data * normal(0, dtype=torch.float32)
        for i, t in enumerate(stock.timesteps[:-1]):
            assert torch.equal(ours.scale_model_input(x, t), x)
            output = normal(i + 1, dtype=torch.float32)
            expected = stock.step(output, t, x, generator=generators[0])
            actual = ours.step(output, t, x, generator=generators[1])
            torch.testing.assert_close(actual.prev_sample, expected.prev_sample, rtol=2e-6, atol=2e-6)
            torch.testing.assert_close(actual.denoised, expected.pred_original_sample, rtol=2e-6, atol=2e-6)
            x = expected.prev_sample

    def test_any_number_of_steps_where_stock_refuses(self):
        scheduler = TrigFlowConsistencyScheduler.from_config(SCMScheduler().config)
        with pytest.raises(ValueError, match="not supported when num_inference_steps != 2"):
            SCMScheduler().set_timesteps(4)
        for count in (1, 3, 4, 8):
            scheduler.set_timesteps(count, max_timesteps=1.57080, intermediate_timesteps=1.3)
            times = [1.57080 * k / count for k in range(count, -1, -1)]
            assert scheduler.timesteps.tolist() == pytest.approx(times, abs=1e-6)

    def test_a_place_is_found_without_a_begin_index(self):
        """SanaSprintPipeline hands the timestep as often as there are samples."""
        scheduler = TrigFlowConsistencyScheduler()
        scheduler.set_timesteps(2)
        x = normal(0)
        scheduler.step(x, scheduler.timesteps[1].expand(2), x)
        assert scheduler.step_index == 2

    def test_configs_go_both_ways(self, tmp_path):
        ours = TrigFlowConsistencyScheduler(sigma_data=0.7, **EDM, gamma=0.5, recommended_sigmas=[80.0, 1.0])
        stock = SCMScheduler.from_config(ours.config)
        assert (stock.config.sigma_data, stock.config.prediction_type) == (0.7, "trigflow")
        stock.save_pretrained(tmp_path)  # our fields ride along
        again = TrigFlowConsistencyScheduler.from_config(SCMScheduler.from_pretrained(tmp_path).config)
        ours.save_pretrained(tmp_path)
        for scheduler in (again, TrigFlowConsistencyScheduler.from_pretrained(tmp_path)):
            assert (scheduler.config.gamma, scheduler.config.network) == (0.5, "edm")
            results = []
            for one in (scheduler, ours):
                one.set_timesteps()
                results.append(sampled(one, normal(0), torch.Generator().manual_seed(3)))
            assert torch.equal(*results)

    def test_every_parameter_of_the_stock_one_has_its_default_here(self):
        stock, ours = SCMScheduler().config, TrigFlowConsistencyScheduler().config
        names = [name for name in stock if not name.startswith("_")]
        assert [ours[name] for name in names] == [stock[name] for name in names]


@pytest.fixture(scope="module")
def sana():
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=32,
        qk_norm="rms_norm_across_heads",
        guidance_embeds=True,
    )
    vae = AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    pipe = SanaSprintPipeline(None, None, vae.eval(), transformer.eval(), SCMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


class TestSanaSprint:
    def ask(self, pipe, count, **options):
        embeds = normal(5, (2, 6, 8), torch.float32)
        return pipe(
            prompt_embeds=embeds,
            prompt_attention_mask=torch.ones(2, 6),
            num_inference_steps=count,
            height=32,
            width=32,
            use_resolution_binning=False,
            generator=torch.Generator().manual_seed(7),
            **({"intermediate_timesteps": None} if count != 2 else {}),
            **options,
        ).images

    @pytest.mark.parametrize("count", [1, 2, 4])
    def test_images_are_those_of_the_stock_scheduler(self, sana, count):
        sana.scheduler = SCMScheduler()
        latents, images = self.ask(sana, count, output_type="latent"), self.ask(sana, count, output_type="np")
        sana.scheduler = TrigFlowConsistencyScheduler.from_config(sana.scheduler.config)
        torch.testing.assert_close(self.ask(sana, count, output_type="latent"), latents, rtol=1e-5, atol=1e-5)
        found = self.ask(sana, count, output_type="np")
        assert images.std() > 0.01
        assert abs(found - images).max() < 1e-5

    @pytest.mark.parametrize("count", [3, 8])
    def test_other_numbers_of_steps(self, sana, count):
        sana.scheduler = TrigFlowConsistencyScheduler(gamma=0.5)
        seen = []

        def note(pipe, step, timestep, tensors):
            seen.append(float(timestep))
            return tensors

        self.ask(sana, count, output_type="latent", callback_on_step_end=note)
        assert seen == pytest.approx([1.57080 * k / count for k in range(count, 0, -1)], abs=1e-6)


class TestOneTruth:
    """Training's scalings are sampling's."""

    @pytest.mark.parametrize(("config", "seen"), NETWORKS)
    @pytest.mark.parametrize("t", [0.004, 0.7, 1.5])
    def test_trainer_and_scheduler_agree(self, config, seen, t):
        t = max(t, 0.05) if config["network"] == "vp" else t
        scheduler, view = TrigFlowConsistencyScheduler(sigma_data=0.7, **config), TrigFlowView(0.7, *seen)
        scheduler.set_timesteps(timesteps=[t])
        x, time = normal(0), torch.full((2,), t, dtype=torch.float64)
        assert scheduler.timesteps.tolist() == view.told(time)[:1].tolist()
        assert scheduler.sigma_to_t(0.7 * math.tan(t)).item() == pytest.approx(scheduler.timesteps.item(), rel=1e-9)
        F = view(network, x, time, {})
        actual = scheduler.step(asked(scheduler, x, scheduler.timesteps[0]), scheduler.timesteps[0], x).denoised
        torch.testing.assert_close(actual, math.cos(t) * x - 0.7 * math.sin(t) * F, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize(("config", "seen"), NETWORKS)
    def test_told_and_times_are_inverse(self, config, seen):
        view, t = TrigFlowView(0.7, *seen), torch.tensor([0.05, 0.9, 1.5], dtype=torch.float64)
        torch.testing.assert_close(view.times(view.told(t)), t, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("gamma", [0.0, 0.4, 1.0])
    @pytest.mark.parametrize("count", [1, 2, 4])
    @pytest.mark.parametrize(
        "config", [*({**EDM, "noise_conditioning": told} for told in ("edm", "adm", "trigflow")), VP]
    )
    @pytest.mark.parametrize("clip", [False, True])
    def test_images_are_those_of_edms_coordinates(self, config, count, gamma, clip):
        config = {"prediction_type": "epsilon", "sigma_data": 0.7, "clip_denoised": clip, "gamma": gamma, **config}
        edm = EDMConsistencyScheduler(boundary_scalings="edm", sigma_min=0.05, **config)
        fields = {name: value for name, value in edm.config.items() if not name.startswith("_")}
        ours, results = TrigFlowConsistencyScheduler.from_config(fields), []
        for scheduler in (edm, ours):
            scheduler.set_timesteps(sigmas=[config["sigma_max"], 3.0, 0.821, 0.1][:count])
            results.append(sampled(scheduler, normal(0), torch.Generator().manual_seed(3)))
        torch.testing.assert_close(*results, rtol=1e-8, atol=1e-8)

    def test_pure_noise(self):
        """Where the network knows it, no factor is infinite; 1.57080 counts as pi / 2."""
        scheduler = TrigFlowConsistencyScheduler(network="flow", prediction_type="flow_prediction")
        for first in (math.pi / 2, 1.57080):
            scheduler.set_timesteps(timesteps=[first])
            assert scheduler.timesteps.tolist() == pytest.approx([1000.0], abs=1e-9)
            assert scheduler.sigmas.tolist() == [math.inf, 0.0]
            x, v = normal(0), normal(1)
            shown = scheduler.scale_model_input(x, scheduler.timesteps[0])
            torch.testing.assert_close(shown, 2 * x)  # x / sigma_data is noise of variance 1
            result = scheduler.step(v, scheduler.timesteps[0], x).denoised
            torch.testing.assert_close(result, 2 * x - v, rtol=1e-9, atol=1e-9)  # x0 = noise - v


DATA = Gaussian(0.3, 0.4)


def design(steps):
    """x at pi / 2 `(N, 1)` and the noise of each step, as a population without sampling error."""
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=steps)), dtype=torch.float64)
    return 0.5 * signs[:, :1], list(signs[:, 1:].split(1, dim=1))


def run_on(answer, times, gamma=1.0):
    """The samples after every step, with f(x, t) = answer(x, t)."""
    x, noises = design(len(times))
    scheduler = TrigFlowConsistencyScheduler(gamma=gamma)
    scheduler.noise_sampler = lambda *_: noises.pop(0)
    scheduler.set_timesteps(timesteps=[*times, 0])
    samples = []
    for t in times:
        output = (math.cos(t) * x - answer(x, torch.tensor([t]).double())) / math.sin(t)  # sigma_data F
        x = scheduler.step(output, torch.tensor(t), x).prev_sample
        samples.append(x)
    return samples


class TestOracle:
    """Every step is linear on N(0.3, 0.4^2), so all points of {-1, 1}^steps as noise give its law without an error."""

    def test_the_law_after_every_step(self):
        process, times = TrigFlow(0.5), [math.pi / 2, 1.1, 0.6, 0.1]
        samples = run_on(lambda x, t: DATA.consistency(process, x, t), times)
        for x, t in zip(samples, [*times[1:], 0.0], strict=True):
            assert x.mean().item() == pytest.approx(0.3 * math.cos(t), abs=1e-6)
            variance = (0.4 * math.cos(t)) ** 2 + (0.5 * math.sin(t)) ** 2
            assert x.var(correction=0).item() == pytest.approx(variance, abs=1e-6)

    def test_without_fresh_noise_a_denoiser_follows_the_flow(self):
        """gamma = 0 is the first-order solver: its error falls with the number of steps, to the exact flow."""
        process, errors = TrigFlow(0.5), []
        exact = DATA.consistency(process, torch.tensor([[-0.5], [0.5]]).double(), torch.tensor([math.pi / 2]))
        for count in (20, 40):
            times = [math.pi / 2 * k / count for k in range(count, 0, -1)]
            scheduler = TrigFlowConsistencyScheduler(gamma=0.0)
            scheduler.set_timesteps(timesteps=times)
            x = torch.tensor([[-0.5], [0.5]], dtype=torch.float64)
            for t in times:
                D = DATA.predict(process, x, torch.tensor([t]).double()).x0
                x = scheduler.step((math.cos(t) * x - D) / math.sin(t), torch.tensor(t), x).prev_sample
            errors.append((x - exact).abs().max().item())
        assert errors[1] < 0.013
        assert errors[0] / errors[1] == pytest.approx(2.0, abs=0.15)

    def test_the_deterministic_step(self):
        scheduler = TrigFlowConsistencyScheduler(gamma=0.0)
        scheduler.set_timesteps(timesteps=[1.3, 0.4])
        x, output = normal(0), normal(1)
        result = scheduler.step(output, scheduler.timesteps[0], x).prev_sample
        torch.testing.assert_close(result, math.cos(0.9) * x - math.sin(0.9) * output, rtol=1e-9, atol=1e-9)


class TestNoise:
    def test_the_last_step_draws_nothing(self):
        for gamma, draws in ((1.0, 2), (0.3, 2), (0.0, 0)):
            generator = torch.Generator().manual_seed(0)
            scheduler = TrigFlowConsistencyScheduler(**EDM, gamma=gamma)
            scheduler.set_timesteps(3)
            sampled(scheduler, normal(0), generator)
            expected = torch.Generator().manual_seed(0)
            for _ in range(draws):
                torch.randn(SHAPE, generator=expected, dtype=torch.float64)
            assert torch.equal(generator.get_state(), expected.get_state())

    @pytest.mark.parametrize(("config", "seen"), [(None, ()), *NETWORKS])
    def test_add_noise_at_any_timestep(self, config, seen):
        scheduler = TrigFlowConsistencyScheduler(sigma_data=0.7, **(config or {}))
        t = torch.tensor([0.2, 1.3], dtype=torch.float64)
        told = TrigFlowView(0.7, *seen).told(t)
        x, noise = normal(0), normal(1)
        found = scheduler.add_noise(x, noise, told.float())
        torch.testing.assert_close(found, diffuse(TrigFlow(0.7), x, noise, t), rtol=1e-5, atol=1e-5)

    def test_every_precision_is_computed_in_double(self):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            scheduler = TrigFlowConsistencyScheduler(**EDM)
            scheduler.set_timesteps(timesteps=[1.3])
            x, output = normal(0).to(dtype), normal(1).to(dtype)
            expected = math.cos(1.3) * x.double() - 0.5 * math.sin(1.3) * output.double()
            assert torch.equal(scheduler.step(output, scheduler.timesteps[0], x).denoised, expected.to(dtype))


class TestTimes:
    def test_of_a_student(self):
        """t_max = arctan(80 / 0.5) (2410.11081, Sec. 3.1); sigma 0.821 is t = 1.0238."""
        scheduler = TrigFlowConsistencyScheduler(**EDM, recommended_sigmas=[80.0, 0.821])
        for asked in ({}, {"num_inference_steps": 2}, {"sigmas": [80.0, 0.821]}):
            scheduler.set_timesteps(**asked)
            assert scheduler.timesteps.tolist() == pytest.approx([1.564546, 1.023773], abs=1e-5)
            assert scheduler.sigmas.tolist() == pytest.approx([80.0, 0.821, 0.0], rel=1e-9)
            assert scheduler.init_noise_sigma == pytest.approx(0.49999023, abs=1e-7)
        scheduler.set_timesteps(2, max_timesteps=1.5, intermediate_timesteps=1.1)
        assert scheduler.timesteps.tolist() == [1.5, 1.1]
        scheduler.set_timesteps(1)
        assert scheduler.timesteps.tolist() == pytest.approx([1.564546], abs=1e-6)
        assert (scheduler.num_inference_steps, scheduler.custom_timesteps, len(scheduler)) == (1, False, 1000)

    def test_most_noise_is_what_the_network_knows(self):
        scheduler = TrigFlowConsistencyScheduler(network="vp", prediction_type="epsilon")
        assert scheduler.sigmas.tolist() == pytest.approx([14.6146, 0.0], abs=1e-3)
        assert scheduler.timesteps.tolist() == pytest.approx([999.0], abs=1e-6)

    def test_begin_index_wins_over_the_timestep(self):
        scheduler = TrigFlowConsistencyScheduler(**EDM)
        scheduler.set_timesteps(4)
        assert (scheduler.step_index, scheduler.begin_index) == (None, None)
        scheduler.set_begin_index(2)
        scheduler.step(normal(0), scheduler.timesteps[0], normal(0))
        assert (scheduler.step_index, scheduler.begin_index) == (3, 2)

    @pytest.mark.parametrize(("config", "seen"), NETWORKS)
    def test_a_timestep_finds_its_place_also_in_float32(self, config, seen):
        scheduler = TrigFlowConsistencyScheduler(**config)
        scheduler.set_timesteps(4)
        scheduler.step(normal(0), scheduler.timesteps[2].float(), normal(0))
        assert scheduler.step_index == 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"network": "rf"}, "network must be one of None, edm, vp, flow; got 'rf'"),
        ({"prediction_type": "epsilon"}, "prediction_type must be one of trigflow; got 'epsilon'"),
        ({"network": "vp"}, "prediction_type must be one of epsilon, v_prediction, sample; got 'trigflow'"),
        ({"noise_conditioning": "log"}, "noise_conditioning must be one of None, edm, adm, trigflow; got 'log'"),
        ({"sigma_data": 0.0}, "sigma_data and sigma_max must be positive, got 0.0 and None"),
        ({"sigma_max": -1.0}, "must be positive"),
        ({**VP, "prediction_type": "sample", "sigma_max": 80.0}, "knows sigmas up to 14.615, but sigma_max is 80.0"),
        ({"gamma": 1.5}, "gamma must be from 0"),
        ({**EDM, "recommended_sigmas": [81.0]}, "sigmas must be numbers that descend, from at most 80.0"),
    ],
)
def test_refuses_a_config(config, message):
    with pytest.raises(ValueError, match=message):
        TrigFlowConsistencyScheduler(**config)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "Give num_inference_steps, timesteps or sigmas"),
        ({"timesteps": [1.5], "sigmas": [80.0]}, "only one of timesteps, sigmas and max_timesteps"),
        ({"timesteps": [1.5, 0.0], "max_timesteps": 1.5}, "only one of timesteps, sigmas and max_timesteps"),
        ({"num_inference_steps": 3, "timesteps": [1.5, 0.0]}, "num_inference_steps is 3, but 1 times are given"),
        ({"num_inference_steps": 0}, "whole number of at least 1, got 0"),
        ({"num_inference_steps": 1.5}, "whole number of at least 1, got 1.5"),
        ({"timesteps": [999, 499]}, r"are times from 1\.5708 to 0, no integer indices; got \[999, 499\]"),
        ({"timesteps": [0.4, 1.3]}, "Times must be numbers that descend"),
        ({"timesteps": [1.6]}, r"from at most 1\.5708 to above 0; got \[1\.6\]"),
        ({"timesteps": [1.3, -0.1]}, "Times must be numbers that descend"),
        ({"timesteps": [0.0]}, "Times must be numbers that descend"),
        ({"timesteps": [math.nan]}, "Times must be numbers"),
        ({"num_inference_steps": 2, "max_timesteps": 3.0}, "Times must be numbers that descend, from at most"),
        ({"sigmas": [0.8, 80.0]}, "sigmas must be numbers that descend"),
        ({"num_inference_steps": 2, "gamma": -1}, "gamma must be from 0"),
    ],
)
def test_refuses_a_schedule(asked, message):
    with pytest.raises(ValueError, match=message):
        TrigFlowConsistencyScheduler().set_timesteps(**asked)


def test_refuses_a_step():
    scheduler, x = TrigFlowConsistencyScheduler(**EDM), normal(0)
    scheduler.set_timesteps(1)
    for integer in (0, torch.tensor(1)):
        with pytest.raises(ValueError, match=r"of TrigFlowConsistencyScheduler are what .* not integer indices"):
            scheduler.step(x, integer, x)
    with pytest.raises(ValueError, match=r"Timestep 1 \(time 1\) is not in the schedule of times \[1.56"):
        scheduler.step(x, 1.0, x)
    scheduler.step(x, scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match="All 1 steps are done"):
        scheduler.step(x, scheduler.timesteps[0], x)
