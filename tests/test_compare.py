import json
import subprocess
import sys

import foolbox as fb
import numpy as np
import pytest
import torch
from linear import Linear

from abs_defense.benchmark import CLEAN, AttackSpec, ModelSpec, compare_evaluations, read_evaluation, run_evaluation
from abs_defense.data import ImageSet

DDN = AttackSpec("ddn", "l2", {"steps": 60}, factory=fb.attacks.DDNAttack)
FMN = AttackSpec("linf-fmn", "linf", {"steps": 60}, factory=fb.attacks.LInfFMNAttack)


def shifted():
    model = Linear()
    generator = torch.Generator().manual_seed(5)
    model.weight.data += 0.2 * torch.randn(784, 10, generator=generator) / 28
    return model


@pytest.fixture
def easy(digits):
    """Four images that the linear model classifies correctly."""
    return ImageSet(digits.images[:4], Linear()(digits.images[:4]).argmax(1), digits.name)


def _run(data, folder, factory, *attacks, name="model", kind="other"):
    spec = ModelSpec(name, factory, kind=kind)
    run_evaluation([spec], (CLEAN, *attacks), data, folder, progress=False)
    return folder


def test_one_table_with_a_column_a_model(easy, tmp_path):
    first = _run(easy, tmp_path / "a", Linear, DDN, name="linear", kind="cnn")
    second = _run(easy, tmp_path / "b", shifted, DDN, FMN, name="other")
    comparison = compare_evaluations([first, second])
    rows = {(row["norm"], row[""]): row for row in comparison.table}
    assert comparison.pairs == []
    ddn = {
        r.model: r.arrays["distances"] for f in (first, second) for r in read_evaluation(f).results if r.norm == "l2"
    }
    for model in ("linear", "other"):
        assert rows["L2", "ddn"][model] == f"{np.median(ddn[model]):.2f}"
        assert rows["L2", "all attacks, at 1.5"][model].endswith(" %")
    assert rows["L2", "published, at 1.5"] == {
        "norm": "L2", "": "published, at 1.5", "linear": "1.09, 8 %", "other": "",
    }  # fmt: skip
    assert rows["L∞", "linf-fmn"]["linear"] == ""
    assert float(rows["L∞", "linf-fmn"]["other"]) > 0
    assert rows["L∞", "all attacks, at 0.3"]["linear"] == ""


def test_attacks_of_two_folders_on_one_model_are_one_column(easy, tmp_path):
    first, second = (_run(easy, tmp_path / a.name, Linear, a) for a in (DDN, FMN))
    whole = _run(easy, tmp_path / "both", Linear, DDN, FMN)
    joined = compare_evaluations([first, second])
    assert joined == compare_evaluations([whole])
    assert joined == compare_evaluations([whole, first])
    assert joined.pairs == []
    assert list(joined.table[0]) == ["norm", "", "model"]


def test_two_models_of_one_name_image_by_image(easy, tmp_path):
    first, second = _run(easy, tmp_path / "a", Linear, DDN, FMN), _run(easy, tmp_path / "b", shifted, DDN)
    comparison = compare_evaluations([first, second])
    names = [f"model ({folder})" for folder in (first, second)]
    assert list(comparison.table[0]) == ["norm", "", *names]
    (row,) = comparison.pairs  # only DDN met both; it was made for L2
    a, b = (
        next(r.arrays["distances"] for r in read_evaluation(f).results if r.attack == "ddn") for f in (first, second)
    )
    assert row["mean distances"] == f"{a.mean():.3f} / {b.mean():.3f}"
    assert row["difference"] == f"{a.mean() / b.mean() - 1:+.1%}"
    low, high = (float(end.rstrip("%")) / 100 + 1 for end in str(row["95% interval"]).split(" to "))
    ratios = a / b
    assert ratios.min() - 0.001 <= low <= a.mean() / b.mean() + 0.001
    assert low < high <= ratios.max() + 0.001


def test_a_model_beside_itself_differs_by_nothing(easy, tmp_path):
    first = _run(easy, tmp_path / "a", Linear, DDN)
    manifest = json.loads((first / "manifest.json").read_text())
    second = _run(easy, tmp_path / "b", Linear, DDN)
    manifest["models"]["model"]["weights_sha256"] = "of a copy"
    (second / "manifest.json").write_text(json.dumps(manifest))
    (row,) = compare_evaluations([first, second]).pairs
    assert row["difference"] == "+0.0%"
    assert row["95% interval"] == "+0.0% to +0.0%"


def test_images_that_were_not_broken_have_no_mean(easy, tmp_path):
    none = AttackSpec("ddn", "l2", {"steps": 1, "init_epsilon": 1e-6}, factory=fb.attacks.DDNAttack)
    folders = [_run(easy, tmp_path / n, make, none) for n, make in {"a": Linear, "b": shifted}.items()]
    comparison = compare_evaluations(folders)
    assert comparison.table[0][f"model ({folders[0]})"] == "none found"
    (row,) = comparison.pairs
    assert row["mean distances"] == "not all images were broken"
    assert row["accuracy at threshold"] == "100 % / 100 %"
    assert "difference" not in row


def test_attacks_image_by_image(easy, tmp_path):
    data = ImageSet(easy.images, torch.cat([easy.labels[:3], (easy.labels[3:] + 1) % 10]), easy.name)
    short = AttackSpec("short", "l2", {"steps": 5}, factory=fb.attacks.DDNAttack)
    none = AttackSpec("none", "l2", factory=fb.attacks.FGM, epsilons=(1e-6,))
    folder = _run(data, tmp_path / "a", Linear, DDN, short, none, FMN)
    found = {r.attack: r.arrays["distances"] for r in read_evaluation(folder).results if "distances" in r.arrays}
    assert all(distances[3] == 0 for distances in found.values())
    comparison = compare_evaluations([folder], ["ddn", "short"])
    rows = {(row["attack"], row["against"]): row for row in comparison.against}
    assert set(rows) == {("short", "ddn"), ("none", "ddn"), ("ddn", "short"), ("none", "short")}
    assert all(row["norm"] == "L2" and row["model"] == "model" and row["images"] == 3 for row in rows.values())
    ratios = found["ddn"][:3] / found["short"][:3]
    assert ratios.max() < 0.999
    row = rows["ddn", "short"]
    assert (row["smaller"], row["larger"], row["alone smallest"]) == (3, 0, 0)  # linf-fmn found smaller ones
    assert row["ratio"] == f"{ratios.min():.3f}, {np.median(ratios):.3f}, {ratios.max():.3f}"
    without = _run(data, tmp_path / "b", Linear, DDN, short, none)
    (row,) = (row for row in compare_evaluations([without], ["short"]).against if row["attack"] == "ddn")
    assert (row["smaller"], row["alone smallest"]) == (3, 3)
    row = rows["short", "ddn"]
    assert (row["smaller"], row["larger"], row["alone smallest"]) == (0, 3, 0)
    row = rows["none", "ddn"]
    assert (row["smaller"], row["larger"], row["ratio"]) == (0, 3, "inf, inf, inf")
    (row,) = (row for row in compare_evaluations([folder], ["none"]).against if row["attack"] == "ddn")
    assert (row["smaller"], row["larger"], row["ratio"]) == (3, 0, "")


def test_a_thousandth_is_no_difference(easy, tmp_path):
    same = AttackSpec("same", "l2", DDN.settings, factory=fb.attacks.DDNAttack)
    folder = _run(easy, tmp_path / "a", Linear, DDN, same, FMN)
    (row,) = compare_evaluations([folder], ["ddn"]).against
    assert (row["smaller"], row["larger"], row["ratio"], row["alone smallest"]) == (0, 0, "1.000, 1.000, 1.000", 0)
    assert compare_evaluations([folder], ["linf-fmn"]).against == []


def test_what_cannot_be_compared(easy, tmp_path):
    first = _run(easy, tmp_path / "a", Linear, DDN)
    fewer = _run(easy.head(2), tmp_path / "b", Linear, DDN)
    with pytest.raises(ValueError, match=r"expected the same images in all, got 4 of .* in .*a and other 2"):
        compare_evaluations([first, fewer])
    weaker = AttackSpec("ddn", "l2", {"steps": 2}, factory=fb.attacks.DDNAttack)
    with pytest.raises(ValueError, match="model: ddn has different settings in"):
        compare_evaluations([first, _run(easy, tmp_path / "c", Linear, weaker)])
    with pytest.raises(ValueError, match="expected an attack that met a model, of ddn; got pgd"):
        compare_evaluations([first], ["pgd"])
    with pytest.raises(ValueError, match="at least one evaluation"):
        compare_evaluations([])
    with pytest.raises(FileNotFoundError, match="holds no evaluation"):
        compare_evaluations([tmp_path / "nowhere"])


def test_command(easy, tmp_path):
    first, second = _run(easy, tmp_path / "a", Linear, DDN), _run(easy, tmp_path / "b", shifted, DDN)
    command = [sys.executable, "-c", "from abs_defense.cli import main; main()", "compare", "a", "b"]
    result = subprocess.run([*command, "--format", "github"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "| model (a)" in result.stdout
    assert "95% interval" in result.stdout
    assert str(compare_evaluations([first, second]).pairs[0]["difference"]) in result.stdout
    other = subprocess.run([*command, "--against", "ddn"], cwd=tmp_path, capture_output=True, text=True)
    assert other.returncode == 0, other.stderr
    assert "--against ddn: no other attack of its norm met a model" in other.stderr
    _run(easy, tmp_path / "c", Linear, AttackSpec("short", "l2", {"steps": 5}, factory=fb.attacks.DDNAttack))
    several = subprocess.run([*command, "c", "--against", "ddn"], cwd=tmp_path, capture_output=True, text=True)
    assert several.returncode == 0, several.stderr
    assert "--against" not in several.stderr
    assert "alone smallest" in several.stdout
    unknown = subprocess.run([*command, "--against", "pgd"], cwd=tmp_path, capture_output=True, text=True)
    assert unknown.returncode == 2
    assert "expected an attack that met a model" in unknown.stderr
    wrong = subprocess.run([*command, "--format", "cuneiform"], cwd=tmp_path, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "is not one of" in wrong.stderr
