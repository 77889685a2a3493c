"""Threads that compute side by side."""

import threading

import pytest
import torch

from abs_defense import ABS
from abs_defense._threads import one_core_each, share_out
from abs_defense.inference import _infer


def test_one_thread_inside_as_many_as_before_outside():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with one_core_each(2) as pool:
            together = threading.Barrier(2)

            def seen(_: int) -> int:
                together.wait()
                return torch.get_num_threads()

            assert list(pool.map(seen, range(2))) == [1, 1]
            assert torch.get_num_threads() == 3
            fresh = []
            thread = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
            thread.start()
            thread.join()
            assert fresh == [3]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_prototypes_are_the_same_on_one_core_and_on_several():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = ABS(prototypes=40).prototype_images
        torch.set_num_threads(3)
        assert torch.allclose(ABS(prototypes=40).prototype_images, alone, rtol=0, atol=1e-6)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("solver", "steps"), [("adam", 6), ("bfgs", 6), ("bfgs", 0)])
def test_inference_is_the_same_on_one_core_and_on_several(solver, steps, digits, monkeypatch):
    shared = []
    monkeypatch.setattr(_infer, "share_out", lambda work, count: shared.append(count) or share_out(work, count))
    images = torch.cat([digits.images.roll(shift, dims=3) for shift in range(4)])  # 80, enough to be shared out
    model = ABS(prototypes=40, steps=steps, solver=solver)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = model.infer(images)
        assert shared == []
        torch.set_num_threads(3)
        together = model.infer(images)
        assert shared == [10]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert torch.equal(together.prediction, alone.prediction)
    close = torch.isclose(together.energy, alone.energy, rtol=1e-4, atol=0)
    assert close.float().mean() > 0.995


def test_parts_are_in_order_without_gradients_and_errors_arrive():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        found = share_out(lambda part: (part.start, part.stop, torch.get_num_threads(), torch.is_grad_enabled()), 10)
        assert found == [(0, 3, 1, False), (3, 7, 1, False), (7, 10, 1, False)]
        assert share_out(lambda part: part, 2) == [slice(0, 1), slice(1, 2)]
        with pytest.raises(RuntimeError, match="no luck"):
            share_out(_unlucky, 4)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def _unlucky(part: slice) -> None:
    raise RuntimeError("no luck")
