"""What a run says of itself: at its start what it will do, at its end where the result is and what comes next."""

import json
import logging
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from cm_diffusers.data.video import VideoDataConfig
from cm_diffusers.engine.player import Player
from cm_diffusers.engine.trainer import Trainer
from cm_diffusers.evaluation.real_clips import OF_TRAINING
from cm_diffusers.evaluation.reference import ReferenceConfig
from cm_diffusers.evaluation.report import hardware
from cm_diffusers.models.adapters import adapter_layers
from cm_diffusers.models.time_weight import without_weight
from cm_diffusers.record import read_record
from cm_diffusers.types import Batch


logger = logging.getLogger(__name__)
Batches = Callable[[int], Iterator[Batch]]
STARTS = {  # flag -> what it names
    "pretrained_teacher_model": "teacher",
    "pretrained_student_model": "student",
    "pretrained_motion_adapter": "motion adapter",
    "spatial_lora": "LoRA",
    "pretrained_vae": "VAE",
    "pretrained_pipeline": "VAE and text tower of",
}
DATA = ("dataset_name", "train_data_dir", "train_shards_path_or_url", "moving_articles", "prompts_file")
OF_IMAGES = {"resolution", "interpolation_type"}  # the record tells the size; filters need not be the training's
USUAL = 8.0  # guidance scale that evaluate.py takes unless told
DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
IMAGES = 'from cm_diffusers import ConsistencyPipeline; ConsistencyPipeline.from_pretrained({folder})({asked}).images[0].save("sample.png")'
TRY = {  # name of a result, of one without a record, or of images without prompts -> Python that samples it
    "pipeline": IMAGES,
    "lora": IMAGES,
    "student": "from cm_diffusers import ConsistencyVideoPipeline; from diffusers.utils import export_to_gif; "
    'export_to_gif(ConsistencyVideoPipeline.from_pretrained({folder})({asked}).frames[0], "clip.gif")',
    "flow clips": "from cm_diffusers import ConsistencyPipeline; from diffusers.utils import export_to_gif; "
    'export_to_gif(ConsistencyPipeline.from_pretrained({folder})({asked}, output_type="pil").frames[0], "clip.gif")',
    "diffusion pipeline": "from diffusers import DiffusionPipeline; "
    'DiffusionPipeline.from_pretrained({folder})({asked}).images[0].save("sample.png")',
    "diffusion lora": "from diffusers import DiffusionPipeline; pipe = DiffusionPipeline.from_pretrained({start}); "
    'pipe.load_lora_weights({folder}); pipe({asked}).images[0].save("sample.png")',
}


def announce(trainer: Trainer, batches: Batches, configs: Sequence[object], result: str) -> Batches:
    """Log what will be trained, on what, for how long and where to; returns the batches.

    Args:
        batches: The data source; what its `found` says, where it has one, is told.
        configs: The script's dataclasses.
        result: Name of the folder that the run will end with.
    """
    if not trainer.accelerator.is_main_process:
        return batches
    flags = _flags(configs)
    told = {
        "from": ", ".join(f"{name} {flags[flag]}" for flag, name in STARTS.items() if flags.get(flag)) or "nothing",
        "trains": "; ".join(_trains(player, flags) for player in trainer.players),
        "data": str(getattr(batches, "found", None) or _data(flags)).rstrip("."),
        "steps": _steps(trainer),
        "batch": _batch(trainer, flags),
        "precision": DTYPES.get(trainer.accelerator.mixed_precision, "float32"),
        "devices": f"{trainer.accelerator.num_processes} x {trainer.device.type} ({hardware()})",
        "samples": _samples(trainer, flags),
        "writes": _writes(trainer, result),
    }
    lines = [f"  {name:<10}{text}" for name, text in told.items() if text]
    logger.info("%s:\n%s", Path(sys.argv[0]).stem, "\n".join(lines))
    return batches


def conclude(trainer: Trainer, configs: Sequence[object], result: str) -> None:
    """Log where the result is, a line that samples it, and the commands that may come next.

    Args:
        configs: The script's dataclasses.
        result: Name of its folder in that of the run.
    """
    if trainer.accelerator.is_main_process:
        folder, flags = trainer.output_dir / result, _flags(configs)
        told = {"sample": _sampling(folder, flags), **_next(folder, flags)}
        lines = [f"  {name:<10}{shlex.join(words)}" for name, words in told.items() if words]
        logger.info("Done: the result is in %s.\n%s", folder, "\n".join(lines))


def _flags(configs: Sequence[object]) -> dict[str, Any]:
    return {name: value for config in configs for name, value in asdict(config).items()}


def _data(flags: dict[str, Any]) -> str:
    named = next((flags[name] for name in reversed(DATA) if flags.get(name)), None)
    return named or f"its own samples for --prompts {', '.join(flags['prompts'])}"


def _trains(player: Player, flags: dict[str, Any]) -> str:
    known = list(player.raw.parameters())
    kind = type(without_weight(player.raw)).__name__
    if adapter_layers(player.raw):
        kind = f"a LoRA of rank {flags['lora_rank']} on {kind}"
    trained, total = (sum(p.numel() for p in some) for some in (player.trainable, known))
    return f"{player.name}, {kind}, {trained:,} of {total:,} parameters"


def _steps(trainer: Trainer) -> str:
    steps = str(trainer.config.max_train_steps)
    return f"{steps}, of which {trainer.step} are done" if trainer.step else steps


def _batch(trainer: Trainer, flags: dict[str, Any]) -> str:
    parts = flags["train_batch_size"], trainer.config.gradient_accumulation_steps, trainer.accelerator.num_processes
    size = parts[0] * parts[1] * parts[2]
    at = f" of {frames} frames" if (frames := flags.get("sample_n_frames")) else ""
    at += f" of {flags['resolution']} px" if flags.get("resolution") else ""
    return f"{size}{at}: {parts[0]} at once x {parts[1]} accumulated x {parts[2]} process{'es' * (parts[2] > 1)}"


def _samples(trainer: Trainer, flags: dict[str, Any]) -> str:
    """When grids are drawn."""
    if "validation_steps" not in flags:
        return ""
    if not (flags.get("validation_prompts") or flags.get("validation_images")):
        return "none, without --validation_prompts"
    often, last = flags["validation_steps"], trainer.config.max_train_steps
    if often > last:
        return f"samples/ at the end alone: --validation_steps {often} is more than {last} steps"
    return f"samples/ every {often} steps and at the end"


def _writes(trainer: Trainer, result: str) -> str:
    config = trainer.config
    logs = "" if config.report_to == "none" else f", {config.tracker_project_name}/ ({config.report_to})"
    return f"{trainer.output_dir / result}; beside it checkpoint-N/ every {config.checkpointing_steps} steps and at the end{logs}"


def _sampling(folder: Path, flags: dict[str, Any]) -> list[str]:
    """The command that draws a first image or clip; [] for what does not draw."""
    record, kind = read_record(folder), folder.name
    if kind in ("pipeline", "lora") and record is None:
        kind = f"diffusion {kind}"
    elif kind in ("pipeline", "lora") and record.num_frames is not None:
        kind = "flow clips"
    if kind not in TRY:
        return []
    prompts = flags.get("validation_prompts") or ["your prompt"]
    asked = "batch_size=4" if record is not None and record.guidance == "none" else _literal(prompts[0])
    places = {"folder": _literal(str(folder)), "start": _literal(flags.get("pretrained_student_model"))}
    return ["python", "-c", TRY[kind].format(asked=asked, **places)]


def _literal(text: str | None) -> str:
    """In Python's double quotes, which a shell's single ones leave alone."""
    return json.dumps(text, ensure_ascii=False)


def _next(folder: Path, flags: dict[str, Any]) -> dict[str, list[str]]:
    """What measures or uses a result, and what shares it."""
    place, out = str(folder), f"{folder.parent}_evaluation"
    teacher = flags.get("pretrained_teacher_model")
    against = ["--teacher", teacher] if teacher else []
    images, clips = _given(ReferenceConfig, flags), _given(VideoDataConfig, flags)
    if folder.name == "vae":
        return {"next": _script("train_diffusion", "--pretrained_vae", place, "--train_data_dir", "CAPTIONED_IMAGES")}
    if folder.name == "classifier":
        return {"next": _script("evaluate", "--feature_extractor", place, "--pipelines", "PIPELINE", *images)}
    if folder.name == "motion_adapter":
        adapter = [*against, "--pretrained_motion_adapter", place]
        return {"measure": _script("evaluate_video", *adapter, *clips, "--output_dir", out)}
    record = read_record(folder)
    if folder.name not in ("pipeline", "lora", "student") or (folder.name == "lora" and record is None):
        return {}
    name, data = ("evaluate_video", clips) if folder.name == "student" else ("evaluate", images)
    if name == "evaluate_video" and flags.get("pretrained_motion_adapter"):
        against += ["--pretrained_motion_adapter", flags["pretrained_motion_adapter"]]
    if record is not None and record.guidance == "embedded" and not record.w_min <= USUAL - 1 <= record.w_max:
        against += ["--guidance_scales", f"{record.recommended_guidance_scale:g}"]
    if record is not None and record.one_step:
        against += ["--num_inference_steps", "1"]
    commands = {"measure": _script(name, "--pipelines", place, *against, *data, "--output_dir", out)}
    if record is not None and not flags.get("push_to_hub"):
        commands["share"] = _script("share", "--folder", place, "--evaluation", out, "--push_to_hub")
    return commands


def _given(kind: type, flags: dict[str, Any]) -> list[str]:
    """The run's data as flags of an evaluation, which had better be on others; a place to fill in where it had none."""
    left_out = {*OF_TRAINING.split(), "cache_dir"} | (OF_IMAGES if kind is ReferenceConfig else set())
    known = {field.name: field.default for field in fields(kind) if field.name not in left_out}
    chosen = {name: flags[name] for name, default in known.items() if flags.get(name, default) != default}
    of_clips = flags.get("sample_n_frames") is not None
    if of_clips != (kind is VideoDataConfig) or not any(chosen.get(name) for name in DATA):
        chosen = {"train_data_dir": "TEST_DATA"}
    return [word for name, value in chosen.items() for word in (f"--{name}", str(value))]


def _script(name: str, *words: str) -> list[str]:
    """A script that lies beside the running one."""
    return ["python", str(Path(sys.argv[0]).with_name(f"{name}.py")), *words]
