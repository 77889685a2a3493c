"""Checks of settings, with one wording."""

from __future__ import annotations

from collections.abc import Collection
from numbers import Integral
from typing import Any


def check_counts(least: int = 1, **settings: Any) -> None:
    """Raise ``ValueError`` for settings that are no whole numbers or below ``least``; None means no limit."""
    for name, value in settings.items():
        if value is None:
            continue
        if not isinstance(value, Integral):
            raise ValueError(f"{name}: expected a whole number, got {value!r}")
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")


def check_choices(**settings: tuple[object, Collection[object]]) -> None:
    """Raise ``ValueError`` for settings, each a value and the allowed ones, that are none of these."""
    for name, (value, choices) in settings.items():
        if value not in choices:
            raise ValueError(f"{name}: expected one of {', '.join(map(str, choices))}, got {value!r}")


def check_positive(**settings: float) -> None:
    """Raise ``ValueError`` for settings that are not above zero."""
    for name, value in settings.items():
        if not value > 0:
            raise ValueError(f"{name}: expected a positive number, got {value}")
