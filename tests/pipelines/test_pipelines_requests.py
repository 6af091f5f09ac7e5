"""What a pipeline refuses, with one clear sentence, and what it warns of."""

import warnings
from dataclasses import asdict, replace

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, LCMScheduler, TCDScheduler
from tiny import tiny_pipeline
from tiny_xl import tiny_xl_pipeline

from cm_diffusers.pipelines import ConsistencyPipeline
from cm_diffusers.record import read_record
from pipelines.test_pipelines import LORA, PROMPTS, STUDENT, TEACHER, seeded


pytestmark = pytest.mark.filterwarnings("ignore:There is no safety checker")
FAST = {"num_inference_steps": 1, "output_type": "latent"}


@pytest.fixture(scope="module")
def embedded() -> ConsistencyPipeline:
    return ConsistencyPipeline.from_pretrained(STUDENT)


@pytest.fixture
def distilled() -> ConsistencyPipeline:
    return ConsistencyPipeline.from_pretrained(LORA)


def unguided() -> ConsistencyPipeline:
    pipe = ConsistencyPipeline.from_pipe(tiny_pipeline())
    pipe.register_to_config(record=asdict(replace(read_record(LORA), guidance="none")))
    return pipe


def warned(pipe, **options) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe(PROMPTS[0], **{**FAST, **options})
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": 3}, "prompt must be a string or a list of strings, got 3"),
        ({"prompt": ["a bag", None]}, "prompt must be a string or a list of strings"),
        ({"prompt": []}, "prompt must be a string or a list of strings"),
        ({"prompt_2": ("a bag",)}, "prompt_2 must be a string or a list of strings"),
        ({"prompt_2": ["a bag"]}, "prompt_2 has 1 entries for 2 prompts"),
        ({"prompt": None}, "exactly one of prompt and prompt_embeds"),
        ({"prompt_embeds": torch.zeros(2, 16, 64)}, "exactly one of prompt and prompt_embeds"),
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number of at least 1, got 0"),
        ({"num_inference_steps": -4}, "at least 1, got -4"),
        ({"num_inference_steps": 2.5}, "a whole number of at least 1, got 2.5"),
        ({"num_inference_steps": "four"}, "a whole number of at least 1, got 'four'"),
        (
            {"num_inference_steps": None, "original_inference_steps": 2.5},
            "original_inference_steps must be a whole num",
        ),
        ({"num_inference_steps": None, "timesteps": [float("nan")]}, r"timesteps must be a list of whole .* \[nan\]"),
        ({"num_inference_steps": None, "timesteps": ["a"]}, r"timesteps must be a list of whole numbers, got \['a'\]"),
        ({"num_inference_steps": None, "timesteps": 5}, "timesteps must be a list of whole numbers, got 5"),
        *(({"guidance_scale": bad}, f"guidance_scale must be .* got {bad!r}") for bad in ("3", float("nan"), -1)),
        *(({"height": bad}, f"height must be a whole number of at least 1, got {bad!r}") for bad in (0, "32", 32.0)),
        *(({"num_images_per_prompt": bad}, f"at least 1, got {bad}") for bad in (0, -1, 1.5, None)),
        ({"clip_skip": -1}, "clip_skip must be a whole number of at least 0, got -1"),
        ({"clip_skip": 99}, "clip_skip leaves out more than the 2 layers of a text encoder"),
        ({"generator": 3}, "generator must be a torch.Generator or a list of them, got 3"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 16, 5)}, r"prompt_embeds must be .* 64\), got \(1, 16, 5\)"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 64)}, r"prompt_embeds must be .* 64\), got \(1, 64\)"),
        ({"num_inference_steps": 51}, "num_inference_steps is 51, but .* 50 "),
        ({"timesteps": [999]}, "num_inference_steps, timesteps or sigmas, not more than one"),
        ({"num_inference_steps": None, "timesteps": [259, 999]}, "timesteps must descend"),
        ({"height": 30}, "multiples of 4, got 30 and 32"),
        ({"width": 2}, "multiples of 4, got 32 and 2"),
        ({"generator": [seeded()]}, "Found 1 generators for 2 images"),
        ({"latents": torch.zeros(2, 4, 4, 4)}, r"latents must have the shape \(2, 4, 8, 8\), got \(2, 4, 4, 4\)"),
        ({"output_type": "jpeg"}, "output_type must be one of pil, np, pt, latent; got 'jpeg'"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"can hold latents, denoised, .*; got \['noise'\]"),
        ({"ip_adapter_image": torch.zeros(1, 3, 8, 8)}, "No IP-Adapter is loaded: call load_ip_adapter"),
        ({"negative_prompt": "a coat"}, "no unconditional branch, so a negative prompt cannot act"),
        ({"negative_prompt_embeds": torch.zeros(2, 16, 64)}, "no unconditional branch"),
    ],
)
def test_refused(embedded, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        embedded(**{"prompt": PROMPTS, **FAST, **options})


@pytest.mark.filterwarnings("ignore:Nothing says")
def test_embeddings_must_fit() -> None:
    pipe, states = ConsistencyPipeline.from_pipe(tiny_xl_pipeline()), torch.zeros(1, 16, 56)
    with pytest.raises(ValueError, match="SDXL-shaped: give pooled_prompt_embeds"):
        pipe(prompt_embeds=states, **FAST)
    pooled = dict.fromkeys(("pooled_prompt_embeds", "negative_pooled_prompt_embeds"), torch.zeros(1, 20))
    with pytest.raises(ValueError, match="must have one shape"):
        pipe(prompt_embeds=states, negative_prompt_embeds=states[:, 1:], **pooled, **FAST)


def test_negative_embeddings_must_fit_the_prompt(distilled) -> None:
    for shape, message in (
        ((1, 3, 64), "must have one shape"),
        ((1, 16, 3), "negative_prompt_embeds must be a tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            distilled(PROMPTS[0], negative_prompt_embeds=torch.zeros(shape), guidance_scale=1.5, **FAST)


def test_a_callback_may_return_nothing(embedded) -> None:
    results = [
        embedded(PROMPTS, generator=seeded(), callback_on_step_end=callback, **FAST).images
        for callback in (None, lambda *step: None)
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize(("low", "high", "count"), [(1.0, 5.0, 0), (0.5, 6.0, 1)])
def test_guidance_outside_the_training_range(embedded, low: float, high: float, count: int) -> None:
    for scale in (low, high):
        messages = warned(embedded, guidance_scale=scale)
        assert len(messages) == count
        assert all(f"guidance_scale {scale:g} is outside the 1 to 5" in message for message in messages)


def test_distilled_students_take_a_little_guidance(distilled) -> None:
    assert warned(distilled) == []
    assert warned(distilled, guidance_scale=1.5, negative_prompt="a coat") == []
    assert warned(distilled, guidance_scale=2.0) == []
    (message,) = warned(distilled, guidance_scale=7.5)
    assert "guidance_scale 7.5 adds to the guidance that is in this student's weights and burns" in message
    (message,) = warned(distilled, negative_prompt="a coat")
    assert "The negative prompt has no effect at guidance_scale 1; raise it a little above 1" in message


@pytest.mark.parametrize("options", [{"guidance_scale": 1.5}, {"negative_prompt": "a coat"}])
def test_students_without_guidance_refuse_it(options: dict) -> None:
    pipe = unguided()
    assert warned(pipe) == []
    with pytest.raises(ValueError, match="distilled without guidance and takes neither guidance_scale above 1"):
        pipe(PROMPTS, **FAST, **options)


def test_a_base_model_is_told_from_a_student() -> None:
    pipe = ConsistencyPipeline.from_pretrained(TEACHER)
    (message,) = warned(pipe, guidance_scale=7.5)
    assert "Nothing says that this model was distilled for few steps" in message
    assert "LCM-LoRA" in message
    pipe.load_lora_weights(LORA)
    assert warned(pipe) == []
    pipe.unload_lora_weights()
    assert len(warned(pipe)) == 1
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)  # the caller knows
    assert warned(pipe) == []


def test_a_scheduler_that_does_not_fit_is_named_with_both_values(embedded) -> None:
    entry = {k: v for k, v in read_record(STUDENT).scheduler.items() if k != "_class_name"}
    pipe = ConsistencyPipeline.from_pipe(embedded)
    for kind in (LCMScheduler, TCDScheduler):
        pipe.scheduler = kind.from_config(entry)
        assert warned(pipe) == []
    pipe.scheduler = LCMScheduler.from_config(
        entry, original_inference_steps=25, beta_end=0.02, prediction_type="sample"
    )
    (message,) = warned(pipe)
    assert "original_inference_steps is 25, in training it was 50" in message
    assert "beta_end is 0.02, in training it was 0.012" in message
    assert "prediction_type is 'sample', in training it was 'epsilon'" in message
    assert "timestep_scaling" not in message
    pipe.scheduler = DDIMScheduler.from_config(entry)
    (message,) = warned(pipe)
    assert "DDIMScheduler is not a consistency scheduler" in message


@pytest.mark.filterwarnings("ignore:The scheduler does not fit")
def test_a_scheduler_without_custom_grids_says_so(embedded) -> None:
    pipe = ConsistencyPipeline.from_pipe(embedded, scheduler=EulerDiscreteScheduler())
    with pytest.raises(ValueError, match="EulerDiscreteScheduler takes no original_inference_steps"):
        pipe(PROMPTS, original_inference_steps=50)


def test_a_pipeline_without_safety_checker_warns_once_unless_that_is_meant() -> None:
    parts = tiny_pipeline().components
    with pytest.warns(UserWarning, match="There is no safety checker"):
        ConsistencyPipeline(**parts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ConsistencyPipeline(**parts, requires_safety_checker=False)
        ConsistencyPipeline(**tiny_xl_pipeline().components)
    with pytest.raises(ValueError, match="needs a feature_extractor"):
        ConsistencyPipeline(**parts | {"safety_checker": torch.nn.Identity()})


@pytest.mark.filterwarnings("ignore:Nothing says")
def test_without_text_encoders_embeddings_are_asked_for() -> None:
    pipe = ConsistencyPipeline.from_pipe(tiny_pipeline(), text_encoder=None)
    for options in ({"prompt": PROMPTS}, {"prompt_embeds": torch.zeros(1, 16, 32), "guidance_scale": 1.5}):
        with pytest.raises(
            ValueError, match="no text encoder; give prompt_embeds, and for guidance negative_prompt_em"
        ):
            pipe(**FAST, **options)
    xl = ConsistencyPipeline.from_pipe(tiny_xl_pipeline(), text_encoder=None, text_encoder_2=None)
    embeddings = {"prompt_embeds": torch.zeros(1, 16, 56), "pooled_prompt_embeds": torch.zeros(1, 20)}
    assert xl(**FAST, **embeddings, guidance_scale=1.5).images.shape == (1, 4, 8, 8)  # zeros need no encoder
