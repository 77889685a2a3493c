"""The report: one HTML file with the tables, the pictures inside, and everything a reader needs to redo it."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from abs_defense._files import replace_atomically
from abs_defense.benchmark._table import Row, formatted

_TEMPLATE = "report.html.jinja"


@dataclass(frozen=True)
class ReportFigure:
    """A PNG file and its title."""

    title: str
    path: Path


def write_report(
    path: str | Path,
    *,
    robustness: Sequence[Row],
    models: Sequence[Row],
    attacks: Sequence[Row],
    figures: Sequence[ReportFigure],
    manifest: Mapping[str, Any],
    errors: Sequence[str] = (),
) -> None:
    """Write the self-contained HTML file; it is replaced as a whole.

    Args:
        path: of the file.
        robustness, models, attacks: the tables, see ``robustness_rows``, ``model_rows``, ``attack_rows``.
        figures: PNG files, embedded.
        manifest: settings; its data and command are named in the text.
        errors: pieces that failed.
    """
    loader = jinja2.PackageLoader("abs_defense.benchmark", "")
    template = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True).get_template(_TEMPLATE)
    html = template.render(
        data=manifest["data"],
        robustness=formatted(robustness),
        models=formatted(models),
        attacks=formatted(attacks),
        names=list(dict.fromkeys(row["attack"] for row in attacks)),
        findings=findings(robustness),
        errors=errors,
        figures=[{"title": f.title, "png": base64.b64encode(f.path.read_bytes()).decode("ascii")} for f in figures],
        manifest=json.dumps(manifest, indent=2, default=str),
    )
    with replace_atomically(path) as temporary:
        temporary.write_text(html, encoding="utf-8")


def findings(robustness: Sequence[Row]) -> list[str]:
    """Where less robustness was found than the paper reports."""
    sentences = []
    for row in robustness:
        name = f"{row['model']}, {row['norm']}"
        ours, published = row.get("accuracy at threshold"), row.get("published accuracy")
        if isinstance(ours, float) and isinstance(published, float) and ours < published:
            sentences.append(
                f"{name}: {100 * ours:.0f} % left at {row['threshold']}, "
                f"where the paper reports {100 * published:.0f} %."
            )
        ours, published = row.get("median distance"), row.get("published median")
        if isinstance(ours, float) and isinstance(published, float | int) and ours < published:
            sentences.append(f"{name}: median distance {ours:.3g}, where the paper reports {published:g}.")
    return sentences
