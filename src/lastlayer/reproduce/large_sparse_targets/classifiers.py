"""Large sparse targets, the losses as classifiers: which word was meant, from the letters of a misspelt one.

Any text gives the task, with as many classes as wanted, all equally frequent, and a result that is right or
wrong. Every loss has the same encoder, an ordinary dense weight and the same optimizer: only the losses differ.
"""

import random
import string
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lastlayer.functional import spherical_loss
from lastlayer.functional.spherical import NormalizedLoss, SphericalLoss
from lastlayer.reproduce.large_sparse_targets.speed import LOSSES as SPHERICAL_LOSSES
from lastlayer.study.errors import StudyError
from lastlayer.study.files import Records
from lastlayer.study.text.corpus import Corpus

LOSSES: dict[str, SphericalLoss | None] = {"softmax": None, **SPHERICAL_LOSSES}
SIZES = (10, 100, 1000)  # classes
STEPS = 600  # of each run
RATES = (1e-3, 3e-3, 1e-2)  # of Adam; each loss is judged at the one that is best on misspellings kept for that
BUCKETS, WIDTH, BATCH = 4096, 128, 128
MISSPELT = 40  # different ones of each word, where it has as many letters
CHOOSE_ON, JUDGE_ON = 4, 10  # of them
LEAST_LETTERS = 5

Part = tuple[Tensor, Tensor]  # (n, length) pieces of misspelt words, (n,) the words


def measure_classifiers(
    corpus: Corpus,
    steps: int = STEPS,
    sizes: tuple[int, ...] = SIZES,
    names: tuple[str, ...] = tuple(LOSSES),
    seed: int = 0,
) -> Records:
    """Trains each loss for `steps` and reports its error on misspellings never seen.

    Raises:
        StudyError: a text with fewer than two words that are long enough.
    """
    words = [word for word in corpus.words if len(word) >= LEAST_LETTERS and word.isalpha()]
    if len(words) < 2:
        raise StudyError(f"{corpus.name} has too few words of {LEAST_LETTERS} letters to tell apart")
    records = []
    for num_classes in sorted({min(size, len(words)) for size in sizes}):
        train, choose, judge = misspellings(words[:num_classes], seed)
        for name in names:
            runs = {rate: _train(LOSSES[name], num_classes, train, rate, steps, seed) for rate in RATES}
            best = min(RATES, key=lambda rate: error_rate(runs[rate], choose))
            records.append(
                {
                    "case": "classifiers",
                    "name": name,
                    "num_classes": num_classes,
                    "error": error_rate(runs[best], judge),
                    "top10_error": error_rate(runs[best], judge, min(10, num_classes)),
                    "learning_rate": best,
                    "steps": steps,
                    "judged_on": len(judge[1]),
                }
            )
    return records


class Classifier(nn.Module):
    """The pieces of a misspelt word added up, one hidden layer, and a score for every word."""

    def __init__(self, num_classes: int, loss: SphericalLoss | None) -> None:
        super().__init__()
        pieces = nn.EmbeddingBag(BUCKETS, WIDTH, mode="sum", padding_idx=0)
        self.encoder = nn.Sequential(pieces, nn.Linear(WIDTH, WIDTH), nn.ReLU())
        self.output = nn.Linear(WIDTH, num_classes)
        self.loss = loss  # None is the softmax's cross-entropy

    def forward(
        self,
        pieces: Tensor,  # (N, length)
        targets: Tensor,  # (N,)
    ) -> Tensor:  # ()
        """The training loss."""
        hidden = self.encoder(pieces)
        if self.loss is None:
            return F.cross_entropy(self.output(hidden), targets)
        return spherical_loss(hidden, self.output.weight, targets, self.output.bias, loss=self.loss)


def _train(
    loss: SphericalLoss | None, num_classes: int, train: Part, rate: float, steps: int, seed: int
) -> Classifier:
    torch.manual_seed(seed)
    model = Classifier(num_classes, loss)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    for _ in range(steps):
        rows = torch.randint(len(train[1]), (BATCH,))
        optimizer.zero_grad()
        model(train[0][rows], train[1][rows]).backward()
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def error_rate(model: Classifier, part: Part, k: int = 1) -> float:
    """The share of words that are not among the `k` best; 1 for scores that are no numbers."""
    ranking = model.output(model.encoder(part[0]))
    if isinstance(model.loss, NormalizedLoss):
        ranking = model.loss.log_prob(ranking)
    if not bool(ranking.isfinite().all()):
        return 1.0
    return 1 - float((ranking.topk(k).indices == part[1][:, None]).any(1).double().mean())


def misspellings(words: list[str], seed: int) -> tuple[Part, Part, Part]:
    """Different misspellings of each word: to train on, to choose the rate on, to judge on."""
    generator = random.Random(seed)
    train: list[tuple[str, int]] = []
    choose, judge = list(train), list(train)
    for label, word in enumerate(words):
        found = dict.fromkeys(misspelt(word, generator) for _ in range(4 * MISSPELT))
        pairs = [(wrong, label) for wrong in found if wrong != word][:MISSPELT]
        choose += pairs[:CHOOSE_ON]
        judge += pairs[CHOOSE_ON : CHOOSE_ON + JUDGE_ON]
        train += pairs[CHOOSE_ON + JUDGE_ON :]
    return _as_tensors(train), _as_tensors(choose), _as_tensors(judge)


def misspelt(word: str, generator: random.Random) -> str:
    """Two mistakes: a letter left out, doubled, exchanged with the next, or replaced."""
    for _ in range(2):
        i = generator.randrange(len(word))
        before, letter, after = word[:i], word[i], word[i + 1 :]
        replaced = generator.choice(string.ascii_lowercase)
        found = (before + after, before + 2 * letter + after, before + after[:1] + letter + after[1:])
        word = generator.choice((*found, before + replaced + after))
    return word


def _as_tensors(pairs: list[tuple[str, int]]) -> Part:
    """The letters of each word by twos and threes, as numbers of buckets, 0 for padding; and the labels."""
    rows = []
    for word, _ in pairs:
        marked = f"<{word}>"
        pieces = [marked[i : i + size] for size in (2, 3) for i in range(len(marked) - size + 1)]
        rows.append(torch.tensor([1 + crc32(piece.encode()) % (BUCKETS - 1) for piece in pieces]))
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([label for _, label in pairs])
