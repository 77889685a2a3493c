"""Checks of settings, with one wording."""

from __future__ import annotations


def check_counts(least: int = 1, **settings: int | None) -> None:
    """Raise ``ValueError`` for settings below ``least``; None means no limit."""
    for name, value in settings.items():
        if value is not None and value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")


def check_positive(**settings: float) -> None:
    """Raise ``ValueError`` for settings that are not above zero."""
    for name, value in settings.items():
        if not value > 0:
            raise ValueError(f"{name}: expected a positive number, got {value}")
