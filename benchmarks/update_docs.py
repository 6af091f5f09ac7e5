"""Put the tables that evaluations wrote into README.md and the model cards, between their markers."""

import re
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "model_cards").glob("*.md"))]
BLOCK = re.compile(r"(<!-- begin (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def with_tables(text: str) -> str:
    return BLOCK.sub(lambda block: block[1] + (ROOT / block[2]).read_text("utf-8").strip() + "\n" + block[3], text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page.read_text("utf-8")), "utf-8")
