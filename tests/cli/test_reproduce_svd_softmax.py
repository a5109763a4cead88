"""`lastlayer reproduce svd-softmax` on a small text: every setting, sound figures, claims beside them."""

import json
import random

import pytest
from typer.testing import CliRunner

from lastlayer.cli import app


@pytest.fixture
def text(tmp_path):
    draw = random.Random(0)
    words = [f"word{i}" for i in range(400)]
    weights = [1 / (i + 1) for i in range(400)]
    lines = [" ".join(draw.choices(words, weights, k=12)) for _ in range(900)]
    path = tmp_path / "text.txt"
    path.write_text("\n".join(lines))
    return path


def test_settings_and_claims(text, tmp_path):
    arguments = ["--text", text, "--seconds", 1, "--width", 32, "--positions", 500, "--largest", 8000]
    out = ["--out", tmp_path / "out", "--json", tmp_path / "records.json"]
    result = CliRunner().invoke(app, ["reproduce", "svd-softmax", *map(str, arguments + out)])
    assert result.exit_code == 0, result.output
    records = json.loads((tmp_path / "records.json").read_text())
    quality = [r for r in records if r["case"] == "quality"]
    assert len(quality) == 2 * 4 * 4
    assert all(0 <= r["coverage"] <= 1 and r["kl"] >= 0 for r in quality)
    by = {(r["kind"], r["window"], r["candidates_share"]): r for r in quality}
    assert by["plain", "d/2", 0.1]["kl"] <= by["plain", "d/16", 0.01]["kl"] + 1e-6
    assert by["plain", "d/2", 0.1]["perplexity"] == pytest.approx(
        by["plain", "d/2", 0.1]["full_perplexity"], rel=0.05
    )
    assert [r["num_classes"] for r in records if r["case"] == "speed"] == [8000]
    claims = [r for r in records if r["case"] == "claim"]
    assert len(claims) == 4
    assert all(r["claim"] in result.output and r["measured"] in result.output for r in claims)
    assert (tmp_path / "out" / "svd-softmax.json").exists()


def test_resume_measures_only_what_is_missing(text, tmp_path, monkeypatch):
    arguments = ["--text", text, "--seconds", 0.5, "--width", 32, "--positions", 500, "--out", tmp_path / "out"]

    def run(*more):
        return CliRunner().invoke(app, ["reproduce", "svd-softmax", *map(str, (*arguments, *more))])

    assert run("--largest", 0).exit_code == 0
    again = run("--largest", 8000)
    assert again.exit_code == 2
    assert "--resume goes on" in again.stderr
    monkeypatch.setattr("lastlayer.study.svd_softmax._trained", lambda *_: pytest.fail("trained again"))
    result = run("--largest", 8000, "--resume")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "svd-softmax.json").read_text())["records"]
    assert [r["case"] for r in found].count("quality") == 32
    assert [r["num_classes"] for r in found if r["case"] == "speed"] == [8000]


def test_interrupted_training_goes_on(text, tmp_path):
    arguments = ["--text", text, "--width", 32, "--positions", 500, "--largest", 0, "--out", tmp_path / "out"]

    def run(*more):
        return CliRunner().invoke(app, ["reproduce", "svd-softmax", *map(str, (*arguments, *more))])

    assert run("--seconds", 0.5).exit_code == 0
    (tmp_path / "out" / "results.json").unlink()
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    assert run("--seconds", 0.5, "--resume").exit_code == 0
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before  # not trained again
    (tmp_path / "out" / "results.json").unlink()
    other = run("--seconds", 9, "--resume")
    assert other.exit_code == 1
    assert "seconds was 0.5, now 9" in other.stderr


def test_too_few_words(tmp_path):
    path = tmp_path / "few.txt"
    path.write_text("a b c a b\n" * 300)
    out = str(tmp_path / "out")
    result = CliRunner().invoke(app, ["reproduce", "svd-softmax", "--text", str(path), "--out", out])
    assert result.exit_code == 2
    assert "at least 200" in result.stderr
