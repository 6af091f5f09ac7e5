"""Put the tables that evaluations wrote into README.md and the teacher's card, and write the students' cards anew."""

import re
from pathlib import Path

from cm_diffusers.measured import FOLDER, read_measured
from cm_diffusers.publishing.model_card import model_card
from cm_diffusers.publishing.provenance import read_provenance
from cm_diffusers.publishing.sharing import attach_evaluation
from cm_diffusers.record import read_record


ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "model_cards/teacher-fashion.md", ROOT / "assets/fashion_teacher/README.md"]
BLOCK = re.compile(r"(<!-- begin (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
STUDENTS = {  # folder in assets -> card, and the evaluation and name it was measured under
    "fashion_lcm": ("lcm-fashion", "students", "LCM"),
    "fashion_lcm_lora": ("lcm-lora-fashion", "students", "LCM-LoRA"),
    "fashion_scott": ("scott-fashion", "students", "SCott"),
    "fashion_rlcm_lora": ("rlcm-lora-fashion", "tuned", "RLCM"),
    "fashion_cd": ("cd-fashion", "images", "CD"),
    "fashion_animatelcm": ("animatelcm-fashion", "video", "AnimateLCM"),
}


def with_tables(text: str) -> str:
    return BLOCK.sub(lambda block: block[1] + (ROOT / block[2]).read_text("utf-8").strip() + "\n" + block[3], text)


def cards() -> dict[Path, str]:
    """The card of each bundled student, beside its weights and in model_cards/."""
    texts = {}
    for folder, (card, *_) in STUDENTS.items():
        source = ROOT / "assets" / folder
        measured = read_measured(source / FOLDER)
        for page, grid in (
            (source / "README.md", f"{FOLDER}/{measured.picture}"),
            (ROOT / f"model_cards/{card}.md", f"../assets/{folder}/{FOLDER}/{measured.picture}"),
        ):
            texts[page] = model_card(read_record(source), read_provenance(source), measured, grid)
    return texts


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page.read_text("utf-8")), "utf-8")
    for folder, (_, results, name) in STUDENTS.items():
        attach_evaluation(ROOT / "assets" / folder, ROOT / "assets/results" / results, name)
    for page, text in cards().items():
        page.write_text(text, "utf-8")
