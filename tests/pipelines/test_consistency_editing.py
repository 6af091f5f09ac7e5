"""Zero-shot editing: what is given stays in the result, and the algorithm is the paper's."""

import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, DiffusionPipeline, UNet2DModel

from cm_diffusers import ConsistencyImagesPipeline, EDMConsistencyScheduler


FILE = Path(__file__).parents[2] / "pipelines" / "consistency_editing.py"
GREY = torch.tensor([0.299, 0.587, 0.114])
SIZE, FACTOR = 8, 2
PLACES = {"timesteps": [30, 22, 0]}


def unet2d(**config) -> UNet2DModel:
    torch.manual_seed(0)
    shape = {"sample_size": SIZE, "layers_per_block": 1, "block_out_channels": (8,), "norm_num_groups": 4}
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "attention_head_dim": 4}
    return UNet2DModel(**{**shape, **blocks, **config}).eval()


def opened(folder: Path, unet: UNet2DModel, scheduler=None) -> DiffusionPipeline:
    """The single file on the folder of a pipeline."""
    if isinstance(scheduler, EDMConsistencyScheduler):
        ConsistencyImagesPipeline(unet, scheduler).save_pretrained(folder)
    else:
        ConsistencyModelPipeline(unet, scheduler or CMStochasticIterativeScheduler()).save_pretrained(folder)
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(FILE), trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def editor(tmp_path_factory: pytest.TempPathFactory) -> DiffusionPipeline:
    return opened(tmp_path_factory.mktemp("student"), unet2d())


@pytest.fixture(scope="module")
def module(editor: DiffusionPipeline):
    return sys.modules[type(editor).__module__]


def images(seed: int = 1, size: int = SIZE, channels: int = 3, count: int = 2) -> torch.Tensor:
    """In [0, 1], with black and white among them."""
    x = torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed))
    x[0, :, 0, 0], x[0, :, -1, -1] = 0.0, 1.0
    return x


def mask() -> torch.Tensor:
    hole = torch.zeros(1, 1, SIZE, SIZE)
    hole[..., 2:6, 3:7] = 1.0
    return hole


def blocks(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) as blocks (B, C, h, w, FACTOR^2)."""
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // FACTOR, FACTOR, w // FACTOR, FACTOR)
    return x.transpose(3, 4).flatten(4)


def unblocked(x: torch.Tensor) -> torch.Tensor:
    b, c, h, w, _ = x.shape
    return x.unflatten(4, (FACTOR, FACTOR)).transpose(3, 4).reshape(b, c, h * FACTOR, w * FACTOR)


def orthogonal(first: torch.Tensor) -> torch.Tensor:
    """An orthogonal matrix with this first column, up to length, in float64."""
    matrix = torch.eye(len(first), dtype=torch.float64)
    matrix[:, 0] = first / first.norm()
    Q = torch.linalg.qr(matrix).Q
    return Q * torch.sign(Q[0, 0] * first[0])


def paper_replacement(task: str, known: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A^-1 [(A y)(1 - mask) + (A x) mask] of Algorithm 4, in float64; `known` is y."""
    if task == "inpainting":
        return known * (1 - mask()) + x * mask()
    first = GREY if task == "colorization" else torch.ones(FACTOR**2)
    Q = orthogonal(first.double())
    coordinates = [value.double() for value in (known, x)]
    if task == "super-resolution":
        y, z = (blocks(value) @ Q for value in coordinates)
    else:
        y, z = (value.movedim(1, -1) @ Q for value in coordinates)
    mixed = torch.cat([y[..., :1], z[..., 1:]], dim=-1) @ Q.T
    return unblocked(mixed) if task == "super-resolution" else mixed.movedim(-1, 1)


def given(task: str) -> tuple[dict, torch.Tensor]:
    """The pipeline's arguments, and the paper's y in [-1, 1]."""
    x = images()
    if task == "inpainting":
        return {"image": x, "mask_image": mask()}, 2 * x - 1
    if task == "colorization":
        grey = (GREY.view(1, 3, 1, 1) * x).sum(1, keepdim=True)
        return {"image": grey}, 2 * grey.expand(-1, 3, -1, -1) - 1
    small = images(size=SIZE // FACTOR)
    return {"image": small}, 2 * small.repeat_interleave(FACTOR, 2).repeat_interleave(FACTOR, 3) - 1


TASKS = ("inpainting", "colorization", "super-resolution")


class TestReplacement:
    def changes(self, module, task: str):
        _, y = given(task)
        if task == "inpainting":
            return module.inpainting(y, mask()), y
        if task == "colorization":
            return module.colorization(y[:, :1]), y
        return module.super_resolution(y[..., ::FACTOR, ::FACTOR], FACTOR), y

    @pytest.mark.parametrize("task", TASKS)
    def test_is_that_of_an_orthogonal_transform(self, module, task: str) -> None:
        (replace, _), y = self.changes(module, task)
        x = torch.randn(2, 3, SIZE, SIZE)
        expected = paper_replacement(task, y, x).float()
        torch.testing.assert_close(replace(x), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(replace(y), y, atol=1e-6, rtol=0)  # what is known of y says all of it

    @pytest.mark.parametrize("task", TASKS[1:])
    def test_the_transforms_invert(self, task: str) -> None:
        x = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)
        torch.testing.assert_close(paper_replacement(task, x, x), x, atol=1e-12, rtol=0)

    @pytest.mark.parametrize("task", TASKS)
    @pytest.mark.parametrize("size", [0.1, 1.0, 30.0])
    def test_the_end_is_in_range_and_still_holds_what_is_known(self, module, task: str, size: float) -> None:
        (replace, finish), _ = self.changes(module, task)
        result = finish(size * torch.randn(2, 3, SIZE, SIZE))
        assert result.abs().max() <= 1 + 1e-5
        torch.testing.assert_close(replace(result), result, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("task", TASKS)
    def test_the_end_changes_nothing_that_is_in_range(self, module, task: str) -> None:
        (_, finish), _ = self.changes(module, task)
        x = finish(torch.randn(2, 3, SIZE, SIZE))
        torch.testing.assert_close(finish(x), x, atol=1e-5, rtol=0)


class TestAlgorithm:
    @pytest.mark.parametrize("task", TASKS)
    @pytest.mark.parametrize("kind", [CMStochasticIterativeScheduler, EDMConsistencyScheduler])
    def test_is_the_papers(self, tmp_path: Path, task: str, kind: type) -> None:
        """Algorithm 4 by hand: noise, denoise, replace, on sigmas of the grid of 40."""
        pipe = opened(tmp_path, unet2d(), kind())
        arguments, y = given(task)
        x0 = by_hand(pipe.unet, task, y, torch.Generator().manual_seed(2))
        actual = pipe(task, **arguments, **PLACES, generator=torch.Generator().manual_seed(2), output_type="pt").images
        fine = (x0.abs() <= 1).all(1, keepdim=True)  # elsewhere the end draws it into the range
        if task == "super-resolution":
            fine = unblocked(blocks(fine).all(-1, keepdim=True).expand(-1, -1, -1, -1, FACTOR**2))
        assert fine.float().mean() > 0.2
        torch.testing.assert_close((2 * actual - 1) * fine, x0 * fine, atol=1e-4, rtol=0)

    def test_sigmas_and_gamma_are_the_schedulers(self, tmp_path: Path) -> None:
        """Below gamma = 1 the pipeline's scheduler would reuse noise; the algorithm here does not."""
        arguments, _ = given("inpainting")
        results = []
        for gamma in (0.0, 1.0):
            scheduler = EDMConsistencyScheduler(gamma=gamma)
            pipe = opened(tmp_path / str(gamma), unet2d(), scheduler)
            request = {
                "sigmas": [80.0, 5.0, 0.821],
                "generator": torch.Generator().manual_seed(2),
                "output_type": "pt",
            }
            results.append(pipe("inpainting", **arguments, **request).images)
            assert (pipe.scheduler.config.gamma, pipe.scheduler.config.s_noise) == (gamma, 1.0)
        assert torch.equal(*results)


def by_hand(unet: UNet2DModel, task: str, y: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    ends = 80 ** (1 / 7), 0.002 ** (1 / 7)
    sigmas = [(ends[0] + place / 39 * (ends[1] - ends[0])) ** 7 for place in (0, 22, 30)]
    x = paper_replacement(task, y, torch.zeros_like(y))
    for i, sigma in enumerate(sigmas):
        std = sigma if i == 0 else (sigma**2 - 0.002**2) ** 0.5
        x = x.float() + std * torch.randn(y.shape, generator=generator)
        time = torch.tensor(250 * np.log(sigma))
        with torch.no_grad():
            output = unet(x / (sigma**2 + 0.25) ** 0.5, time, return_dict=False)[0]
        c_skip = 0.25 / ((sigma - 0.002) ** 2 + 0.25)
        c_out = 0.5 * (sigma - 0.002) / (sigma**2 + 0.25) ** 0.5
        x = paper_replacement(task, y, (c_skip * x + c_out * output).clamp(-1, 1))
    return x.float()


class TestResults:
    def test_the_known_part_is_exactly_the_input(self, editor: DiffusionPipeline) -> None:
        x = images()
        result = editor("inpainting", x, mask_image=mask(), output_type="pt", **PLACES).images
        hole = mask().bool().expand_as(x)
        torch.testing.assert_close(result[~hole], x[~hole], atol=1e-7, rtol=0)
        assert (result - x)[hole].abs().mean() > 0.1

    def test_no_noise_is_drawn_in_vain(self, editor: DiffusionPipeline) -> None:
        """The scheduler's steps end at f and need none: torch's own generator stays as it is."""
        state = torch.get_rng_state()
        editor("inpainting", images(), mask_image=mask(), generator=torch.Generator().manual_seed(0), **PLACES)
        assert torch.equal(torch.get_rng_state(), state)

    def test_inpainting_keeps_every_byte(self, editor: DiffusionPipeline) -> None:
        array = (images()[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        hole = mask()[0, 0].bool().numpy()
        white = PIL.Image.fromarray(np.uint8(255 * hole))
        result = np.asarray(editor("inpainting", PIL.Image.fromarray(array), white, **PLACES).images[0])
        assert np.array_equal(result[~hole], array[~hole])
        assert not np.array_equal(result, array)

    def test_grey_of_the_result_is_the_given_grey(self, editor: DiffusionPipeline) -> None:
        arguments, y = given("colorization")
        result = editor("colorization", **arguments, **PLACES, output_type="pt").images
        grey = (GREY.view(1, 3, 1, 1) * result).sum(1, keepdim=True)
        torch.testing.assert_close(grey, arguments["image"], atol=1e-6, rtol=0)
        assert (result - grey).abs().mean() > 0.01
        picture = PIL.Image.fromarray(np.uint8(255 * arguments["image"][0, 0].numpy()), "L")
        colored = editor("colorization", picture, **PLACES).images[0]
        assert colored.mode == "RGB"
        difference = np.asarray(colored.convert("L"), int) - np.asarray(picture, int)
        assert np.abs(difference).max() <= 1

    def test_a_colored_image_gives_its_grey(self, editor: DiffusionPipeline) -> None:
        x = images()
        grey = (GREY.view(1, 3, 1, 1) * x).sum(1, keepdim=True)
        both = [
            editor("colorization", one, **PLACES, output_type="pt", generator=torch.Generator().manual_seed(1)).images
            for one in (x, grey)
        ]
        torch.testing.assert_close(*both, atol=1e-5, rtol=0)

    def test_block_means_of_the_result_are_the_small_image(self, editor: DiffusionPipeline) -> None:
        small = images(size=SIZE // FACTOR)
        result = editor("super-resolution", small, **PLACES, output_type="pt").images
        assert result.shape == (2, 3, SIZE, SIZE)
        torch.testing.assert_close(blocks(result).mean(-1), small, atol=1e-6, rtol=0)
        assert blocks(result).std(-1).mean() > 0.01

    def test_grey_networks_fill_and_enlarge(self, tmp_path: Path) -> None:
        pipe = opened(tmp_path, unet2d(in_channels=1, out_channels=1))
        x = images(channels=1)
        result = pipe("inpainting", x, mask_image=mask(), output_type="pt", **PLACES).images
        outside = ~mask().bool().expand_as(x)
        torch.testing.assert_close(result[outside], x[outside], atol=1e-7, rtol=0)
        small = images(size=4, channels=1)
        result = pipe("super-resolution", small, output_type="pt", **PLACES).images
        torch.testing.assert_close(blocks(result).mean(-1), small, atol=1e-6, rtol=0)
        with pytest.raises(ValueError, match="sees grey images only"):
            pipe("colorization", x)

    def test_classes_and_generators(self, tmp_path: Path) -> None:
        pipe = opened(tmp_path, unet2d(num_class_embeds=3))
        request = {"output_type": "pt", **PLACES}
        several = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        x = images()
        both = pipe("inpainting", x, mask(), class_labels=[0, 2], generator=several, **request).images
        alone = pipe(
            "inpainting", x[1:], mask(), class_labels=2, generator=several[1].manual_seed(2), **request
        ).images
        torch.testing.assert_close(alone, both[1:], atol=1e-5, rtol=0)
        for labels, message in ((None, "exactly where"), (3, "numbers from 0 to 2"), ([0], "must be 2 numbers")):
            with pytest.raises(ValueError, match=message):
                pipe("inpainting", x, mask(), class_labels=labels, **request)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("outpainting", images()), "task must be one of inpainting, colorization, super-resolution"),
        (("inpainting", images()), "Inpainting needs a mask_image"),
        (("colorization", images(), mask()), "others take none"),
        (("inpainting", images(size=4), mask()), r"image must have the network's size \(8, 8\), but it is \(4, 4\)"),
        (("inpainting", images(), torch.zeros(1, 1, 4, 4)), r"mask must have the network's size \(8, 8\)"),
        (("inpainting", images(channels=1), mask()), "must have 3 channels, but it has 1"),
        (("super-resolution", images()), r"whole number of times smaller than \(8, 8\), but it is \(8, 8\)"),
        (("super-resolution", images(size=3)), r"but it is \(3, 3\)"),
    ],
)
def test_refuses_what_cannot_be_done(editor: DiffusionPipeline, arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        editor(*arguments)


def test_refuses_other_requests(editor: DiffusionPipeline, module) -> None:
    with pytest.raises(ValueError, match="sigmas must be numbers that descend"):
        editor("inpainting", images(), mask(), sigmas=[0.8, 80.0])
    with pytest.raises(ValueError, match="Found 1 generators for 2 images"):
        editor("inpainting", images(), mask(), generator=[torch.Generator()], **PLACES)
    with pytest.raises(ValueError, match="network of 4 channels sees none"):
        module.ConsistencyEditingPipeline(unet2d(in_channels=4), CMStochasticIterativeScheduler())
