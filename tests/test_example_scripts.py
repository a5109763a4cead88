"""The scripts in `examples/` run, and learn: classes, digits, a recommender and a classifier on small data."""

import lzma
import random
import re


def test_many_classes(output_of):
    assert share_right(output_of("many_classes.py", "--classes", 5000, "--steps", 60)) > 50


def test_digits(output_of):
    assert share_right(output_of("digits.py")) > 90


def share_right(output):
    return float(re.search(r"right: ([\d.]+)%", output)[1])


def test_next_item(tmp_path, output_of):
    """Sessions that count upwards: the next item follows from the last."""
    generator = random.Random(0)
    sessions = [range(start, start + 8) for start in (generator.randrange(30) for _ in range(400))]
    items = tmp_path / "sessions.txt"
    items.write_text("\n".join(" ".join(f"item{i}" for i in session) for session in sessions))
    page = tmp_path / "page.html"
    chosen = "full;log-uniform, corrected"
    output = output_of(
        "next_item.py", "--items", items, "--seconds", 1, "--seeds", 1, "--layers", chosen, "--out", page
    )
    for name in chosen.split(";"):
        recall = float(re.search(rf"{name} +[\d,]+ +([\d.]+)", output)[1])
        assert recall > 0.5, output
    assert "NDCG@10" in page.read_text()


def test_extreme_labels(tmp_path, output_of):
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
    output = output_of("extreme_labels.py", "--data", tmp_path, "--seconds", 1)
    for name in ("one against all", "one against sampled", "two levels"):
        precision = float(re.search(rf"{name} +[\d,]+ +([\d.]+)", output)[1])
        assert precision > 80, output
