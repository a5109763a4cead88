"""Held-out perplexity of a small language model under cluster, tree and full output layers, on real text.

python benchmarks/cluster_quality.py --text FOLDER [--steps 1500 | --seconds 60] [--models full,root,...]

Every model has the same seed, text and optimizers (as in `lastlayer compare`) and either the same steps or the
same seconds of training, evaluation not counted. Results are written after each model; with the same command
again, models that are there already are not trained again.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lastlayer import AdaptiveSoftmax, FullSoftmax, HierarchicalSoftmax, TreeSoftmax, clusters
from lastlayer.layers.base import OutputLayer
from lastlayer.study.measuring.measure import write_records
from lastlayer.study.text.batches import Streams
from lastlayer.study.text.corpus import Corpus, load_corpus
from lastlayer.study.text.word_vectors import word_vectors
from lastlayer.study.training.evaluation import evaluate
from lastlayer.study.training.language_model import LanguageModel
from lastlayer.study.training.trainer import Budget, Trainer

RESULTS = Path(__file__).parent / "results"
Build = Callable[[Corpus, int], OutputLayer]


def two_level(assign: Callable[[Corpus], torch.Tensor]) -> Build:
    """Two levels over clusters that follow from the text."""
    return lambda corpus, width: HierarchicalSoftmax(
        width, corpus.num_classes, clusters=assign(corpus), sparse=True
    )


def adaptive(*cutoffs: int) -> Build:
    """Adaptive softmax; a cut-off below 1 is a share of the classes."""

    def build(corpus: Corpus, width: int) -> OutputLayer:
        return AdaptiveSoftmax(width, corpus.num_classes, [*cutoffs])

    return build


def similar(corpus: Corpus) -> torch.Tensor:
    """Words that stand beside similar words share a cluster."""
    return clusters.by_embedding(word_vectors(corpus.train, corpus.num_classes))


def shuffled(corpus: Corpus) -> torch.Tensor:
    """Even clusters of words in no order."""
    order = torch.randperm(corpus.num_classes, generator=torch.Generator().manual_seed(0))
    return clusters.even(corpus.num_classes)[order]


MODELS: dict[str, Build] = {
    "full": lambda corpus, width: FullSoftmax(width, corpus.num_classes),
    "shuffled": two_level(shuffled),
    "even": two_level(lambda corpus: clusters.by_frequency(corpus.counts, power=0.0)),
    "root": two_level(lambda corpus: clusters.by_frequency(corpus.counts)),
    "mass": two_level(lambda corpus: clusters.by_frequency(corpus.counts, power=1.0)),
    "similar": two_level(similar),
    "tree": lambda corpus, width: TreeSoftmax(width, corpus.num_classes, counts=corpus.counts, sparse=True),
    "adaptive-2000-10000": adaptive(2000, 10_000),
    "adaptive-4000-20000": adaptive(4000, 20_000),
    "adaptive-8846-44230": adaptive(8846, 44_230),
}


def main() -> None:
    """Trains each model that has no result yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--min-count", type=int, default=2)
    parser.add_argument("--models", default=",".join(MODELS))
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--steps", type=int)
    budget.add_argument("--seconds", type=float)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--window", type=int, default=35)
    parser.add_argument("--learning-rate", type=float, default=0.2)
    parser.add_argument("--held-out-tokens", type=int, default=20_000)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--checkpoints", type=Path, help="a folder: a run that was killed goes on from there")
    options = parser.parse_args()
    case = "equal-time" if options.seconds else "equal-steps"
    path = options.results or RESULTS / f"cluster_quality_{case.replace('-', '_')}.json"
    corpus = load_corpus([options.text], min_count=options.min_count)
    for name in options.models.split(","):
        if name in {record["name"] for record in _read(path)}:
            continue
        record = {"case": case, "name": name, **train(name, corpus, options)}
        records = _with_ratios([*_read(path), record])  # read again: another process may have added its own
        print(records[-1], flush=True)
        notes = "embedding, LSTM, output layer; Adagrad for embedding and output layer, Adam for the LSTM"
        write_records(path, records, notes=notes)


def train(name: str, corpus: Corpus, options: Any) -> dict[str, Any]:
    """Trains one model and reads the held-out text with it."""
    torch.manual_seed(0)
    layer = MODELS[name](corpus, options.width)
    cpu = torch.device("cpu")
    trainer = Trainer(
        LanguageModel(corpus.num_classes, layer),
        Streams(corpus.train, options.batch, options.window, cpu),
        Streams(corpus.held_out, 10, 50, cpu),
        Budget(options.seconds, options.steps),
        learning_rate=options.learning_rate,
        path=options.checkpoints and options.checkpoints / f"{name}.safetensors",
        identity={key: str(value) for key, value in vars(options).items() if key != "models"},
    )
    trainer.resume()
    trainer.run()
    quality = evaluate(trainer.model, trainer.held_out, options.held_out_tokens)
    return {
        "num_classes": corpus.num_classes,
        "num_clusters": getattr(layer, "num_clusters", None),
        "in_features": options.width,
        "batch": options.batch * options.window,
        "learning_rate": options.learning_rate,
        "perplexity": quality.perplexity,
        "held_out_tokens": quality.tokens,
        "steps": trainer.steps,
        "tokens": trainer.tokens,
        "seconds": trainer.seconds,
        "curve": [[point.tokens, round(point.perplexity, 2)] for point in trainer.curve if point.perplexity],
    }


def _read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["records"] if path.exists() else []


def _with_ratios(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each perplexity is to the full softmax's."""
    full = next((record["perplexity"] for record in records if record["name"] == "full"), None)
    return [{**record, "ratio_to_full": full and record["perplexity"] / full} for record in records]


if __name__ == "__main__":
    main()
