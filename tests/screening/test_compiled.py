"""Compiled queries against their plain twin: the same candidates, values, normalisers and certificates."""

import pytest
import torch

from lastlayer import Int4Preview, Int8Preview, ScreenedSoftmax, SoftCap, SVDPreview
from lastlayer.kernels import engine

pytestmark = pytest.mark.skipif(not engine.available(), reason="no compiled engine")


def head(num_classes, width=40, seed=7):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0.3, -1, width)
    weight = torch.randn(num_classes, width, generator=generator) * scale
    return weight, torch.randn(num_classes, generator=generator), torch.randn(30, width, generator=generator)


def plain(call, *arguments):
    with engine.forced(None):
        return call(*arguments)


def same(mine, theirs):
    torch.testing.assert_close(mine.log_prob, theirs.log_prob, rtol=1e-5, atol=1e-5)
    assert torch.equal(mine.indices, theirs.indices)
    assert torch.equal(mine.certified, theirs.certified)


def close(mine, theirs):
    """Rotated in float32 or in float64, a hidden state may round to whole numbers one apart: one part in 8,128."""
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-3)


PREVIEWS = {
    "float32": SVDPreview(9),
    "bfloat16": SVDPreview(9, storage="bfloat16"),
    "svd-int8": SVDPreview(9, storage="int8"),
    "int8": Int8Preview(),
    "int4": Int4Preview(),
    "int4-calibrated": Int4Preview(calibration=head(1)[2]),
}
every_preview = pytest.mark.parametrize("preview", PREVIEWS.values(), ids=PREVIEWS)


@pytest.mark.usefixtures("isa")
@every_preview
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("num_classes", "candidates"), [(63, 5), (1001, 3), (4003, 300)])
def test_topk_is_the_twins(preview, exact, num_classes, candidates):
    weight, bias, hidden = head(num_classes)
    layer = ScreenedSoftmax(weight, bias, preview=preview, candidates=candidates, exact=exact)
    for rows in (1, 2, 7):
        for part in hidden[:7].split(rows):
            same(layer.topk(part, min(3, candidates)), plain(layer.topk, part, min(3, candidates)))


@pytest.mark.usefixtures("isa")
@every_preview
@pytest.mark.parametrize("exact", [False, True])
def test_logits_and_scores_are_the_twins(preview, exact):
    weight, bias, hidden = head(3000)
    layer = ScreenedSoftmax(weight, bias, preview=preview, candidates=40, exact=exact)
    ids = torch.randint(3000, (30, 5), generator=torch.Generator().manual_seed(1))
    for rows in (1, 4, 30):
        for call in (layer, layer.log_prob, layer.preview_scores, lambda h: layer.score(h, ids[: len(h)])):
            close(call(hidden[:rows]), plain(call, hidden[:rows]))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("width", [1, 7, 64, 65, 129, 577])
@pytest.mark.parametrize("preview", [Int8Preview(), Int4Preview(), SVDPreview(1, storage="int8")], ids=repr)
def test_widths(width, preview):
    """Padded rows and chunks."""
    weight, bias, hidden = head(130, width)
    layer = ScreenedSoftmax(weight, bias, preview=preview, candidates=3, exact=True)
    mine, theirs = layer.preview_scores(hidden), plain(layer.preview_scores, hidden)
    close(mine, theirs)
    for rows in (1, 3):
        same(layer.topk(hidden[:rows], 3), plain(layer.topk, hidden[:rows], 3))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_sums_of_the_widest_rows_do_not_overflow(sign):
    """The largest whole numbers there are, all of one sign."""
    weight = torch.full((70, 8192), 3.0)
    weight[::2] *= -1
    layer = ScreenedSoftmax(weight, preview=Int8Preview(), candidates=2)
    hidden = torch.full((3, 8192), sign * 0.5)
    torch.testing.assert_close(layer.preview_scores(hidden), hidden @ weight.T, rtol=1e-3, atol=0)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("preview", [Int8Preview(), Int4Preview()], ids=["int8", "int4"])
def test_half_precision(dtype, rows, preview):
    weight, bias, hidden = (tensor.to(dtype) for tensor in head(1500))
    weight[3] *= 1e-6  # subnormal in float16
    layer = ScreenedSoftmax(weight, bias, preview=preview, candidates=20)
    for exact in (False, True):
        mine = layer.topk(hidden[:rows], 5, exact)
        assert layer._compiled is not None
        same(mine, plain(layer.topk, hidden[:rows], 5, exact))


@pytest.mark.parametrize("exact", [False, True])
def test_logit_map(exact):
    weight, bias, hidden = head(1500)
    settings = {"preview": Int8Preview(), "candidates": 20, "exact": exact}
    layer = ScreenedSoftmax(weight, bias, logit_map=SoftCap(3.0), **settings)
    for rows in (1, 4):
        calls = (lambda h: layer.topk(h, 5).log_prob, lambda h: layer.topk(h, 5).indices, layer, layer.log_prob)
        for call in calls:
            mine = call(hidden[:rows])
            assert layer._compiled is not None
            torch.testing.assert_close(mine, plain(call, hidden[:rows]), rtol=1e-5, atol=1e-5)


@every_preview
def test_several_threads(preview):
    weight, _, hidden = head(9000, 40)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        layer = ScreenedSoftmax(weight, preview=preview, candidates=2000, exact=True)
        for rows in (1, 3):
            mine, theirs = layer.topk(hidden[:rows], 4), plain(layer.topk, hidden[:rows], 4)
            same(mine, theirs)
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("isa")
@every_preview
def test_ties(preview):
    weight, _, hidden = head(900)
    weight[:] = weight[:3].repeat(300, 1)
    layer = ScreenedSoftmax(weight, preview=preview, candidates=7, exact=True)
    for row in (*hidden[:5], torch.zeros(40)):
        answer = layer.topk(row, 4)
        logits = weight @ row
        torch.testing.assert_close(logits[answer.indices], logits.topk(4).values)
        assert len(set(answer.indices.tolist())) == 4
        assert answer.certified


SCORES = {
    "normal": lambda classes: torch.randn(classes, generator=torch.Generator().manual_seed(0)),
    "sorted": lambda classes: SCORES["normal"](classes).sort().values,
    "ties": lambda classes: SCORES["normal"](classes).round(),
    "equal": lambda classes: torch.zeros(classes),
    "zero is the largest": lambda classes: -torch.arange(classes) * 1e-30,
    "few above": lambda classes: SCORES["normal"](classes) + 10 * (torch.arange(classes) % 16 == 0),
}


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize(("classes", "count"), [(70, 69), (3000, 5), (3000, 24), (3000, 200), (9000, 700)])
def test_the_best_of_any_scores(kind, classes, count):
    """Selection alone: one coordinate, whose logits are the scores."""
    scores = SCORES[kind](classes)
    layer = ScreenedSoftmax(scores[:, None], preview=Int8Preview(), candidates=count, exact=True)
    answer = layer.topk(torch.ones(1), count)
    torch.testing.assert_close(scores[answer.indices], scores.sort(descending=True).values[:count], rtol=0, atol=0)
    assert len(answer.indices.unique()) == count
    truth = scores.double().log_softmax(0)[answer.indices]
    torch.testing.assert_close(answer.log_prob.double(), truth, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("logit_map", [None, SoftCap(60.0)])
def test_normalizer_error_is_of_the_normalizer_in_use(logit_map):
    """Where preview scores tie, the plain form may have other candidates than the engine has."""
    generator = torch.Generator().manual_seed(0)
    excess = []
    for _ in range(60):
        weight = (10 * torch.randn(500, 3, generator=generator)).bfloat16()
        hidden = (3 * torch.randn(17, 3, generator=generator)).bfloat16()
        preview = SVDPreview(1, storage="bfloat16")
        layer = ScreenedSoftmax(weight, preview=preview, candidates=14, logit_map=logit_map)
        logits = hidden.double() @ weight.double().T
        true = (logits if logit_map is None else logit_map(logits)).log_softmax(-1)
        best = layer.topk(hidden, 1).indices
        off = (layer.log_prob(hidden).double() - true).gather(-1, best).abs().squeeze(-1)
        excess.append(float((off - layer.log_normalizer_error(hidden)).max()))
    assert max(excess) < 1e-4  # of rounding
