"""The screening kernels one by one, each against what PyTorch makes of the same numbers."""

import numpy as np
import pytest
import torch

from lastlayer import Int8Preview, ScreenedSoftmax
from lastlayer.screening.quantised import Int8Rows, split_in_two
from lastlayer.screening.summary import BLOCK, Summary, kernels

run = kernels()
pytestmark = pytest.mark.skipif(run is None, reason="numba does not serve here")
needs_amx = pytest.mark.skipif(run is None or not run.HAS_AMX, reason="the processor has no AMX")
needs_vnni = pytest.mark.skipif(run is None or not run.HAS_VNNI, reason="the processor has no VNNI")
CLASSES = [1, 15, 63, 64, 65, 97, 1024, 1025, 2500]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def summary_of(scores):  # (N, V) -> maxima and sums of blocks, in float64
    blocks = torch.nn.functional.pad(scores.double(), (0, -scores.shape[1] % BLOCK), value=-torch.inf)
    blocks = blocks.unflatten(-1, (-1, BLOCK))
    most = blocks.amax(-1, keepdim=True)
    sums = (blocks - most.nan_to_num(neginf=0.0)).exp().sum(-1)
    return most[..., 0].float().numpy(), sums.numpy()


def assert_summarised(summary):
    most, sums = summary_of(torch.from_numpy(summary.scores))
    np.testing.assert_array_equal(summary.block_max, most)
    np.testing.assert_allclose(summary.block_sum, sums, rtol=2e-6)


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("rows", [1, 3])
def test_summarise(classes, rows):
    scores = 30 * normal(rows, classes)
    scores[:, ::7] = -torch.inf
    scores[:, : BLOCK if classes > BLOCK else 0] = -torch.inf  # a block of which nothing is left
    assert_summarised(Summary.of(scores))


def poisoned(rows, classes):
    room = Summary.empty(rows, classes)
    for array in room:
        array.fill(np.nan)
    return room


@needs_amx
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize(
    ("rows", "width", "workers"), [(1, 7, 1), (2, 64, 2), (16, 65, 1), (17, 129, 2), (40, 200, 3)]
)
def test_scan_of_many_hidden_states(classes, rows, width, workers):
    weight, bias, hidden = normal(classes, width), normal(classes, seed=1), normal(rows, width, seed=2)
    hidden[-1] = 0
    stored, room, of_rows = Int8Rows(weight, torch.float32), poisoned(rows, classes), np.empty((rows, 2))
    given = hidden.numpy(), stored.stored.numpy(), stored.scale.numpy(), bias.numpy(), BLOCK, of_rows
    run.scan_int8_rows(workers, *given, *room)
    torch.testing.assert_close(torch.from_numpy(room.scores), stored.scores(hidden, bias), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(of_rows), stored.of_rows(hidden))
    assert_summarised(room)


@needs_vnni
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize(("width", "workers"), [(7, 1), (64, 2), (129, 3)])
def test_scan_of_one_hidden_state(classes, width, workers):
    from lastlayer.kernels.screening.scan import scan_int8

    weight, bias, hidden = normal(classes, width), normal(classes, seed=1), normal(1, width, seed=2)
    stored, room, parts = Int8Rows(weight, torch.float32), poisoned(1, classes), split_in_two(hidden)
    vectors = np.zeros((2, stored.stored.shape[1]), dtype=np.int8)
    vectors[:, :width] = torch.cat(parts[:2])
    steps = (np.float32(step.item()) for step in (parts.step_high, parts.step_low))
    scan_int8(
        stored.stored.numpy(), stored.scale.numpy(), bias.numpy(), *vectors, *steps, BLOCK, workers, *room.row()
    )
    torch.testing.assert_close(torch.from_numpy(room.scores), stored.scores(hidden, bias), rtol=1e-5, atol=1e-5)
    assert_summarised(room)


@needs_amx
@pytest.mark.parametrize("exact", [False, True])
def test_batches_without_amx(exact, monkeypatch):
    weight, bias, hidden = normal(3001, 70), normal(3001, seed=1), normal(19, 70, seed=2)
    layer = ScreenedSoftmax(weight, bias, preview=Int8Preview(), candidates=20, exact=exact)
    mine, _ = layer.topk(hidden, 5), monkeypatch.setattr(run, "HAS_AMX", False)
    theirs = layer.topk(hidden, 5)
    torch.testing.assert_close(mine.log_prob, theirs.log_prob)
    assert torch.equal(mine.indices, theirs.indices)
    assert torch.equal(mine.certified, theirs.certified)


def misleading(classes):
    """Every 16th score, which is what a sample sees, is larger than the others."""
    scores = normal(classes)
    scores[::16] += 10
    return scores


SCORES = {
    "normal": normal,
    "sorted": lambda classes: normal(classes).sort().values,
    "ties": lambda classes: normal(classes).round(),
    "equal": lambda classes: torch.zeros(classes),
    "misleading": misleading,
}


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize(
    ("classes", "count"), [(1, 1), (70, 70), (3000, 5), (3000, 23), (3000, 24), (9000, 700), (9000, 9000)]
)
def test_choose(kind, classes, count):
    from lastlayer.kernels.screening.choose import choose

    scores = SCORES[kind](classes)
    summary = Summary.of(scores[None])
    chosen = torch.from_numpy(choose(scores.numpy(), summary.block_max[0], BLOCK, count)).long()
    assert len(chosen) == len(chosen.unique()) == count
    torch.testing.assert_close(
        scores[chosen].sort().values, scores.topk(count).values.sort().values, rtol=0, atol=0
    )


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("count", [1, 3, 14, 15])
def test_the_best_where_the_largest_score_is_zero(scale, count):
    """A threshold is looked for from the largest block maximum downwards, in steps that must not be 0."""
    from lastlayer.kernels.screening.choose import choose

    scores = -np.arange(15, dtype=np.float32) * np.float32(scale)
    chosen = choose(scores, np.zeros(1, dtype=np.float32), 64, count)
    assert sorted(chosen.tolist()) == list(range(count))
