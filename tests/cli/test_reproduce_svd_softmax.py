"""`lastlayer reproduce svd-softmax` on a small text: every setting, sound figures, claims, resuming."""

import json
import random
import shutil

import pytest
from typer.testing import CliRunner

from lastlayer.cli.app import app

SECONDS = 0.5


def run(*arguments):
    return CliRunner().invoke(app, ["reproduce", "svd-softmax", *map(str, arguments)])


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    draw = random.Random(0)
    words = [f"word{i}" for i in range(400)]
    weights = [1 / (i + 1) for i in range(400)]
    lines = [" ".join(draw.choices(words, weights, k=12)) for _ in range(900)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def done(text, tmp_path_factory):
    """One whole run: its folder, its output, its options."""
    folder = tmp_path_factory.mktemp("out")
    options = "--text", text, "--width", 32, "--positions", 500, "--seconds", SECONDS
    result = run(*options, "--largest", 8000, "--out", folder, "--json", folder / "records.json")
    assert result.exit_code == 0, result.output
    return folder, result.output, options


@pytest.fixture
def folder(done, tmp_path):
    return shutil.copytree(done[0], tmp_path / "out")


def test_settings_and_claims(done):
    folder, output, _ = done
    records = json.loads((folder / "records.json").read_text())
    quality = [r for r in records if r["case"] == "quality"]
    assert len(quality) == 2 * 4 * 4
    assert all(0 <= r["coverage"] <= 1 and r["kl"] >= 0 for r in quality)
    by = {(r["kind"], r["window"], r["candidates_share"]): r for r in quality}
    assert by["plain", "d/2", 0.1]["kl"] <= by["plain", "d/16", 0.01]["kl"] + 1e-6
    assert by["plain", "d/2", 0.1]["perplexity"] == pytest.approx(
        by["plain", "d/2", 0.1]["full_perplexity"], rel=0.05
    )
    few, many = by["plain", "d/16", 0.01], by["plain", "d/16", 0.1]
    assert few["coverage"] < many["coverage"]  # each setting has candidates of its own
    assert few["kl"] > many["kl"]
    assert [r["num_classes"] for r in records if r["case"] == "speed"] == [8000]
    claims = [r for r in records if r["case"] == "claim"]
    assert len(claims) == 4
    assert all(r["claim"] in output and r["measured"] in output for r in claims)
    assert json.loads((folder / "results.json").read_text())["records"] == records[:-4]


def test_resume_measures_only_what_is_missing(done, folder, monkeypatch):
    cells = json.loads((folder / "results.json").read_text())["records"]
    kept = {"records": [r for r in cells if r["case"] == "quality"]}
    (folder / "results.json").write_text(json.dumps(kept))
    monkeypatch.setattr("lastlayer.reproduce.svd_softmax.study._trained", lambda *_: pytest.fail("trained again"))
    refused = run(*done[2], "--out", folder)
    assert refused.exit_code == 2
    assert "--resume goes on" in refused.stderr
    result = run(*done[2], "--largest", 8000, "--out", folder, "--resume")
    assert result.exit_code == 0, result.output
    again = json.loads((folder / "results.json").read_text())["records"]
    assert [r for r in again if r["case"] == "quality"] == [r for r in cells if r["case"] == "quality"]
    assert [r["num_classes"] for r in again if r["case"] == "speed"] == [8000]


def test_trained_model_is_kept(done, folder, monkeypatch):
    (folder / "results.json").unlink()
    monkeypatch.setattr("lastlayer.study.training.trainer.Trainer.run", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr("lastlayer.reproduce.svd_softmax.study.WINDOW_PARTS", (8,))
    monkeypatch.setattr("lastlayer.reproduce.svd_softmax.study.CANDIDATE_SHARES", (0.05,))
    result = run(*done[2], "--largest", 0, "--out", folder, "--resume")
    assert result.exit_code == 0, result.output
    (folder / "results.json").unlink()
    other = run(*done[2], "--seconds", 9, "--out", folder, "--resume")
    assert other.exit_code == 1
    assert "seconds was 0.5, now 9" in other.stderr


def test_too_few_words(tmp_path):
    path = tmp_path / "few.txt"
    path.write_text("a b c a b\n" * 300)
    result = run("--text", path, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "at least 200" in result.stderr
