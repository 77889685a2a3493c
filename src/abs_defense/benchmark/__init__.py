"""Evaluation: models x measurements -> finished pieces on disk -> tables, pictures, report."""

from abs_defense.benchmark._certify import Certification, run_certification
from abs_defense.benchmark._compare import Comparison, compare_evaluations
from abs_defense.benchmark._job import Evaluation, Finished, read_evaluation, rebuild_report, run_evaluation
from abs_defense.benchmark._published import PUBLISHED, Published, load_curves
from abs_defense.benchmark._ray import ray_executor
from abs_defense.benchmark._runner import Failure, Piece, Plan, Result, evaluate, make_plan, run_plan
from abs_defense.benchmark._suite import (
    CLEAN,
    DISTAL,
    NORMS,
    PRESETS,
    AttackSpec,
    CertificateSpec,
    DistalSpec,
    Measurement,
    ModelSpec,
    choose_measurements,
    load_additions,
    our_model,
)
from abs_defense.benchmark._table import (
    attack_rows,
    format_value,
    formatted,
    model_rows,
    robustness_rows,
    smallest_distances,
    write_csv,
)

__all__ = [
    "CLEAN",
    "DISTAL",
    "NORMS",
    "PRESETS",
    "PUBLISHED",
    "AttackSpec",
    "CertificateSpec",
    "Certification",
    "Comparison",
    "DistalSpec",
    "Evaluation",
    "Failure",
    "Finished",
    "Measurement",
    "ModelSpec",
    "Piece",
    "Plan",
    "Published",
    "Result",
    "attack_rows",
    "choose_measurements",
    "compare_evaluations",
    "evaluate",
    "format_value",
    "formatted",
    "load_additions",
    "load_curves",
    "make_plan",
    "model_rows",
    "our_model",
    "ray_executor",
    "read_evaluation",
    "rebuild_report",
    "robustness_rows",
    "run_certification",
    "run_evaluation",
    "run_plan",
    "smallest_distances",
    "write_csv",
]
