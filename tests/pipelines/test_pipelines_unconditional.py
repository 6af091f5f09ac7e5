"""Images without prompts: the stock pipeline's images, seeded labels, latents, and students that keep what they know."""

from pathlib import Path

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    UNet2DModel,
)
from tiny import tiny_pipeline, tiny_unet, tiny_vae

from cm_diffusers import (
    ConsistencyImagesPipeline,
    ConsistencyImg2ImgPipeline,
    ConsistencyPipeline,
    EDMConsistencyScheduler,
)
from cm_diffusers.diffusion.process import DiscreteVP
from cm_diffusers.record import RECORD, Record, write_record


CLASSES = 5
STATISTICS = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [0.5, 1.0, 2.0, 4.0]}
TWO_STEPS = {"sigmas": [80.0, 0.821]}


def unet2d(**config) -> UNet2DModel:
    torch.manual_seed(0)
    defaults = {
        "sample_size": 8,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 4,
    }
    return UNet2DModel(**{**defaults, **config}).eval()


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline(unet: UNet2DModel, vae=None, config: dict | None = None, **scheduler) -> ConsistencyImagesPipeline:
    return quiet(ConsistencyImagesPipeline(unet, EDMConsistencyScheduler(**scheduler), vae, **(config or {})))


def latent_pipeline(**config) -> ConsistencyImagesPipeline:
    unet = unet2d(in_channels=4, out_channels=4)
    torch.manual_seed(1)
    return pipeline(unet, tiny_vae(), config, clip_denoised=False)


def seeds(*values: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(value) for value in values]


@pytest.fixture(scope="module")
def with_classes() -> ConsistencyImagesPipeline:
    return pipeline(unet2d(num_class_embeds=CLASSES))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as those of the published consistency models, with classes."""
    folder = tmp_path_factory.mktemp("published")
    unet = unet2d(num_class_embeds=CLASSES)
    ConsistencyModelPipeline(unet, CMStochasticIterativeScheduler()).save_pretrained(folder)
    return folder


class TestEqualsStock:
    @pytest.mark.parametrize("asked", [{}, {"num_inference_steps": 4}, {"timesteps": [22, 0]}])
    @pytest.mark.parametrize("several", [False, True])
    def test_image_for_image(self, published: Path, asked: dict, several: bool) -> None:
        stock, ours = quiet(ConsistencyModelPipeline.from_pretrained(published)), quiet(load(published))
        images = []
        for pipe in (stock, ours):
            generator = seeds(1, 2, 3) if several else seeds(1)[0]
            request = {"batch_size": 3, "class_labels": [4, 0, 2], "output_type": "np", **asked}
            images.append(torch.from_numpy(pipe(**request, generator=generator).images))
        assert images[0].std() > 0.05
        torch.testing.assert_close(images[1], images[0], atol=2e-5, rtol=0)

    def test_without_classes(self) -> None:
        unet = unet2d(in_channels=1, out_channels=1)
        stock = quiet(ConsistencyModelPipeline(unet, CMStochasticIterativeScheduler(num_train_timesteps=201)))
        ours = pipeline(unet, num_train_timesteps=201)
        both = [
            pipe(2, timesteps=[106, 0], num_inference_steps=None, generator=seeds(5)[0], output_type="pil").images
            for pipe in (stock, ours)
        ]
        for expected, actual in zip(*both, strict=True):
            assert (actual.mode, actual.size) == ("L", (8, 8))
            assert max(abs(a - b) for a, b in zip(expected.tobytes(), actual.tobytes(), strict=True)) <= 1

    def test_from_the_same_latents(self, published: Path, with_classes: ConsistencyImagesPipeline) -> None:
        stock = quiet(ConsistencyModelPipeline.from_pretrained(published))
        request = {"latents": torch.randn(1, 3, 8, 8), "class_labels": 3, "output_type": "np"}
        expected, actual = (torch.from_numpy(pipe(**request).images) for pipe in (stock, with_classes))
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)

    def test_with_the_stock_scheduler(self, published: Path, with_classes: ConsistencyImagesPipeline) -> None:
        pipe = quiet(load(published, scheduler=CMStochasticIterativeScheduler()))
        assert type(pipe.scheduler) is CMStochasticIterativeScheduler
        request = {"timesteps": [22, 0], "class_labels": 3, "output_type": "pt"}
        expected, actual = (one(**request, generator=seeds(1)[0]).images for one in (pipe, with_classes))
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)
        with pytest.raises(ValueError, match="takes no sigmas; use EDMConsistencyScheduler"):
            pipe(**TWO_STEPS)


def load(folder: Path, **kwargs) -> ConsistencyImagesPipeline:
    pipe = ConsistencyPipeline.from_pretrained(folder, **kwargs)
    assert type(pipe) is ConsistencyImagesPipeline
    return pipe


class TestLabels:
    def test_a_seed_gives_labels_and_images(self, with_classes: ConsistencyImagesPipeline) -> None:
        first, second, other = (
            with_classes(20, generator=seeds(seed)[0], output_type="pt", **TWO_STEPS) for seed in (1, 1, 2)
        )
        assert torch.equal(first.class_labels, second.class_labels)
        assert torch.equal(first.images, second.images)
        assert not torch.equal(first.class_labels, other.class_labels)
        assert set(first.class_labels.tolist()) | set(other.class_labels.tolist()) == set(range(CLASSES))

    def test_a_generator_for_each_image_makes_it_independent_of_its_batch(
        self, with_classes: ConsistencyImagesPipeline
    ) -> None:
        request = {"output_type": "pt", **TWO_STEPS}
        together = with_classes(generator=seeds(1, 2, 3, 4), **request)
        assert len(together.images) == 4
        for i, seed in enumerate((1, 2, 3, 4)):
            alone = with_classes(generator=seeds(seed), **request)
            assert alone.class_labels.tolist() == [together.class_labels[i].item()]
            torch.testing.assert_close(alone.images[0], together.images[i], atol=1e-5, rtol=0)
        assert len(set(together.class_labels.tolist())) > 1

    def test_the_labels_are_those_that_are_shown(self, with_classes: ConsistencyImagesPipeline) -> None:
        drawn = with_classes(generator=seeds(7), output_type="pt")
        given = with_classes(class_labels=drawn.class_labels, generator=seeds(7), output_type="pt")
        other = with_classes(class_labels=(drawn.class_labels + 1) % CLASSES, generator=seeds(7), output_type="pt")
        assert torch.equal(drawn.images, given.images)  # noise is drawn before the labels
        assert not torch.allclose(drawn.images, other.images, atol=1e-3)

    @pytest.mark.parametrize("labels", [3, [3, 3], torch.tensor([3, 3]), torch.tensor(3)])
    def test_every_way_to_give_them(self, with_classes: ConsistencyImagesPipeline, labels) -> None:
        result = with_classes(2, class_labels=labels, generator=seeds(1)[0], output_type="latent")
        assert result.class_labels.tolist() == [3, 3]

    def test_networks_without_classes_have_none(self) -> None:
        result = pipeline(unet2d())(output_type="pt")
        assert result.class_labels is None
        assert len(pipeline(unet2d())(output_type="pt", return_dict=False)) == 1


class TestLatents:
    def test_statistics_are_undone(self) -> None:
        plain, standardised = latent_pipeline(sigma_data=0.5), latent_pipeline(sigma_data=0.5, **STATISTICS)
        x, latents = (p(2, generator=seeds(1)[0], output_type="latent").images for p in (plain, standardised))
        mean, std = (torch.tensor(STATISTICS[name]).view(1, 4, 1, 1) for name in ("latents_mean", "latents_std"))
        torch.testing.assert_close(latents, x / 0.5 * std + mean)
        image = standardised(2, generator=seeds(1)[0], output_type="pt").images
        with torch.no_grad():
            decoded = standardised.vae.decode(latents / standardised.vae.config.scaling_factor).sample
        torch.testing.assert_close(image, (decoded / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)
        assert image.shape == (2, 3, 32, 32)

    def test_they_travel_with_the_folder(self, tmp_path: Path) -> None:
        pipe = latent_pipeline(**STATISTICS)
        pipe.save_pretrained(tmp_path)
        again = quiet(load(tmp_path))
        assert {name: again.config[name] for name in STATISTICS} == STATISTICS
        assert not again.scheduler.config.clip_denoised
        expected, actual = (p(generator=seeds(1)[0], output_type="pt").images for p in (pipe, again))
        torch.testing.assert_close(actual, expected)

    def test_the_scheduler_must_mean_the_same_data(self) -> None:
        pipe = latent_pipeline(**STATISTICS)
        pipe.scheduler = EDMConsistencyScheduler(sigma_data=1.0)
        with pytest.raises(ValueError, match=r"sigma_data 0\.5, its scheduler 1\.0"):
            pipe()


class TestVPNetworks:
    def test_a_conditional_unet_without_text(self) -> None:
        torch.manual_seed(0)
        blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        unet = tiny_unet(mid_block_type="UNetMidBlock2D", num_class_embeds=CLASSES, **blocks)
        pipe = pipeline(unet, network="vp", sigma_min=0.03, sigma_max=14.0, clip_denoised=False)
        shown = []
        unet.register_forward_pre_hook(lambda module, args: shown.append((args[0].std().item(), args[1].item())))
        result = pipe(64, class_labels=2, sigmas=[14.0, 0.821], output_type="latent", generator=seeds(1)[0])
        assert result.images.isfinite().all()
        assert shown[0][0] == pytest.approx(14 / 197**0.5, rel=0.03)  # x / sqrt(1 + sigma^2)
        process = DiscreteVP.from_scheduler(DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear"))
        times = process.time_at(-torch.tensor([14.0, 0.821], dtype=torch.float64).log())
        assert [time for _, time in shown] == pytest.approx(times.tolist(), abs=1e-3)

    def test_one_that_reads_text_is_for_the_other_pipeline(self) -> None:
        with pytest.raises(ValueError, match="reads text; sample it with ConsistencyPipeline"):
            pipeline(tiny_unet())

    @pytest.mark.filterwarnings("ignore:Nothing says that this model was distilled")
    def test_the_other_pipeline_keeps_its_scheduler(self, tmp_path: Path) -> None:
        stock = tiny_pipeline()
        stock.scheduler = EDMConsistencyScheduler(network="vp", sigma_min=0.03, sigma_max=14.0, clip_denoised=False)
        stock.save_pretrained(tmp_path)
        pipe = quiet(ConsistencyPipeline.from_pretrained(tmp_path))
        assert type(pipe) is ConsistencyPipeline
        assert (type(pipe.scheduler), pipe.scheduler.config.network) == (EDMConsistencyScheduler, "vp")
        image = pipe("a bag", num_inference_steps=2, generator=seeds(1)[0], output_type="latent").images
        assert image.shape == (1, 4, 8, 8)
        assert image.isfinite().all()


class TestLoading:
    def test_a_published_folder(self, published: Path) -> None:
        for pipe in (load(published), ConsistencyImagesPipeline.from_pretrained(published)):
            assert type(pipe.scheduler) is EDMConsistencyScheduler
            assert pipe.scheduler.config.num_train_timesteps == 40
        assert type(DiffusionPipeline.from_pretrained(published)) is ConsistencyModelPipeline
        with pytest.raises(ValueError, match="is a ConsistencyModelPipeline, without prompts; load it with"):
            ConsistencyImg2ImgPipeline.from_pretrained(published)

    def test_our_fields_ride_in_the_stock_scheduler(self, tmp_path: Path) -> None:
        """The folder that loads without this package."""
        scheduler = EDMConsistencyScheduler(boundary_scalings="edm", recommended_sigmas=[80.0, 0.821])
        stock = CMStochasticIterativeScheduler.from_config(scheduler.config)
        ConsistencyModelPipeline(unet2d(), stock).save_pretrained(tmp_path)
        pipe = quiet(load(tmp_path))
        assert pipe.scheduler.config.boundary_scalings == "edm"
        pipe(output_type="latent")
        assert pipe.scheduler.sigmas.tolist() == [80.0, 0.821, 0.0]

    def test_our_own_folder_by_every_loader(self, tmp_path: Path) -> None:
        pipe = pipeline(unet2d(), noise_conditioning="edm", recommended_sigmas=[80.0, 1.526])
        pipe.save_pretrained(tmp_path)
        for loader in (DiffusionPipeline, ConsistencyPipeline, ConsistencyImagesPipeline):
            again = loader.from_pretrained(tmp_path)
            assert type(again) is ConsistencyImagesPipeline
            assert type(again.scheduler) is EDMConsistencyScheduler
            assert again.scheduler.config.noise_conditioning == "edm"
            assert again.vae is None

    def test_the_record_stays_beside_the_weights(self, tmp_path: Path) -> None:
        record = Record("ect", "a/teacher", "none", 0.0, 0.0, 1.0, 3, {"_class_name": "EDMConsistencyScheduler"})
        pipeline(unet2d()).save_pretrained(tmp_path / "a")
        write_record(record, tmp_path / "a")
        pipe = quiet(load(tmp_path / "a"))
        assert pipe.record == record
        pipe.save_pretrained(tmp_path / "b")
        assert (tmp_path / "b" / RECORD).read_text() == (tmp_path / "a" / RECORD).read_text()
        pipe(output_type="latent")
        assert len(pipe.scheduler.timesteps) == 3

    def test_a_diffusion_model_is_no_student(self) -> None:
        with pytest.raises(ValueError, match="DDPMScheduler does not sample consistency models"):
            ConsistencyImagesPipeline(unet2d(), DDPMScheduler())


class TestCall:
    def test_callbacks_see_a_preview_and_replace(self, with_classes: ConsistencyImagesPipeline) -> None:
        seen = []

        def callback(pipe, i, t, tensors):
            seen.append(tensors)
            return {"latents": torch.zeros_like(tensors["latents"])} if i == 1 else {}

        request = {"class_labels": 1, "output_type": "latent", "generator": seeds(1)[0], **TWO_STEPS}
        names = ["latents", "denoised", "class_labels"]
        result = with_classes(callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names, **request)
        assert torch.equal(result.images, torch.zeros(1, 3, 8, 8))
        assert torch.equal(seen[1]["latents"], seen[1]["denoised"])
        assert 0.5 < (seen[0]["latents"] - seen[0]["denoised"]).std() / 0.821 < 1.5
        assert seen[0]["class_labels"].tolist() == [1]

    def test_output_types(self, with_classes: ConsistencyImagesPipeline) -> None:
        request = {"class_labels": 1, "latents": torch.randn(1, 3, 8, 8)}
        results = {kind: with_classes(**request, output_type=kind).images for kind in ("latent", "pt", "np", "pil")}
        torch.testing.assert_close(results["pt"], (results["latent"] / 2 + 0.5).clamp(0, 1))
        torch.testing.assert_close(torch.from_numpy(results["np"]).permute(0, 3, 1, 2), results["pt"])
        assert results["pil"][0].size == (8, 8)

    @pytest.mark.parametrize(
        ("asked", "message"),
        [
            ({"class_labels": CLASSES}, "from 0 to 4, one or a list; got 5"),
            ({"class_labels": [0, -1]}, r"from 0 to 4, one or a list; got \[0, -1\]"),
            ({"class_labels": [0.5]}, "whole numbers from 0 to 4"),
            ({"class_labels": [0, 1], "batch_size": 3}, r"equally many, got \{'class_labels': 2, 'batch_size': 3\}"),
            ({"batch_size": 0}, "batch_size must be a whole number of at least 1"),
            ({"generator": seeds(1, 2), "batch_size": 3}, "equally many"),
            ({"latents": torch.zeros(1, 3, 4, 4)}, r"latents must have the shape \(1, 3, 8, 8\)"),
            ({"output_type": "jpg"}, "output_type must be one of"),
            ({"callback_on_step_end_tensor_inputs": ["x"]}, "can hold latents, denoised, class_labels"),
            ({"num_inference_steps": 2, "sigmas": [80.0]}, "Give exactly one of"),
            ({"sigmas": [0.8, 80.0]}, "must be numbers that descend"),
        ],
    )
    def test_refuses_what_cannot_be_done(
        self, with_classes: ConsistencyImagesPipeline, asked: dict, message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            with_classes(**asked)

    def test_labels_for_a_network_without_classes(self) -> None:
        with pytest.raises(ValueError, match="knows no classes; leave class_labels out"):
            pipeline(unet2d())(class_labels=1)

    @pytest.mark.parametrize(
        "config",
        [{"latents_mean": [0.0] * 4}, {**STATISTICS, "latents_std": [1.0, 1.0, 1.0, 0.0]}, {"latents_std": [1.0]}],
    )
    def test_statistics_that_do_not_fit(self, config: dict) -> None:
        with pytest.raises(ValueError, match="a number for each of the 4 channels, latents_std positive ones"):
            latent_pipeline(**config)
