"""Evaluation: models x attacks -> finished pieces on disk -> table, pictures, report."""

from abs_defense.benchmark._job import Evaluation, run_evaluation
from abs_defense.benchmark._plan import FIRST_ATTACKS, NORMS, AttackSpec, Norm
from abs_defense.benchmark._runner import Result, evaluate
from abs_defense.benchmark._table import format_value, smallest_distances, table_rows, write_csv

__all__ = [
    "FIRST_ATTACKS",
    "NORMS",
    "AttackSpec",
    "Evaluation",
    "Norm",
    "Result",
    "evaluate",
    "format_value",
    "run_evaluation",
    "smallest_distances",
    "table_rows",
    "write_csv",
]
