"""The card beside trained weights: what they are, and how to get them again."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from abs_defense._files import replace_atomically
from abs_defense._versions import versions
from abs_defense.models._weights import sha256


def write_card(weights: Path, command: str, **fields: Any) -> dict[str, Any]:
    """Write ``<weights>.json`` with the fields, command, date, hash, versions and licence; return it."""
    card = {
        **fields,
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "sha256": sha256(weights),
        "versions": versions(),
        "licence": "Apache-2.0",
    }
    with replace_atomically(weights.with_suffix(".json")) as path:
        path.write_text(json.dumps(card, indent=2) + "\n")
    return card
