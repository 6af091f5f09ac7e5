"""A finished folder, made ready to be shared: measurements put in, licence filled in, card written anew."""

import inspect
import json
import os
import runpy
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from diffusers import (
    DiffusionPipeline,
    LatentConsistencyModelPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from transformers.hf_argparser import HfArg

from cm_diffusers.engine.cli import refuse_changed
from cm_diffusers.errors import UserError
from cm_diffusers.measured import BASELINES, FOLDER, GRID, TABLE, Measured, clips_of, read_measured, run_name
from cm_diffusers.models.teachers import load_stock
from cm_diffusers.pipelines.recorded import check_has_weights
from cm_diffusers.places import public
from cm_diffusers.publishing.folders import SAMPLES, written_aside
from cm_diffusers.publishing.model_card import model_card
from cm_diffusers.publishing.provenance import Provenance, read_license, read_provenance, write_provenance
from cm_diffusers.publishing.single_file import write_single_file
from cm_diffusers.publishing.student_kinds import LORA_WEIGHTS, PIPELINE_FILE, is_stock, knows_names
from cm_diffusers.record import RECORD, Record, read_record, write_record


CHECKPOINTS = "single_file"


@dataclass
class ShareConfig:
    """A result to share, and what its card shall say beside how it was made."""

    folder: str = HfArg(help="Folder of a finished pipeline or LoRA, as a training script wrote it.")
    evaluation: str | None = HfArg(
        default=None,
        help="Output folder of training/evaluate.py or evaluate_video.py: its numbers and samples go into the card.",
    )
    evaluation_name: str | None = HfArg(
        default=None,
        help="The student's name in that evaluation, where it measured several and its weights do not tell which it is.",
    )
    base_model: str | None = HfArg(
        default=None, help="Hub id of the teacher, where the training used a local copy of it."
    )
    teacher_license: str | None = HfArg(
        default=None,
        help='Licence of the teacher, or of the data if there was none, where its own card gives none, e.g. "openrail++".',
    )
    pipeline_file: str | None = HfArg(
        default=None,
        help="Single-file pipeline to put beside the weights as pipeline.py: a path, or the name of one of this project's, "
        "e.g. consistency_text_to_image.py.",
    )
    single_file: bool = HfArg(
        default=False,
        help="Write a whole student once more as single_file/NAME.safetensors, a checkpoint for ComfyUI and A1111; not one "
        "with embedded guidance, which they have no input for.",
    )
    single_file_fp16: bool = HfArg(default=False, help="With --single_file: in half precision.")


def prepare(config: ShareConfig, name: str | None = None) -> Path:
    """Writes the card of a finished folder anew, from what lies beside the weights.

    Args:
        name: Hub id it will be loaded by; None keeps the present name.

    Raises:
        ValueError: The folder holds no result of a training script, or a pipeline without weights, or the evaluation
            none of this student; a teacher is named where there was none; the single file is no pipeline for this
            folder; or programs that read a single checkpoint could not sample it.
    """
    folder = Path(config.folder)
    record = read_record(folder) if folder.is_dir() else None
    if record is None or not any((folder / file).is_file() for file in ("model_index.json", LORA_WEIGHTS)):
        raise UserError(
            f"{folder} holds no pipeline or LoRA with its {RECORD}; give the folder that a training script ended with, "
            "such as runs/NAME/pipeline, runs/NAME/lora or runs/NAME/student."
        )
    check_has_weights(folder)
    provenance = read_provenance(folder)
    if config.base_model and not record.base_model:
        raise UserError(f"{folder} was trained from data alone, so --base_model names nothing; leave it out.")
    if config.base_model:
        record = replace(record, base_model=config.base_model)
        provenance = replace(provenance, base_id=config.base_model)
    provenance = replace(_with_license(provenance, config, record), name=name or provenance.name)
    single_file = _single_file(config.pipeline_file) if config.pipeline_file else None
    if single_file:
        _check_pipeline_file(single_file, folder, record)
    if config.single_file:
        _write_checkpoint(folder, record, run_name(name or config.folder), config.single_file_fp16)
    else:
        refuse_changed(config, "single_file_fp16", "without --single_file")
    if config.evaluation:
        attach_evaluation(folder, Path(config.evaluation), config.evaluation_name)
    measured = read_measured(folder / FOLDER) if (folder / FOLDER).is_dir() else None
    grid = f"{FOLDER}/{measured.picture}" if measured else SAMPLES if (folder / SAMPLES).is_file() else None
    if single_file:
        _put(folder / PIPELINE_FILE, single_file.read_bytes())
    checkpoints = [f"{path.parent.name}/{path.name}" for path in folder.glob(f"{CHECKPOINTS}/*.safetensors")]
    named, alone = knows_names(folder, provenance), (folder / PIPELINE_FILE).is_file()
    card = model_card(record, provenance, measured, grid, alone, checkpoints, named)
    write_record(record, folder)
    write_provenance(provenance, folder)
    _put(folder / "README.md", card.encode())
    return folder


def _write_checkpoint(folder: Path, record: Record, name: str, fp16: bool) -> None:
    if not (folder / "model_index.json").is_file():
        raise UserError(f"--single_file is for whole pipelines, but {folder} holds a LoRA; leave it out.")
    pipe = load_stock(folder, torch.float16 if fp16 else torch.float32)
    if not isinstance(pipe, StableDiffusionPipeline | StableDiffusionXLPipeline | LatentConsistencyModelPipeline):
        raise UserError(
            f"--single_file is for Stable Diffusion's layout, but {folder} is a {type(pipe).__name__}; leave it out."
        )
    with written_aside(folder / CHECKPOINTS) as aside:
        write_single_file(pipe, aside / f"{name}.safetensors", record)


def _put(path: Path, content: bytes) -> None:
    aside = path.with_name(f".{path.name}.partial")
    aside.write_bytes(content)
    os.replace(aside, path)


def _single_file(name: str) -> Path:
    """By its path, or by its name where the project's own lie: in the installed package, or in the checkout."""
    package = Path(__file__).resolve().parents[1]
    places = (Path(name), package / "single_files" / name, package.parents[1] / "pipelines" / name)
    return next((place for place in places if place.is_file()), places[0])


def _check_pipeline_file(path: Path, folder: Path, record: Record) -> None:
    """Runs the file: diffusers must find exactly one pipeline class in it, for the parts that are in the folder.

    A student that diffusers alone cannot sample needs a file that does.
    """
    if not (folder / "model_index.json").is_file():
        raise UserError(f"--pipeline_file is for whole pipelines, but {folder} holds a LoRA; leave it out.")
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    if any(isinstance(entry, list) and str(entry[0]).startswith("cm_diffusers") for entry in index.values()):
        raise UserError(
            f"--pipeline_file is for diffusers without this package, which cannot load the scheduler of {folder}; leave "
            "it out."
        )
    found = _pipeline_classes(path)
    if len(found) != 1:
        raise UserError(
            f"--pipeline_file {path} must hold exactly one subclass of DiffusionPipeline, but it holds "
            f"{', '.join(cls.__name__ for cls in found) or 'none'}; give a file such as "
            "consistency_text_to_image.py."
        )
    modules, _ = found[0]._get_signature_keys(found[0])
    parts = {name for name, entry in index.items() if isinstance(entry, list) and isinstance(entry[0], str)}
    if lacking := sorted(set(modules) - set(found[0]._optional_components) - parts):
        raise UserError(f"--pipeline_file {path} needs {', '.join(lacking)}, which {folder} has not; leave it out.")
    if left := sorted(parts - set(modules)):
        raise UserError(f"--pipeline_file {path} leaves out {', '.join(left)} of {folder}; give another.")
    if not is_stock(record) and (asked := _asked_for(found[0])):
        raise UserError(
            f"--pipeline_file {path} asks for {', '.join(asked)}, but {folder} needs one that "
            "samples, for diffusers alone cannot; give such a one."
        )


def _asked_for(pipeline: type[DiffusionPipeline]) -> list[str]:
    """What a call must be given beside a prompt."""
    _, *given = inspect.signature(pipeline.__call__).parameters.values()
    needed = [one.name for one in given if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
    return [name for name in needed if name != "prompt"]


def _pipeline_classes(path: Path) -> list[type[DiffusionPipeline]]:
    """Those that the file itself defines."""
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"--pipeline_file {path} is not a Python file that exists; give one.")
    name = "single_file_pipeline"
    try:
        content = runpy.run_path(str(path), run_name=name)
    except Exception as error:  # whatever the file does
        raise UserError(f"--pipeline_file {path} does not run: {error!r}; give one that does.") from error
    own = [value for value in content.values() if isinstance(value, type) and value.__module__ == name]
    return [value for value in own if issubclass(value, DiffusionPipeline)]


def _with_license(provenance: Provenance, config: ShareConfig, record: Record) -> Provenance:
    """The licence that the card of teacher or data gives; else, as now stated there, or by the flag."""
    base = record.base_model  # which scripts name relative to the result
    base = os.path.normpath(Path(config.folder, base)) if base.startswith("..") else base
    where = (base,) if base else (provenance.data, "dataset")
    known = provenance.license or read_license(*where)
    given = config.teacher_license
    if given and known.get("license", given) != given:
        raise UserError(
            f"--teacher_license {given} contradicts the {'teacher' if record.base_model else 'data'}'s card, which gives "
            f"{known['license']!r}; leave it out."
        )
    return replace(provenance, license=known or ({"license": given} if given else {}))


def attach_evaluation(folder: Path, evaluation: Path, name: str | None) -> None:
    """Puts the rows of one student and the sample grid into its folder, whole or not at all.

    Args:
        name: The student's in the evaluation.
    """
    measured = read_measured(evaluation, name, folder)
    measured = replace(measured, setting={key: public(value) for key, value in measured.setting.items()})
    with written_aside(folder / FOLDER) as aside:
        (aside / TABLE).write_text(json.dumps(asdict(measured), indent=1) + "\n", "utf-8")
        picture = clips_of(_student(measured)) if measured.of_clips else GRID
        shutil.copyfile(evaluation / picture, aside / measured.picture)


def _student(measured: Measured) -> str:
    return next(row["pipeline"] for row in measured.rows if row["pipeline"] not in BASELINES)
