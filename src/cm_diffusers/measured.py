"""What `training/evaluate.py` or `evaluate_video.py` measured of one student, as it travels with the weights and stands in the model card."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult

from cm_diffusers.errors import UserError


FOLDER = "evaluation"
TABLE, GRID, CLIPS = "table.json", "grid.png", "clips.gif"
TEACHER = "teacher"  # the name of its rows
REAL = "other real images"  # the name of their row: what no pipeline of the same law would be beyond, but for chance
REAL_CLIPS = "other real clips"
BASELINES = (REAL, REAL_CLIPS, TEACHER)
ENOUGH = 1000  # images, below which Fréchet distances are warned of
RESULTS = "pipeline", "lora", "student"  # folders that training scripts end with


def result_folder(run: Path) -> Path | None:
    """What a training ended with; None if it has not ended."""
    return next((run / name for name in RESULTS if (run / name).is_dir()), None)


def distance_name(extractor: str) -> str:
    """What the Fréchet distance on these features is called: numbers on other features than Inception's are no FID.

    Args:
        extractor: "inception", or the folder of a classifier: "assets/fashion_classifier" gives "FD-fashion", and
            "runs/birds/classifier" "FD-birds".
    """
    folder = Path(extractor)
    name = folder.parent.name if folder.name == "classifier" and len(folder.parts) > 2 else folder.name
    return "FID" if extractor == "inception" else f"FD-{name.removesuffix('_classifier')}"


def too_few(count: int, what: str = "images") -> str | None:
    """A warning where a Fréchet distance was measured on so few images that it says little; else None.

    The distance is biased: of fewer images it is larger, whatever they show (1911.07023).
    """
    if count >= ENOUGH:
        return None
    return (
        f"Only {count} {what} were measured: Fréchet distances of fewer than {ENOUGH:,} are too large and uncertain, so "
        "compare them with none but those of as many, and better measure more."
    )


@dataclass(frozen=True)
class Measured:
    """The rows of a student, of its teacher and of other real images, and what they depend on.

    Attributes:
        setting: Number of images, seed, feature extractor, reference images, hardware ... by name.
        rows: One for each number of steps and guidance scale; that is None where the student takes no prompts.
    """

    setting: dict[str, object]
    rows: list[dict]

    @property
    def of_clips(self) -> bool:
        return "num_clips" in self.setting

    @property
    def picture(self) -> str:
        """Name of the file of samples that lies beside the numbers."""
        return CLIPS if self.of_clips else GRID

    def results(self) -> Iterator[EvalResult]:
        """The student's numbers for the Hub, each named as it was computed, with its protocol."""
        for row in self.rows:
            if row["pipeline"] not in BASELINES:
                for metric, (kind, words) in self._metrics().items():
                    if row.get(metric) is not None:
                        yield self._result(row, metric, kind, words)

    def _metrics(self) -> dict[str, tuple[str, str]]:
        """Column -> metric type and name; "fid" is said of Inception features only."""
        extractor = self.setting["extractor"]
        agreement = {"agreement": ("prompt_agreement", f"prompt agreement by {extractor}")}
        if self.of_clips:
            name, features = distance_name(extractor), f"Fréchet distance, features of {extractor}"
            return {
                "direction_accuracy": ("direction_accuracy", "share of clips that move as told"),
                "fd_frames": ("frechet_distance", f"{name} of frames ({features})"),
                "fd_differences": ("frechet_distance", f"{name} of differences of frames ({features})"),
                "fvd": ("fvd", f"FVD, features of {self.setting['video_extractor']}"),
                **agreement,
            }
        standard = extractor == "inception"
        distance = "fid" if standard else "frechet_distance"
        name = distance_name(extractor) + ("" if standard else f" (Fréchet distance, features of {extractor})")
        return {
            "fid": (distance, name),
            **agreement,
            "clip_score": ("clip_score", "CLIP score"),
        }

    def _result(self, row: dict, metric: str, kind: str, words: str) -> EvalResult:
        reference = str(self.setting["reference"])
        steps = f"{row['num_inference_steps']} step{'s' if row['num_inference_steps'] > 1 else ''}"
        count = "num_clips" if self.of_clips else "num_images"
        scale = row["guidance_scale"]
        sampling = {name: row[name] for name in ("num_inference_steps", "guidance_scale") if row[name] is not None}
        of_images = "unconditional-image-generation" if scale is None else "text-to-image"
        return EvalResult(
            task_type="text-to-video" if self.of_clips else of_images,
            dataset_type=reference,
            dataset_name=reference,
            metric_type=kind,
            metric_name=f"{words}; {steps}{'' if scale is None else f', guidance scale {scale:g}'}",
            metric_value=round(row[metric], 4),
            metric_args=sampling | {name: self.setting[name] for name in (count, "seed", "dtype")},
        )


def clips_of(pipeline: str) -> str:
    """Name of the animation of a pipeline that `evaluate_video.py` writes: "_" for what does not belong in file names."""
    return re.sub(r"[^\w.-]+", "_", pipeline) + ".gif"


def run_name(source: str) -> str:
    """Of the run, where a folder is one that training scripts name after what is in it; else the last part."""
    path = Path(source).resolve() if Path(source).exists() else Path(source)
    return path.parent.name if path.is_dir() and path.name in RESULTS else path.name


def weights_digest(source: str | Path) -> str | None:
    """SHA-256 of a student's own weights, wherever they lie: of its network, or of its LoRA and motion modules.

    None where none are here, as of a Hub id.
    """
    files = sorted(Path(source).glob("unet/*.safetensors")) or sorted(Path(source).glob("*.safetensors"))
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def read_measured(folder: Path, name: str | None = None, student: Path | None = None) -> Measured:
    """The rows of one student in the folder of an evaluation.

    Args:
        name: The student's in the table; not needed if it is the only one beside the baselines, or found by its weights.
        student: Its folder, where it must be the one that was measured; older evaluations do not tell.

    Raises:
        ValueError: No evaluation, or no such student in it, or several and no name, or two under one name; or what was
            measured had other weights.
    """
    path = folder / TABLE
    if not path.is_file():
        raise UserError(
            f"{folder} holds no {TABLE}; give the --output_dir of training/evaluate.py or evaluate_video.py."
        )
    content = json.loads(path.read_text("utf-8"))
    wanted = _name_of(path, content, name, student)
    rows = [row for row in content["rows"] if row["pipeline"] == wanted]
    if len({(row["num_inference_steps"], row["guidance_scale"]) for row in rows}) < len(rows):
        raise UserError(f"{path} has several rows of {wanted} for the same steps and guidance; measure it anew.")
    return Measured(content["setting"], [row for row in content["rows"] if row["pipeline"] in (*BASELINES, wanted)])


def _name_of(path: Path, content: dict, name: str | None, student: Path | None) -> str:
    """The student's name in a table: by its weights, by what was given, or as the only one."""
    names = list(dict.fromkeys(row["pipeline"] for row in content["rows"] if row["pipeline"] not in BASELINES))
    digests = content.get("weights", {})
    own = weights_digest(student) if student and digests else None
    same = [one for one in names if own and digests.get(one) == own]
    candidates = same or names
    wanted = candidates[0] if name is None and len(candidates) == 1 else name
    if wanted not in names:
        found = "no --evaluation_name is given" if name is None else f"--evaluation_name is {name!r}"
        raise UserError(f"{path} measured {', '.join(names) or 'no student'}, but {found}; give one of them.")
    if own and digests.get(wanted) not in (None, own):
        advice = f"give --evaluation_name {same[0]!r}" if same else "measure that folder"
        raise UserError(f"{path} measured as {wanted} other weights than those in {student}; {advice}.")
    return wanted
