"""Does what it is told, a JSON line each, in a process of its own: HF_ENDPOINT is read when huggingface_hub is imported.

`{"script": "share", "argv": [...]}` runs a script of training/; `{"repo_id": id, "to": file}` loads a repository with
the package and saves an image; with `"package": false`, without the package; with `"custom": class name`, by the
`pipeline.py` in the repository. `{"push": folder, "repo_id": id}` loads a folder with the package and calls `push_to_hub`.
"""

import contextlib
import io
import json
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch


PROMPT, SEED, STEPS = "a photo of a bag", 0, 2


def call(name: str, argv: list[str]) -> str:
    from scripts import forget_accelerate, script

    from cm_diffusers.engine import cli
    from cm_diffusers.publishing import hub

    hub.WAITS = (0.0, 0.0, 0.0)
    forget_accelerate()
    out = io.StringIO()
    with mock.patch.object(sys, "argv", [f"training/{name}.py", *argv]), contextlib.redirect_stdout(out):
        try:
            cli.run(script(name).main)
        except SystemExit as end:
            return str(end.code)
    return out.getvalue().strip()


def push(folder: str, repo_id: str) -> str:
    from cm_diffusers import ConsistencyPipeline

    return str(ConsistencyPipeline.from_pretrained(folder).push_to_hub(repo_id))


def load(repo_id: str, lora: str | None = None, package: bool = True, custom: str | None = None) -> np.ndarray:
    if package:
        from cm_diffusers import ConsistencyPipeline

        return image(ConsistencyPipeline.from_pretrained(lora or repo_id))
    from diffusers import DiffusionPipeline, LCMScheduler

    options = {"custom_pipeline": repo_id, "trust_remote_code": True} if custom else {}
    pipe = DiffusionPipeline.from_pretrained(repo_id, **options)
    assert custom in (None, type(pipe).__name__)
    if lora:
        pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, original_inference_steps=20)
        pipe.load_lora_weights(lora, weight_name="pytorch_lora_weights.safetensors")
    assert "cm_diffusers" not in sys.modules
    return image(pipe)


def image(pipe) -> np.ndarray:
    generator = torch.Generator().manual_seed(SEED)
    options = {"num_inference_steps": STEPS, "guidance_scale": 1.0, "height": 32, "width": 32}
    return pipe(PROMPT, generator=generator, output_type="np", **options).images


if __name__ == "__main__":
    for line in sys.stdin:
        task = json.loads(line)
        if "script" in task:
            reply = call(task["script"], task["argv"])
        elif "push" in task:
            reply = push(task["push"], task["repo_id"])
        else:
            np.save(Path(task.pop("to")), load(**task))
            reply = ""
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()
