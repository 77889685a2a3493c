"""Runs ``on_second_device.py`` in a process of its own: a second device changes what torch does elsewhere."""

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).with_name("on_second_device.py")


def test_on_a_second_device():
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:xdist", str(TESTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-20_000:]
    if " passed" not in done.stdout:
        pytest.skip(done.stdout.splitlines()[-1])
