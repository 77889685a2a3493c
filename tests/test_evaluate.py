import csv
import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import eagerpy as ep
import foolbox as fb
import numpy as np
import pytest
import torch
from linear import Linear

from abs_defense import ABS, cli, load_model
from abs_defense.attacks import PointwiseAttack
from abs_defense.benchmark import (
    CLEAN,
    DISTAL,
    NORMS,
    PRESETS,
    PUBLISHED,
    AttackSpec,
    CertificateSpec,
    DistalSpec,
    Evaluation,
    ModelSpec,
    Result,
    attack_rows,
    choose_measurements,
    evaluate,
    format_value,
    load_additions,
    load_curves,
    make_plan,
    model_rows,
    our_model,
    rebuild_report,
    robustness_rows,
    run_evaluation,
    run_plan,
    smallest_distances,
)
from abs_defense.benchmark._figures import certified_figure
from abs_defense.benchmark._measure import measure
from abs_defense.benchmark._report import findings
from abs_defense.benchmark._table import certified
from abs_defense.data import ImageSet
from abs_defense.inference import _infer
from abs_defense.models import ABS_NAMES, MODEL_NAMES, load_weights, save_weights
from abs_defense.models._baselines import save_baseline, untrained_network

FAST = (
    AttackSpec("ddn", "l2", {"steps": 4}, queries=6, gradients=4, factory=fb.attacks.DDNAttack),
    AttackSpec("linf-fmn", "linf", {"steps": 4}, queries=6, gradients=4, factory=fb.attacks.LInfFMNAttack),
    AttackSpec("l0-fmn", "l0", {"steps": 4}, queries=6, gradients=4, factory=fb.attacks.L0FMNAttack),
)


NOISE = AttackSpec(
    "noise",
    "l2",
    {"repeats": 20},
    factory=fb.attacks.L2ClippingAwareRepeatedAdditiveGaussianNoiseAttack,
    epsilons=(2, 4, 8, 16),
)


class Unlucky(fb.attacks.DDNAttack):
    def run(self, *args, **kwargs):
        raise RuntimeError("no luck today")


def _tiny():
    return ABS(weights=None, prototypes=32, steps=0)


TINY = ModelSpec("tiny", _tiny, kind="prototype-abs")


@pytest.fixture
def four(digits):
    return digits.head(4)


def _load(path):
    with np.load(path) as file:
        return dict(file)


def test_results_are_true(four, tmp_path):
    results = evaluate([TINY], (CLEAN, *FAST), four, tmp_path, progress=False)
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


def test_changes_that_a_binary_model_does_not_see_do_not_count(four, tmp_path):
    _, result = evaluate([our_model("binary-cnn")], (CLEAN, NOISE), four, tmp_path, progress=False)
    broken = np.isfinite(result.arrays["distances"]) & (result.arrays["distances"] > 0)
    assert broken.any()
    images, adversarials = four.images.numpy()[broken], result.arrays["adversarials"][broken]
    unseen = (images > 0.5) == (adversarials > 0.5)
    np.testing.assert_array_equal(images[unseen], adversarials[unseen])
    assert (abs(adversarials[~unseen] - 0.5) <= 1.01e-3).all()


def test_a_threshold_given_to_a_model_makes_other_pieces(four, tmp_path):
    class Binarising(torch.nn.Module):
        binary_threshold = None

        def __init__(self):
            super().__init__()
            self.cnn = load_model("cnn")

        def forward(self, images):
            return self.cnn((images > 0.5).float())

    class Saying(Binarising):
        binary_threshold = 0.5

    Saying.__qualname__ = Binarising.__qualname__
    before, after = (
        evaluate([ModelSpec("own", kind)], (CLEAN, NOISE), four, tmp_path, progress=False)[1].arrays["distances"]
        for kind in (Binarising, Saying)
    )
    np.testing.assert_array_equal(np.isfinite(before), np.isfinite(after))
    assert (after <= before).all()
    assert (after < before).any()


def test_finished_pieces_are_not_computed_again(four, tmp_path, monkeypatch):
    first = evaluate([TINY], (CLEAN, *FAST), four, tmp_path, progress=False)
    stamps = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "pieces").iterdir()}
    monkeypatch.setattr(fb.attacks.DDNAttack, "run", Unlucky.run)
    second = evaluate([TINY], (CLEAN, *FAST), four, tmp_path, progress=False)
    assert stamps == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "pieces").iterdir()}
    for a, b in zip(first, second, strict=True):
        assert b.errors == ()
        for name in a.arrays:
            np.testing.assert_array_equal(a.arrays[name], b.arrays[name])


def test_a_longer_run_continues_a_shorter_one(four, tmp_path):
    measurements = [replace(m, piece=2) for m in (CLEAN, FAST[0])]
    evaluate([TINY], measurements, four.head(2), tmp_path, progress=False)
    missing = make_plan([TINY], measurements, four, tmp_path).missing()
    assert [piece.key.start for piece in missing] == [2, 2]
    swapped = ImageSet(four.images.flip(0), four.labels.flip(0), four.name)
    assert len(make_plan([TINY], measurements, swapped, tmp_path).missing()) == 4


class Signed(Linear):
    def __init__(self, sign):
        super().__init__()
        self.sign = sign

    def forward(self, x):
        return self.sign * super().forward(x)


def test_models_that_differ_in_their_settings_only_are_told_apart(four, tmp_path):
    for sign in (1.0, -1.0):
        spec = ModelSpec("signed", Signed, {"sign": sign})
        (clean,) = evaluate([spec], (CLEAN,), four, tmp_path, progress=False)
        np.testing.assert_array_equal(clean.arrays["predictions"], Signed(sign)(four.images).argmax(1))


def test_pieces_of_distal_adversarials_have_noise_of_their_own(four, tmp_path):
    spec = DistalSpec("distal", settings={"steps": 1}, images=4)
    whole, parts = (
        evaluate([TINY], (CLEAN, part), four, tmp_path / str(part.piece), progress=False)[-1].arrays["adversarials"]
        for part in (spec, replace(spec, piece=2))
    )
    np.testing.assert_allclose(whole, parts, atol=1e-5)
    assert (abs(whole[:2] - whole[2:]) > 0.1).any()


def test_curves_of_l0_radii_fall_after_the_pixels_they_cover():
    radii = np.array([0.0, 12.0, 12.0, 20.0])
    axis = certified_figure({"m": radii}, "l0", "bisector").axes[0]
    x, y = axis.lines[0].get_data()
    for pixels in (1, 11, 12, 13, 20, 21):
        left = y[np.searchsorted(x, pixels, side="right") - 1]
        assert left == 100 * (certified(radii, pixels, "l0").mean())


def test_models_that_differ_in_what_a_lambda_holds_are_told_apart(four, tmp_path):
    for sign in (1.0, -1.0):
        spec = ModelSpec("signed", lambda sign=sign: Signed(sign))
        (clean,) = evaluate([spec], (CLEAN,), four, tmp_path, progress=False)
        np.testing.assert_array_equal(clean.arrays["predictions"], Signed(sign)(four.images).argmax(1))


CODE = """
import foolbox
from linear import Linear

class Defended(Linear):
    def forward(self, x):
        return {sign} * super().forward(x)

class Attack(foolbox.attacks.DDNAttack):
    pass
"""


@pytest.mark.parametrize("edited", ["model", "attack"])
def test_changed_code_makes_other_pieces(four, tmp_path, monkeypatch, edited):
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("model", "attack"):
        (tmp_path / f"own_{name}.py").write_text(CODE.format(sign=1))
        monkeypatch.delitem(sys.modules, f"own_{name}", raising=False)
    models = [ModelSpec("own", "own_model:Defended")]
    measurements = (CLEAN, AttackSpec("ddn", "l2", {"steps": 2}, factory="own_attack:Attack"))
    evaluate(models, measurements, four, tmp_path / "out", progress=False)
    assert not make_plan(models, measurements, four, tmp_path / "out").missing()
    (tmp_path / f"own_{edited}.py").write_text(CODE.format(sign=-1))
    missing = make_plan(models, measurements, four, tmp_path / "out").missing()
    assert [piece.measurement.name for piece in missing] == (["clean", "ddn"] if edited == "model" else ["ddn"])


def test_models_of_an_unknown_kind_are_networks():
    for measurement in PRESETS["full"]:
        assert measurement.serves("mine") == measurement.serves("other")
        assert not (measurement.serves("mine") and measurement.models == ABS_NAMES)


def test_names_of_measurements_are_taken(four, tmp_path):
    attack = AttackSpec("ddn", "l2", factory=fb.attacks.DDNAttack)
    with pytest.raises(ValueError, match="attack 'ddn': there is another one of this name"):
        choose_measurements("quick", added=[attack])
    with pytest.raises(ValueError, match="'clean' is the name of the clean accuracy"):
        make_plan([TINY], (replace(attack, name="clean"),), four, tmp_path)


def test_attacks_that_differ_in_fixed_arguments_only_are_told_apart(four, tmp_path):
    made = [partial(fb.attacks.DDNAttack, steps=steps) for steps in (4, 5)]
    keys = [make_plan([TINY], (AttackSpec("ddn", "l2", factory=f),), four, tmp_path).pieces[0].key for f in made]
    assert keys[0].file != keys[1].file
    for nameless in (lambda: made[0](), partial(lambda: made[0]())):
        with pytest.raises(ValueError, match="expected a class or function at the top of a module"):
            make_plan([TINY], (AttackSpec("ddn", "l2", factory=nameless),), four, tmp_path)


def test_the_seed_reaches_attacks_that_have_their_own(four, tmp_path):
    pointwise = AttackSpec("pointwise", "l0", factory=PointwiseAttack)
    right = ImageSet(four.images, _tiny()(four.images).argmax(1), four.name)
    found = [
        evaluate([TINY], (pointwise,), right, tmp_path, seed=seed, progress=False)[-1].arrays["adversarials"]
        for seed in (0, 1)
    ]
    assert (found[0] != found[1]).any()
    assert pointwise.make(seed=3).seed == 3
    assert replace(pointwise, settings={"seed": 7}).make(seed=3).seed == 7


@pytest.mark.parametrize("change", ["seed", "images", "settings", "weights"])
def test_other_settings_are_other_pieces(four, tmp_path, change):
    evaluate([TINY], (CLEAN, *FAST[:1]), four, tmp_path, progress=False)
    count = len(list((tmp_path / "pieces").iterdir()))
    model, attacks, data, seed = _tiny, FAST[:1], four, 0
    if change == "seed":
        seed = 1
    elif change == "images":
        data = ImageSet(four.images.flip(0), four.labels.flip(0), four.name)
    elif change == "settings":
        attacks = (AttackSpec("ddn", "l2", {"steps": 5}, factory=fb.attacks.DDNAttack),)
    else:

        def model():
            changed = _tiny()
            state = changed.state_dict()
            state["decoders.bias_3"] += 0.1
            changed.load_state_dict(state)
            return changed

    evaluate([ModelSpec("tiny", model)], (CLEAN, *attacks), data, tmp_path, seed=seed, progress=False)
    added = len(list((tmp_path / "pieces").iterdir())) - count
    assert added == (1 if change == "settings" else 2)


def _flip_bytes(content):
    middle = len(content) // 2
    return content[:middle] + bytes(255 - byte for byte in content[middle : middle + 40]) + content[middle + 40 :]


@pytest.mark.parametrize("damage", [lambda content: content[:100], lambda content: b"", _flip_bytes])
def test_damaged_piece_is_computed_again(four, tmp_path, damage):
    first = evaluate([TINY], (CLEAN, *FAST[:1]), four, tmp_path, progress=False)
    for path in (tmp_path / "pieces").iterdir():
        path.write_bytes(damage(path.read_bytes()))
    second = evaluate([TINY], (CLEAN, *FAST[:1]), four, tmp_path, progress=False)
    np.testing.assert_array_equal(first[1].arrays["distances"], second[1].arrays["distances"])


def test_results_do_not_depend_on_what_ran_before(four, tmp_path):
    both = evaluate([TINY], (CLEAN, *FAST[:2]), four, tmp_path / "both", progress=False)
    alone = evaluate([TINY], (CLEAN, *FAST[1:2]), four, tmp_path / "alone", progress=False)
    np.testing.assert_array_equal(both[2].arrays["distances"], alone[1].arrays["distances"])


def test_a_failing_attack_does_not_stop_the_rest(four, tmp_path):
    attacks = (AttackSpec("unlucky", "l2", factory=Unlucky), *FAST[1:2])
    results = evaluate([TINY], (CLEAN, *attacks), four, tmp_path, progress=False)
    assert "RuntimeError: no luck today" in results[1].errors[0]
    assert "tiny: unlucky, images 0 to 3" in results[1].errors[0]
    assert results[2].errors == ()
    first, second = robustness_rows(results, four, {})
    assert first["median distance"] is None
    assert format_value("median distance", first["median distance"]) == "no result"
    assert second["median distance"] is not None


class UnluckyOnce(fb.attacks.DDNAttack):
    def run(self, model, inputs, criterion, **kwargs):
        if len(inputs) == 1:
            raise KeyError("not this one")
        return super().run(model, inputs, criterion, **kwargs)


def test_an_attack_that_fails_on_some_pieces_counts_on_the_others(four, tmp_path):
    attacks = (AttackSpec("once", "l2", {"steps": 4}, factory=UnluckyOnce, piece=3), CLEAN)
    right = ImageSet(four.images, _tiny()(four.images).argmax(1), four.name)
    once = next(r for r in evaluate([TINY], attacks, right, tmp_path, progress=False) if r.attack == "once")
    assert len(once.errors) == 1
    assert "KeyError" in once.errors[0]
    assert once.arrays["distances"].shape == (4,)
    assert np.isinf(once.arrays["distances"][3])
    np.testing.assert_array_equal(once.arrays["adversarials"][3], four.images[3].numpy())
    mislabelled = ImageSet(four.images, torch.cat([right.labels[:3], (right.labels[3:] + 1) % 10]), four.name)
    once = next(r for r in evaluate([TINY], attacks, mislabelled, tmp_path, progress=False) if r.attack == "once")
    assert len(once.errors) == 1
    assert once.arrays["distances"][3] == 0


def test_a_full_disk_loses_nothing(four, tmp_path, monkeypatch):
    from abs_defense.benchmark._store import Store

    save = Store.save

    def full(self, key, arrays):
        if key.attack == "linf-fmn":
            raise OSError(28, "No space left on device")
        save(self, key, arrays)

    monkeypatch.setattr(Store, "save", full)
    with pytest.raises(OSError, match="No space left"):
        evaluate([TINY], (CLEAN, *FAST), four, tmp_path, progress=False)
    monkeypatch.undo()
    plan = make_plan([TINY], (CLEAN, *FAST), four, tmp_path)
    assert [p.measurement.name for p in plan.missing()] == ["linf-fmn", "l0-fmn"]
    resumed = run_plan(plan, progress=False)
    whole = evaluate([TINY], (CLEAN, *FAST), four, tmp_path / "whole", progress=False)
    for a, b in zip(resumed, whole, strict=True):
        for name in a.arrays:
            np.testing.assert_array_equal(a.arrays[name], b.arrays[name])


def test_several_shards_equal_one(digits, tmp_path, monkeypatch):
    whole = evaluate([TINY], (CLEAN, *FAST[:1]), digits.head(7), tmp_path / "whole", progress=False)
    small = replace(FAST[0], piece=3)
    parts = evaluate([TINY], (CLEAN, small), digits.head(7), tmp_path / "parts", progress=False)
    assert len(list((tmp_path / "parts" / "pieces").glob("tiny-ddn-*"))) == 3
    np.testing.assert_allclose(whole[1].arrays["distances"], parts[1].arrays["distances"], rtol=1e-3)
    assert len(parts[1].arrays["adversarials"]) == 7


def test_labels_out_of_range(four, tmp_path):
    with pytest.raises(ValueError, match="expected classes 0 to 9 of model 'tiny', got values from 10 to 13"):
        evaluate([TINY], (CLEAN,), ImageSet(four.images, torch.arange(10, 14), "x"), tmp_path, progress=False)


def test_output_that_cannot_be_written(four, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(OSError, match="cannot write to the output folder"):
        evaluate([TINY], (CLEAN,), four, tmp_path / "out", progress=False)


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
    np.testing.assert_array_equal(smallest_distances(results, "m", "l2", four), [1.0, 1.5, np.inf, 0.0])
    row = robustness_rows(results, four, {"m": "abs"})[0]
    assert row["median distance"] == 1.25
    assert row["accuracy at threshold"] == 0.25
    assert row["strongest attack"] == "a"
    assert row["queries per image"] == 14
    assert row["gradients per image"] == 3
    assert row["published median"] == 2.24
    assert row["published accuracy"] == 0.80
    assert row["published mean bound"] == 0.690
    model = model_rows(results, four, {"m": "abs"})[0]
    assert model["clean accuracy"] == 0.75
    assert model["median confidence"] == pytest.approx(0.75)
    assert model["published accuracy"] == 0.990
    assert row["clean accuracy"] == 0.75
    assert findings([row]) == [
        "m, L2: 25 % left at 1.5, where the paper reports 80 %.",
        "m, L2: median distance 1.25, where the paper reports 2.24.",
    ]
    assert findings([{**row, "accuracy at threshold": 0.9, "median distance": 2.5}]) == []
    first, second = attack_rows(results)
    assert first["attack"] == "a"
    assert second["median distance"] == 3.0
    assert first["success rate"] == pytest.approx(2 / 3)
    assert first["gradients per image"] == 1.5


def test_an_adversarial_counts_in_every_norm(four):
    """Of the second image the L0 attack found nothing; the third is misclassified as it is."""
    data = four.head(3)
    pixels, dust = data.images.clone(), data.images.clone()
    pixels[0, 0, 0, :2] = 0.5
    dust[:2, 0, :2] = 0.25
    cost = {"queries": np.full(3, 5.0), "gradients": np.zeros(3)}
    l0 = {"distances": np.array([2.0, np.inf, 0.0]), "adversarials": pixels.numpy(), **cost}
    linf = {"distances": np.array([0.25, 0.25, 0.0]), "adversarials": dust.numpy(), **cost}
    results = [Result("m", "few", "l0", l0, 1.0), Result("m", "dust", "linf", linf, 1.0)]
    assert (data.images[:2, 0, :2] == 0).all()
    np.testing.assert_array_equal(smallest_distances(results, "m", "linf", data), [0.25, 0.25, 0.0])
    np.testing.assert_array_equal(smallest_distances(results, "m", "l0", data), [2.0, 56.0, 0.0])
    assert smallest_distances(results, "m", "l2", data) is None
    rows = robustness_rows(results, data, {})
    assert [(row["norm"], row["strongest attack"]) for row in rows] == [("L∞", "dust"), ("L0", "few")]
    assert [row["queries per image"] for row in rows] == [10, 10]


def test_attacks_whose_queries_are_counted_ask_for_decisions_only(digits, monkeypatch):
    duels, solve = [], _infer._solve_duel

    def counted(*args):
        duels.append(1)
        return solve(*args)

    monkeypatch.setattr(_infer, "_solve_duel", counted)
    spec = AttackSpec("pointwise", "l0", {"restarts": 1, "max_queries": 2}, factory=PointwiseAttack)
    reported = []
    arrays = measure(spec, ABS(prototypes=50), digits.images, digits.labels, 0, reported.append)
    assert len(duels) == 2  # and one call for all logits
    assert sum(reported) >= arrays["queries"].sum() == 60


def test_a_certificate_asks_once_for_each_image_and_reports_that(digits, monkeypatch):
    model, asked, reported = ABS(prototypes=50, steps=0), [], []
    forward = ABS.forward

    def counted(self, images):
        asked.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(ABS, "forward", counted)
    measure(CertificateSpec("c", "l2"), model, digits.images, digits.labels, 0, reported.append)
    assert asked == reported == [len(digits)]


def test_certificates_stand_beside_attacks(digits, tmp_path):
    model = ModelSpec("few", _few, kind="prototype-abs")
    chosen = (CLEAN, FAST[0], CertificateSpec("bisector-l2", "l2", models=("prototype-abs",)))
    results = evaluate([model], chosen, digits, tmp_path, progress=False)
    row = robustness_rows(results, digits, {})[0]
    attacked, radii = results[1].arrays["distances"], results[2].arrays["radius"]
    assert row["certificate"] == "proved"
    assert row["mean certified radius"] == pytest.approx(radii.mean())
    assert row["certified accuracy at threshold"] == (radii > 1.5).mean()
    assert row["certified accuracy at threshold"] <= row["accuracy at threshold"]
    assert (radii <= attacked + 1e-6).all()
    refused = evaluate([ModelSpec("linear", Linear)], (CertificateSpec("c", "l2"),), digits, tmp_path, progress=False)
    assert "certificates are for ABS models, not for Linear" in refused[1].errors[0]


def _few():
    return ABS(prototypes=200, steps=0)


def test_somebody_elses_model(four, tmp_path):
    distal = DistalSpec("distal", settings={"steps": 40}, images=3)
    model = ModelSpec("linear", Linear)
    results = evaluate([model], (CLEAN, *FAST, distal), four, tmp_path, progress=False)
    assert [r.errors for r in results] == [()] * 5
    np.testing.assert_array_equal(results[0].arrays["predictions"], Linear()(four.images).argmax(1))
    found = results[-1].arrays
    assert len(found["fooled"]) == 3
    confidences = Linear()(torch.from_numpy(found["adversarials"])).softmax(1).amax(1).detach().numpy()
    np.testing.assert_allclose(found["confidences"], confidences, rtol=1e-4)
    np.testing.assert_array_equal(found["fooled"], confidences >= 0.9)
    assert model_rows(results, four, {})[0]["fooled by noise"] == f"{found['fooled'].sum()} of 3"


def test_estimated_gradients_cost_queries_only(four, tmp_path):
    attack = replace(FAST[0], settings={"steps": 1}, gradient="estimated")
    result = evaluate([ModelSpec("linear", Linear)], (attack,), four, tmp_path, progress=False)[-1]
    assert result.errors == ()
    assert (result.arrays["gradients"] == 0).all()
    assert (result.arrays["queries"] > 784).all()


def test_presets_and_names():
    assert choose_measurements("quick") == list(PRESETS["quick"])
    assert [m.name for m in choose_measurements("quick", ["ddn", "boundary", "ddn"])] == ["clean", "ddn", "boundary"]
    assert choose_measurements("quick", ["ddn"])[1].settings == {"steps": 30}
    assert choose_measurements("full", ["ddn"])[1].settings == {"steps": 100}
    left = choose_measurements("full", skip=["boundary", "distal"])
    assert {m.name for m in PRESETS["full"]} - {m.name for m in left} == {"boundary", "distal"}
    with pytest.raises(ValueError, match="expected one of quick, paper, full, got 'slow'"):
        choose_measurements("slow")
    for names in ({"names": ["magic"]}, {"skip": ["magic"]}):
        with pytest.raises(ValueError, match="got 'magic'"):
            choose_measurements("quick", **names)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_sound(preset):
    names = [m.name for m in PRESETS[preset]]
    assert len(names) == len(set(names))
    assert CLEAN in PRESETS[preset]
    assert DISTAL.name in names
    for measurement in PRESETS[preset]:
        assert all(kind in {*MODEL_NAMES, "other"} for kind in measurement.models)
        if measurement.name.endswith("-estimated") and isinstance(measurement, AttackSpec):
            assert measurement.piece == 50 or 2**19 < measurement.piece * measurement.queries <= 1e6
        if "brendel-bethge" in measurement.name and importlib.util.find_spec("numba") is None:
            continue  # abs-defense[attacks]
        if isinstance(measurement, AttackSpec) and measurement.surrogate is None:
            attack = measurement.make()
            assert isinstance(attack, fb.attacks.base.MinimizationAttack)
            assert attack.distance.__class__ is NORMS[measurement.norm].distance.__class__ or measurement.norm == "l0"


def test_pieces_are_small_where_queries_are_many_and_dear(digits, tmp_path):
    boundary = next(m for m in PRESETS["paper"] if m.name == "boundary")
    assert [boundary.piece_for(kind) for kind in ("abs", "binary-abs", "cnn", "prototype-abs")] == [10, 10, 50, 50]
    assert [replace(boundary, queries=q).piece_for("abs") for q in (0, 1, 140_001, 10**7)] == [50, 50, 1, 1]
    models = [TINY, replace(TINY, name="dear", kind="abs")]
    plan = make_plan(models, (CLEAN, boundary), digits, tmp_path)
    shards = [(p.model.name, p.measurement.name, p.key.start, p.key.stop) for p in plan.pieces]
    assert shards == [
        ("tiny", "clean", 0, 20),
        ("tiny", "boundary", 0, 20),
        ("dear", "clean", 0, 20),
        ("dear", "boundary", 0, 10),
        ("dear", "boundary", 10, 20),
    ]


class Outside(fb.attacks.DDNAttack):
    """Its first image is NaN, its second beyond white, its third a little beyond."""

    def run(self, model, inputs, criterion, **kwargs):
        found = super().run(model, inputs, criterion, **kwargs).raw.clone()
        found[0] = torch.nan
        found[1] = 1.4
        found[2] = (found[2] + 1e-7) * (1 + 1e-7)
        return ep.astensor(found)


def test_what_is_no_image_is_no_adversarial(four, tmp_path):
    model = Linear()
    known = ImageSet(four.images, model(four.images).argmax(1), four.name)
    attacks = [AttackSpec(kind.__name__, "l2", {"steps": 20}, factory=kind) for kind in (fb.attacks.DDNAttack, Outside)]
    _, good, bad = evaluate([ModelSpec("linear", Linear)], attacks, known, tmp_path, progress=False)
    assert bad.errors == ()
    assert np.isfinite(good.arrays["distances"]).all()
    assert np.isinf(bad.arrays["distances"][:2]).all()
    np.testing.assert_array_equal(bad.arrays["adversarials"][:2], four.images[:2].numpy())
    np.testing.assert_allclose(bad.arrays["distances"][2:], good.arrays["distances"][2:], rtol=1e-3)
    assert bad.arrays["adversarials"].max() <= 1
    assert np.isfinite(smallest_distances([good, bad], "linear", "l2", known)).all()


def test_an_unfinished_attack_has_no_figures(four, tmp_path):
    measurements = [replace(m, piece=2) for m in (CLEAN, *FAST[:2])]
    run_evaluation([TINY], measurements, four, tmp_path, progress=False)
    next((tmp_path / "pieces").glob("tiny-ddn-00002-*")).unlink()
    partial = rebuild_report(tmp_path)
    assert partial.errors == ["tiny: ddn, images 2 to 3: not computed yet"]
    assert [row["attack"] for row in partial.attacks] == ["linf-fmn"]
    assert partial.robustness[0]["median distance"] is None


def test_a_model_without_right_answers_has_no_success_rate(four, tmp_path):
    labels = (_tiny()(four.images).argmax(1) + 1) % 10
    results = evaluate([TINY], (CLEAN, *FAST[:1]), ImageSet(four.images, labels, "wrong"), tmp_path, progress=False)
    (row,) = attack_rows(results)
    assert "success rate" not in row
    assert row["attack"] == "ddn"


def test_own_models_and_attacks_from_a_file(tmp_path, digits):
    path = tmp_path / "mine.toml"
    path.write_text(
        """
        [[models]]
        name = "mine"
        factory = "test_evaluate:Linear"

        [[attacks]]
        name = "pgd"
        norm = "linf"
        factory = "foolbox.attacks:LinfPGD"
        settings = { steps = 5 }
        epsilons = [0.1, 0.5]
        queries = 12
        gradients = 10
        """
    )
    models, attacks = load_additions(path)
    results = evaluate(models, choose_measurements("quick", ["pgd"], added=attacks), digits.head(3), tmp_path)
    assert [(r.model, r.attack, r.errors) for r in results] == [("mine", "clean", ()), ("mine", "pgd", ())]
    assert (results[1].arrays["distances"] <= 0.5 + 1e-6).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[models", "mine.toml: "),
        ("[[modles]]\nname = 'x'", "expected .* got modles"),
        ("[models]\nname = 'x'", r"models: expected tables \[\[models\]\]"),
        ("attacks = [1]", r"attacks: expected tables \[\[attacks\]\], got \[1\]"),
        ("[[models]]\nname = 'x'\nfactory = 'nothing:here'", "expected 'package.module:attribute', got 'nothing:here'"),
        ("[[models]]\nname = 'x'\nfactory = 'torch:nn.Linearr'", "got 'torch:nn.Linearr'"),
        ("[[models]]\nname = 'x'\nfactory = 'torch'\ncolour = 1", "x: .*colour"),
        ("[[models]]\nname = 3\nfactory = 'torch:nn'", "model 3: name: expected a text, got int"),
        ("[[models]]\nname = 'x'\nfactory = 'torch:nn'\nsettings = 3", "expected a table of arguments, got 3"),
        ("[[attacks]]\nname = 'a'\nnorm = 'l2'\nfactory = 'torch:nn'\nepsilons = 0.3", "list of numbers, got 0.3"),
        ("[[attacks]]\nname = 'a'\nnorm = 'l3'\nfactory = 'torch:nn'", "attack 'a': norm: expected l2, linf or l0"),
        ("[[attacks]]\nname = 'a'\nnorm = 'l2'\nfactory = 'torch:nn'\nsurrogate = 'x'", "no model 'x' to craft on"),
    ],
)
def test_wrong_additions_are_refused(tmp_path, text, message):
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_additions(tmp_path / "mine.toml")


def test_wrong_specifications_are_refused(four, tmp_path):
    with pytest.raises(ValueError, match=r"a: models: expected a list of kinds, got 'abs'"):
        AttackSpec("a", "l2", models="abs", factory=fb.attacks.DDNAttack)
    with pytest.raises(ValueError, match="attack 'a': norm: expected l2, linf or l0, got None"):
        AttackSpec("a", factory=fb.attacks.DDNAttack)
    with pytest.raises(ValueError, match="epsilons: DDNAttack takes none"):
        AttackSpec("a", "l2", factory=fb.attacks.DDNAttack, epsilons=(1.0,)).make()
    with pytest.raises(ValueError, match="attack: expected one of a fixed epsilon, got DDNAttack"):
        AttackSpec("a", "l2", factory=fb.attacks.DDNAttack, epsilons=(1.0,), surrogate="cnn").make()
    with pytest.raises(ValueError, match="a: piece: expected at least 1 image, got 0"):
        AttackSpec("a", "l2", piece=0, factory=fb.attacks.DDNAttack)
    with pytest.raises(ValueError, match="a: queries, gradients: expected numbers of at least 0, got nan, 0"):
        AttackSpec("a", "l2", queries=float("nan"), factory=fb.attacks.DDNAttack)
    with pytest.raises(ValueError, match="a: gradient: expected 'model' or 'estimated', got 'estimate'"):
        AttackSpec("a", "l2", gradient="estimate", factory=fb.attacks.DDNAttack)
    for attack, message in (
        (AttackSpec("a", "l2", {"stepz": 3}, factory=fb.attacks.DDNAttack), "attack 'a': .*stepz"),
        (AttackSpec("a", "linf", factory=fb.attacks.LinfPGD), "attack 'a': epsilons: expected positive numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            make_plan([TINY], (CLEAN, attack), four, tmp_path)
    with pytest.raises(ValueError, match="model 'm': expected a torch module from its factory, got int"):
        make_plan([ModelSpec("m", int)], (CLEAN,), four, tmp_path)
    with pytest.raises(ValueError, match=r"model 'm': .*colour"):
        make_plan([ModelSpec("m", Linear, {"colour": 1})], (CLEAN,), four, tmp_path)


class Broken(Linear):
    def forward(self, x):
        raise RuntimeError("boom")


def test_a_model_that_fails_does_not_stop_the_others(four, tmp_path):
    results = evaluate([ModelSpec("broken", Broken), TINY], (CLEAN,), four, tmp_path)
    assert results[0].errors == ("broken: clean, images 0 to 3: RuntimeError: boom",)
    assert results[1].errors == ()


def test_names_must_differ(four, tmp_path):
    with pytest.raises(ValueError, match="models: expected different names, got tiny, tiny"):
        make_plan([TINY, TINY], (CLEAN,), four, tmp_path)
    with pytest.raises(ValueError, match="expected names that can be part of a file's, got 'a/b'"):
        make_plan([ModelSpec("a/b", Linear)], (CLEAN,), four, tmp_path)


def test_published_curves(tmp_path, shared_data):
    curves = load_curves(shared_data / "schott2018" / "published_curves.json")
    assert len(curves) == 18
    for (kind, norm), (distance, accuracy) in curves.items():
        published = PUBLISHED[kind][norm]
        assert np.interp(-0.5, -np.array(accuracy), distance) == pytest.approx(published.median, abs=0.6, rel=0.06)
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(ValueError, match="expected the published curves"):
        load_curves(tmp_path / "other.json")


@pytest.mark.parametrize(
    ("column", "value", "text"),
    [
        ("clean accuracy", 0.9903, "99.0 %"),
        ("clean accuracy", 1.0, "100.0 %"),
        ("clean accuracy", 0.9999, "99.99 %"),
        ("median distance", 2.2417, "2.24"),
        ("median distance", float("inf"), "none found"),
        ("median distance", None, "no result"),
        ("mean certified radius", 1.8834, "1.883"),
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
    model = our_model("prototype-abs", weights=weights_file)
    chosen = (CLEAN, *FAST, replace(DISTAL, settings={"steps": 3}))
    result = run_evaluation([model], chosen, four, tmp_path, command="the command", progress=False)
    assert result.errors == []
    html = result.report.read_text()
    for expected in ("prototype-abs", "accuracy at threshold", "the command", "weights_sha256", "not guaranteed"):
        assert expected in html
    pictures = {
        "curves", "adversarials-prototype-abs", "distal", "reconstructions-prototype-abs"
    }  # fmt: skip
    assert pictures <= {path.stem for path in (tmp_path / "figures").glob("*.png")}
    assert html.count("data:image/png;base64,") == len(list((tmp_path / "figures").glob("*.png")))
    assert "http" not in html
    for path in (tmp_path / "figures").glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
    with (tmp_path / "robustness.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["median distance"]) == result.robustness[0]["median distance"]
    assert "prototype-abs" in (tmp_path / "robustness.txt").read_text()
    latex = (tmp_path / "robustness.tex").read_text()
    assert r"\toprule" in latex
    assert "∞" not in latex
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["measurements"]["ddn"]["steps"] == 4
    (machine,) = manifest["hardware"]
    assert machine["device"] == "cpu"
    assert machine["cores"] == os.cpu_count()


def test_report_from_finished_pieces(four, tmp_path):
    whole = run_evaluation([TINY], (CLEAN, *FAST), four, tmp_path, progress=False)
    html = whole.report.read_text()
    whole.report.unlink()
    again = rebuild_report(tmp_path)
    assert again == whole
    assert whole.report.read_text() == html
    for path in (tmp_path / "pieces").glob("tiny-ddn-*"):
        path.unlink()
    partial = rebuild_report(tmp_path)
    assert partial.errors == ["tiny: ddn, images 0 to 3: not computed yet"]
    assert [row["norm"] for row in partial.robustness] == ["L2", "L∞", "L0"]
    assert partial.robustness[0]["median distance"] is None
    assert all(row["median distance"] is not None for row in partial.robustness[1:])
    assert partial.attacks == [row for row in whole.attacks if row["attack"] != "ddn"]
    result = _run("report", tmp_path, cwd=tmp_path)
    assert result.returncode == 1
    assert "not computed yet" in result.stdout
    with pytest.raises(FileNotFoundError, match=r"holds no evaluation: plan\.json, manifest\.json, images\.npz not"):
        rebuild_report(tmp_path / "nowhere")


def test_hardware_of_every_piece(four, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("abs_defense.benchmark._measure.hardware", lambda device: {"device": "elsewhere"})
        run_evaluation([TINY], (CLEAN,), four, tmp_path, progress=False)
    run_evaluation([TINY], (CLEAN, *FAST[:1]), four, tmp_path, progress=False)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert sorted(machine["device"] for machine in manifest["hardware"]) == ["cpu", "elsewhere"]
    piece = next((tmp_path / "pieces").glob("tiny-ddn-*.npz"))
    arrays = {name: value for name, value in _load(piece).items() if name != "hardware"}
    np.savez_compressed(piece, **arrays)  # as written before this was kept
    rebuild_report(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["hardware"] == [{"device": "elsewhere"}, {"device": "not recorded"}]
    assert "elsewhere" in (tmp_path / "report.html").read_text()


def test_pieces_say_what_they_are(four, tmp_path):
    evaluate([TINY], (CLEAN, *FAST[:1]), four, tmp_path, seed=3, progress=False)
    piece = next((tmp_path / "pieces").glob("tiny-ddn-*.npz"))
    manifest = json.loads(str(_load(piece)["manifest"]))
    assert manifest["seed"] == 3
    assert manifest["attack_settings"]["steps"] == 4
    assert manifest["images_sha256"] == four.sha256()
    assert manifest["versions"]["torch"] == importlib.metadata.version("torch")
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


def test_weights_of_a_baseline(tmp_path, four):
    weights = tmp_path / "cnn.safetensors"
    save_baseline(weights, "cnn", untrained_network("cnn").state_dict())
    spec = our_model("cnn", weights=weights)
    (clean,) = evaluate([spec], (CLEAN,), four, tmp_path, progress=False)
    expected = load_model("cnn", weights=weights)(four.images).argmax(1)
    np.testing.assert_array_equal(clean.arrays["predictions"], expected)
    result = _run("evaluate", "--model", "cnn", "--weights", "nowhere", "--no-attacks", cwd=tmp_path)
    assert result.returncode == 2
    assert "nowhere" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "cnn", "--model", "madry", "--weights", "w"], "expected an ABS model, or a single baseline"),
        (["--model", "cnn", "--solver", "adam"], "is of ABS models, and none is among the models"),
        (["--model", "cnn", "--nearest-neighbor-data", "d"], "nearest-neighbor is not among the models"),
        (["--attack", "ddn", "--no-attacks"], "there are no attacks with --no-attacks"),
        (["--gpus-per-piece", "1"], "is for --ray"),
        (["--data-dir", "d", "--download"], "the images are in --data-dir"),
    ],
)
def test_arguments_without_effect_are_refused(tmp_path, arguments, message):
    result = _run("evaluate", *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert not (tmp_path / "abs-defense-report").exists()


def test_modules_beside_the_command_and_attacks_for_nobody(tmp_path):
    (tmp_path / "nets.py").write_text((Path(__file__).parent / "linear.py").read_text())
    toml = "[[models]]\nname = 'mine'\nfactory = 'nets:Linear'\n"
    (tmp_path / "mine.toml").write_text(toml)
    result = _run("evaluate", "--add", "mine.toml", "--no-attacks", "--images", 2, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    result = _run("evaluate", "--model", "abs", "--attack", "pointwise", "--images", 2, cwd=tmp_path)
    assert result.returncode == 2
    assert "attack 'pointwise' is for models of kind cnn, binary-cnn, madry, other; none is among abs" in result.stderr
    attack = "[[attacks]]\nname = 'a'\nnorm = 'l2'\nfactory = 'foolbox.attacks:DDNAttack'\nmodels = ['mine']\n"
    (tmp_path / "mine.toml").write_text(toml + attack)
    result = _run("evaluate", "--add", "mine.toml", "--images", 2, cwd=tmp_path)
    assert result.returncode == 2
    assert "none is among mine (kind other)" in result.stderr


def test_dry_run_prints_the_plan_only(tmp_path, weights_file):
    args = ["evaluate", "--model", "prototype-abs", "--weights", weights_file, "--images", 3, "--preset", "full"]
    result = _run(*args, "--dry-run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for expected in ("l2-bim-estimated", "0 of 1", "queries per image", "in all"):
        assert expected in result.stdout
    assert not list((tmp_path / "abs-defense-report" / "pieces").iterdir())
    assert not (tmp_path / "abs-defense-report" / "report.html").exists()


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
    args = ["evaluate", "--weights", weights_file, "--images", 2, "--model", "prototype-abs", "--skip", "distal"]
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
        with (tmp_path / name / "robustness.csv").open() as file:
            return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]

    assert table("killed") == table("whole")


@pytest.mark.parametrize("columns", [80, 160])
def test_tables_fit_the_terminal_with_every_cell_whole(monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    attacked = {"median distance": 2.128, "accuracy at threshold": 0.8512, "strongest attack": "linf-bisector"}
    cost, published = {"queries per image": 4749.0, "gradients per image": 167.0}, {"published median": 2.24}
    proved = {"mean certified radius": 1.9, "certified accuracy at threshold": 0.5, "certificate": "proved"}
    row = {"norm": "L2", "model": "nearest-neighbor", "images": 20, "threshold": "1.5"} | attacked | cost
    cli._print_evaluation(
        Evaluation(
            robustness=[row | published | {"published accuracy": 0.802}, row | {"norm": "L∞"} | proved],
            models=[{"model": "nearest-neighbor", "images": 20, "fooled by noise": "13 of 50", "seconds": 12345.0}],
            attacks=[{"model": "nearest-neighbor", "attack": "linf-bisector", "norm": "L2", "seconds": 12345.0}],
            report=Path("report.html"),
            errors=[],
        )
    )
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= columns
    for cell in (
        "nearest-neighbor",
        "linf-bisector",
        "2.13",
        "85.1 %",
        "80.2 %",
        "1.900",
        "proved",
        "13 of 50",
        "12345",
    ):
        assert cell in printed
    assert ("4749" in printed) == (columns == 160)
