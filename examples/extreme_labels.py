"""Extreme multi-label classification of what every Debian machine knows: package descriptions to dependencies.

python examples/extreme_labels.py [--data FOLDER] [--labels dependencies|debtags] [--seconds 60] [--json FILE]

FOLDER holds `packages.train.tsv.xz` and `packages.test.tsv.xz`, five fields a line between tabs: name, section,
text, debtags, dependencies. Without it the packages are those that `apt-cache dumpavail` knows. A bag of words
meets three output layers: a sigmoid for each label with all negatives, the same with sampled ones, and two levels
that are trained on one label of each row at a time. P@k, and PSP@k, which weighs rare labels more.
"""

import argparse
import hashlib
import lzma
import re
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lastlayer import HierarchicalSoftmax, OneVsAll, OutputLayer, Unigram, clusters, metrics
from lastlayer.study.measuring.measure import write_records

WIDTH, BATCH, IGNORED = 128, 256, -100
FIGURES = ("P@1", "P@3", "P@5", "PSP@1", "PSP@3", "PSP@5")


class Package(NamedTuple):
    """One row: what is known, and what is to be told."""

    words: list[str]
    labels: list[str]


class Rows(NamedTuple):
    """Packages as tensors."""

    words: Tensor  # (N, W), ids of words, padded with 0
    labels: Tensor  # (N, K), ids of labels, padded with IGNORED


def read_folder(folder: Path, part: str, field: int) -> list[Package]:
    """The packages of a prepared file."""
    with lzma.open(folder / f"packages.{part}.tsv.xz", "rt", encoding="utf-8") as lines:
        rows = [line.rstrip("\n").split("\t") for line in lines]
    return [Package(words_of(f"{row[1]} {row[2]}"), row[field].split()) for row in rows]


def read_apt(field: int) -> Iterator[tuple[str, Package]]:
    """The packages that apt knows, by name."""
    listing = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    for block in listing.split("\n\n"):
        fields = dict(re.findall(r"^([\w-]+): *(.*(?:\n .*)*)", block, re.MULTILINE))
        text = f"{fields.get('Section', '')} {fields.get('Package', '')} {fields.get('Description', '')}"
        labels = re.split(r"[,|]", fields.get("Tag" if field == 3 else "Depends", ""))
        yield (
            fields.get("Package", ""),
            Package(words_of(text), [part.split()[0] for part in labels if part.split()]),
        )


def words_of(text: str) -> list[str]:
    """Lower-case words, and the parts of compound ones."""
    return re.findall(r"[a-z][a-z0-9+]*|\d+", text.lower())


def load(folder: Path | None, field: int) -> tuple[list[Package], list[Package]]:
    """Packages to train on, and to test."""
    if folder is not None:
        return read_folder(folder, "train", field), read_folder(folder, "test", field)
    train: list[Package] = []
    test: list[Package] = []
    for name, package in read_apt(field):
        (test if hashlib.md5(name.encode()).digest()[0] < 26 else train).append(package)
    return train, test


def numbered(train: list[Package]) -> tuple[dict[str, int], dict[str, int]]:
    """Ids of the words and labels that occur twice or more, most frequent first; word 0 is padding."""
    words = Counter(word for package in train for word in package.words)
    labels = Counter(label for package in train for label in set(package.labels))
    word_ids = {word: place + 1 for place, (word, count) in enumerate(words.most_common()) if count > 1}
    return word_ids, {label: place for place, (label, count) in enumerate(labels.most_common()) if count > 1}


def as_rows(packages: list[Package], words: dict[str, int], labels: dict[str, int]) -> Rows:
    """Packages that have a label, as padded ids."""
    of_words = [[words[w] for w in package.words if w in words] or [0] for package in packages]
    of_labels = [sorted({labels[label] for label in package.labels if label in labels}) for package in packages]
    kept = [row for row, own in enumerate(of_labels) if own]
    return Rows(padded([of_words[row] for row in kept], 0), padded([of_labels[row] for row in kept], IGNORED))


def padded(rows: list[list[int]], value: int) -> Tensor:
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


class Classifier(nn.Module):
    """The mean of word vectors, one hidden layer, an output layer."""

    def __init__(self, num_words: int, output: OutputLayer) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(num_words + 1, WIDTH, mode="mean", padding_idx=0)
        nn.init.normal_(self.words.weight, std=0.3)
        self.hidden = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())
        self.output = output

    def encode(self, words: Tensor) -> Tensor:
        return self.hidden(self.words(words))


def one_of(labels: Tensor) -> Tensor:  # (n, K) to (n,)
    """One label of each row, at random: what a layer of one class a row is trained on."""
    scores = torch.rand(labels.shape).masked_fill(labels == IGNORED, -1)
    return labels.gather(1, scores.argmax(1, keepdim=True))[:, 0]


def train(model: Classifier, rows: Rows, seconds: float, pick: Callable[[Tensor], Tensor]) -> int:
    """Adagrad for as long; how many steps fitted."""
    with torch.sparse.check_sparse_tensor_invariants(False):
        optimizer = torch.optim.Adagrad(model.parameters(), lr=0.05)
        steps, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            at = torch.randint(len(rows.words), (BATCH,))
            loss = model.output(model.encode(rows.words[at]), pick(rows.labels[at]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
    return steps


@torch.no_grad()
def evaluate(model: Classifier, rows: Rows, propensity: Tensor) -> list[float]:
    """P@1, 3, 5 and PSP@1, 3, 5, in percent."""
    k = min(5, model.output.num_classes)
    best = torch.cat([model.output.topk(model.encode(words), k)[1] for words in rows.words.split(512)])
    plain = [metrics.precision(best[:, :n], rows.labels) for n in (1, 3, 5)]
    scored = [metrics.propensity_scored_precision(best[:, :n], rows.labels, propensity) for n in (1, 3, 5)]
    return [100 * float(value) for value in plain + scored]


def main() -> None:
    """Trains the three layers for the same time each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="the folder of the prepared files; none: apt-cache dumpavail")
    parser.add_argument("--labels", choices=("dependencies", "debtags"), default="dependencies")
    parser.add_argument("--seconds", type=float, default=60.0, help="of training, for every layer")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    packages, test_packages = load(arguments.data, 4 if arguments.labels == "dependencies" else 3)
    words, labels = numbered(packages)
    rows, test = as_rows(packages, words, labels), as_rows(test_packages, words, labels)
    V = len(labels)
    counts = torch.bincount(rows.labels[rows.labels != IGNORED], minlength=V)
    propensity = metrics.propensities(counts, len(rows.words))
    about = (
        f"{len(rows.words):,} packages, {len(words):,} words, {V:,} {arguments.labels}; test {len(test.words):,}"
    )
    print(about)
    sampler = Unigram(counts, power=0.5)
    layers: dict[str, tuple[OutputLayer, Callable[[Tensor], Tensor]]] = {
        "one against all": (OneVsAll(WIDTH, V), lambda ids: ids),
        "one against sampled": (
            OneVsAll(WIDTH, V, sampler=sampler, num_samples=512, sparse=True),
            lambda ids: ids,
        ),
        "two levels": (
            HierarchicalSoftmax(WIDTH, V, clusters=clusters.by_frequency(counts), sparse=True),
            one_of,
        ),
    }
    print(f"{'':22}{'steps':>8}" + "".join(f"{name:>8}" for name in FIGURES))
    records = []
    for name, (output, pick) in layers.items():
        torch.manual_seed(0)
        model = Classifier(len(words), output)
        steps = train(model, rows, arguments.seconds, pick)
        values = evaluate(model, test, propensity)
        print(f"{name:22}{steps:8,}" + "".join(f"{value:8.1f}" for value in values), flush=True)
        found = dict(zip(FIGURES, (round(value, 2) for value in values), strict=True))
        records.append({"name": name, "num_classes": V, "seconds": arguments.seconds, "steps": steps, **found})
    if arguments.json is not None:
        write_records(arguments.json, records, notes=about)


if __name__ == "__main__":
    main()
