"""Put the tables that evaluations wrote into README.md and the teacher's card, write the students' cards and assets.lock."""

import hashlib
import re
from pathlib import Path

from cm_diffusers.measured import FOLDER, read_measured
from cm_diffusers.publishing.model_card import model_card
from cm_diffusers.publishing.provenance import read_provenance
from cm_diffusers.publishing.sharing import attach_evaluation
from cm_diffusers.record import read_record


ROOT = Path(__file__).resolve().parent.parent
TEACHERS = {
    "fashion_teacher": "teacher-fashion",
    "fashion_flow_teacher": "flow-teacher-fashion",
}  # folder in assets -> card
PAGES = [
    ROOT / "README.md",
    *(ROOT / f"model_cards/{card}.md" for card in TEACHERS.values()),
    *(ROOT / f"assets/{folder}/README.md" for folder in TEACHERS),
]
LOCK = ROOT / "assets.lock"
BLOCK = re.compile(r"(<!-- begin (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
STUDENTS = {  # folder in assets -> card, and the evaluation and name it was measured under
    "fashion_lcm": ("lcm-fashion", "students", "LCM"),
    "fashion_lcm_lora": ("lcm-lora-fashion", "students", "LCM-LoRA"),
    "fashion_scott": ("scott-fashion", "students", "SCott"),
    "fashion_rlcm_lora": ("rlcm-lora-fashion", "tuned", "RLCM"),
    "fashion_cd": ("cd-fashion", "images", "CD"),
    "fashion_scd": ("scd-fashion", "scd", "sCD"),
    "fashion_animatelcm": ("animatelcm-fashion", "video", "AnimateLCM"),
}
REMADE = {  # folder in assets that has no weights -> where the commands of assets/README.md write them
    "fashion_flow_teacher": "runs/flow_fashion/pipeline",
    "fashion_scott": "runs/scott_fashion/pipeline",
    "fashion_edm_latents": "runs/edm_fashion_latents/pipeline",
    "fashion_cd": "runs/cd_fashion_latents/pipeline",
    "fashion_scd": "runs/scd_fashion_latents/pipeline",
    "fashion_frames": "runs/frames_fashion/pipeline",
    "fashion_motion": "runs/motion_fashion/motion_adapter",
    "fashion_animatelcm": "runs/animatelcm_student_fashion/student",
}
NOTE = (
    "The repository has no weights of it: the commands in `assets/README.md` write them to `{}`; load them from there."
)


def with_tables(text: str) -> str:
    return BLOCK.sub(lambda block: block[1] + (ROOT / block[2]).read_text("utf-8").strip() + "\n" + block[3], text)


def with_note(card: str, folder: str) -> str:
    """The card, which says where the weights of a bundled student are made if they are not beside it."""
    note = NOTE.format(REMADE[folder]) + "\n\n" if folder in REMADE else ""
    return card.replace("\n## Use\n\n", f"\n## Use\n\n{note}", 1)


def cards() -> dict[Path, str]:
    """The card of each bundled student, beside its record and in model_cards/."""
    texts = {}
    for folder, (card, *_) in STUDENTS.items():
        source = ROOT / "assets" / folder
        measured = read_measured(source / FOLDER)
        for page, grid in (
            (source / "README.md", f"{FOLDER}/{measured.picture}"),
            (ROOT / f"model_cards/{card}.md", f"../assets/{folder}/{FOLDER}/{measured.picture}"),
        ):
            card = model_card(read_record(source), read_provenance(source), measured, grid)
            texts[page] = with_note(card, folder)
    return texts


def lock() -> str:
    """A line for each file in assets: its sha256, its size in bytes and its path."""
    lines = []
    for path in sorted(path for path in (ROOT / "assets").rglob("*") if path.is_file()):
        content = path.read_bytes()
        lines.append(f"{hashlib.sha256(content).hexdigest()} {len(content)} {path.relative_to(ROOT).as_posix()}\n")
    return "".join(lines)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page.read_text("utf-8")), "utf-8")
    for folder, (_, results, name) in STUDENTS.items():
        attach_evaluation(ROOT / "assets" / folder, ROOT / "assets/results" / results, name)
    for page, text in cards().items():
        page.write_text(text, "utf-8")
    LOCK.write_text(lock(), "utf-8")
