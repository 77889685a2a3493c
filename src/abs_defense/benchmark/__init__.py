"""Evaluation: models x attacks -> finished pieces on disk -> table, pictures, report."""

from abs_defense.benchmark._certify import Certification, run_certification
from abs_defense.benchmark._job import Evaluation, run_evaluation
from abs_defense.benchmark._plan import FIRST_ATTACKS, FULL_ATTACKS, NORMS, PRESETS, AttackSpec, choose_attacks
from abs_defense.benchmark._runner import Result, evaluate
from abs_defense.benchmark._table import attack_rows, format_value, smallest_distances, table_rows, write_csv

__all__ = [
    "FIRST_ATTACKS",
    "FULL_ATTACKS",
    "NORMS",
    "PRESETS",
    "AttackSpec",
    "Certification",
    "Evaluation",
    "Result",
    "attack_rows",
    "choose_attacks",
    "evaluate",
    "format_value",
    "run_certification",
    "run_evaluation",
    "smallest_distances",
    "table_rows",
    "write_csv",
]
