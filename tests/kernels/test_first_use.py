"""What is heard of the first use of a kernel, which numba then compiles."""

import logging
import subprocess
import sys

import pytest
from numba import njit

from lastlayer.kernels import first_use

USE = """
import logging, sys
import numpy as np
from lastlayer.kernels import first_use
from lastlayer.kernels.fast_math import exp
first_use.PATIENCE = -1.0
if "quietly" in sys.argv:
    logging.getLogger("lastlayer").setLevel(logging.ERROR)
exp(np.float32(1.0))
exp(np.float32(2.0))
"""


def use(folder, *arguments):
    """What a process that calls a kernel says on stderr; numba's files are in `folder`."""
    run = [sys.executable, "-c", USE, *arguments]
    environment = {"NUMBA_CACHE_DIR": str(folder), "PYTHONPATH": ":".join(sys.path), "PATH": ""}
    return subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stderr


def test_compiling_is_said_on_stderr_and_only_where_it_happens(tmp_path):
    said = use(tmp_path / "fresh")
    assert said.startswith("lastlayer: compiling kernels")
    assert said.count("\n") == 1
    assert use(tmp_path / "fresh") == "", "what is on disk is not compiled again"


def test_a_program_can_leave_it_out(tmp_path):
    assert use(tmp_path, "quietly") == ""


@pytest.fixture(autouse=True)
def unheard():
    """As in a process that has compiled nothing yet."""
    first_use.NOTICE.__init__()


def kernel(module):
    """A function of a module, with another inside, that numba has not seen yet."""

    def double(x):
        return 2 * x

    double.__module__ = module
    double = njit(double)

    def fourfold(x):
        return double(double(x))

    fourfold.__module__ = module
    return njit(fourfold)


@pytest.mark.parametrize(
    ("patience", "module", "records"),
    [(-1.0, "lastlayer.kernels", 1), (60.0, "lastlayer.kernels", 0), (-1.0, "mine", 0), (-1.0, None, 0)],
)
def test_it_is_said_once_late_enough_and_of_own_kernels(caplog, monkeypatch, patience, module, records):
    monkeypatch.setattr(first_use, "PATIENCE", patience)
    for _ in range(2):
        assert kernel(module)(3) == 12
    assert [(r.name, r.levelno) for r in caplog.records] == [("lastlayer", logging.WARNING)] * records


def test_the_time_of_several_kernels_adds_up(caplog, monkeypatch):
    """Kernels of 0.4 s each are silent by themselves; the third one that begins has 0.8 s before it."""
    now = iter([0.0, 0.4, 100.0, 100.4, 200.0, 200.4])
    monkeypatch.setattr(first_use, "monotonic", lambda: next(now))
    monkeypatch.setattr(first_use, "PATIENCE", 0.7)

    def once(x):
        return x

    once.__module__ = "lastlayer.kernels"
    for n, said in enumerate([0, 0, 1]):
        njit(once)([1, 1.0, 1j][n])
        assert len(caplog.records) == said
