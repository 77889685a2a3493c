"""Threads that compute side by side."""

import threading

import torch

from abs_defense import ABS
from abs_defense._threads import one_core_each


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
