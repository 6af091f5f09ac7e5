"""What training leaves is what is combined: the last snapshot alone is the published student."""

from pathlib import Path

import pytest
import torch
from scripts import data_flags, image_folder, run_script
from tiny import tiny_pipeline

from cm_diffusers.combining.runs import CombineConfig, find_run
from cm_diffusers.evaluation.sampling import generate, load_pipeline


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "LoRA"])
def test_the_last_snapshot_alone_is_the_published_student(tmp_path: Path, lora: bool) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "teacher")
    data = data_flags(image_folder(tmp_path / "data"), tmp_path / "cache")
    run = {"max_train_steps": 4, "snapshot_steps": 2, "learning_rate": 0.01, "output_dir": tmp_path / "run"}
    kind = {"lora": True, "lora_rank": 2, "lora_alpha": 6.0} if lora else {}
    run_script("distill_lcm", pretrained_teacher_model=tmp_path / "teacher", **data, **run, **kind)
    config = CombineConfig(run_dir=str(tmp_path / "run"))
    source = find_run(config)
    assert [one.step for one in source.kept] == [2, 4]
    pipe = load_pipeline(str(source.result))
    images = [generate(pipe, ["a bag"], [0], 2, 1.0, 1)[0]]
    network = source.on(pipe, config)
    for put, vector in ((network.put, [1, 0]), (network.put, [0, 1]), (network.put_published, [0, 1])):
        put(vector)
        images.append(generate(pipe, ["a bag"], [0], 2, 1.0, 1)[0])
    assert (images[0] - images[1]).abs().max() > 5 / 255
    for found in images[2:]:
        torch.testing.assert_close(found, images[0], atol=1.01 / 255 if lora else 0, rtol=0)
