"""What every command shares: common options, exit codes, one line of error and no traceback."""

import io
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from lastlayer.cli import main
from lastlayer.cli.app import app
from lastlayer.cli.options import Common, verb
from lastlayer.cli.reproduce import large_sparse_targets
from lastlayer.cli.speedup import speedup
from lastlayer.kernels import engine
from lastlayer.study.errors import StudyError, Terminated, UsageError
from lastlayer.study.measuring.measure import environment

PAPERS = ("svd-softmax", "hierarchical-softmax", "softmax-bottleneck", "large-sparse-targets")
SMALL = ["bench", "--num-classes", "50", "--in-features", "4", "--batch", "3", "--seconds", "0.1"]


@pytest.fixture
def run():
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def failing(problem):
    toy = typer.Typer()

    def study(common):
        raise problem

    toy.command()(verb(study))
    return toy


@pytest.mark.parametrize(
    ("problem", "code", "said"),
    [
        (UsageError("no such layer"), 2, "lastlayer: no such layer\n"),
        (StudyError("the text is empty"), 1, "lastlayer: the text is empty\n"),
        (KeyboardInterrupt(), 130, "lastlayer: interrupted\n"),
        (Terminated(), 143, "lastlayer: terminated\n"),
        (RuntimeError("deep\ninside"), 1, "lastlayer: RuntimeError: deep (--debug shows where)\n"),
    ],
)
def test_failures_are_one_line(problem, code, said):
    result = CliRunner().invoke(failing(problem), [])
    assert (result.exit_code, result.stderr) == (code, said)
    assert "Traceback" in CliRunner().invoke(failing(problem), ["--debug"]).stderr


def test_records_are_written(run, tmp_path):
    path = tmp_path / "new" / "records.json"
    result = run(*SMALL, "--layers", "full,hierarchical", "--json", path)
    assert result.exit_code == 0, result.output
    records = json.loads(path.read_text())
    needed = {"case", "name", "num_classes", "in_features", "batch", "ms", "ratio_to_full", "peak_bytes"}
    assert all(needed <= record.keys() for record in records)
    assert {record["case"] for record in records} >= {"training", "query", "single query"}
    assert all(record["ms"] > 0 and isinstance(record["peak_bytes"], int) for record in records)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bench", "--no-such-option"], "--no-such-option"),
        (["bench", "--batch", "0"], "--batch"),
        (["bench", "--device", "abacus"], "--device abacus"),
        (["bench", "--device", "meta"], "--device meta"),
        (["bench", "--seed", str(2**63)], "--seed must be below"),
        (["bench", "--threads", "0"], "--threads"),
        ([*SMALL, "--k", "51"], "--k"),
        ([*SMALL, "--json", "/"], "--json"),
        (["nonsense"], "nonsense"),
        (["config", "--threads", "none"], "--threads"),
        (["bench", "--num-classes", 10**9, "--in-features", 1024], "V=1,000,000,000 d=1,024 N=256 needs about "),
        (
            ["reproduce", "large-sparse-targets", "--parts", "speed", "--num-classes", 10**10],
            "V=10,000,000,000 d=300 needs about",
        ),
    ],
)
def test_bad_usage_is_two(run, arguments, said):
    result = run(*arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("run", [lambda c: speedup(c, Path("none")), large_sparse_targets])
def test_what_is_of_cpus_takes_no_other_device(run):
    with pytest.raises(UsageError, match="--device cuda: what is measured here is of CPUs"):
        run(Common(0, torch.device("cuda")))


def test_unwritable_records_fail_before_the_work(run):
    result = run(*SMALL, "--json", "/dev/null/records.json")
    assert result.exit_code == 1
    assert "cannot write to the folder /dev/null" in result.stderr
    assert "ratio" not in result.stdout


def test_a_terminal_without_the_signs(monkeypatch):
    """The dagger and the lines of a table, where the encoding has neither."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(sys, "argv", ["lastlayer", "--version"])
    with pytest.raises(SystemExit):
        main()
    print("† as remembered", flush=True)
    assert b"? as remembered" in written.getvalue()


def test_finished_parts_outlive_an_interrupt(run, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("lastlayer.cli.reproduce.measure_scaling", interrupted)
    options = ["--parts", "exactness,scaling", "--steps", 3, "--json", tmp_path / "records.json"]
    result = run("reproduce", "large-sparse-targets", *options)
    assert (result.exit_code, result.stderr) == (130, "lastlayer: interrupted\n")
    assert {r["case"] for r in json.loads((tmp_path / "records.json").read_text())} == {"exactness"}


def test_command_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lastlayer", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("lastlayer", run_name="__main__")
    assert (ended.value.code, capsys.readouterr().out[:10]) == (0, "lastlayer ")


VERBS = ["compare", "speedup", "bench", *(f"reproduce {paper}" for paper in PAPERS)]


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_for_people(run, verb):
    """Types are words, not Python's or click's; every option says what it is."""
    text = run(*verb.split(), "--help").output
    assert not re.search("[<>]", text.replace("<unk>", ""))
    assert "range" not in text.lower()
    assert "INTEGER" not in text


def test_help_names_what_is_read(run):
    text = " ".join(run("compare", "--help").output.split())
    assert all(
        word in text for word in (".gz", ".bz2", ".xz", ".jsonl", ".npy", ".bin", "folder", "standard input")
    )


@pytest.mark.parametrize("columns", [30, 45, 80, 120])
@pytest.mark.parametrize("verb", ["compare", "bench"])
def test_help_stays_within_the_terminal(run, monkeypatch, columns, verb):
    monkeypatch.setenv("COLUMNS", str(columns))
    result = run(verb, "--help")
    assert result.exit_code == 0
    assert max(map(len, result.output.splitlines())) <= columns


def test_config_says_what_runs_here(run, tmp_path):
    path = tmp_path / "config.json"
    result = run("config", "--json", path, "--threads", 1)
    assert result.exit_code == 0, result.output
    (record,) = json.loads(path.read_text())
    assert f"torch: {torch.__version__}\n" in result.output
    assert {"version", "processor", "engine", "isa", "why", "supported", "threads"} <= record.keys()
    assert all(not isinstance(value, list | dict) for value in record.values())
    assert environment()["isa"] == record["isa"]


def test_an_instruction_set_that_does_not_exist_is_bad_usage(run, monkeypatch):
    """Said before any work, not by the first kernel."""

    def nonsense():
        raise ValueError("LASTLAYER_MAX_CPU_ISA must be one of ...")

    monkeypatch.setattr(engine, "current", nonsense)
    result = run("compare", "--text", "/dev/null")
    assert (result.exit_code, result.stderr) == (2, "lastlayer: LASTLAYER_MAX_CPU_ISA must be one of ...\n")


@pytest.mark.parametrize("missing", ["typer", "rich", "matplotlib"])
def test_without_what_the_command_needs(missing, monkeypatch, capsys):
    """The command says what to install."""
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit) as ended:
        main()
    said = f"lastlayer: the command needs {missing}: pip install 'lastlayer[cli]'\n"
    assert (ended.value.code, capsys.readouterr().err) == (1, said)
