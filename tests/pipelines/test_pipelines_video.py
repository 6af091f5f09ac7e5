"""ConsistencyVideoPipeline draws what the stock pipelines draw, and what they cannot: shared noise, images, previews."""

import json
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    AnimateDiffControlNetPipeline,
    AnimateDiffPipeline,
    ControlNetModel,
    DDIMScheduler,
    LCMScheduler,
    MotionAdapter,
    StableDiffusionPipeline,
    UNetMotionModel,
)
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.utils import export_to_gif
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from models.test_image_to_video import awake
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny import tiny_pipeline, tiny_unet
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from cm_diffusers.models.image_to_video import ImageToVideoAdapter
from cm_diffusers.pipelines import layouts
from cm_diffusers.pipelines.frame_noise import mixed_frames, progressive_frames, repeated_frames, shuffled_frames
from cm_diffusers.pipelines.pipeline_consistency_video import ConsistencyVideoPipeline
from cm_diffusers.record import Record, read_record, write_record
from cm_diffusers.schedulers import ConsistencyScheduler
from pipelines.test_pipelines import ip_adapter, seeded


PROMPTS = ["an ankle boot", "a bag"]
FAST = {"num_inference_steps": 1, "num_frames": 2, "output_type": "latent"}
WEIGHTS = "diffusion_pytorch_model.safetensors"

pytestmark = pytest.mark.filterwarnings("ignore:Nothing says:UserWarning", "ignore:There is no safety checker")


def motion_adapter(seed: int = 1, frames: int = 8) -> MotionAdapter:
    torch.manual_seed(seed)
    return MotionAdapter(
        block_out_channels=(32, 64),
        motion_layers_per_block=1,
        motion_norm_num_groups=8,
        motion_num_attention_heads=2,
        motion_max_seq_length=frames,
    )


def stock(cls=AnimateDiffPipeline, **components) -> AnimateDiffPipeline:
    """A stock pipeline with LCM's scheduler and AnimateDiff's betas."""
    extra = {name: components.pop(name) for name in ("motion_adapter", "controlnet") if name in components}
    parts = tiny_pipeline(**components).components
    del parts["safety_checker"]
    pipe = cls(**parts, **{"motion_adapter": motion_adapter(), **extra})
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, beta_schedule="linear")
    return pipe


def ours(pipe=None, **components) -> ConsistencyVideoPipeline:
    return ConsistencyVideoPipeline.from_pipe(pipe or stock(), **components)


def clips(pipe, prompt=PROMPTS, seed=0, **options) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "num_frames": 4, "guidance_scale": 1.0, "generator": seeded(seed), **options}
    return pipe(prompt, output_type="np", **options).frames


def noises(pipe, prompt="a bag", frames: int = 8, **options) -> list[torch.Tensor]:
    """The noise of the start, and that injected after each step, solved for in x' = alpha' f + sigma' z."""
    first, steps = [], []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: first.append(args[0]))

    def see(pipe, step, timestep, tensors):
        steps.append((tensors["latents"], tensors["denoised"]))
        return {}

    inputs = ["latents", "denoised"]
    options = {"num_inference_steps": 3, "generator": seeded(), "output_type": "latent", **options}
    pipe(
        prompt,
        num_frames=frames,
        callback_on_step_end=see,
        callback_on_step_end_tensor_inputs=inputs,
        **options,
    )
    hook.remove()
    table = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps[1:]]
    return [first[0]] + [(x - a**0.5 * f) / (1 - a) ** 0.5 for (x, f), a in zip(steps[:-1], table, strict=True)]


# Equality with the stock pipelines


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 1.5, "negative_prompt": ["a coat", "a dress"]}])
@pytest.mark.parametrize("steps", [1, 4])
def test_clips_equal_those_of_the_stock_pipeline(steps: int, options: dict) -> None:
    pipe, options = stock(), {"num_inference_steps": steps, **options}
    mine = clips(ours(pipe), **options)
    assert mine.shape == (2, 4, 32, 32, 3)
    np.testing.assert_allclose(mine, clips(pipe, **options), atol=1e-5)


def test_the_motion_modules_act() -> None:
    one, other = (clips(ours(stock(motion_adapter=motion_adapter(seed)))) for seed in (1, 2))
    assert abs(one - other).max() > 1e-2


def test_free_init_equals_stock() -> None:
    pipe = stock()
    results = []
    for one in (ours(pipe), pipe):
        one.enable_free_init(num_iters=2, use_fast_sampling=True)
        results.append(clips(one))
    np.testing.assert_allclose(*results, atol=1e-5)


@pytest.mark.parametrize("prompt", ["a bag", {0: "a bag", 6: "a coat"}])
def test_free_noise_with_independent_noise_equals_stock(prompt) -> None:
    pipe = stock()
    pipe.enable_free_noise(context_length=4, context_stride=2, noise_type="random")
    mine = ours(pipe)
    mine.enable_free_noise(context_length=4, context_stride=2, noise_type="random")
    options = {"num_frames": 10, "guidance_scale": 1.5}
    np.testing.assert_allclose(clips(mine, prompt, **options), clips(pipe, prompt, **options), atol=1e-5)
    several = clips(mine, prompt, num_videos_per_prompt=2, **{**options, "generator": [seeded(1), seeded(0)]})
    np.testing.assert_allclose(several[1], clips(pipe, prompt, **options)[0], atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_ip_adapters_act_as_in_the_stock_pipeline(scale: float) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=32, patch_size=16, projection_dim=24)
    pipe = stock(image_encoder=CLIPVisionModelWithProjection(vision).eval())
    pipe.feature_extractor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    without = clips(ours(pipe), guidance_scale=scale)
    pipe.load_ip_adapter(ip_adapter(tiny_unet(), 24), subfolder="", weight_name="")
    options = {"ip_adapter_image": torch.rand(1, 3, 32, 32), "guidance_scale": scale}
    mine = clips(ours(pipe), **options)
    np.testing.assert_allclose(mine, clips(pipe, **options), atol=1e-5)
    assert abs(mine - without).max() > 1e-2
    with pytest.raises(ValueError, match="An IP-Adapter is loaded: give ip_adapter_image"):
        clips(ours(pipe))


def control_net(seed: int = 0) -> ControlNetModel:
    torch.manual_seed(seed)
    net = ControlNetModel.from_unet(tiny_unet(), conditioning_embedding_out_channels=(8, 8, 16))
    for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block):
        torch.nn.init.normal_(layer.weight, std=0.2)
    torch.nn.init.normal_(net.controlnet_cond_embedding.conv_out.weight, std=20.0)
    return net


def pictures(count: int, seed: int = 0) -> list[PIL.Image.Image]:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return [PIL.Image.fromarray(one) for one in pixels]


@pytest.mark.parametrize("guidance", [1.0, 1.5])
@pytest.mark.parametrize(
    ("nets", "frames", "scale"),
    [(1, pictures(4), 0.7), (2, [pictures(4), pictures(4, seed=1)], [0.7, 0.4])],
    ids=["one", "two"],
)
def test_control_nets_act_as_in_the_stock_pipeline(nets: int, frames: list, scale, guidance: float) -> None:
    control = [control_net(seed) for seed in range(nets)]
    pipe = stock(AnimateDiffControlNetPipeline, controlnet=control[0] if nets == 1 else control)
    options = {"guidance_scale": guidance, "conditioning_frames": frames, "controlnet_conditioning_scale": scale}
    mine = ours(pipe)
    expected = clips(pipe, PROMPTS[0], **options)  # stock cannot make two clips
    np.testing.assert_allclose(clips(mine, PROMPTS[0], **options), expected, atol=1e-5)
    none = clips(mine, PROMPTS[0], **{**options, "controlnet_conditioning_scale": 0.0})
    assert abs(none - expected).max() > 1e-2


def test_forms_of_conditioning_frames() -> None:
    pipe = ours(controlnet=control_net())
    frames = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    expected = clips(pipe, conditioning_frames=frames)
    floats = frames / 255
    for form in (floats, list(floats), floats[None], floats.expand(2, -1, -1, -1, -1)):
        np.testing.assert_allclose(clips(pipe, conditioning_frames=form), expected, atol=1e-5)
    several = clips(pipe, conditioning_frames=torch.stack([floats, floats.flip(0)]))
    np.testing.assert_allclose(several[0], expected[0], atol=1e-5)
    assert abs(several[1] - expected[1]).max() > 1e-2


# Behaviour


def test_a_clip_does_not_depend_on_its_batch() -> None:
    pipe = ours()
    for sharing in (None, mixed_frames(1.0), shuffled_frames(2, 1)):
        options = {"noise_sharing": sharing, "guidance_scale": 1.5}
        four = clips(pipe, generator=[seeded(i) for i in range(4)], num_videos_per_prompt=2, **options)
        assert four.shape[0] == 4
        np.testing.assert_allclose(four[3:], clips(pipe, PROMPTS[1], seed=3, **options), atol=1e-5)


def test_prompt_embeddings_stand_in_for_prompts_and_layers_are_skipped() -> None:
    pipe = ours()
    expected = clips(pipe, guidance_scale=1.5, negative_prompt="a coat")
    states, negative = pipe.encode_prompt(
        PROMPTS, negative_prompt="a coat", do_classifier_free_guidance=True, num_images_per_prompt=1
    )
    options = {"prompt_embeds": states, "negative_prompt_embeds": negative, "guidance_scale": 1.5}
    np.testing.assert_allclose(clips(pipe, None, **options), expected, atol=1e-5)
    np.testing.assert_allclose(clips(pipe, clip_skip=0), clips(pipe), atol=1e-5)
    assert abs(clips(pipe, clip_skip=1) - clips(pipe)).max() > 1e-4


def test_callbacks_see_the_preview_and_can_interrupt() -> None:
    pipe, seen = ours(), []

    def callback(pipe, step, timestep, tensors):
        seen.append((int(timestep), tensors["latents"], tensors["denoised"]))
        pipe._interrupt = step == 1
        return tensors

    result = pipe(
        PROMPTS[0],
        num_frames=4,
        num_inference_steps=4,
        generator=seeded(),
        output_type="latent",
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "denoised"],
    ).frames
    assert [t for t, *_ in seen] == [999, 759]
    torch.testing.assert_close(result, seen[-1][1])
    noise = randn_tensor((1, 4, 4, 8, 8), generator=seeded())
    one_step = pipe(PROMPTS[0], num_frames=4, num_inference_steps=1, latents=noise, output_type="latent").frames
    torch.testing.assert_close(seen[0][2], one_step)


def test_an_interrupt_also_ends_free_init() -> None:
    pipe, seen = ours(), []

    def callback(pipe, step, timestep, tensors):
        seen.append(tensors["latents"])
        pipe._interrupt = True

    pipe.enable_free_init(num_iters=3)
    options = {"num_inference_steps": 2, "num_frames": 2, "output_type": "latent", "callback_on_step_end": callback}
    result = pipe("a bag", **options).frames
    assert len(seen) == 1
    torch.testing.assert_close(result, seen[0])


def test_the_guidance_can_be_cut_off_by_the_stock_callback() -> None:
    unet = stock().unet
    pipe = ours(controlnet=control_net(), image_adapter=ImageToVideoAdapter.from_unet(unet))
    calls = []
    pipe.unet.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    clips(
        pipe,
        PROMPTS[0],
        num_inference_steps=3,
        guidance_scale=1.5,
        image=pictures(1)[0],
        conditioning_frames=pictures(4),
        callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0),
    )
    assert calls == [2, 1, 1]


def test_an_embedded_student_takes_guidance_as_a_number() -> None:
    pipe = ours(stock(unet=tiny_unet(time_cond_proj_dim=16)))
    calls = []
    pipe.unet.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    weak, strong = (clips(pipe, guidance_scale=scale) for scale in (1.0, 8.0))
    assert set(calls) == {2}
    assert abs(weak - strong).max() > 1e-3


def test_output_types(tmp_path: Path) -> None:
    pipe = ours()
    options = {"num_frames": 3, "num_inference_steps": 1, "height": 32, "width": 40}
    shapes = {"np": (1, 3, 32, 40, 3), "pt": (1, 3, 3, 32, 40), "latent": (1, 4, 3, 8, 10)}
    for kind, shape in shapes.items():
        frames = pipe("a bag", output_type=kind, generator=seeded(), **options).frames
        assert tuple(frames.shape) == shape
    again = pipe("a bag", output_type="np", generator=seeded(), return_dict=False, decode_chunk_size=2, **options)[0]
    frames = pipe("a bag", generator=seeded(), **options).frames[0]
    np.testing.assert_allclose(np.stack(frames) / 255, again[0], atol=1 / 255)
    with PIL.Image.open(export_to_gif(frames, str(tmp_path / "clip.gif"))) as gif:
        assert (gif.n_frames, gif.size) == (3, (40, 32))


def test_half_precision() -> None:
    pipe = ours(controlnet=control_net(), image_adapter=awake(ImageToVideoAdapter.from_unet(stock().unet)))
    pipe.to(torch.bfloat16)
    frames = clips(pipe, image=pictures(1)[0], conditioning_frames=pictures(4), noise_sharing=mixed_frames(1.0))
    assert np.isfinite(frames).all()


def test_every_offloaded_component_exists() -> None:
    pipe = ours()
    assert set(pipe.model_cpu_offload_seq.split("->")) <= set(pipe.components)
    assert set(pipe._optional_components) <= set(pipe.components)


# Noise


@pytest.mark.parametrize(("window", "stride"), [(4, 4), (4, 2), (5, 3), (6, 1)])
def test_shuffled_frames_hold_every_noise_once_in_each_window(window: int, stride: int) -> None:
    noise = shuffled_frames(window, stride, seed=3)((1, 2, 23, 4, 4), seeded(), "cpu", torch.float32)
    order = (noise[0, :, :, None] - noise[0, :, None, :window]).abs().amax((0, 3, 4)).argmin(1)
    torch.testing.assert_close(noise, noise[:, :, order], rtol=0, atol=0)
    for start in range(0, 23 - window, stride):
        assert sorted(order[start : start + window].tolist()) == list(range(window))
    torch.testing.assert_close(noise[:, :, :window], randn_tensor((1, 2, window, 4, 4), generator=seeded()))


def test_shuffles_differ_and_follow_the_seed_alone() -> None:
    def order(seed: int, generator: int = 0, batch: int = 1) -> list[int]:
        noise = shuffled_frames(8, 8, seed)((batch, 1, 24, 2, 2), seeded(generator), "cpu", torch.float32)
        return (noise[0, 0, :, None] - noise[0, 0, None, :8]).abs().amax((2, 3)).argmin(1).tolist()

    assert order(0) == order(0, generator=5, batch=3) != order(1)
    assert order(0)[8:16] != list(range(8))


def test_repeated_frames_repeat() -> None:
    noise = repeated_frames(3)((2, 4, 8, 4, 4), seeded(), "cpu", torch.float32)
    torch.testing.assert_close(noise[:, :, 3:], noise[:, :, :-3], rtol=0, atol=0)
    assert (noise[:, :, 1:] - noise[:, :, :-1]).abs().flatten(3).amax(-1).min() > 0.1


@pytest.mark.parametrize(
    ("sampler", "correlation"),
    [
        (mixed_frames(1.0), lambda n: 0.5),
        (mixed_frames(0.0), lambda n: 0.0),
        (mixed_frames(2.0), lambda n: 0.8),
        (progressive_frames(2.0), lambda n: 0.8 ** (n / 2)),
        (progressive_frames(0.0), lambda n: 0.0),
        (shuffled_frames(4, 2), None),
    ],
)
def test_marginals_are_standard_normal_and_frames_correlate_as_said(sampler, correlation) -> None:
    noise = sampler((4, 4, 6, 64, 64), seeded(), "cpu", torch.float32)
    frames = noise.transpose(0, 2).flatten(1).double()
    torch.testing.assert_close(frames.mean(1), torch.zeros(6).double(), atol=0.02, rtol=0)
    if correlation is not None:
        expected = [[1.0 if i == j else correlation(abs(i - j)) for j in range(6)] for i in range(6)]
        torch.testing.assert_close(frames.cov(), torch.tensor(expected).double(), atol=0.02, rtol=0)
    levels = torch.linspace(0.02, 0.98, 25).double()
    quantiles = torch.distributions.Normal(0.0, 1.0).icdf(levels)
    found = torch.quantile(frames[3, ::2], levels)
    torch.testing.assert_close(found, quantiles, atol=0.05, rtol=0)


def test_shared_noise_survives_every_re_noising() -> None:
    pipe = ours()
    found = noises(pipe, noise_sharing=repeated_frames(3))
    assert len(found) == 3
    for noise in found:
        torch.testing.assert_close(noise[:, :, 3:], noise[:, :, :-3], atol=1e-4, rtol=0)
    assert all(abs(np.corrcoef(found[0].flatten(), noise.flatten())[0, 1]) < 0.1 for noise in found[1:])
    assert pipe.scheduler.noise_sampler is None


def test_one_permutation_serves_the_start_and_every_step() -> None:
    order = None
    for noise in noises(ours(), noise_sharing=shuffled_frames(4, 4, seed=1)):
        distances = (noise[0, :, :, None] - noise[0, :, None, :4]).abs().amax((0, 3, 4))
        assert distances.min(1).values.max() < 1e-4
        order = distances.argmin(1) if order is None else order
        torch.testing.assert_close(distances.argmin(1), order, rtol=0, atol=0)
    assert order[4:].tolist() != [0, 1, 2, 3]


@pytest.mark.parametrize("kind", ["repeat_context", "shuffle_context"])
def test_free_noise_shares_what_it_says_in_every_step(kind: str) -> None:
    """Stock FreeNoise repeats nothing for "repeat_context", and its sharing is lost after the first step."""
    pipe = ours()
    pipe.enable_free_noise(context_length=4, context_stride=2, noise_type=kind)
    for noise in noises(pipe, frames=12):
        distances = (noise[0, :, :, None] - noise[0, :, None, :4]).abs().amax((0, 3, 4))
        assert distances.min(1).values.max() < 1e-4
        if kind == "repeat_context":
            assert distances.argmin(1).tolist() == [frame % 4 for frame in range(12)]


def test_a_noise_sampler_of_the_scheduler_is_restored() -> None:
    pipe, calls = ours(), []
    pipe.scheduler.noise_sampler = theirs = lambda *where: calls.append(where) or repeated_frames(2)(*where)

    def fail(*arguments):
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        pipe("a bag", **FAST, noise_sharing=repeated_frames(1), callback_on_step_end=fail)
    assert pipe.scheduler.noise_sampler is theirs
    assert calls == []
    pipe("a bag", **{**FAST, "num_inference_steps": 3})
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: shuffled_frames(0, 1), "window must be a whole number of at least 1, got 0"),
        (lambda: shuffled_frames(4, 5), "stride must be at most window"),
        (lambda: repeated_frames(2.5), "window must be a whole number"),
        (lambda: mixed_frames(-1.0), "alpha must be a number of at least 0"),
        (lambda: progressive_frames(float("inf")), "alpha must be a number of at least 0"),
        (lambda: repeated_frames(2)((1, 4, 8, 8), None, "cpu", torch.float32), r"clips \(B, C, F, h, w\)"),
        (lambda: mixed_frames(1.0)((1, 4, 8, 8), None, "cpu", torch.float32), r"clips \(B, C, F, h, w\)"),
    ],
)
def test_what_frames_cannot_share(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# Image to video


def test_an_image_acts_through_its_adapter() -> None:
    pipe = ours()
    plain = clips(pipe)
    pipe = ours(image_adapter=ImageToVideoAdapter.from_unet(pipe.unet))
    one, other = pictures(2)
    np.testing.assert_allclose(clips(pipe, image=one), plain, atol=0)
    np.testing.assert_allclose(clips(pipe), plain, atol=0)
    awake(pipe.image_adapter)
    first, second = clips(pipe, image=one), clips(pipe, image=other)
    assert abs(first - plain).max() > 1e-2
    both = clips(pipe, image=[one, other], guidance_scale=1.5)
    np.testing.assert_allclose(both[0], clips(pipe, image=one, guidance_scale=1.5)[0], atol=1e-5)
    assert abs(both[1] - clips(pipe, image=one, guidance_scale=1.5)[1]).max() > 1e-3
    assert abs(clips(pipe, image=one, motion_scale=1.5) - first).max() > 1e-3
    tensor = torch.from_numpy(np.array(one)).permute(2, 0, 1) / 255
    np.testing.assert_allclose(clips(pipe, image=tensor), first, atol=1e-5)
    assert abs(first - second).max() > 1e-3


def test_the_adapter_reads_the_mean_latents_of_the_image() -> None:
    pipe, seen = ours(image_adapter=ImageToVideoAdapter.from_unet(stock().unet)), []
    pipe.image_adapter.register_forward_pre_hook(lambda module, args: seen.append(args))
    image = torch.rand(1, 3, 32, 32)
    clips(pipe, image=image, motion_scale=0.5)
    latents, frames, scale = seen[0]
    expected = pipe.vae.encode(2 * image - 1).latent_dist.mean * pipe.vae.config.scaling_factor
    torch.testing.assert_close(latents, expected.expand(2, -1, -1, -1))
    assert (frames, scale) == (4, 0.5)


def test_residuals_of_image_and_control_add_up() -> None:
    pipe = ours(controlnet=control_net(), image_adapter=awake(ImageToVideoAdapter.from_unet(stock().unet)))
    seen = []
    pipe.unet.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    options = {
        **FAST,
        "latents": torch.randn(1, 4, 2, 8, 8),
        "image": pictures(1)[0],
        "conditioning_frames": pictures(2),
    }
    pipe("a bag", **options)
    pipe("a bag", **options, controlnet_conditioning_scale=0.0)
    pipe("a bag", **{**options, "image": None})
    names = ("down_block_additional_residuals", "mid_block_additional_residual")
    both, image, control = ([*one[names[0]], one[names[1]]] for one in seen)
    for total, a, b in zip(both, image, control, strict=True):
        torch.testing.assert_close(total, a + b)
        assert min(a.abs().max(), b.abs().max()) > 1e-3


# Loading


def entry(base: str | Path, **scheduler) -> Record:
    config = LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="linear", **scheduler).config
    fields = {"_class_name": "LCMScheduler", **{k: v for k, v in config.items() if k[0] != "_"}}
    return Record("animatelcm", str(base), "distilled", 2.0, 2.0, 1.2, 3, fields)


@pytest.fixture
def student(tmp_path: Path) -> Path:
    """A published student, beside its base model: motion adapter at the root, LoRA of the image model, record."""
    tiny_pipeline().save_pretrained(tmp_path / "base")
    folder = tmp_path / "student"
    motion_adapter().save_pretrained(folder)
    unet = tiny_unet()
    unet.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["to_k", "conv1"], init_lora_weights=False))
    layers, config = get_peft_model_state_dict(unet), unet.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers, unet_lora_adapter_metadata=config)
    write_record(entry("base", original_inference_steps=100), folder)
    return folder


def by_hand(folder: Path, weight_name: str = "pytorch_lora_weights.safetensors", **scheduler) -> AnimateDiffPipeline:
    adapter = MotionAdapter.from_pretrained(folder)
    pipe = AnimateDiffPipeline.from_pretrained(folder.parent / "base", motion_adapter=adapter)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, beta_schedule="linear", **scheduler)
    with warnings.catch_warnings(action="ignore"):  # PEFT's, of the layers that get no adapter
        pipe.load_lora_weights(folder, weight_name=weight_name)
    return pipe


@pytest.mark.filterwarnings("error:While injecting")
def test_a_published_student_is_loaded_and_sampled_as_its_record_says(student: Path) -> None:
    pipe = ConsistencyVideoPipeline.from_pretrained(student)
    assert pipe.record == read_record(student)
    assert (pipe.scheduler.config.beta_schedule, pipe.scheduler.config.original_inference_steps) == ("linear", 100)
    np.testing.assert_allclose(clips(pipe), clips(by_hand(student, original_inference_steps=100)), atol=1e-5)
    adapted = {name for name, _ in pipe.unet.named_parameters() if ".lora_" in name}
    spatial = {key.removeprefix("unet.") for key in load_file(student / "pytorch_lora_weights.safetensors")}
    assert {name.replace(".default_0", "") for name in adapted} == spatial
    frames = pipe("a bag", output_type="latent").frames
    assert (frames.shape, pipe.num_timesteps, pipe.guidance_scale) == ((1, 4, 8, 8, 8), 3, 1.2)
    with pytest.raises(ValueError, match="A LoRA is on the UNet"):
        pipe.save_pretrained(student.parent / "whole")


def test_a_student_is_put_on_another_base_model(student: Path) -> None:
    tiny_pipeline(seed=5).save_pretrained(student.parent / "other")
    expected = clips(ConsistencyVideoPipeline.from_pretrained(student))
    mine = ConsistencyVideoPipeline.from_pretrained(student, base_model=student.parent / "other")
    assert mine.record == read_record(student)
    assert abs(clips(mine) - expected).max() > 1e-2


def test_a_student_on_a_motion_pipeline_replaces_its_motion_modules(student: Path) -> None:
    expected = clips(ConsistencyVideoPipeline.from_pretrained(student))
    stock(motion_adapter=motion_adapter(seed=7)).save_pretrained(student.parent / "teacher")
    mine = ConsistencyVideoPipeline.from_pretrained(student, base_model=student.parent / "teacher")
    np.testing.assert_allclose(clips(mine), expected, atol=1e-5)


def without_positions(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    kept = {key: value for key, value in weights.items() if not key.endswith(".pe")}
    assert 0 < len(kept) < len(weights)
    save_file(kept, folder / WEIGHTS, {"format": "pt"})


def test_the_layout_of_animatelcm(student: Path) -> None:
    """No record, a LoRA of another name, no positional buffers."""
    expected = clips(by_hand(student))
    (student / "cm_diffusers.json").unlink()
    (student / "pytorch_lora_weights.safetensors").rename(student / "t2v_lora.safetensors")
    without_positions(student)
    where = {"base_model": student.parent / "base", "weight_name": "t2v_lora.safetensors"}
    pipe = ConsistencyVideoPipeline.from_pretrained(student, **where)
    np.testing.assert_allclose(clips(pipe), expected, atol=1e-5)
    assert pipe.scheduler.config.beta_schedule == "linear"
    scheduler = LCMScheduler(beta_schedule="scaled_linear")
    assert ConsistencyVideoPipeline.from_pretrained(student, scheduler=scheduler, **where).scheduler is scheduler
    for missing in where:
        with pytest.raises(ValueError, match="give base_model and weight_name"):
            ConsistencyVideoPipeline.from_pretrained(student, **{k: v for k, v in where.items() if k != missing})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("mid_block.motion_modules.0.proj_in.weight"), "lacks weights .1, such as mid_block"),
        (lambda w: w.update({"strange.weight": torch.zeros(2)}), "has unknown weights .1, such as strange.weight"),
        (lambda w: w.update({"mid_block.motion_modules.0.proj_in.weight": torch.zeros(2, 2)}), "no motion adapter"),
    ],
)
def test_a_motion_adapter_must_be_whole(change, message: str, student: Path) -> None:
    weights = load_file(student / WEIGHTS)
    change(weights)
    save_file(weights, student / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        ConsistencyVideoPipeline.from_pretrained(student)


def test_what_is_no_student_says_so(student: Path) -> None:
    base = student.parent / "base"
    with pytest.raises(ValueError, match="This UNet makes images; give a motion_adapter"):
        ConsistencyVideoPipeline.from_pretrained(base)
    stock().save_pretrained(student.parent / "teacher")
    with pytest.raises(ValueError, match="does not fit the UNet"):
        ConsistencyVideoPipeline.from_pretrained(student.parent / "teacher", motion_adapter=motion_adapter(frames=4))
    with pytest.raises(ValueError, match=r"config\.json is that of a UNet2DConditionModel"):
        ConsistencyVideoPipeline.from_pretrained(base / "unet", base_model=base, weight_name="x.safetensors")
    write_record(entry("gone"), student)
    with pytest.raises(ValueError, match="belongs on 'gone', which cannot be used"):
        ConsistencyVideoPipeline.from_pretrained(student)


def test_an_image_model_or_its_lora_takes_a_motion_adapter(student: Path) -> None:
    base, adapter = student.parent / "base", motion_adapter()
    pipe = ConsistencyVideoPipeline.from_pretrained(base, motion_adapter=adapter, scheduler=by_hand(student).scheduler)
    np.testing.assert_allclose(clips(pipe), clips(stock()), atol=1e-5)
    image_lora = student.parent / "image_lora"
    image_lora.mkdir()
    for name in ("pytorch_lora_weights.safetensors", "cm_diffusers.json"):
        (image_lora / name).write_bytes((student / name).read_bytes())
    mine = ConsistencyVideoPipeline.from_pretrained(image_lora, motion_adapter=adapter)
    np.testing.assert_allclose(clips(mine), clips(ConsistencyVideoPipeline.from_pretrained(student)), atol=1e-5)


def test_a_pipeline_is_saved_and_loaded_with_all_its_parts(tmp_path: Path) -> None:
    pipe = ours(
        controlnet=control_net(),
        image_adapter=awake(ImageToVideoAdapter.from_unet(stock().unet)),
        record=asdict(entry("base")),
    )
    pipe.save_pretrained(tmp_path)
    again = ConsistencyVideoPipeline.from_pretrained(tmp_path)
    options = {"image": pictures(1)[0], "conditioning_frames": pictures(4)}
    np.testing.assert_allclose(clips(again, **options), clips(pipe, **options), atol=1e-5)
    assert again.record == pipe.record == read_record(tmp_path)
    assert isinstance(again.unet, UNetMotionModel)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["image_adapter"] == ["cm_diffusers", "ImageToVideoAdapter"]


def test_a_repository_is_asked_what_it_holds(monkeypatch) -> None:
    def answer(error):
        monkeypatch.setattr(layouts, "hf_hub_download", lambda *where, **options: raise_(error))

    answer(EntryNotFoundError("no such file"))
    with pytest.raises(ValueError, match="for a motion adapter with its LoRA, give base_model and weight_name"):
        ConsistencyVideoPipeline.from_pretrained("somebody/motion")
    for error in (LocalEntryNotFoundError("offline"), HFValidationError("no name")):
        answer(error)
        with pytest.raises(OSError, match="somebody/motion"):
            ConsistencyVideoPipeline.from_pretrained("somebody/motion")


def raise_(error: Exception) -> None:
    raise error


# Refusals


@pytest.fixture(scope="module")
def steered() -> ConsistencyVideoPipeline:
    return ours(controlnet=control_net(), image_adapter=ImageToVideoAdapter.from_unet(tiny_unet()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 9}, "num_frames is 9, but the motion adapter takes at most 8"),
        ({"num_frames": 0}, "num_frames must be a whole number of at least 1"),
        ({"noise_sharing": "shuffled"}, "noise_sharing must be a function"),
        ({"noise_sharing": lambda shape, *where: torch.zeros(1)}, "noise_sharing must return noise of"),
        ({"image": pictures(1)[0].resize((64, 32))}, r"image has the size \(32, 64\) .*, the clip \(32, 32\)"),
        ({"image": torch.rand(3, 3, 32, 32)}, "3 images cannot be spread over 2"),
        ({"image": 3}, "An image must be a PIL image"),
        ({"conditioning_frames": None}, "There is a ControlNet: give conditioning_frames"),
        ({"conditioning_frames": pictures(3)}, "There are 3 conditioning_frames for 2 frames"),
        ({"conditioning_frames": torch.rand(3, 3, 32, 32)}, "There are 3 conditioning_frames for 2 frames"),
        ({"conditioning_frames": torch.rand(2, 3, 32, 64)}, r"conditioning_frames has the size \(32, 64\)"),
        ({"conditioning_frames": pictures(1)[0]}, "conditioning_frames must be a list of images, or a tensor"),
        ({"controlnet_conditioning_scale": [1.0, 1.0]}, "Found 2 controlnet_conditioning_scales for 1 ControlNets"),
        ({"prompt": None}, "exactly one of prompt and prompt_embeds"),
        ({"prompt": {0: "a bag"}}, "prompt must be a string or a list of strings"),
        ({"negative_prompt": ["a coat"]}, "negative_prompt has 1 entries for 2 prompts"),
        ({"height": 30}, "height and width must be multiples of 4"),
        ({"latents": torch.zeros(2, 4, 3, 8, 8)}, r"latents must have the shape \(2, 4, 2, 8, 8\)"),
        ({"generator": [torch.Generator()]}, "Found 1 generators for 2 images"),
        ({"output_type": "gif"}, "output_type must be one of"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "can hold latents, denoised"),
        ({"timesteps": [999]}, "Give num_inference_steps or timesteps"),
        ({"decode_chunk_size": 0}, "decode_chunk_size must be a whole number"),
        ({"prompt": None, "prompt_embeds": torch.zeros(2, 16, 7)}, "prompt_embeds must be a tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore:The negative prompt has no effect")
def test_refused(steered, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        steered(**{"prompt": PROMPTS, "conditioning_frames": pictures(2), **FAST, **options})


def test_refused_by_the_parts_that_are_there() -> None:
    pipe = ours()
    with pytest.raises(ValueError, match="An image needs an image_adapter"):
        pipe("a bag", **FAST, image=pictures(1)[0])
    with pytest.raises(ValueError, match="conditioning_frames need a ControlNet"):
        pipe("a bag", **FAST, conditioning_frames=pictures(2))
    pipe = ours(image_adapter=ImageToVideoAdapter(block_out_channels=(32, 64, 64), norm_num_groups=8))
    with pytest.raises(ValueError, match="The image_adapter was made for another UNet"):
        pipe("a bag", **FAST, image=pictures(1)[0])
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="DDIMScheduler draws noise that frames do not share"):
        pipe("a bag", **FAST, noise_sharing=repeated_frames(1))
    with pytest.raises(ValueError, match="DDIMScheduler takes no timesteps"):
        pipe("a bag", **{**FAST, "num_inference_steps": None}, timesteps=[999])
    pipe.enable_free_init()
    pipe.scheduler = ConsistencyScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="FreeInit chooses the timesteps itself"):
        pipe("a bag", **{**FAST, "num_inference_steps": None}, timesteps=[999, 499])
    with pytest.raises(ValueError, match="FreeInit draws noise that frames do not share"):
        pipe("a bag", **FAST, noise_sharing=repeated_frames(1))
    pipe.enable_free_noise(context_length=2, context_stride=1)
    with pytest.raises(ValueError, match="With FreeNoise the prompt is one string"):
        pipe(PROMPTS, **FAST)


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_base_model_and_strong_guidance_are_warned_of() -> None:
    pipe = ours(record=asdict(entry("base")))
    with pytest.warns(UserWarning, match="adds to the guidance that is in this student's weights") as caught:
        pipe("a bag", **FAST, guidance_scale=7.5)
    assert caught[0].filename == __file__
    pipe.scheduler = ConsistencyScheduler.from_config(pipe.scheduler.config, beta_schedule="scaled_linear")
    with pytest.warns(UserWarning, match="beta_schedule is 'scaled_linear', in training it was 'linear'"):
        pipe("a bag", **FAST)
    pipe = ours()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    with pytest.warns(UserWarning, match="Nothing says that this model was distilled") as caught:
        pipe("a bag", **FAST)
    assert caught[0].filename == __file__


def test_noise_that_frames_share_keeps_its_published_name():
    from cm_diffusers import frame_noise as published
    from cm_diffusers.pipelines import frame_noise

    assert set(published.__all__) == {name for name in vars(frame_noise) if name.endswith("_frames")}
    assert all(getattr(published, name) is getattr(frame_noise, name) for name in published.__all__)
