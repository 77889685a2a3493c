import csv
import json
import os
import signal
import subprocess
import sys
import time

import foolbox as fb
import numpy as np
import pytest
import torch

from abs_defense import ABS
from abs_defense.benchmark import (
    FIRST_ATTACKS,
    FULL_ATTACKS,
    NORMS,
    PRESETS,
    AttackSpec,
    Result,
    attack_rows,
    choose_attacks,
    evaluate,
    format_value,
    run_evaluation,
    smallest_distances,
    table_rows,
)
from abs_defense.data import ImageSet
from abs_defense.models import load_weights, save_weights

FAST = tuple(AttackSpec(a.name, a.norm, a.factory, {"steps": 4}, queries=6) for a in FIRST_ATTACKS)


class Unlucky(fb.attacks.DDNAttack):
    def run(self, *args, **kwargs):
        raise RuntimeError("no luck today")


def _tiny():
    return ABS(weights=None, prototypes=32, steps=0)


@pytest.fixture
def four(digits):
    return digits.head(4)


def _load(path):
    with np.load(path) as file:
        return dict(file)


def test_results_are_true(four, tmp_path):
    results = evaluate({"tiny": _tiny}, FAST, four, tmp_path, progress=False)
    assert [(r.attack, r.norm) for r in results] == [
        ("clean", None),
        ("ddn", "l2"),
        ("linf-fmn", "linf"),
        ("l0-fmn", "l0"),
    ]
    model = _tiny()
    clean = results[0].arrays["predictions"]
    np.testing.assert_array_equal(clean, model(four.images).argmax(1))
    for result in results[1:]:
        distances = result.arrays["distances"]
        adversarials = torch.from_numpy(result.arrays["adversarials"])
        fooled = (model(adversarials).argmax(1) != four.labels).numpy()
        wrong = clean != four.labels.numpy()
        assert (distances[wrong] == 0).all()
        np.testing.assert_array_equal(np.isfinite(distances), fooled | wrong)
        measured = NORMS[result.norm].distance(four.images, adversarials).numpy()
        right = np.isfinite(distances) & ~wrong
        np.testing.assert_allclose(distances[right], measured[right], rtol=1e-5)
        assert 5 <= result.arrays["queries"][0] <= 6
        assert result.arrays["gradients"][0] == 4


def test_finished_pieces_are_not_computed_again(four, tmp_path, monkeypatch):
    first = evaluate({"tiny": _tiny}, FAST, four, tmp_path, progress=False)
    stamps = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "pieces").iterdir()}
    monkeypatch.setattr(fb.attacks.DDNAttack, "run", Unlucky.run)
    second = evaluate({"tiny": _tiny}, FAST, four, tmp_path, progress=False)
    assert stamps == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "pieces").iterdir()}
    for a, b in zip(first, second, strict=True):
        assert b.error is None
        for name in a.arrays:
            np.testing.assert_array_equal(a.arrays[name], b.arrays[name])


@pytest.mark.parametrize("change", ["seed", "images", "settings", "weights"])
def test_other_settings_are_other_pieces(four, tmp_path, change):
    evaluate({"tiny": _tiny}, FAST[:1], four, tmp_path, progress=False)
    count = len(list((tmp_path / "pieces").iterdir()))
    model, attacks, data, seed = _tiny, FAST[:1], four, 0
    if change == "seed":
        seed = 1
    elif change == "images":
        data = ImageSet(four.images.flip(0), four.labels.flip(0), four.name)
    elif change == "settings":
        attacks = (AttackSpec("ddn", "l2", fb.attacks.DDNAttack, {"steps": 5}),)
    else:

        def model():
            changed = _tiny()
            state = changed.state_dict()
            state["decoders.bias_3"] += 0.1
            changed.load_state_dict(state)
            return changed

    evaluate({"tiny": model}, attacks, data, tmp_path, seed=seed, progress=False)
    added = len(list((tmp_path / "pieces").iterdir())) - count
    assert added == (1 if change == "settings" else 2)


def test_damaged_piece_is_computed_again(four, tmp_path):
    first = evaluate({"tiny": _tiny}, FAST[:1], four, tmp_path, progress=False)
    for path in (tmp_path / "pieces").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    second = evaluate({"tiny": _tiny}, FAST[:1], four, tmp_path, progress=False)
    np.testing.assert_array_equal(first[1].arrays["distances"], second[1].arrays["distances"])


def test_results_do_not_depend_on_what_ran_before(four, tmp_path):
    both = evaluate({"tiny": _tiny}, FAST[:2], four, tmp_path / "both", progress=False)
    alone = evaluate({"tiny": _tiny}, FAST[1:2], four, tmp_path / "alone", progress=False)
    np.testing.assert_array_equal(both[2].arrays["distances"], alone[1].arrays["distances"])


def test_a_failing_attack_does_not_stop_the_rest(four, tmp_path):
    attacks = (AttackSpec("unlucky", "l2", Unlucky, {}), *FAST[1:2])
    results = evaluate({"tiny": _tiny}, attacks, four, tmp_path, progress=False)
    assert "no luck today" in results[1].error
    assert results[2].error is None
    row = table_rows(results, four)[0]
    assert row["L2 median"] is None
    assert format_value("L2 median", row["L2 median"]) == "failed"
    assert row["L∞ median"] is not None


def test_several_shards_equal_one(digits, tmp_path, monkeypatch):
    whole = evaluate({"tiny": _tiny}, FAST[:1], digits.head(7), tmp_path / "whole", progress=False)
    monkeypatch.setattr("abs_defense.benchmark._runner.SHARD", 3)
    parts = evaluate({"tiny": _tiny}, FAST[:1], digits.head(7), tmp_path / "parts", progress=False)
    np.testing.assert_allclose(whole[1].arrays["distances"], parts[1].arrays["distances"], rtol=1e-3)
    assert len(parts[1].arrays["adversarials"]) == 7


def test_labels_out_of_range(four, tmp_path):
    with pytest.raises(ValueError, match="expected classes 0 to 9 of model 'tiny', got values from 10 to 13"):
        evaluate({"tiny": _tiny}, (), ImageSet(four.images, torch.arange(10, 14), "x"), tmp_path, progress=False)


def test_output_that_cannot_be_written(four, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(OSError, match="cannot write to the output folder"):
        evaluate({"tiny": _tiny}, (), four, tmp_path / "out", progress=False)


def test_strongest_attack_counts_per_image(four):
    def attack(name, distances):
        return Result(
            "m",
            name,
            "l2",
            {"distances": np.array(distances), "queries": np.full(4, 7.0), "gradients": np.arange(4.0)},
            1.0,
        )

    clean = Result(
        "m",
        "clean",
        None,
        {
            "predictions": np.array([four.labels[0], four.labels[1], four.labels[2], (four.labels[3] + 1) % 10]),
            "confidences": np.array([0.9, 0.8, 0.7, 0.6]),
            "queries": np.ones(4),
            "gradients": np.zeros(4),
        },
        1.0,
    )
    results = [clean, attack("a", [1.0, 2.0, np.inf, 0.0]), attack("b", [3.0, 1.5, np.inf, 0.0])]
    np.testing.assert_array_equal(smallest_distances(results, "m", "l2"), [1.0, 1.5, np.inf, 0.0])
    row = table_rows(results, four)[0]
    assert row["clean accuracy"] == 0.75
    assert row["L2 median"] == 1.25
    assert row["L2 accuracy at 1.5"] == 0.25
    assert row["median confidence"] == pytest.approx(0.75)
    assert row["queries per image"] == 15
    assert row["gradients per image"] == 3
    first, second = attack_rows(results)
    assert first["attack"] == "a"
    assert second["median distance"] == 3.0
    assert first["success rate"] == pytest.approx(2 / 3)
    assert first["gradients per image"] == 1.5


def test_attacks_of_presets_and_by_name():
    assert choose_attacks("quick") == FIRST_ATTACKS
    assert [a.name for a in choose_attacks("quick", ["l2-bisector", "ddn", "ddn"])] == ["l2-bisector", "ddn"]
    with pytest.raises(ValueError, match="expected one of quick, full, got 'slow'"):
        choose_attacks("slow")
    with pytest.raises(ValueError, match="got 'magic'"):
        choose_attacks("quick", ["magic"])


def test_every_attack_of_the_presets_can_be_made():
    names = [attack.name for attacks in PRESETS.values() for attack in attacks]
    assert len(names) == len(set(names))
    for attack in FULL_ATTACKS:
        assert isinstance(attack.make(), fb.attacks.base.MinimizationAttack)


@pytest.mark.parametrize(
    ("column", "value", "text"),
    [
        ("clean accuracy", 0.9903, "99.0 %"),
        ("clean accuracy", 1.0, "100.0 %"),
        ("clean accuracy", 0.9999, "99.99 %"),
        ("L2 median", 2.2417, "2.24"),
        ("L2 median", float("inf"), "none found"),
        ("L2 median", None, "failed"),
        ("model", "abs", "abs"),
        ("images", 20, "20"),
    ],
)
def test_cells(column, value, text):
    assert format_value(column, value) == text


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_weights(path, load_weights(None))
    return path


def test_report_is_complete(four, tmp_path, weights_file):
    result = run_evaluation(
        ["prototype-abs"], FAST, four, tmp_path, weights=weights_file, command="the command", progress=False
    )
    assert result.errors == []
    html = result.report.read_text()
    for expected in ("prototype-abs", "L∞ accuracy at 0.3", "the command", "weights_sha256", "What is not guaranteed"):
        assert expected in html
    assert html.count("data:image/png;base64,") == 3
    assert "http" not in html.replace("http-equiv", "")
    for name in ("curves.png", "adversarials.png", "reconstructions-prototype-abs.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["L2 median"]) == result.rows[0]["L2 median"]


def test_pieces_say_what_they_are(four, tmp_path):
    evaluate({"tiny": _tiny}, FAST[:1], four, tmp_path, seed=3, progress=False)
    piece = next((tmp_path / "pieces").glob("tiny-ddn-*.npz"))
    manifest = json.loads(str(_load(piece)["manifest"]))
    assert manifest["seed"] == 3
    assert manifest["attack_settings"] == {"steps": 4}
    assert manifest["images_sha256"] == four.sha256()
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["model_settings"]["steps"] == 0


def _run(*args, cwd, **kwargs):
    return subprocess.run(
        [sys.executable, "-c", "from abs_defense.cli import main; main()", *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "300", "NO_COLOR": "1"},
        **kwargs,
    )


def test_command_line_evaluates_clean(tmp_path, weights_file):
    result = _run(
        "evaluate", "--no-attacks", "--model", "prototype-abs", "--weights", weights_file, "--images", 3, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert "prototype-abs" in result.stdout
    assert "clean accuracy" in result.stdout
    assert (tmp_path / "abs-defense-report" / "report.html").is_file()
    assert "prototype-abs: clean" in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "resnet"], "'resnet' is not one of abs, binary-abs, prototype-abs"),
        (["--data-dir", "nowhere"], "error: no data folder at nowhere"),
        (["--weights", "nowhere"], "error: no weights at 'nowhere'"),
        (["--device", "quantum"], "'quantum' cannot be used"),
        (["--images", "0"], "--images"),
        (["--out", "/dev/null/x"], "error: cannot write to the output folder"),
    ],
)
def test_command_line_refuses(tmp_path, args, message):
    result = _run("evaluate", "--no-attacks", *args, cwd=tmp_path)
    assert result.returncode == 2
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_train_needs_data(tmp_path):
    result = _run("train", "abs", cwd=tmp_path)
    assert result.returncode == 2
    assert "name a folder of IDX files" in " ".join(result.stderr.split())


def test_killed_evaluation_resumes_to_the_same_table(tmp_path, weights_file):
    args = ["evaluate", "--weights", weights_file, "--images", 2, "--model", "prototype-abs"]
    command = [sys.executable, "-c", "from abs_defense.cli import main; main()", *map(str, args), "--out", "killed"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    pieces = tmp_path / "killed" / "pieces"
    try:
        while not list(pieces.glob("*.npz")):
            assert process.poll() is None, "the evaluation ended before it could be killed"
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    for path in pieces.glob("*.npz"):
        assert "manifest" in _load(path)
    assert _run(*args, "--out", "killed", cwd=tmp_path).returncode == 0
    assert _run(*args, "--out", "whole", cwd=tmp_path).returncode == 0

    def table(name):
        with (tmp_path / name / "table.csv").open() as file:
            return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]

    assert table("killed") == table("whole")
