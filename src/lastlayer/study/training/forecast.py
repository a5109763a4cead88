"""How long `compare` will take for one layer, from what each of its parts took once."""

from itertools import pairwise
from typing import NamedTuple

from lastlayer.study.training.trainer import CURVE_AT, CURVE_TOKENS, SAVE_EVERY, Budget


class Rehearsal(NamedTuple):
    """Seconds of each part, measured."""

    build: float  # the model
    step: float
    save: float  # a checkpoint
    evaluate: float  # a held-out token
    accuracy: float  # a held-out token whose best classes are queried
    measure: float  # the layer's own cost, beside the others


def forecast(
    rehearsal: Rehearsal,
    budget: Budget,
    held_out: int,  # tokens there are
    evaluated: int,  # tokens of the final perplexity, at most
    ranked: int,  # tokens of the final accuracy, at most
) -> float:
    """Seconds of the whole run: training, its curve, its checkpoints, the final evaluation, the measuring.

    Example:
        >>> forecast(Rehearsal(1.0, 0.1, 0.5, 1e-4, 1e-3, 3.0), Budget(seconds=60), 100_000, 30_000, 2_000)
        78.5
    """
    training = budget.seconds if budget.steps is None else budget.steps * rehearsal.step
    assert training is not None
    between = [training * (end - begin) for begin, end in pairwise((0.0, *CURVE_AT))]
    saves = len(CURVE_AT) + sum(int(gap // SAVE_EVERY) for gap in between) + 1
    curve = len(CURVE_AT) * min(CURVE_TOKENS, held_out)
    return (
        rehearsal.build
        + training
        + saves * rehearsal.save
        + (curve + min(evaluated, held_out)) * rehearsal.evaluate
        + min(ranked, held_out) * rehearsal.accuracy
        + rehearsal.measure
    )
