"""The recommender and the classifier in `examples/` run as a user would run them, on small data."""

import lzma
import random
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def output_of(script, *arguments):
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_next_item(tmp_path):
    """Sessions that count upwards: the next item follows from the last."""
    generator = random.Random(0)
    sessions = [range(start, start + 8) for start in (generator.randrange(30) for _ in range(400))]
    items = tmp_path / "sessions.txt"
    items.write_text("\n".join(" ".join(f"item{i}" for i in session) for session in sessions))
    page = tmp_path / "page.html"
    chosen = "full;log-uniform, corrected"
    output = output_of(
        "next_item.py", "--items", items, "--seconds", 3, "--seeds", 1, "--layers", chosen, "--out", page
    )
    for name in chosen.split(";"):
        recall = float(re.search(rf"{name} +[\d,]+ +([\d.]+)", output)[1])
        assert recall > 0.5, output
    assert "NDCG@10" in page.read_text()


def test_extreme_labels(tmp_path):
    """Labels that are words of the text."""
    generator = random.Random(0)
    names = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
    for part, rows in (("train", 600), ("test", 60)):
        lines = []
        for row in range(rows):
            labels = generator.sample(names, 2)
            lines.append(
                f"p{row}\tmisc\t{' '.join(labels)} thing\t\t{' '.join('lib' + label for label in labels)}"
            )
        with lzma.open(tmp_path / f"packages.{part}.tsv.xz", "wt") as file:
            file.write("\n".join(lines) + "\n")
    output = output_of("extreme_labels.py", "--data", tmp_path, "--seconds", 2)
    for name in ("one against all", "one against sampled", "two levels"):
        precision = float(re.search(rf"{name} +[\d,]+ +([\d.]+)", output)[1])
        assert precision > 80, output
