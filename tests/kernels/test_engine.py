"""The choice of an instruction set, what `show_config` reports, and the plain code where there is no engine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lastlayer import FullSoftmax
from lastlayer.kernels import engine
from lastlayer.kernels.config import config, show_config
from lastlayer.kernels.engine import Kernel

needs_engine = pytest.mark.skipif(not engine.available(), reason=f"no compiled engine: {engine.reason()}")


def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**os.environ, **variables}
    )


@pytest.fixture
def chosen_again(monkeypatch):
    """The engine as in a new process: nothing is chosen or loaded, in this test alone."""
    monkeypatch.setattr(engine, "_state", type(engine._state)())
    engine._load.cache_clear()
    yield
    engine._load.cache_clear()


@needs_engine
@pytest.mark.parametrize("isa", engine.supported())
def test_variable_lowers_the_instruction_set(isa, chosen_again, monkeypatch):
    monkeypatch.setenv(engine.VARIABLE, isa)
    assert engine.current().isa == isa


@pytest.mark.parametrize("name", ["nonsense", "AVX2 ", "neon_i8mm" if "neon" in engine.FOREIGN else "avx2"])
def test_unknown_instruction_set_is_an_error_that_lists_the_known(name, chosen_again, monkeypatch):
    monkeypatch.setenv(engine.VARIABLE, name)
    with pytest.raises(ValueError, match=f"{engine.VARIABLE} must be one of portable, .*, got {name!r}"):
        show_config()


def test_the_variable_is_read_from_the_environment_of_the_process():
    out = run("import lastlayer; lastlayer.show_config()", LASTLAYER_MAX_CPU_ISA="nonsense")
    assert out.returncode != 0
    assert "LASTLAYER_MAX_CPU_ISA must be one of portable" in out.stderr


@needs_engine
def test_instruction_set_that_the_processor_lacks_is_an_error_that_lists_those_it_has():
    lacking = [isa for isa in engine.ISAS if not isa.startswith(engine.FOREIGN) and isa not in engine.supported()]
    if not lacking:
        pytest.skip("this processor has them all")
    with (
        pytest.raises(ValueError, match=f"{lacking[-1]}.*this processor lacks.*portable"),
        engine.forced(lacking[-1]),
    ):
        pass


def test_config_says_what_runs(capsys):
    record = show_config()
    assert record == config()
    assert f"isa: {record['isa']}" in capsys.readouterr().out
    assert record["engine"] == ("compiled" if engine.available() else "plain")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "was not built"),
        (b"no library", "could not be loaded"),
        (b"", "could not be loaded"),
        (Path(torch._C.__file__), "could not be loaded"),
    ],
    ids=["missing", "broken", "empty", "foreign"],
)
def test_extension_that_does_not_load_leaves_the_plain_code_and_one_warning(
    content, says, tmp_path, chosen_again, monkeypatch
):
    file = tmp_path / "engine_portable.so"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    monkeypatch.setattr(engine, "_file", lambda isa: file if file.is_file() and isa == "portable" else None)
    with pytest.warns(RuntimeWarning, match=says) as seen:
        assert [engine.available() for _ in range(2)] == [False, False]
    assert len(seen) == 1
    layer = FullSoftmax(8, 70_000)
    layer(torch.randn(9, 8), torch.arange(9)).backward()
    assert layer.weight.grad.isfinite().all()


@needs_engine
def test_extension_of_another_version_leaves_the_plain_code(chosen_again, monkeypatch):
    monkeypatch.setattr(engine, "_names", engine._names | {"a_later_kernel"})
    with pytest.warns(RuntimeWarning, match=r"another version \(it has no a_later_kernel\)"):
        assert not engine.available()


@needs_engine
def test_kernel_without_engine_names_itself():
    with engine.forced(None), pytest.raises(RuntimeError, match="kernel cpu_features"):
        Kernel("cpu_features", "")()


@needs_engine
def test_tensor_that_is_not_on_the_cpu_is_an_error():
    with pytest.raises(RuntimeError, match="kernel use_threads takes tensors on the CPU, got one on meta"):
        Kernel("use_threads", "pp")(torch.empty(3, device="meta"), None)


FORKED = """
import os
import torch
from lastlayer.kernels.softmax_rows import RowTerms, fused

def loss():
    torch.manual_seed(0)
    terms = RowTerms(torch.arange(64), torch.ones(64), None, None, None)
    return fused(torch.randn(64, 5000), None, terms, True)[0]

torch.set_num_threads(2)
before = loss()
child = os.fork()
if not child:
    os._exit(0 if torch.equal(loss(), before) else 1)
print(os.waitpid(child, 0)[1])
"""


@needs_engine
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_forked_child_runs_kernels_on_its_own_thread():
    out = run(FORKED)
    assert out.stdout.strip() == "0", out.stderr
