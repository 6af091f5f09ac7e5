"""A page of the fronts of a sweep, whole in itself: point at a point, and it shows its images and knobs."""

import base64
import io
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from cm_diffusers.evaluation.front_plot import colours, curves, limits, pairs
from cm_diffusers.evaluation.front_report import KNOBS, Front, Report, in_words, number, setting_words, values_of
from cm_diffusers.evaluation.fronts import non_dominated
from cm_diffusers.evaluation.report import replace_file
from cm_diffusers.measured import TEACHER


PAGE = "fronts.html"
WIDTH, HEIGHT, MARGIN = 420, 340, 52  # of a panel, and what labels take of it on each side
INNER = np.array([WIDTH, HEIGHT]) - 2 * MARGIN
INSIDE = 'width="{0}" height="{1}" viewBox="{2} {2} {0} {1}"'.format(*INNER, MARGIN)  # clips what is beyond
TICKS = 4
STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 1rem; color: #222; background: #fff }
main { display: flex; flex-wrap: wrap; gap: 1rem } #fronts { flex: 1 1 440px }
aside { flex: 0 0 340px; position: sticky; top: 1rem; align-self: flex-start }
aside img { width: 100%; image-rendering: pixelated } svg text { font-size: 11px; fill: #222 }
td, th { text-align: left; font-weight: normal; padding-right: 1em } figure { margin: 0 0 1.5rem }
.point { cursor: pointer; outline: none } .point.chosen, .point:focus { stroke: #000; stroke-width: 3 }
"""
SCRIPT = """
const rows = JSON.parse(document.getElementById('rows').textContent);
const points = [...document.querySelectorAll('.point')], aside = document.querySelector('aside');
function show(row) {
  points.forEach(point => point.classList.toggle('chosen', point.dataset.row === row));
  const { name, image, knobs, numbers } = rows[row], table = document.createElement('table');
  for (const pair of [...knobs, ...numbers]) {
    const line = table.insertRow();
    pair.forEach(text => { line.insertCell().textContent = text });
  }
  const title = document.createElement('h2'), picture = new Image();
  title.textContent = name;
  picture.src = image; picture.alt = 'Images of ' + name;
  aside.replaceChildren(title, picture, table);
}
for (const point of points)
  for (const event of ['mouseover', 'focus', 'click'])
    point.addEventListener(event, () => show(point.dataset.row));
"""


def write_page(folder: Path, report: Report) -> None:
    """Writes `fronts.html`."""
    replace_file(folder / PAGE, lambda path: path.write_text(page(report), "utf-8"))


def page(report: Report) -> str:
    """One HTML page without any other file or address: names are shown and do not act."""
    rows = json.dumps([_told(report, place) for place in range(len(report.rows))]).replace("<", "\\u003c")
    key = " ".join(
        f'<span style="color:{colour}">● {escape(name)}</span>' for name, colour in colours(report.rows).items()
    )
    images = f"Images, a column for each prompt: {escape('; '.join(report.prompts))}." if report.prompts else ""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>Fronts</title><style>{STYLE}</style></head><body>
<h1>Fronts</h1><p>{key}</p><p>Better is to the right and up; the line joins the points that no other beats in both columns.
Hollow points at a border lie beyond it.</p>
<main><div id="fronts">{"".join(_figure(report, front) for front in report.fronts)}</div>
<aside aria-live="polite">Point at a point, or go from one to the next with the tabulator.</aside></main>
<p>{images} {escape(setting_words(report.setting))}</p>
<script type="application/json" id="rows">{rows}</script><script>{SCRIPT}</script></body></html>
"""


def _told(report: Report, place: int) -> dict[str, object]:
    """What the page shows of a row."""
    row, numbers = report.rows[place], {key: one for key, one in report.columns.items() if key not in KNOBS}
    return {
        "name": str(row["pipeline"]),
        "image": picture(report.shown[place]),
        "knobs": [[KNOBS[key][0], KNOBS[key][1].format(row[key])] for key in KNOBS if row.get(key) is not None],
        "numbers": [[one.heading, number(row, key, one)] for key, one in numbers.items()],
    }


def picture(shown: Tensor) -> str:
    """Images (P, E, 3, h, w) in bytes, a column for each prompt, as the address of a picture."""
    sheet = shown.permute(1, 3, 0, 4, 2).flatten(2, 3).flatten(0, 1)
    file = io.BytesIO()
    Image.fromarray(sheet.numpy()).save(file, format="WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def _figure(report: Report, front: Front) -> str:
    panels = "".join(_panel(report, front, pair) for pair in pairs(front))
    return f"<figure>{panels}<figcaption>{escape(front.caption(report.columns))}</figcaption></figure>"


def _panel(report: Report, front: Front, pair: tuple[str, str]) -> str:
    """SVG of two columns."""
    better = [report.columns[key].better for key in pair]
    values = values_of(report.rows, pair)
    place_of = _Scale(limits(report.rows, pair), [way == "min" for way in better])
    on = np.flatnonzero(non_dominated(values, better))
    parts = [_axes(place_of, [report.columns[key].heading for key in pair])]
    palette = colours(report.rows)
    taught = [row for row in report.rows if row["pipeline"] == TEACHER]
    lines = [_line(place_of(values[on[np.argsort(values[on, 0])]]), "#000000", "")]
    lines += [_line(place_of(line), palette[TEACHER], "5 4") for line in curves(taught, pair)]
    parts.append(f'<svg x="{MARGIN}" y="{MARGIN}" {INSIDE}>{"".join(lines)}</svg>')
    for number_, (row, place) in enumerate(zip(report.rows, place_of(values), strict=True)):
        if not np.isnan(place).any():
            parts.append(_point(number_, in_words(row), place, palette[row["pipeline"]], number_ in front.members))
    return f'<svg width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" role="group">{"".join(parts)}</svg>'


class _Scale:
    """From two columns to places in a panel, better to the right and up.

    Args:
        ends: Of the axes (2, 2).
        inverted: Whether less is better, in each.
    """

    def __init__(self, ends: np.ndarray, inverted: Sequence[bool]) -> None:
        self.low, self.high = ends
        self.flip = np.array(inverted) != [False, True]  # places grow downwards

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Of values (N, 2); NaN stays NaN."""
        share = (values - self.low) / (self.high - self.low)
        return MARGIN + INNER * np.where(self.flip, 1 - share, share)

    def ticks(self) -> np.ndarray:
        """Values (T, 2)."""
        return np.linspace(self.low, self.high, TICKS + 2)[1:-1]


def _axes(scale: _Scale, headings: Sequence[str]) -> str:
    right, bottom = WIDTH - MARGIN, HEIGHT - MARGIN
    parts = [f'<path d="M{MARGIN} {MARGIN}V{bottom}H{right}" fill="none" stroke="#777777"/>']
    for values in scale.ticks():
        x, y = scale(values)
        parts.append(f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{values[0]:.3g}</text>')
        parts.append(f'<text x="{MARGIN - 4}" y="{y + 4:.1f}" text-anchor="end">{values[1]:.3g}</text>')
    across, up = map(escape, headings)
    parts.append(f'<text x="{WIDTH / 2}" y="{bottom + 34}" text-anchor="middle">{across}</text>')
    return "".join(parts) + f'<text x="{MARGIN}" y="{MARGIN - 14}" text-anchor="middle">{up}</text>'


def _line(places: np.ndarray, colour: str, dashes: str) -> str:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places if not np.isnan([x, y]).any())
    return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-dasharray="{dashes}"/>'


def _point(row: int, words: str, place: np.ndarray, colour: str, ringed: bool) -> str:
    """Hollow at the border where it lies beyond."""
    x, y = np.clip(place, MARGIN, MARGIN + INNER)
    fill = colour if (place == (x, y)).all() else "#ffffff"
    ring = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="8" fill="none" stroke="#000000"/>' if ringed else ""
    label = f'class="point" data-row="{row}" tabindex="0" role="img" aria-label="{escape(words)}"'
    return f'{ring}<circle {label} cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{fill}" stroke="{colour}"><title>{escape(words)}</title></circle>'
