"""`lastlayer reproduce hierarchical-softmax` on a small text: every layer at equal steps and equal time."""

import json

import pytest
from typer.testing import CliRunner

from lastlayer.cli.app import app

COMMAND = ["reproduce", "hierarchical-softmax"]


def test_claims_stand_beside_figures(tmp_path, monkeypatch):
    monkeypatch.setattr("lastlayer.study.compare.render", lambda results: "")  # four pages, tested elsewhere
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"the {n % 7} and a {n % 13} of {n % 29}" for n in range(800)) + "\n")
    small = ["--steps", "2", "--seconds", "0.2", "--width", "16", "--largest", "1000", "--rounds", "1"]
    arguments = [*COMMAND, "--text", str(text), *small, "--out", str(tmp_path / "out")]
    path = tmp_path / "records.json"
    result = CliRunner().invoke(app, [*arguments, "--json", str(path)])
    assert result.exit_code == 0, result.output
    records = json.loads(path.read_text())
    assert {record["case"] for record in records} == {"speed", "equal-steps", "equal-time"}
    for case in ("equal-steps", "equal-time"):
        quality = {r["name"]: r for r in records if r["case"] == case}
        assert set(quality) == {"full", "hierarchical", "tree", "adaptive"}
        assert quality["full"]["ratio_to_full"] == 1
        assert quality["adaptive"]["claimed"] == "147 / 30 min"
    assert all(record["times_faster"] > 0 for record in records if record["case"] == "speed")
    assert (tmp_path / "out" / "reproduce.json").exists()
    again = CliRunner().invoke(app, [*arguments, "--resume"])
    assert again.exit_code == 0, again.output
    assert again.output.count("already trained") == 8


@pytest.mark.parametrize(
    ("option", "code", "said"), [(["--largest", "5"], 2, "--largest"), (["--rounds", "0"], 2, "")]
)
def test_bad_usage(option, code, said, tmp_path):
    result = CliRunner().invoke(app, [*COMMAND, *option, "--out", str(tmp_path)])
    assert result.exit_code == code
    assert said in result.stderr
