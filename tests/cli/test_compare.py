"""`lastlayer compare` from end to end on a tiny text, and every kind of bad usage."""

import json
import re
import shutil
import signal
import threading

import pytest
from typer.testing import CliRunner

from lastlayer.cli.app import app
from lastlayer.study.training.trainer import Trainer

TINY = ["--width", 8, "--batch", 4, "--window", 5, "--layers", "full,hierarchical", "--threads", 1]
NEEDED = {
    "layer", "perplexity", "top10_accuracy", "seconds", "tokens", "tokens_per_second",
    "output_layer_ms", "peak_bytes", "parameters", "query_ms", "screened_query_ms",
}  # fmt: skip


def run(*arguments):
    return CliRunner().invoke(app, ["compare", *(str(argument) for argument in arguments)])


@pytest.fixture(scope="module")
def compared(tmp_path_factory, story):
    """A finished run: its output, its folder, its records."""
    folder = tmp_path_factory.mktemp("compared")
    result = run("--text", story, *TINY, "--steps", 25, "--out", folder / "out", "--json", folder / "records.json")
    assert result.exit_code == 0, result.output
    return result.output, folder / "out", json.loads((folder / "records.json").read_text())


@pytest.fixture
def folder(compared, tmp_path):
    """A copy of the finished run's folder, to damage or to go on with."""
    return shutil.copytree(compared[1], tmp_path / "out")


def test_table_records_and_page(compared):
    output, out, records = compared
    assert {record["layer"] for record in records} == {"full", "hierarchical"}
    assert all(record.keys() >= NEEDED for record in records)
    assert all(1 < record["perplexity"] < 30 and record["steps"] == 25 for record in records)
    assert [r["perplexity"] for r in records] == sorted(r["perplexity"] for r in records)
    assert output.index("story.txt: ") < output.index("about") < output.index("perplexity")

    results = json.loads((out / "results.json").read_text())
    assert results["records"] == records
    assert all(curve[-1]["tokens"] == records[0]["tokens"] for curve in results["curves"].values())
    assert {"machine", "torch", "commit", "command"} <= results["environment"].keys()

    page = (out / "index.html").read_text()
    elsewhere = r"<script [^>]*src|<link|<img|url\((?!#)|https?:|@import"
    assert not re.search(elsewhere, page.replace("http://www.w3.org/", ""))  # which names what a drawing is
    assert page.count('<svg class="wide"') == 2  # over time and over what was read
    assert "prefers-color-scheme:dark" in page
    assert all(f"{record['perplexity']:.2f}"[:4] in page for record in records)
    assert (out / "vocabulary.tsv").read_text().splitlines()[0].startswith("the\t")


def test_finished_run_is_shown_again(compared, folder, story):
    result = run("--text", story, *TINY, "--steps", 25, "--out", folder, "--resume")
    assert result.exit_code == 0, result.output
    assert result.output.count("already trained") == 2
    again = json.loads((folder / "results.json").read_text())["records"]
    assert [r["perplexity"] for r in again] == [r["perplexity"] for r in compared[2]]
    differs = run("--text", story, *TINY, "--steps", 30, "--out", folder, "--resume")
    assert (differs.exit_code, "steps was 25, now 30" in differs.stderr) == (1, True)


@pytest.mark.parametrize(("sent", "code", "said"), [("INT", 130, "interrupted"), ("TERM", 143, "terminated")])
def test_stopped_and_resumed_equals_uninterrupted(compared, tmp_path, story, monkeypatch, sent, code, said):
    """The message says where the checkpoint is; what is there is not overwritten."""
    step, out = Trainer.step, tmp_path / "out"
    common = ["--text", story, *TINY, "--steps", 25, "--out", out]

    def stopped(trainer):
        if trainer.steps == 12 and trainer.path is not None:
            assert threading.current_thread() is threading.main_thread()  # where a signal is caught
            signal.raise_signal(getattr(signal, f"SIG{sent}"))
        step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stopped)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        result = run(*common)
        signal.signal(signal.SIGINT, before)
    where = f"the checkpoint is {out / 'full.safetensors'}; the same command with --resume goes on from it"
    assert (result.exit_code, result.stderr) == (code, f"lastlayer: {said}; {where}\n")
    refused = run(*common)
    assert (refused.exit_code, "--resume goes on" in refused.stderr) == (2, True)
    result = run(*common, "--resume", "--json", tmp_path / "resumed.json")
    assert result.exit_code == 0, result.output
    for field in ("layer", "perplexity", "top10_accuracy", "tokens", "steps"):
        resumed = json.loads((tmp_path / "resumed.json").read_text())
        assert [r[field] for r in resumed] == [r[field] for r in compared[2]]


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--layers", "full,fool"], 2, "no layer 'fool'; the layers are: full, hierarchical"),
        (["--steps", 5, "--seconds", 5], 2, "not both"),
        (["--characters", "--ids"], 2, "one of --characters and --ids, not both"),
        (["--ids-dtype", "float"], 2, "--ids-dtype must be one of uint16, uint32; got 'float'"),
        (["--width", 10**8], 2, "at --width 100,000,000 needs about"),
        (["--seconds", "inf"], 2, "--seconds must be a finite number of seconds, got inf"),
        (["--text", "missing.txt"], 2, "no text file missing.txt"),
        (["--min-count", 100_000], 1, "lower --min-count"),
        (["--out", "/dev/null/out"], 1, "cannot write to the folder /dev/null/out"),
        (["--steps", 20, "--learning-rate", 1e38], 1, "lower the learning rate with --learning-rate"),
    ],
)
def test_bad_requests(tmp_path, story, options, code, said):
    text = [] if "--text" in options else ["--text", story]
    result = run(*text, *TINY, "--out", tmp_path / "out", *options)
    assert result.exit_code == code, result.output
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize("content", [b"", b"word", b"one line of text", b"\0\1\2" * 500, b"caf\xe9 " * 500])
def test_bad_texts(tmp_path, content):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    result = run("--text", path, *TINY, "--steps", 3, "--out", tmp_path / "out")
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("lastlayer: ")
    assert "bad.txt" in result.stderr
    assert result.stderr.count("\n") == 1


def test_several_texts_after_one_option(tmp_path, story):
    result = run("--text", story, story, *TINY, "--layers", "full", "--steps", 3, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "story.txt and 1 more" in result.output


def test_truncated_checkpoint(folder, story):
    path = folder / "full.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    for options in ([], ["--resume"]):
        result = run("--text", story, *TINY, "--steps", 25, "--out", folder, *options)
        assert (result.exit_code, "full.safetensors is damaged" in result.stderr) == (1, True)


def test_full_disk_loses_nothing(folder, story, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def disk_is_full(tensors, file, metadata):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lastlayer.study.training.checkpoint.save_file", disk_is_full)
    result = run("--text", story, *TINY, "--steps", 25, "--out", folder)
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
