"""The scheduler of flow-matching students: stock's steps where stock is right, none of its defects, in its pipelines."""

import math

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.utils.torch_utils import randn_tensor
from oracles import Gaussian

from cm_diffusers.diffusion.process import RectifiedFlow, diffuse
from cm_diffusers.pipelines.stock import stock_entry
from cm_diffusers.schedulers import FlowConsistencyScheduler


SHAPES = [(2, 4, 8, 8), (2, 16, 64), (2, 4, 3, 4, 4)]  # images, packed, video
# u = 1 - i/n, k u / (1 + (k - 1) u) by hand.
GRIDS = {
    (1.0, 4): [1.0, 0.75, 0.5, 0.25],
    (3.0, 1): [1.0],
    (3.0, 2): [1.0, 0.75],
    (3.0, 4): [1.0, 0.9, 0.75, 0.5],
    (3.0, 8): [1.0, 21 / 22, 0.9, 5 / 6, 0.75, 9 / 14, 0.5, 0.3],
    (5.0, 4): [1.0, 0.9375, 5 / 6, 0.625],
}
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-6, torch.bfloat16: 1e-2}  # stock has float32 times


def normal(seed, shape=SHAPES[0], dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def even(count):
    return [1 - i / count for i in range(count)]


def network(x, t):
    """Some velocity that depends on all it is given."""
    return torch.sin(3 * x) + torch.cos(t / 100).to(x.dtype)


def sampled(scheduler, x, **step):
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, **step).prev_sample
    return x


def ready(shift=3.0, count=4, **config):
    scheduler = FlowConsistencyScheduler(shift=shift, **config)
    scheduler.set_timesteps(count)
    return scheduler


class TestGrid:
    @pytest.mark.parametrize(("asked", "times"), GRIDS.items())
    def test_shifted_once_in_float64(self, asked, times):
        scheduler = ready(*asked)
        assert scheduler.sigmas.dtype == torch.float64
        assert scheduler.sigmas.tolist() == pytest.approx([*times, 0.0], abs=1e-15)
        assert scheduler.timesteps.dtype == torch.float32  # also for half-precision samples: no time is rounded
        assert scheduler.timesteps.tolist() == pytest.approx([1000 * t for t in times], rel=1e-7)
        assert (scheduler.init_noise_sigma, scheduler.order, len(scheduler)) == (1.0, 1, 1000)
        assert scheduler.num_inference_steps == asked[1]

    def test_grids_are_nested(self):
        grids = {count: set(ready(5.0, count).sigmas.tolist()) for count in (1, 2, 4, 8, 40)}
        assert grids[1] < grids[2] < grids[4] < grids[8] < grids[40]

    @pytest.mark.parametrize("given", [even(4), torch.tensor(even(4)), [*even(4)[:3], 0.2]])
    def test_sigmas_are_shifted_once_whatever_mu(self, given):
        scheduler, stock = ready(), FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(sigmas=given, mu=1.15, device="cpu")
        stock.set_timesteps(sigmas=list(map(float, given)))
        torch.testing.assert_close(scheduler.sigmas.float(), stock.sigmas, rtol=0, atol=1e-7)
        torch.testing.assert_close(scheduler.timesteps, stock.timesteps, rtol=1e-6, atol=0)

    def test_sigmas_and_timesteps_must_agree(self):
        scheduler = ready()
        scheduler.set_timesteps(sigmas=even(4), timesteps=[1000, 900, 750, 500])
        assert scheduler.sigmas.tolist() == [1.0, 0.9, 0.75, 0.5, 0.0]
        with pytest.raises(ValueError, match=r"The timesteps are those of sigmas .*0\.75, 0\.5, 0\.25\], but sigmas"):
            scheduler.set_timesteps(sigmas=even(4), timesteps=[1000, 750, 500, 250])

    def test_recommended(self):
        scheduler = ready(recommended_sigmas=[1.0, 0.5])
        for asked in (
            {},
            {"num_inference_steps": 2},
            {"sigmas": [1.0, 0.5]},
        ):  # the last as Flux's pipeline asks for 2
            scheduler.set_timesteps(**asked)
            assert scheduler.sigmas.tolist() == [1.0, 0.75, 0.0]
        scheduler.set_timesteps(4)
        assert scheduler.sigmas.tolist() == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0], abs=1e-15)
        uneven = FlowConsistencyScheduler(shift=1.0, recommended_sigmas=[0.9, 0.3])
        uneven.set_timesteps(sigmas=[1.0, 0.5], mu=0.9)
        assert uneven.sigmas.tolist() == [0.9, 0.3, 0.0]

    def test_strength(self):
        """As noisy as stock's last half of eight steps, in as many steps as are asked for."""
        scheduler = ready()
        scheduler.set_timesteps(4, strength=0.5)
        assert scheduler.sigmas.tolist() == pytest.approx(ready(3.0, 8).sigmas[4:].tolist(), abs=1e-15)


class TestStockDefects:
    """Each of them is still there; ours is right."""

    @pytest.mark.parametrize("kind", [FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler])
    @pytest.mark.parametrize(
        ("shift", "wrong"), [(3.0, [1, 0.8577, 0.6022, 0.0089]), (5.0, [1, 0.9099, 0.717, 0.0244])]
    )
    def test_double_shift(self, kind, shift, wrong):
        stock = kind(shift=shift)
        stock.set_timesteps(4)
        assert stock.sigmas.tolist() == pytest.approx([*wrong, 0], abs=2e-3)
        assert ready(shift).sigmas.tolist() == pytest.approx([*GRIDS[shift, 4], 0], abs=1e-15)

    @pytest.mark.parametrize("kind", [FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler])
    def test_timesteps_told_are_not_those_of_the_state(self, kind):
        told, stock, ours = [1000.0, 750.0, 500.0, 250.0], kind(shift=3.0), ready()
        for scheduler in (stock, ours):
            scheduler.set_timesteps(timesteps=told)
            assert scheduler.timesteps.tolist() == told
        assert stock.sigmas.tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0], abs=1e-6)
        assert ours.sigmas.tolist() == [1, 0.75, 0.5, 0.25, 0]

    @pytest.mark.parametrize("stochastic", [{"stochastic_sampling": True}, None])
    def test_noise_at_the_last_step(self, stochastic):
        if stochastic:
            stock = FlowMatchEulerDiscreteScheduler(shift=3.0, **stochastic)
        else:
            stock = FlowMatchLCMScheduler(shift=3.0)
        stock.set_timesteps(sigmas=even(2))
        x, generator = normal(0), torch.Generator().manual_seed(3)
        for scheduler, draws in ((stock, True), (ready(count=2), False)):
            scheduler.step(x, scheduler.timesteps[0], x, generator=generator)
            before = generator.get_state(), torch.get_rng_state()
            scheduler.step(x, scheduler.timesteps[1], x, generator=generator)
            assert torch.equal(before[0], generator.get_state()) is not draws
            assert torch.equal(before[1], torch.get_rng_state())

    def test_nothing_but_the_sample_is_returned(self):
        stock, ours, x = FlowMatchLCMScheduler(), ready(), normal(0)
        stock.set_timesteps(4)
        assert set(stock.step(x, stock.timesteps[0], x)) == {"prev_sample"}
        result = ours.step(normal(1), ours.timesteps[0], x)
        torch.testing.assert_close(result.denoised, x - normal(1))
        assert not hasattr(stock, "add_noise")

    def test_scale_noise_off_the_grid_and_in_half_precision(self):
        stock, ours = FlowMatchEulerDiscreteScheduler(shift=3.0), ready()
        stock.set_timesteps(sigmas=even(4))
        x, noise = normal(0), normal(1)
        off, on = torch.tensor([123.0, 1000.0]), torch.tensor([900.0, 900.0])
        with pytest.raises(IndexError):
            stock.scale_noise(x, off, noise)
        expected = torch.stack([0.877 * x[0] + 0.123 * noise[0], noise[1]])
        torch.testing.assert_close(ours.scale_noise(x, off, noise), expected)
        assert torch.equal(ours.add_noise(x, noise, off), ours.scale_noise(x, off, noise))
        x, noise = x.bfloat16(), noise.bfloat16()
        expected = (0.1 * x.double() + 0.9 * noise.double()).bfloat16()
        assert (ours.scale_noise(x, on, noise) != expected).float().mean() < 0.01  # where float32 rounds before
        rounded = stock.scale_noise(x, stock.timesteps[1:2].expand(2), noise)
        assert (rounded != expected).float().mean() > 0.2

    def test_inverted_sigmas_are_refused(self):
        for wrong in ({"invert_sigmas": True}, {"shift_terminal": 0.02}, {"use_dynamic_shifting": True}):
            stock = FlowMatchEulerDiscreteScheduler(shift=3.0, **wrong)
            with pytest.raises(ValueError, match="A student has one shift of its own"):
                FlowConsistencyScheduler.from_config(stock.config)

    def test_terminal_stretch_of_one_step_is_nan(self):
        stock = FlowMatchEulerDiscreteScheduler(shift_terminal=0.02)
        stock.set_timesteps(sigmas=[1.0])
        assert math.isnan(stock.sigmas[0])
        assert ready(1.0, 1).sigmas.tolist() == [1.0, 0.0]


class TestEqualsStock:
    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize("count", [1, 2, 4, 8])
    @pytest.mark.parametrize("gamma", [0.0, 1.0])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_euler_given_sigmas(self, shape, gamma, count, dtype):
        stock = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=gamma == 1)
        ours = ready(gamma=gamma)
        generators = [torch.Generator().manual_seed(3) for _ in range(2)]
        if dtype == torch.float64:
            ours.noise_sampler = lambda shape, generator, device, dtype: randn_tensor(shape, generator, device)
        for scheduler in (stock, ours):
            scheduler.set_timesteps(sigmas=even(count))
        x = normal(0, shape).to(dtype)
        for i, t in enumerate(stock.timesteps):
            output = normal(i + 1, shape).to(dtype)
            wide = torch.promote_types(
                dtype, torch.float32
            )  # in half precision stock rounds its step before it is added
            expected = stock.step(output.to(wide), t, x.to(wide), generator=generators[0]).prev_sample.to(dtype)
            actual = ours.step(output, t, x, generator=generators[1]).prev_sample
            assert actual.dtype == dtype
            torch.testing.assert_close(actual, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
            x = expected

    @pytest.mark.parametrize("count", [1, 2, 4, 8])
    def test_flow_map_euler_by_number(self, count):
        stock, ours = FlowMapEulerDiscreteScheduler(shift=5.0), ready(5.0, count, gamma=0.0)
        stock.set_timesteps(count)
        torch.testing.assert_close(ours.sigmas, stock.sigmas, rtol=0, atol=1e-15)
        x = normal(0, dtype=torch.float64)
        for t in ours.timesteps:
            v = network(x, t)
            expected = stock.step(v, t, x).prev_sample
            x = ours.step(v, t, x).prev_sample
            torch.testing.assert_close(x, expected)

    def test_a_generator_per_row(self):
        x, generators = normal(0), lambda: [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        both = sampled(ready(), x, generator=generators())
        alone = sampled(ready(), x[1:], generator=generators()[1:])
        torch.testing.assert_close(both[1:], alone)

    def test_between(self):
        """s = (1 - gamma) t', and fresh noise from there: a law of its own for each gamma, checked on the coefficients."""
        ours, t, following = ready(gamma=0.4), 0.9, 0.75
        s = 0.6 * following
        a = (1 - following) / (1 - s)
        b = math.sqrt(following**2 - (a * s) ** 2)
        x, v, z = (normal(seed, dtype=torch.float64) for seed in range(3))
        ours.noise_sampler = lambda *_: z
        ours.set_begin_index(1)
        actual = ours.step(v, ours.timesteps[1], x)
        assert torch.equal(actual.denoised, x - t * v)
        torch.testing.assert_close(actual.prev_sample, a * (x + (s - t) * v) + b * z)


class TestGaussian:
    """The exact consistency function of N(0.5, 1.3^2) in four steps of shift 3."""

    N = 200_000

    @pytest.mark.parametrize(("gamma", "std"), [(1.0, 1.3), (0.5, 1.481), (0.0, 2.095)])
    def test_standard_deviation_of_the_samples(self, gamma, std):
        data, scheduler = Gaussian(0.5, 1.3), ready(gamma=gamma)
        x = normal(0, (1, self.N), torch.float64)
        for t in scheduler.timesteps:
            level = t.double().reshape(1) / 1000
            f = data.consistency(RectifiedFlow(), x, level)
            result = scheduler.step((x - f) / level, t, x)
            torch.testing.assert_close(result.denoised, f, rtol=1e-6, atol=1e-6)
            x = result.prev_sample
        assert x.std().item() == pytest.approx(std, abs=3 * std / math.sqrt(2 * self.N) + 5e-4)
        assert x.mean().item() == pytest.approx(0.5, abs=3 * std / math.sqrt(self.N))

    @pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
    def test_the_exact_flow_map_keeps_the_law(self, gamma):
        """Its velocity is the mean one from t to s, which a step of this scheduler goes along."""
        data, process, scheduler = Gaussian(0.5, 1.3), RectifiedFlow(), ready(gamma=gamma)
        x = normal(0, (1, self.N), torch.float64)
        for t, following in zip(scheduler.sigmas[:-1], scheduler.sigmas[1:], strict=True):
            s = (1 - gamma) * following
            v = (data.flow(process, x, t.reshape(1), s.reshape(1)) - x) / (s - t)
            x = scheduler.step(v, 1000 * t, x).prev_sample
        assert x.std().item() == pytest.approx(1.3, abs=4 * 1.3 / math.sqrt(2 * self.N))


class TestOwnNoise:
    """Without a generator what is sampled from decides all; torch's generator is not touched."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_a_row_alone_is_the_row_in_a_batch(self, shape, dtype):
        x, state = normal(0, shape).to(dtype), torch.get_rng_state()
        together, scheduler = sampled(ready(), x), ready()
        for row in range(2):
            scheduler.set_timesteps(4)
            assert torch.equal(sampled(scheduler, x[row : row + 1]), together[row : row + 1])
        assert torch.equal(torch.get_rng_state(), state)

    def test_the_noise_is_standard_normal_and_new_in_every_step_and_row(self):
        scheduler, seen = ready(count=3), []
        x = normal(0, (2, 50_000))
        for t, following in zip(scheduler.timesteps, scheduler.sigmas[1:].tolist(), strict=True):
            result = scheduler.step(torch.zeros_like(x), t, x)
            if following:
                seen.extend((result.prev_sample - (1 - following) * result.denoised) / following)
            x = result.prev_sample
        for noise in seen:
            assert noise.mean().item() == pytest.approx(0, abs=0.02)
            assert noise.std().item() == pytest.approx(1, abs=0.02)
        correlations = torch.corrcoef(torch.stack([*seen, *normal(0, (2, 50_000))])) - torch.eye(6)
        assert correlations.abs().max() < 0.02

    def test_other_latents_have_other_noise(self):
        x = normal(0)
        y = x.clone()
        y[0, 0, 0, 0] += 1e-6
        a, b = sampled(ready(), x), sampled(ready(), y)
        assert (a[0] - b[0]).abs().mean() > 0.1
        assert torch.equal(a[1], b[1])

    def test_a_generator_wins(self):
        x, results = (
            normal(0),
            [sampled(ready(), normal(0), generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)],
        )
        assert torch.equal(results[0], results[1])
        assert not torch.allclose(results[0], results[2])
        assert not torch.allclose(results[0], sampled(ready(), x))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_vae():
    return AutoencoderKL(
        block_out_channels=(8,), latent_channels=4, norm_num_groups=4, shift_factor=0.1, scaling_factor=0.7
    ).eval()


def flux(cls=FluxPipeline):
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    vae = tiny_vae()
    return quiet(cls(FlowConsistencyScheduler(shift=3.0), vae, None, None, None, None, transformer.eval()))


def sd3(cls=StableDiffusion3Pipeline):
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    towers = dict.fromkeys(
        ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    )
    return quiet(cls(transformer.eval(), FlowConsistencyScheduler(shift=3.0), tiny_vae(), **towers))


def wan():
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=256,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return quiet(WanPipeline(None, None, None, FlowConsistencyScheduler(shift=5.0), transformer.eval()))


def ask(pipe, generator=None, rows=slice(0, 2), **options):
    """Latents of these rows of a batch of two prompts."""
    embeds, pooled = normal(5, (2, 5, 16))[rows], normal(6, (2, 16))[rows]
    size = {"height": 64, "width": 64} if isinstance(pipe, WanPipeline) else {}
    if isinstance(pipe, WanPipeline):
        options |= {"num_frames": 5, "guidance_scale": 1.0}
    else:
        options |= {"pooled_prompt_embeds": pooled}
        size = {} if isinstance(pipe, StableDiffusion3Img2ImgPipeline) else {"height": 8, "width": 8}
    if isinstance(pipe, StableDiffusion3Pipeline | StableDiffusion3Img2ImgPipeline):
        options |= {"guidance_scale": 1.0}
    asked = {"num_inference_steps": 4, **size, **options}
    return pipe(prompt_embeds=embeds, generator=generator, output_type="latent", **asked)[0]


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


@pytest.mark.parametrize("make", [flux, sd3, wan])
class TestStockPipelines:
    def test_the_same_generator_the_same_image(self, make):
        pipe = make()
        first, again, other = (ask(pipe, seeds(seed)[0]) for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert (first - other).abs().mean() > 0.1
        assert first.isfinite().all()

    def test_a_row_alone_is_the_row_in_a_batch(self, make):
        pipe = make()
        together = ask(pipe, seeds(1, 2))
        alone = ask(pipe, seeds(2), slice(1, 2))
        torch.testing.assert_close(alone, together[1:], rtol=1e-5, atol=1e-5)

    def test_the_times_are_the_students(self, make):
        pipe, seen = make(), []
        ask(pipe, seeds(1)[0], callback_on_step_end=lambda pipe, i, t, kept: seen.append(float(t)) or kept)
        shift = pipe.scheduler.config.shift
        assert seen == pytest.approx([1000 * t for t in GRIDS[shift, 4]], rel=1e-6)

    def test_without_noise_it_is_euler_on_the_grid(self, make):
        pipe = make()
        shift = pipe.scheduler.config.shift
        pipe.scheduler = FlowConsistencyScheduler(shift=shift, gamma=0.0)
        ours = ask(pipe, seeds(1)[0])
        stock = stock_entry(pipe.scheduler, 4, SIGMAS[make])
        pipe.scheduler = stock.scheduler
        torch.testing.assert_close(ours, ask(pipe, seeds(1)[0], **stock.arguments), rtol=1e-5, atol=1e-5)


SIGMAS = {flux: "passed", sd3: "accepted", wan: "unknown"}


def test_a_saved_pipeline_keeps_it(tmp_path):
    pipe = sd3()
    pipe.scheduler = FlowConsistencyScheduler(shift=5.0, gamma=0.5)
    pipe.save_pretrained(tmp_path)
    towers = {name: None for name, part in pipe.components.items() if part is None}
    again = quiet(StableDiffusion3Pipeline.from_pretrained(tmp_path, **towers))
    assert type(again.scheduler) is FlowConsistencyScheduler
    assert torch.equal(ask(again, seeds(1)[0]), ask(pipe, seeds(1)[0]))


@pytest.mark.parametrize("make", [sd3, flux])
def test_in_half_precision_no_time_is_rounded(make):
    """833.3 would be 832; latents of bfloat16 stay such."""
    pipe, seen = make().to(torch.bfloat16), []
    pipe.scheduler = FlowConsistencyScheduler(shift=5.0)
    embeds = {"prompt_embeds": normal(5, (1, 5, 16)).bfloat16(), "pooled_prompt_embeds": normal(6, (1, 16)).bfloat16()}
    first, again = (
        pipe(
            **embeds,
            num_inference_steps=4,
            guidance_scale=1.0,
            height=8,
            width=8,
            generator=seeds(1)[0],
            output_type="latent",
            callback_on_step_end=lambda pipe, i, t, kept: seen.append(float(t)) or kept,
        ).images
        for _ in range(2)
    )
    assert seen == pytest.approx(2 * [1000.0, 937.5, 2500 / 3, 625.0], rel=1e-7)
    assert first.dtype == torch.bfloat16
    assert torch.equal(first, again)


def test_stock_noise_does_not_follow_the_generator_of_flux():
    """The defect that `TestOwnNoise` is about."""
    pipe = flux()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    first, again = (ask(pipe, seeds(1)[0]) for _ in range(2))
    assert (first - again).abs().mean() > 0.1


class TestImageToImage:
    """`strength` of the stock pipelines, which use `scale_noise` and `set_begin_index`."""

    @pytest.mark.parametrize("make", [flux, sd3])
    @pytest.mark.parametrize(("strength", "left"), [(1.0, 4), (0.5, 2), (0.25, 1)])
    def test_equals_euler_given_sigmas(self, make, strength, left):
        pipe = make(FluxImg2ImgPipeline if make is flux else StableDiffusion3Img2ImgPipeline)
        image, options = normal(9, (2, 4, 8, 8)), {"strength": strength}
        if make is flux:
            image = normal(9, (2, 3, 8, 8)).clamp(-1, 1)
        results, seen = [], []
        note = lambda pipe, i, t, kept: seen.append(float(t)) or kept  # noqa: E731
        for scheduler in (
            FlowConsistencyScheduler(shift=3.0, gamma=0.0),
            stock_entry(FlowConsistencyScheduler(shift=3.0, gamma=0.0), 4, "passed").scheduler,
        ):
            pipe.scheduler = scheduler
            given = {"sigmas": even(4)}
            results.append(ask(pipe, seeds(1)[0], image=image, callback_on_step_end=note, **given, **options))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
        assert seen == pytest.approx(2 * [1000, 900, 750, 500][-left:], rel=1e-6)

    @pytest.mark.parametrize("make", [flux, sd3])
    def test_reproducible_with_fresh_noise(self, make):
        pipe = make(FluxImg2ImgPipeline if make is flux else StableDiffusion3Img2ImgPipeline)
        image = normal(9, (2, 3, 8, 8)).clamp(-1, 1) if make is flux else normal(9, (2, 4, 8, 8))
        first, again, other = (ask(pipe, seeds(seed)[0], image=image, strength=0.75) for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert (first - other).abs().mean() > 0.05


class TestConfig:
    def test_save_and_load(self, tmp_path):
        ours = FlowConsistencyScheduler(shift=3.158, gamma=0.5, recommended_sigmas=[1.0, 0.4])
        ours.save_pretrained(tmp_path)
        again = FlowConsistencyScheduler.from_pretrained(tmp_path)
        by_config = FlowConsistencyScheduler.from_config(ours.config)
        for scheduler in (again, by_config):
            assert (scheduler.config.shift, scheduler.config.gamma) == (3.158, 0.5)
            assert scheduler.config.recommended_sigmas == [1.0, 0.4]
        assert FlowConsistencyScheduler.from_config(ours.config, gamma=1.0).config.shift == 3.158
        for scheduler in (ours, again):
            scheduler.set_timesteps()
        assert torch.equal(sampled(ours, normal(0)), sampled(again, normal(0)))

    def test_stock_pipelines_find_what_they_read(self):
        config = FlowConsistencyScheduler(shift=3.0).config
        assert config.get("base_image_seq_len", 256) == 256
        assert not config.get("use_dynamic_shifting", None)
        assert not hasattr(config, "use_flow_sigmas")
        assert config.num_train_timesteps == 1000

    def test_the_shift_is_never_guessed(self):
        with pytest.raises(TypeError, match="shift"):
            FlowConsistencyScheduler.from_config({"flow_shift": 5.0, "use_flow_sigmas": True})

    @pytest.mark.parametrize("gamma", [0.0, 1.0])
    @pytest.mark.parametrize("sigmas", ["passed", "accepted", "unknown"])
    def test_stock_entries_carry_everything(self, sigmas, gamma, tmp_path):
        ours = FlowConsistencyScheduler(shift=5.0, gamma=gamma, recommended_sigmas=[1.0, 0.5])
        entry, _ = stock_entry(ours, 4, sigmas)
        entry.save_pretrained(tmp_path)
        stock = type(entry).from_pretrained(tmp_path)
        again = FlowConsistencyScheduler.from_config(stock.config)
        fields = {name: value for name, value in ours.config.items() if not name.startswith("_")}
        assert {name: again.config[name] for name in fields} == fields

    @pytest.mark.parametrize("steps", [1, 2, 4, 8])
    @pytest.mark.parametrize(
        ("sigmas", "gamma", "kind"),
        [
            ("passed", 1.0, FlowMatchEulerDiscreteScheduler),
            ("passed", 0.0, FlowMatchEulerDiscreteScheduler),
            ("accepted", 1.0, FlowMatchEulerDiscreteScheduler),
            ("accepted", 0.0, FlowMapEulerDiscreteScheduler),
            ("unknown", 1.0, FlowMatchEulerDiscreteScheduler),
            ("unknown", 0.0, FlowMapEulerDiscreteScheduler),
        ],
    )
    def test_stock_entries_have_the_times(self, sigmas, gamma, kind, steps):
        stock, arguments = stock_entry(FlowConsistencyScheduler(shift=3.0, gamma=gamma), steps, sigmas)
        assert type(stock) is kind
        if sigmas == "passed":  # what those pipelines make of the number
            assert arguments == {"num_inference_steps": steps}
            arguments = {"sigmas": even(steps), "mu": 1.15}
        stock.set_timesteps(**arguments)
        expected = ready(3.0, steps).sigmas[:-1].tolist()
        assert stock.sigmas[:steps].tolist() == pytest.approx(expected, abs=6e-3)
        if not (sigmas == "unknown" and gamma):
            assert stock.sigmas.tolist() == pytest.approx([*expected, 0], abs=1e-6)
        if kind is FlowMatchEulerDiscreteScheduler:
            assert stock.config.stochastic_sampling is (gamma > 0)

    def test_stock_entries_keep_recommended_sigmas(self):
        ours = FlowConsistencyScheduler(shift=3.0, recommended_sigmas=[1.0, 0.4])
        for sigmas in ("passed", "accepted"):
            assert stock_entry(ours, 2, sigmas).arguments == {"sigmas": [1.0, 0.4]}
        assert stock_entry(ours, 2, "unknown").arguments == {"num_inference_steps": 3}


class TestContract:
    """What diffusers' own suite of schedulers asks of any."""

    def test_inputs_and_outputs(self):
        scheduler, x = ready(), normal(0)
        assert scheduler.scale_model_input(x, scheduler.timesteps[0]) is x
        result = scheduler.step(x, scheduler.timesteps[0], x, return_dict=False)
        scheduler.set_timesteps(4)
        same = scheduler.step(x, scheduler.timesteps[0], x)
        assert isinstance(result, tuple)
        assert torch.equal(result[0], same.prev_sample)
        assert torch.equal(result[1], same.denoised)
        assert result[0].shape == x.shape
        assert (scheduler.step_index, scheduler.begin_index) == (1, None)

    def test_begin_index(self):
        x, scheduler = normal(0), ready(gamma=0.0)
        by_time = scheduler.step(x, scheduler.timesteps[2], x).prev_sample
        scheduler.set_timesteps(4)
        scheduler.set_begin_index(2)
        assert torch.equal(scheduler.step(x, scheduler.timesteps[2], x).prev_sample, by_time)
        torch.testing.assert_close(by_time, 0.75 * x)  # x + (0.5 - 0.75) x

    def test_trainers_noise(self):
        x, noise, t = normal(0), normal(1), torch.tensor([0.9, 0.3])
        torch.testing.assert_close(ready().add_noise(x, noise, 1000 * t), diffuse(RectifiedFlow(), x, noise, t))

    def test_other_units_of_time(self):
        scheduler = ready(num_train_timesteps=1)
        assert scheduler.timesteps.tolist() == pytest.approx([1.0, 0.9, 0.75, 0.5])
        assert sampled(scheduler, normal(0)).isfinite().all()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "Give num_inference_steps, sigmas or timesteps"),
        ({"num_inference_steps": 0}, "whole number of at least 1, got 0"),
        ({"num_inference_steps": 2.5}, "whole number of at least 1, got 2.5"),
        ({"num_inference_steps": 3, "sigmas": [1.0, 0.4]}, "num_inference_steps is 3, but 2 times are given"),
        ({"sigmas": [0.4, 1.0]}, "sigmas must be numbers that descend, from at most 1.0"),
        ({"sigmas": [1.0, 0.0]}, "sigmas must be numbers that descend"),
        ({"sigmas": [1000.0, 500.0]}, "sigmas must be numbers that descend"),
        ({"timesteps": [1001.0]}, "timesteps must be numbers that descend, from at most 1000.0"),
        ({"timesteps": []}, "timesteps must be numbers that descend"),
        ({"num_inference_steps": 4, "strength": 0.0}, "strength must be above 0"),
        ({"sigmas": [1.0, 0.4], "strength": 0.5}, "A strength of 0.5 goes with num_inference_steps"),
        ({"num_inference_steps": 4, "gamma": 1.5}, "gamma must be from 0"),
    ],
)
def test_refuses_a_schedule(asked, message):
    with pytest.raises(ValueError, match=message):
        FlowConsistencyScheduler(shift=3.0).set_timesteps(**asked)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"shift": 0.0}, "shift must be above 0 and finite, got 0.0"),
        ({"shift": math.inf}, "shift must be above 0 and finite"),
        ({"shift": 3.0, "gamma": -0.1}, "gamma must be from 0"),
        ({"shift": 3.0, "recommended_sigmas": [0.5, 0.75]}, "sigmas must be numbers that descend"),
    ],
)
def test_refuses_a_config(config, message):
    with pytest.raises(ValueError, match=message):
        FlowConsistencyScheduler(**config)


def test_refuses_a_step():
    scheduler, x = ready(), normal(0)
    for integer in (0, torch.tensor(900)):
        with pytest.raises(ValueError, match="not integer indices"):
            scheduler.step(x, integer, x)
    with pytest.raises(ValueError, match=r"Timestep 800 \(sigma 0\.8\) is not in the schedule"):
        scheduler.step(x, 800.0, x)
    sampled(scheduler, x)
    with pytest.raises(ValueError, match="All 4 steps are done"):
        scheduler.step(x, scheduler.timesteps[0], x)
