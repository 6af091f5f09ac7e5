"""The published combination: as a student of its training, with what it is combined of in its card."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cm_diffusers.combining.report import Report
from cm_diffusers.combining.runs import CombineConfig, Source
from cm_diffusers.evaluation.sampling import load_pipeline
from cm_diffusers.models.teachers import load_stock
from cm_diffusers.places import public
from cm_diffusers.publishing.pipelines import save_lora, save_pipeline
from cm_diffusers.publishing.provenance import Provenance, command_of, read_provenance
from cm_diffusers.record import base_model_of, read_record


OF_LAST_WEIGHTS = re.compile(
    r"published_step|\w+_when_best"
)  # what a watched training told of the weights it published


def publish(report: Report, source: Source, config: CombineConfig, configs: Sequence[object]) -> Path:
    """Writes `<output_dir>/pipeline` or `lora`, and returns it.

    Args:
        configs: The script's dataclasses.
    """
    folder = Path(config.output_dir) / source.result.name
    provenance = _told(report, read_provenance(source.result), folder, configs)
    save_combination(source, config, report.verdict.published.entry.vector, folder, provenance)
    return folder


def save_combination(
    source: Source, config: CombineConfig, vector: Sequence[float], folder: Path, provenance: Provenance
) -> None:
    """The pipeline, or LoRA, with a combination of the run's snapshots in the place of its weights."""
    own = {name: value for name, value in provenance.settings.items() if not OF_LAST_WEIGHTS.fullmatch(name)}
    provenance, record = replace(provenance, settings=own), read_record(source.result)
    if record.base_model:
        record = replace(record, base_model=base_model_of(record, source.result))
    if source.is_lora:
        pipe = load_pipeline(str(source.result))
        network = source.on(pipe, config)
        network.put_published(vector)
        changed = {"lora_rank": network.rank, "lora_alpha": network.config.lora_alpha}
        provenance = replace(provenance, settings=provenance.settings | changed)
        save_lora(network.network, folder, record, provenance, config.save_fp16)
    else:
        pipe = load_stock(source.result)
        source.on(pipe, config).put_published(vector)
        save_pipeline(pipe, folder, config.save_fp16, record, provenance)


def _told(report: Report, training: Provenance, folder: Path, configs: Sequence[object]) -> Provenance:
    verdict = report.verdict
    combination = {
        "published": verdict.published.name,
        "accepted": verdict.accepted,
        "objective": report.objective,
        "weights": dict(zip(map(str, report.steps), verdict.published.entry.vector, strict=True)),
        "values": {one.name: report.shown(one.value) for one in verdict.contenders},
        "evaluations": len(report.log),
        "share": verdict.share,
        "num_images": report.config.num_images,
    }
    command = f"{training.command}\n{command_of(configs)}"
    return replace(training, name=public(str(folder)), command=command, combination=combination)
