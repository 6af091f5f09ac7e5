"""Where a student comes from: script, settings, data and teacher's licence, `training.json` beside its weights."""

import json
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, fields
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download, metadata_load
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

import cm_diffusers
from cm_diffusers.engine.launcher import DEFAULTS, is_sharded
from cm_diffusers.errors import UserError
from cm_diffusers.models.families.base import network_of, tag_of
from cm_diffusers.pipelines.recorded import PROVENANCE
from cm_diffusers.places import LOCAL, public


logger = logging.getLogger(__name__)

# Where files lay and who pushed them is nobody's business, and a token least of all.
PRIVATE = set(
    "output_dir overwrite_output_dir cache_dir latent_cache_dir resume_from_checkpoint report_to "
    "tracker_project_name push_to_hub hub_model_id hub_private_repo hub_token".split()
)


@dataclass(frozen=True)
class Provenance:
    """What a model card tells about the making, beside the record.

    Attributes:
        name: Hub id or folder the card's examples load.
        base_id: Hub id of the teacher; None if it was a folder of the machine.
        family: Under what the Hub lists such networks, as "stable-diffusion-xl" or "sd3"; None for one without text.
        data: What the student was trained on, in words or as a Hub id.
        license: The `license` of the teacher, or of the data where there is none, and `license_name` and
            `license_link` where it has them; empty if unknown.
        command: The command line, without paths of the machine.
        commit: Of the code.
        settings: Flags and their values, without paths of the machine and without anything about the Hub.
        num_classes: Of a network that takes `class_labels`.
        fused: Whether a LoRA, or motion modules, lie in the weights of a whole pipeline.
        combination: Of weights that a run kept, see `publishing/combined_card.py`; None for what a training ended with.
    """

    name: str
    base_id: str | None
    family: str | None
    data: str
    license: dict[str, str]
    command: str
    commit: str
    settings: dict[str, object]
    num_classes: int | None = None
    fused: bool = False
    combination: dict[str, object] | None = None


def describe_run(
    configs: Sequence[object],
    teacher: DiffusionPipeline | None,
    source: str | None,
    data: str,
    name: str,
    left_out: Collection[str] = (),
    num_classes: int | None = None,
) -> Provenance:
    """The provenance of a training script's result.

    Args:
        configs: The script's dataclasses.
        teacher: The teacher's pipeline; None if the network was trained from data alone.
        source: Folder or Hub id it came from, where its licence stands; None without a teacher.
        data: Hub id or folder of the data, or words.
        name: Hub id or folder of the result.
        left_out: Settings that do not act in this script.
        num_classes: Of a network that takes `class_labels`.
    """
    settings = {key: public(value) for config in configs for key, value in asdict(config).items()}
    return Provenance(
        name=public(name),
        base_id=None if source is None or is_path(source) else source,
        family=_family(teacher),
        data=public(data),
        license=read_license(data, "dataset") if source is None else read_license(source),
        command=command_of(configs),
        commit=_commit(),
        settings={key: value for key, value in settings.items() if key not in {*PRIVATE, *left_out}},
        num_classes=num_classes,
    )


def _family(teacher: DiffusionPipeline | None) -> str | None:
    if getattr(teacher, "text_encoder", None) is None:
        return None
    return tag_of(network_of(teacher))


def is_path(source: str) -> bool:
    """Whether a model is named by a folder of this machine instead of a Hub id."""
    local = source.startswith(".") or bool(LOCAL.match(source)) or source.count("/") > 1
    return local or (source != "" and Path(source).exists())  # Path("") is the working folder


def write_provenance(provenance: Provenance, folder: Path) -> None:
    (folder / PROVENANCE).write_text(json.dumps(asdict(provenance), indent=1) + "\n", "utf-8")


def read_provenance(folder: Path) -> Provenance:
    """
    Raises:
        ValueError: There is none, or it is not one.
    """
    path = folder / PROVENANCE
    try:
        return as_provenance(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path} does not tell how the student was trained ({error!r}); give a folder that a training script wrote."
        ) from error


def as_provenance(content: dict[str, object]) -> Provenance:
    """What a newer release has added is passed over."""
    return Provenance(**{field.name: content[field.name] for field in fields(Provenance) if field.name in content})


def read_license(source: str, repo_type: str = "model") -> dict[str, str]:
    """The licence fields in the front matter of a README, in a folder or on the Hub; {} if unknown.

    What is wrong with a README is a warning: the licence is for the card, which comes after hours of training.
    """
    try:
        here = Path(source).exists()
        path = Path(source, "README.md") if here else Path(hf_hub_download(source, "README.md", repo_type=repo_type))
        metadata = (metadata_load(path) if path.is_file() else None) or {}
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
        return {}
    except Exception as error:  # of yaml, of the encoding, of what is no mapping
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        logger.warning("The README.md of %s is malformed (%s); the card will give no licence.", source, reason)
        return {}
    found = {key: metadata[key] for key in ("license", "license_name", "license_link") if metadata.get(key)}
    listed = found.get("license")
    if isinstance(listed, list):  # as data sets have it; of several, none is that of everything
        found["license"] = listed[0] if len(listed) == 1 else None
    if odd := sorted(key for key, value in found.items() if not isinstance(value, str | None)):
        logger.warning(
            "The README.md of %s gives no text as %s; the card will give no licence.", source, ", ".join(odd)
        )
        return {}
    return found if found.get("license") or "license" not in found else {}


def command_of(configs: Iterable[object]) -> str:
    """The script with every flag that is not its default, as `accelerate launch` starts it if on several processes."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    words = ["python"] if processes == 1 else ["accelerate", "launch", "--num_processes", str(processes)]
    words += ["--use_fsdp", "--fsdp_version", "2"] if processes > 1 and is_sharded() else []
    words += _script()
    for config in configs:
        for field in fields(config):
            value = getattr(config, field.name)
            if field.name not in PRIVATE and value != _default(field):
                words += _flag(field.name, public(value))
    return shlex.join(words)


def _script() -> list[str]:
    """By its path as in a checkout, by its module where it lies in the installed package."""
    path = Path(sys.argv[0]).resolve()
    if path.parent == Path(cm_diffusers.__file__).resolve().parent / "training":
        return ["-m", f"cm_diffusers.training.{path.stem}"]
    return [f"training/{path.name}"]


def _default(field: Field) -> object:
    if field.name in DEFAULTS:
        return DEFAULTS[field.name]
    return field.default if field.default_factory is MISSING else field.default_factory()


def _flag(name: str, value: object) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no_{name}"]
    return [f"--{name}", *map(str, value if isinstance(value, list) else [value])]


def _commit() -> str:
    """The commit of the code that trains where it is a checkout, with "-dirty" if it was changed; else the version."""
    here, git = Path(__file__), ["git", "-C", str(Path(__file__).parent)]
    try:
        # a package installed inside somebody else's checkout is not of that checkout
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=True)
        describe = [*git, "describe", "--always", "--dirty", "--exclude", "*"]
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return f"version {cm_diffusers.__version__}"
