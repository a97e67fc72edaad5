"""Runs tests/interpreter in a process of its own: Triton reads TRITON_INTERPRET when it is imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed on this platform")
VERSIONS = [tuple(map(int, module.__version__.split(".")[:2])) for module in (triton, numpy)]
pytestmark = pytest.mark.skipif(
    VERSIONS[0] < (3, 7) and VERSIONS[1] >= (2, 4), reason="the interpreter of Triton 3.6 needs numpy below 2.4"
)
ROOT = Path(__file__).parent.parent


def run(selection):
    command = [sys.executable, "-m", "pytest", "tests/interpreter", "-q", "-x", "-m", selection, "--durations=5"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return int(re.search(r"(\d+) passed", done.stdout).group(1))


def test_kernels_in_the_interpreter():
    assert run("not slow") > 90


@pytest.mark.slow
def test_longer_kernel_cases_in_the_interpreter():
    assert run("slow") > 20
