"""The cards of motion modules, conditions and tuned diffusion models, to the letter."""

from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard

from cm_diffusers.publishing.other_cards import condition_card, motion_card, tuned_card
from cm_diffusers.publishing.provenance import Provenance


MADE = Provenance(
    name="ada/result",
    base_id="ada/images",
    family="stable-diffusion",
    data="ada/clips",
    license={"license": "openrail++"},
    command="python training/x.py --prompt '{a}'",
    commit="abc1234",
    settings={
        "pretrained_teacher_model": "ada/images",
        "pretrained_student_model": "/somewhere/diffusion",
        "rewards": ["jpeg_compressibility", "clip_score"],
        "sample_n_frames": 8,
    },
)
POLICY = SimpleNamespace(num_steps=10, guidance_scale=2.0, eta=0.5)
END = """
Code: cm_diffusers at `abc1234`.

```bash
python training/x.py --prompt '{a}'
```
"""
MOTION = """\
---
library_name: diffusers
pipeline_tag: text-to-video
license: "openrail++"
base_model: ada/images
base_model_relation: adapter
tags: [text-to-video, diffusers, diffusers-training, cm_diffusers, animatediff]
---

# Motion modules for `ada/images`

Make clips of up to 16 frames with this image model. Trained between its frozen layers on 8 frames of
ada/clips, by diffusion, after [AnimateDiff](https://arxiv.org/abs/2307.04725); the noise schedule, `linear`, lies in
`scheduler_config.json`.

```python
from diffusers import AnimateDiffPipeline, DDIMScheduler, MotionAdapter

adapter = MotionAdapter.from_pretrained("ada/result")
pipe = AnimateDiffPipeline.from_pretrained("ada/images", motion_adapter=adapter)
pipe.scheduler = DDIMScheduler.from_pretrained("ada/result", timestep_spacing="trailing", clip_sample=False)
frames = pipe("your prompt", num_frames=8).frames[0]
```

For few steps: `training/distill_animatelcm.py --pretrained_motion_adapter ada/result`.
"""
IMAGE_ADAPTER = """\
---
library_name: diffusers
pipeline_tag: image-to-video
tags: [image-to-video, diffusers, diffusers-training, cm_diffusers, animatelcm]
---

# Image-to-video adapter of `clips`

Lets a few-step video student begin with a given image. Trained on ada/clips without a teacher, after
[AnimateLCM](https://arxiv.org/abs/2402.00769).

```python
from cm_diffusers import ConsistencyVideoPipeline, ImageToVideoAdapter

adapter = ImageToVideoAdapter.from_pretrained("ada/result")
pipe = ConsistencyVideoPipeline.from_pretrained("clips", image_adapter=adapter)
frames = pipe("your prompt", image=image).frames[0]
```
"""
CONTROLNET = """\
---
library_name: diffusers
pipeline_tag: text-to-video
tags: [text-to-video, controlnet, diffusers, diffusers-training, cm_diffusers, animatelcm]
---

# ControlNet of edges for `clips`

Lets a few-step video student follow the edges of given frames (Sobel magnitude, normalised per clip). Trained on
ada/clips without a teacher, after [AnimateLCM](https://arxiv.org/abs/2402.00769).

```python
from cm_diffusers import ConsistencyVideoPipeline
from diffusers import ControlNetModel

net = ControlNetModel.from_pretrained("ada/result")
pipe = ConsistencyVideoPipeline.from_pretrained("clips", controlnet=net)
frames = pipe("your prompt", conditioning_frames=edges).frames[0]
```
"""
TUNED = """\
---
library_name: diffusers
pipeline_tag: text-to-image
tags: [text-to-image, diffusers, diffusers-training, cm_diffusers, ddpo]
---

# `diffusion`, tuned for jpeg_compressibility, clip_score

A diffusion model, tuned for a reward of its own samples with cm_diffusers, after [DDPO](https://arxiv.org/abs/2305.13301).

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("ada/result")
image = pipe("your prompt", num_inference_steps=10, guidance_scale=2, eta=0.5).images[0]
```
"""
TUNED_LORA = """\
---
library_name: diffusers
pipeline_tag: text-to-image
tags: [text-to-image, diffusers, diffusers-training, cm_diffusers, draft]
---

# `diffusion`, tuned for jpeg_compressibility, clip_score

A diffusion model, tuned for a reward of its own samples with cm_diffusers, after [DRaFT](https://arxiv.org/abs/2309.17400).

```python
from diffusers import DDIMScheduler, DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("diffusion")
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
pipe.load_lora_weights("ada/result")
image = pipe("your prompt", num_inference_steps=10, guidance_scale=2, eta=0.5).images[0]
```

For ComfyUI, A1111 and kohya's tools: the same file, `pytorch_lora_weights.safetensors`. For PEFT: `peft/`, exactly what was trained.
"""


@pytest.mark.parametrize(
    ("card", "told"),
    [
        (motion_card(MADE, "linear", 16), MOTION),
        (condition_card(MADE, "image_adapter", "/somewhere/clips"), IMAGE_ADAPTER),
        (condition_card(MADE, "controlnet", "clips"), CONTROLNET),
        (tuned_card("rlcm", MADE, False, POLICY), TUNED),
        (tuned_card("direct_reward", MADE, True, POLICY), TUNED_LORA),
    ],
    ids=["motion", "image_adapter", "controlnet", "tuned", "tuned_lora"],
)
def test_a_card_to_the_letter(card: str, told: str) -> None:
    assert card == told + END
    assert ModelCard(card).data.library_name == "diffusers"
