"""The same pieces on a real local Ray, with a worker killed on the way."""

import os
import signal
from pathlib import Path

import foolbox as fb
import numpy as np
import pytest
from linear import Linear

from abs_defense._versions import versions
from abs_defense.benchmark import CLEAN, AttackSpec, ModelSpec, _runner, evaluate, make_plan, ray_executor, run_plan

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'abs-defense[ray]'")


class Deadly(fb.attacks.DDNAttack):
    """Kills its process, once."""

    def __init__(self, mark, **settings):
        super().__init__(**settings)
        self.mark = mark

    def run(self, *args, **kwargs):
        if not Path(self.mark).exists():
            Path(self.mark).write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return super().run(*args, **kwargs)


class Unlucky(fb.attacks.DDNAttack):
    def run(self, *args, **kwargs):
        raise RuntimeError("no luck today")


@pytest.fixture(scope="module")
def cluster():
    here = str(Path(__file__).parent)
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    yield ray_executor("local")
    ray.shutdown()


def _ddn(**settings):
    return AttackSpec("ddn", "l2", {"steps": 5}, factory=fb.attacks.DDNAttack, piece=4, **settings)


MODEL = ModelSpec("linear", Linear)


@pytest.mark.touches_random_state
def test_ray_gives_what_this_process_gives(digits, tmp_path, cluster):
    here = evaluate([MODEL], (CLEAN, _ddn()), digits, tmp_path / "here", progress=False)
    there = evaluate([MODEL], (CLEAN, _ddn()), digits, tmp_path / "there", executor=cluster, progress=False)
    for a, b in zip(here, there, strict=True):
        assert b.errors == ()
        for name in a.arrays:
            np.testing.assert_allclose(a.arrays[name], b.arrays[name], rtol=1e-4, atol=1e-5)


@pytest.mark.touches_random_state
def test_pieces_of_a_killed_worker_are_repeated(digits, tmp_path, cluster):
    mark = tmp_path / "killed"
    deadly = AttackSpec("deadly", "l2", {"steps": 5, "mark": str(mark)}, factory=Deadly, piece=4)
    plan = make_plan([MODEL], (CLEAN, deadly), digits, tmp_path / "there")
    results = run_plan(plan, executor=cluster, progress=False)
    assert mark.exists()
    assert int(mark.read_text()) != os.getpid()
    whole = evaluate([MODEL], (CLEAN, _ddn()), digits, tmp_path / "here", progress=False)
    assert results[1].errors == ()
    np.testing.assert_allclose(results[1].arrays["distances"], whole[1].arrays["distances"], rtol=1e-4)


@pytest.mark.touches_random_state
def test_a_failing_piece_is_reported_and_tried_again(digits, tmp_path, cluster):
    attacks = (AttackSpec("unlucky", "l2", factory=Unlucky, piece=10), _ddn())
    plan = make_plan([MODEL], (CLEAN, *attacks), digits, tmp_path)
    results = run_plan(plan, executor=cluster, progress=False)
    assert len(results[1].errors) == 2
    assert "no luck today" in results[1].errors[0]
    assert results[2].errors == ()
    assert [p.measurement.name for p in plan.missing()] == ["unlucky", "unlucky"]


def test_a_model_that_cannot_be_made_there_is_a_failure(digits, tmp_path, cluster):
    home = os.getpid()

    def only_here():
        if os.getpid() != home:
            raise OSError("no such file on this machine")
        return Linear()

    plan = make_plan([ModelSpec("local", only_here)], (CLEAN,), digits.head(2), tmp_path)
    results = run_plan(plan, executor=cluster, progress=False)
    assert "no such file on this machine" in results[0].errors[0]


class Moody(Linear):
    """Has other weights in every process."""

    def __init__(self):
        super().__init__()
        self.weight.data[0, 0] = os.getpid()


def test_a_worker_with_another_model_or_other_versions_gives_no_result(digits, tmp_path, cluster, monkeypatch):
    results = evaluate([ModelSpec("moody", Moody)], (CLEAN,), digits, tmp_path, executor=cluster, progress=False)
    assert "the worker is not like the machine that plans: weights_sha256: expected" in results[0].errors[0]
    monkeypatch.setattr(_runner, "versions", lambda: {**versions(), "foolbox": "2.4.0"})
    results = evaluate([MODEL], (CLEAN,), digits, tmp_path, executor=cluster, progress=False)
    assert "foolbox: expected 2.4.0, got 3" in results[0].errors[0]
