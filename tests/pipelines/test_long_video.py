"""The single files for long videos: clips cover them, share their noise as they say, and one clip is the stock pipeline's."""

import ast
import json
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers import AnimateDiffPipeline, DDIMScheduler, DiffusionPipeline, LCMScheduler, MotionAdapter
from tiny import tiny_pipeline, tiny_unet

from cm_diffusers import ConsistencyScheduler


ROOT = Path(__file__).parents[2]
FILES = {name: ROOT / "pipelines" / f"video_{name}.py" for name in ("co_denoising", "look_back")}
MOST, STEPS = 8, 4  # frames that the motion modules know
BAG, COAT = "a photo of a bag", "a photo of a coat"
LINEAR = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "linear"}
N1, N2 = 3, 4  # of 8 frames: 6 and 8 of 16
ALONE = """
import json, sys
import numpy as np, torch
sys.modules["cm_diffusers"] = None  # now it cannot be imported
from diffusers import DiffusionPipeline
folder, files, asked = sys.argv[1], *map(json.loads, sys.argv[2:])
for name, file in files.items():
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=file, trust_remote_code=True)
    assert type(pipe.scheduler).__name__ == "LCMScheduler"
    pipe.set_progress_bar_config(disable=True)
    frames = pipe(**asked, generator=torch.Generator().manual_seed(1), output_type="pt").frames
    np.save(f"{folder}/{name}.npy", frames.numpy())
"""


def motion_adapter() -> MotionAdapter:
    torch.manual_seed(1)
    size = {"block_out_channels": (8, 16), "motion_layers_per_block": 1, "motion_max_seq_length": MOST}
    return MotionAdapter(**size, motion_num_attention_heads=2, motion_norm_num_groups=4)


def unet():
    torch.manual_seed(0)
    return tiny_unet(block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=2)


@pytest.fixture(scope="module")
def stock() -> AnimateDiffPipeline:
    parts = tiny_pipeline(unet=unet(), scheduler=LCMScheduler(**LINEAR, steps_offset=1)).components
    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    pipe = AnimateDiffPipeline(**{name: parts[name] for name in names}, motion_adapter=motion_adapter())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folder(stock: AnimateDiffPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("student")
    stock.save_pretrained(home)
    return home


@pytest.fixture(scope="module")
def pipes(folder: Path) -> dict[str, DiffusionPipeline]:
    found = {}
    for name, file in FILES.items():
        found[name] = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(file), trust_remote_code=True)
        found[name].set_progress_bar_config(disable=True)
    return found


@pytest.fixture
def co(pipes) -> DiffusionPipeline:
    return pipes["co_denoising"]


@pytest.fixture
def back(pipes) -> DiffusionPipeline:
    return pipes["look_back"]


def module_of(pipe: DiffusionPipeline) -> ModuleType:
    return sys.modules[type(pipe).__module__]


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latents(pipe, prompt=BAG, generator=None, **asked) -> torch.Tensor:
    """(B, C, F, h, w)."""
    generator = seeded() if generator is None else generator
    return pipe(prompt, **{"num_inference_steps": STEPS, **asked}, generator=generator, output_type="latent").frames


class Seen:
    """What the network is shown and told, and each noise that is added, in the order of their use."""

    def __init__(self, pipe: DiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        self.x, self.text, self.clean, self.noise = [], [], [], []
        forward, add_noise = type(pipe.unet).forward, pipe.scheduler.add_noise

        def called(unet, x, t, encoder_hidden_states, **rest):
            self.x.append(x.clone())
            self.text.append(encoder_hidden_states)
            return forward(unet, x, t, encoder_hidden_states=encoder_hidden_states, **rest)

        def added(clean, noise, t):
            self.clean.append(clean.clone())
            self.noise.append(noise.clone())
            return add_noise(clean, noise, t)

        monkeypatch.setattr(type(pipe.unet), "forward", called)
        monkeypatch.setattr(pipe.scheduler, "add_noise", added)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch):
    return lambda pipe: Seen(pipe, monkeypatch)


class TestBoth:
    @pytest.mark.parametrize("name", FILES)
    @pytest.mark.parametrize("frames", [1, 5, MOST])
    def test_one_clip_is_the_stock_pipelines(self, pipes, stock, name: str, frames: int) -> None:
        expected = latents(stock, num_frames=frames, guidance_scale=1.0)
        torch.testing.assert_close(latents(pipes[name], num_frames=frames), expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("name", FILES)
    def test_guidance_prompts_and_frames_are_the_stock_pipelines(self, pipes, stock, name: str) -> None:
        asked = {"num_frames": 4, "num_inference_steps": 2, "guidance_scale": 1.7, "output_type": "pt"}
        generators = [[seeded(1), seeded(2)] for _ in range(2)]
        expected = stock([BAG, COAT], **asked, negative_prompt=["a dress"] * 2, generator=generators[0]).frames
        actual = pipes[name]([BAG, COAT], **asked, negative_prompt="a dress", generator=generators[1]).frames
        assert actual.shape == (2, 4, 3, 32, 32)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("name", FILES)
    def test_a_video_is_independent_of_its_batch(self, pipes, name: str) -> None:
        prompts, asked = [{0: BAG, 9: COAT}, COAT], {"num_frames": 14, "num_inference_steps": 2}
        together = latents(pipes[name], prompts, generator=[seeded(1), seeded(2)], **asked)
        assert together.shape == (2, 4, 14, 8, 8)
        for video, prompt, seed in zip(together, prompts, (1, 2), strict=True):
            alone = latents(pipes[name], prompt, generator=seeded(seed), **asked)[0]
            torch.testing.assert_close(video, alone, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("name", FILES)
    def test_the_generator_decides(self, pipes, name: str) -> None:
        first, again, other = (
            latents(pipes[name], num_frames=12, num_inference_steps=2, generator=seeded(seed)) for seed in (1, 1, 2)
        )
        torch.manual_seed(9)
        assert torch.equal(first, again)
        assert (first - other).abs().amax((0, 1, 3, 4)).min() > 1e-2

    @pytest.mark.parametrize("name", FILES)
    def test_torchs_own_generator_is_left_alone(self, pipes, name: str) -> None:
        before = torch.get_rng_state()
        latents(pipes[name], num_frames=3, num_inference_steps=2)
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize("name", FILES)
    def test_each_frame_reads_its_prompt(self, pipes, seen, name: str) -> None:
        pipe, record = pipes[name], seen(pipes[name])
        starts = {0: BAG, 7: COAT, 10: "a dress"}
        latents(pipe, starts, num_frames=13, num_inference_steps=1)
        order = {"co_denoising": [(0, 8), (4, 12), (5, 13)], "look_back": [(0, 8), (5, 13), (5, 13)]}[name]
        known = pipe.encode_prompt(list(starts.values()), "cpu", 1, False)[0]
        expected = torch.stack([known[0]] * 7 + [known[1]] * 3 + [known[2]] * 3)
        assert len(record.text) == len(order)
        for text, (start, end) in zip(record.text, order, strict=True):
            assert torch.equal(text, expected[start:end])

    @pytest.mark.parametrize("name", FILES)
    def test_other_schedulers_of_consistency_models(self, pipes, monkeypatch, name: str) -> None:
        pipe, asked = pipes[name], {"num_frames": 10, "num_inference_steps": 3}
        expected = latents(pipe, **asked)
        monkeypatch.setattr(pipe, "scheduler", ConsistencyScheduler(**LINEAR))
        torch.testing.assert_close(latents(pipe, **asked), expected, rtol=1e-4, atol=1e-4)
        for scheduler in (ConsistencyScheduler(gamma=0.3), DDIMScheduler()):
            monkeypatch.setattr(pipe, "scheduler", scheduler)
            with pytest.raises(ValueError, match=rf"^{type(scheduler).__name__} does not noise .* LCMScheduler.from"):
                latents(pipe, **asked)

    @pytest.mark.parametrize("name", FILES)
    def test_half_precision_keeps_the_digits_of_the_scheduler_s_arithmetic(self, pipes, name: str) -> None:
        """Data is a difference of two that are 15 times as large at the most noise."""
        pipe = pipes[name]
        output, x = (torch.randn(1, 4, 3, 8, 8, generator=seeded(seed)).bfloat16() for seed in (1, 2))
        pipe.scheduler.set_timesteps(2)
        for t in pipe.scheduler.timesteps:
            found = module_of(pipe).denoised(pipe, output, t, x)
            alpha = float(pipe.scheduler.alphas_cumprod[t]) ** 0.5
            expected = (x.double() - (1 - alpha**2) ** 0.5 * output.double()) / alpha
            torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
        assert pipe.scheduler.step_index is None

    @pytest.mark.parametrize("name", FILES)
    @pytest.mark.parametrize(
        ("asked", "message"),
        [
            ({"clip_frames": 9}, "clip_frames must be from 1 to the 8 frames that the motion modules know, got 9"),
            ({"clip_frames": 0}, "clip_frames must be from 1"),
            ({"num_frames": 0}, "num_frames must be a whole number of at least 1, got 0"),
            ({"num_inference_steps": 2.5}, "num_inference_steps must be a whole number of at least 1, got 2.5"),
            ({"prompt": {4: BAG}}, "from 0 to 19 and one at 0; got {4"),
            ({"prompt": {0: BAG, 20: COAT}}, "from 0 to 19"),
            ({"prompt": [BAG, None]}, "must be a text, .* got None"),
            ({"prompt": []}, "There is no prompt"),
            ({"height": 30}, "multiples of 4, got 30 and 32"),
            ({"generator": [torch.Generator()] * 3}, "Found 3 generators for 1 videos"),
        ],
    )
    def test_refuses_what_cannot_be_done(self, pipes, name: str, asked: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            pipes[name](**{"prompt": BAG, "num_frames": 20, **asked})

    def test_without_the_package(self, folder: Path, pipes) -> None:
        asked = {"prompt": BAG, "num_frames": 11, "num_inference_steps": 2, "guidance_scale": 1.5}
        arguments = [json.dumps(part) for part in ({name: str(file) for name, file in FILES.items()}, asked)]
        done = subprocess.run([sys.executable, "-c", ALONE, str(folder), *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for name, pipe in pipes.items():
            frames = pipe(**asked, generator=seeded(), output_type="pt").frames.numpy()
            assert frames.shape == (1, 11, 3, 32, 32)
            assert frames.std() > 0.01
            np.testing.assert_allclose(np.load(folder / f"{name}.npy"), frames, rtol=0, atol=1e-5)

    def test_an_image_model_with_a_motion_adapter(self, tmp_path: Path, pipes) -> None:
        """As Stable Diffusion and AnimateLCM are published, apart."""
        tiny_pipeline(unet=unet(), scheduler=LCMScheduler(**LINEAR, steps_offset=1)).save_pretrained(tmp_path)
        how = {"custom_pipeline": str(FILES["co_denoising"]), "trust_remote_code": True}
        pipe = DiffusionPipeline.from_pretrained(tmp_path, motion_adapter=motion_adapter(), **how)
        pipe.set_progress_bar_config(disable=True)
        frames = pipe(BAG, num_frames=9, num_inference_steps=1)
        assert (len(frames.frames), len(frames.frames[0]), frames.frames[0][0].size) == (1, 9, (32, 32))

    def test_the_files_share_their_functions(self) -> None:
        """Each stands alone, so each has them; none may change alone."""
        sources = [
            {
                node.name: ast.get_source_segment(file.read_text(), node)
                for node in ast.parse(file.read_text()).body
                if isinstance(node, ast.FunctionDef)
            }
            for file in FILES.values()
        ]
        common = sources[0].keys() & sources[1].keys()
        assert {"encoded", "predicted", "denoised", "noised_again"} <= common
        assert {name for name in common if sources[0][name] != sources[1][name]} == set()


class TestCoDenoising:
    @pytest.mark.parametrize(
        ("frames", "length", "stride"),
        [(8, 8, 4), (9, 8, 4), (32, 8, 4), (31, 8, 3), (16, 8, 8), (7, 1, 1), (50, 16, 5)],
    )
    def test_clips_cover_all_frames_and_their_shares_sum_to_one(
        self, co, frames: int, length: int, stride: int
    ) -> None:
        module = module_of(co)
        parts = module.clips(frames, length, stride)
        weights = module.shares(parts, frames)
        assert [part.stop - part.start for part in parts] == [length] * len(parts)
        assert (parts[0].start, parts[-1].stop) == (0, frames)
        assert all(0 < b.start - a.start <= stride for a, b in pairwise(parts))
        torch.testing.assert_close(weights.sum(0), torch.ones(frames, dtype=torch.float64), rtol=1e-15, atol=0)
        covered = torch.stack([torch.arange(frames).ge(p.start) & torch.arange(frames).lt(p.stop) for p in parts])
        assert torch.equal(weights > 0, covered)

    def test_shares_of_two_clips_by_hand(self, co) -> None:
        weights = module_of(co).shares(module_of(co).clips(12, 8, 4), 12)
        assert weights[0].tolist() == pytest.approx([1, 1, 1, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5, 0, 0, 0, 0])
        assert weights[1].tolist() == pytest.approx(weights[0].flip(0).tolist())

    @pytest.mark.parametrize("clipping", [{}, {"clip_sample": True, "clip_sample_range": 0.3}, {"thresholding": True}])
    def test_clean_frames_of_overlapping_clips_are_averaged(self, co, stock, monkeypatch, clipping: dict) -> None:
        """Each clip's prediction by the stock scheduler, weighted by hand."""
        for pipe in (co, stock):
            monkeypatch.setattr(pipe, "scheduler", LCMScheduler(**LINEAR, **clipping))
        actual = latents(co, num_frames=12, num_inference_steps=1)
        z = torch.randn(1, 4, 12, 8, 8, generator=seeded())
        first, second = (
            latents(stock, num_frames=8, num_inference_steps=1, guidance_scale=1.0, latents=z[:, :, start : start + 8])
            for start in (0, 4)
        )
        share = torch.tensor([4, 3, 2, 1]).view(-1, 1, 1) / 5
        middle = share * first[:, :, 4:] + (1 - share) * second[:, :, :4]
        expected = torch.cat([first[:, :, :4], middle, second[:, :, 4:]], dim=2)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(("length", "stride"), [(8, 4), (8, 2), (8, 3), (5, 5)])
    def test_sources_of_shared_noise(self, co, length: int, stride: int) -> None:
        sources = module_of(co).noise_sources(41, length, stride)
        places = torch.arange(41) % length
        assert torch.equal(sources[:length], torch.arange(length))
        assert torch.equal(sources // stride, places // stride)  # near in the first clip, too
        assert not torch.equal(sources, places)
        if length % stride == 0:
            for start in range(0, 41 - length, stride):
                assert sorted(sources[start : start + length].tolist()) == list(range(length))

    def test_shared_noise_survives_every_step(self, co, seen) -> None:
        record, asked = seen(co), {"num_frames": 20, "stride": 4}
        latents(co, share_noise=True, **asked)
        sources = module_of(co).noise_sources(20, 8, 4)
        assert len(record.noise) == STEPS - 1  # once for the video, not for each clip
        for noise in record.noise:
            assert torch.equal(noise, noise[:, :, sources])
            assert noise[:, :, :8].flatten(3).transpose(1, 2).flatten(2)[0].corrcoef().triu(1).abs().max() < 0.3
        starts = (0, 4, 8, 12)
        start = {place: x[:, :, 0] for place, x in zip(starts, record.x, strict=False)}
        for place in starts:
            assert torch.equal(start[place], record.x[0][:, :, sources[place]])

    def test_without_sharing_all_noise_is_its_own(self, co, seen) -> None:
        record = seen(co)
        latents(co, num_frames=20)
        for noise in record.noise:
            rows = noise[0].transpose(0, 1).flatten(1)
            assert rows.shape == (20, 4 * 8 * 8)
            assert rows.corrcoef().fill_diagonal_(0).abs().max() < 0.4

    def test_sharing_changes_nothing_in_one_clip(self, co) -> None:
        assert torch.equal(latents(co, num_frames=8, share_noise=True), latents(co, num_frames=8))

    @pytest.mark.parametrize("stride", [0, 9])
    def test_refuses_a_stride(self, co, stride: int) -> None:
        with pytest.raises(ValueError, match=rf"stride must be from 1 to the 8 frames of a clip, got {stride}"):
            co(BAG, num_frames=20, stride=stride)


class Clips:
    """Three clips of `VideoLookBackPipeline`, as they were seen: the first, its extension and the bridge."""

    def __init__(self, record: Seen, steps: int) -> None:
        self.x = [record.x[start : start + steps] for start in range(0, 3 * steps, steps)]
        between = steps - 1
        self.clean = [record.clean[start : start + between] for start in range(0, 3 * between, between)]
        self.noise = [record.noise[start : start + between] for start in range(0, 3 * between, between)]
        for x, noise in zip(self.x, self.noise, strict=True):
            noise.insert(0, x[0])  # the first of LCM has variance 1


@pytest.fixture
def three(back, seen):
    def made(**asked) -> tuple[torch.Tensor, Clips]:
        record, steps = seen(back), asked.get("num_inference_steps", STEPS)
        result = latents(back, num_frames=13, **asked)
        assert (len(record.x), len(record.noise)) == (3 * steps, 3 * (steps - 1))
        return result, Clips(record, steps)

    return made


class TestLookBack:
    def test_order_of_the_noise(self, back) -> None:
        """All reversed, then the first ones turned round: 6 of 16 as in the paper."""
        order = module_of(back).look_back_order(16, 6).tolist()
        assert order == [10, 11, 12, 13, 14, 15, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0]

    @pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
    def test_regularization_moves_the_mean_of_frames_alone(self, back, weight: float) -> None:
        clean, before = (torch.randn(2, 4, 6, 3, 3, generator=seeded(s), dtype=torch.float64) for s in (1, 2))
        moved = module_of(back).regularized(clean, before, weight)
        expected = (1 - weight) * clean.mean(2) + weight * before.mean(2)
        torch.testing.assert_close(moved.mean(2), expected, rtol=1e-12, atol=1e-13)
        deviations = [frames - frames.mean(2, keepdim=True) for frames in (moved, clean)]
        torch.testing.assert_close(*deviations, rtol=1e-12, atol=1e-13)

    def test_regularization_is_the_papers_gradient_step(self, back) -> None:
        """delta times the gradient of |mean - mean'|^2, with delta = N weight / 2 for the sum over elements."""
        clean = torch.randn(1, 4, 6, 3, 3, generator=seeded(1), dtype=torch.float64, requires_grad=True)
        before = torch.randn(1, 4, 6, 3, 3, generator=seeded(2), dtype=torch.float64)
        (before.mean(2) - clean.mean(2)).square().sum().backward()
        expected = clean.detach() - 6 * 0.3 / 2 * clean.grad
        torch.testing.assert_close(module_of(back).regularized(clean.detach(), before, 0.3), expected)

    def test_means_are_equal_in_the_pipeline(self, three) -> None:
        _, clips = three(regularization=1.0, tied_share=0.0)
        for i in range(STEPS - 1):
            mean = clips.clean[0][i].mean(2)
            for later in clips.clean[1:]:
                torch.testing.assert_close(later[i].mean(2), mean, rtol=0, atol=1e-5)

    def test_noise_of_every_step(self, back, three) -> None:
        _, clips = three()
        order = module_of(back).look_back_order(8, N1)
        for first, extension, bridge in zip(*clips.noise, strict=True):
            assert torch.equal(extension[:, :, :N1], first[:, :, -N1:])
            assert torch.equal(extension, first[:, :, order])
            assert torch.equal(bridge[:, :, :N1], first[:, :, -N1:])
            assert torch.equal(bridge[:, :, -N2:], extension[:, :, -N2:])
            own = bridge[:, :, N1:-N2].flatten()
            others = torch.cat([first, extension], dim=2).transpose(1, 2).flatten(2)[0]
            assert torch.stack([own, *others]).corrcoef()[0, 1:].abs().max() < 0.4

    @pytest.mark.parametrize(("steps", "share", "tied"), [(4, 0.8, 4), (5, 0.8, 4), (5, 0.5, 3), (3, 0.0, 0)])
    def test_tied_frames_follow_their_clip(self, three, steps: int, share: float, tied: int) -> None:
        """In the first ceil(share steps) steps they are shown and predicted as there, then not."""
        result, clips = three(num_inference_steps=steps, tied_share=share)
        first, extension, bridge = clips.x
        for i in range(steps):
            same = i <= tied  # what is shown after a tied step is the same
            assert torch.equal(extension[i][:, :, :N1], first[i][:, :, -N1:]) == same
            assert torch.equal(bridge[i][:, :, :N1], first[i][:, :, -N1:]) == same
            assert torch.equal(bridge[i][:, :, -N2:], extension[i][:, :, -N2:]) == same
        for i, (one, two, three_) in enumerate(zip(*clips.clean, strict=True)):
            assert torch.equal(two[:, :, :N1], one[:, :, -N1:]) == (i < tied)
            assert torch.equal(three_[:, :, -N2:], two[:, :, -N2:]) == (i < tied)
        assert result.shape == (1, 4, 13, 8, 8)

    def test_the_video_is_the_first_clip_and_the_bridges(self, back, stock) -> None:
        whole = latents(back, num_frames=18)
        torch.testing.assert_close(
            whole[:, :, :8], latents(stock, num_frames=8, guidance_scale=1.0), rtol=0, atol=1e-6
        )
        torch.testing.assert_close(latents(back, num_frames=15), whole[:, :, :15], rtol=0, atol=1e-6)
        change = (whole[:, :, 8:] - whole[:, :, :8][:, :, -1:]).abs().amax((0, 1, 3, 4))
        assert change.min() > 1e-2

    def test_a_bridge_by_hand(self, back, stock) -> None:
        """One free step: ties do nothing, so the end is what the network makes of the bridge's noise."""
        whole = latents(back, num_frames=13, num_inference_steps=1, tied_share=0.0, regularization=0.0)
        generator = seeded()
        z, between = (torch.randn(1, 4, frames, 8, 8, generator=generator) for frames in (8, 8 - N1 - N2))
        bridge = torch.cat([z[:, :, -N1:], between, z[:, :, :N2].flip(2)], dim=2)
        asked = {"num_frames": 8, "num_inference_steps": 1, "guidance_scale": 1.0}
        torch.testing.assert_close(whole[:, :, 8:], latents(stock, latents=bridge, **asked)[:, :, N1:])

    @pytest.mark.parametrize(
        ("asked", "message"),
        [
            ({"left_frames": 0}, "leave some of the 8 frames of a clip between them, got 0 and 4"),
            ({"left_frames": 4, "right_frames": 4}, "between them, got 4 and 4"),
            ({"clip_frames": 2}, "of the 2 frames of a clip between them, got 0 and 1"),
            ({"tied_share": 1.2}, "must be from 0 to 1, got 1.2 and 0.1"),
            ({"regularization": math.nan}, "must be from 0 to 1, got 0.8 and nan"),
        ],
    )
    def test_refuses_ties_that_cannot_be(self, back, asked: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            back(BAG, num_frames=20, **asked)
