"""The report: one HTML file with the table, the pictures inside, and everything a reader needs to redo it."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from abs_defense._files import replace_atomically
from abs_defense.benchmark._table import format_value

_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>abs-defense report</title>
<style>
 body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 0 auto; padding: 1rem; color: #222; }
 .wide { overflow-x: auto; }
 table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
 th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: right; }
 th:first-child, td:first-child { text-align: left; white-space: nowrap; }
 img { max-width: 100%; height: auto; }
 pre { background: #f5f5f5; padding: .7rem; overflow-x: auto; font-size: .8rem; }
 .error { color: #a00; }
</style></head><body>
{% macro table(rows) %}<div class="wide"><table>
<thead><tr>{% for column in rows[0] %}<th>{{ column }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in rows %}<tr>{% for cell in row.values() %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</tbody>
</table></div>{% endmacro %}
<h1>abs-defense report</h1>
<p>{{ data.name }}, {{ data.images }} images. Distances are those of the strongest attack of this run for each image,
in pixel values of [0, 1] (L2, L∞) or in pixels (L0); an image that is misclassified as it is counts with distance 0.
Robust at a threshold: the smallest adversarial found is farther away.</p>
{{ table(rows) }}
{% for error in errors %}<p class="error">{{ error }}</p>{% endfor %}
<h2>What is not guaranteed</h2>
<p>These are upper bounds on the robustness, found by {{ attacks or "no attack" }}. A stronger attack may find smaller
perturbations. Lower bounds come from <code>abs-defense certify</code>.</p>
{% if attack_rows %}<h2>Attacks</h2>
<p>Over the images that the model classifies correctly. A query is one image passed through the model, a gradient one
image in one backward pass.</p>
{{ table(attack_rows) }}{% endif %}
{% for figure in figures %}<h2>{{ figure.title }}</h2>
<div class="wide"><img alt="{{ figure.title }}" src="data:image/png;base64,{{ figure.png }}"></div>{% endfor %}
<h2>Settings</h2><pre>{{ manifest }}</pre>
</body></html>
"""


Row = Mapping[str, float | str | None]


@dataclass(frozen=True)
class ReportFigure:
    """A PNG file and its title."""

    title: str
    path: Path


def write_report(
    path: str | Path,
    rows: Sequence[Row],
    attacks: Sequence[Row],
    figures: Sequence[ReportFigure],
    manifest: Mapping[str, Any],
    errors: Sequence[str] = (),
) -> None:
    """Write the self-contained HTML file; it is replaced as a whole.

    Args:
        path: of the file.
        rows: of the first table, see ``table_rows``.
        attacks: of the second, see ``attack_rows``.
        figures: PNG files, embedded.
        manifest: settings; its ``data`` and ``attacks`` are named in the text.
        errors: pieces that failed.
    """
    template = jinja2.Environment(autoescape=True).from_string(_TEMPLATE)
    html = template.render(
        data=manifest["data"],
        rows=_formatted(rows),
        attack_rows=_formatted(attacks),
        errors=errors,
        attacks=", ".join(manifest["attacks"]),
        figures=[{"title": f.title, "png": base64.b64encode(f.path.read_bytes()).decode("ascii")} for f in figures],
        manifest=json.dumps(manifest, indent=2, default=str),
    )
    with replace_atomically(path) as temporary:
        temporary.write_text(html, encoding="utf-8")


def _formatted(rows: Sequence[Row]) -> list[dict[str, str]]:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return [{c: format_value(c, row[c]) if c in row else "" for c in columns} for row in rows]
