"""The fused kernels against their plain twin: the same candidates, values, normalisers and certificates."""

import subprocess
import sys

import pytest
import torch

from lastlayer import Int4Preview, Int8Preview, ScreenedSoftmax, SoftCap, SVDPreview
from lastlayer.screening import screened as module
from lastlayer.screening import summary
from lastlayer.screening.fused import FusedScreen

kernels = summary.kernels()
pytestmark = pytest.mark.skipif(kernels is None, reason="numba does not serve here")


def head(num_classes, width=40, seed=7):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0.3, -1, width)
    weight = torch.randn(num_classes, width, generator=generator) * scale
    return weight, torch.randn(num_classes, generator=generator), torch.randn(30, width, generator=generator)


def plain(layer, hidden, k, exact, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(layer, "_for_kernels", False)
        return layer.topk(hidden, k, exact)


PREVIEWS = {
    "float32": SVDPreview(9),
    "bfloat16": SVDPreview(9, storage="bfloat16"),
    "svd-int8": SVDPreview(9, storage="int8"),
    "int8": Int8Preview(),
    "int4": Int4Preview(),
    "int4-calibrated": Int4Preview(calibration=head(1)[2]),
}


@pytest.mark.parametrize("preview", PREVIEWS.values(), ids=PREVIEWS)
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    ("num_classes", "candidates"), [(1, 1), (63, 5), (64, 64), (1001, 3), (4003, 10), (4003, 1500)]
)
def test_fused_is_plain(preview, exact, num_classes, candidates, monkeypatch):
    weight, bias, hidden = head(num_classes)
    layer = ScreenedSoftmax(weight, bias, preview=preview, candidates=candidates)
    k = min(3, candidates)
    for rows in (1, 2, 5):
        for part in hidden.split(rows):
            mine, theirs = layer.topk(part, k, exact), plain(layer, part, k, exact, monkeypatch)
            torch.testing.assert_close(mine.log_prob, theirs.log_prob, rtol=1e-5, atol=1e-5)
            assert torch.equal(mine.indices, theirs.indices)
            assert torch.equal(mine.certified, theirs.certified)


@pytest.mark.parametrize("preview", PREVIEWS.values(), ids=PREVIEWS)
@pytest.mark.parametrize("exact", [False, True])
def test_fused_logits_are_plain(preview, exact, monkeypatch):
    weight, bias, hidden = head(3000)
    layer = ScreenedSoftmax(weight, bias, preview=preview, candidates=40, exact=exact)
    for rows in (1, 4, 30):
        for call in (layer, layer.log_prob):
            mine = call(hidden[:rows])
            with monkeypatch.context() as patch:
                patch.setattr(layer, "_for_kernels", False)
                theirs = call(hidden[:rows])
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("preview", [Int8Preview(), Int4Preview()], ids=["int8", "int4"])
def test_fused_is_plain_for_half_precision(dtype, rows, preview, monkeypatch):
    weight, bias, hidden = (tensor.to(dtype) for tensor in head(1500))
    layer = ScreenedSoftmax(weight, bias, preview=preview, candidates=20)
    for exact in (False, True):
        mine, theirs = (
            layer.topk(hidden[:rows], 5, exact),
            plain(layer, hidden[:rows], 5, exact, monkeypatch),
        )
        assert isinstance(layer._for_kernels, FusedScreen)
        assert torch.equal(mine.indices, theirs.indices)
        assert torch.equal(mine.certified, theirs.certified)
        torch.testing.assert_close(mine.log_prob, theirs.log_prob, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("exact", [False, True])
def test_fused_is_plain_under_a_logit_map(exact, monkeypatch):
    weight, bias, hidden = head(1500)
    settings = {"preview": Int8Preview(), "candidates": 20, "exact": exact}
    layer = ScreenedSoftmax(weight, bias, logit_map=SoftCap(3.0), **settings)
    for rows in (1, 4):
        calls = (lambda h: layer.topk(h, 5).log_prob, lambda h: layer.topk(h, 5).indices, layer, layer.log_prob)
        for call in calls:
            mine = call(hidden[:rows])
            assert isinstance(layer._for_kernels, FusedScreen)
            with monkeypatch.context() as patch:
                patch.setattr(layer, "_for_kernels", False)
                torch.testing.assert_close(mine, call(hidden[:rows]), rtol=1e-5, atol=1e-5)


def test_fused_without_bias_and_with_several_threads(monkeypatch):
    weight, _, hidden = head(9000, 70)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for preview in (preview for name, preview in PREVIEWS.items() if "calibrated" not in name):
            layer = ScreenedSoftmax(weight, preview=preview, candidates=2000, exact=True)
            mine = layer.topk(hidden[0], 4)
            theirs = plain(layer, hidden[0], 4, True, monkeypatch)
            assert torch.equal(mine.indices, theirs.indices)
            torch.testing.assert_close(mine.log_prob, theirs.log_prob, rtol=1e-5, atol=1e-5)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("preview", [Int8Preview(), Int4Preview()], ids=["int8", "int4"])
def test_without_vnni(preview, monkeypatch):
    weight, bias, hidden = head(3000)
    layer = ScreenedSoftmax(weight, bias, preview=preview, candidates=20)
    expected = layer.topk(hidden[0], 5)
    monkeypatch.setattr(kernels, "HAS_VNNI", False)
    answer = ScreenedSoftmax(weight, bias, preview=preview, candidates=20).topk(hidden[0], 5)
    assert torch.equal(answer.indices, expected.indices)
    torch.testing.assert_close(answer.log_prob, expected.log_prob)


def test_without_numba(monkeypatch):
    weight, bias, hidden = head(3000)
    layer = ScreenedSoftmax(weight, bias, preview=Int8Preview(), candidates=20, exact=True)
    monkeypatch.setattr(module, "serves", lambda weight: False)
    assert torch.equal(layer.topk(hidden[:4], 5).indices, (hidden[:4] @ weight.T + bias).topk(5).indices)


@pytest.mark.parametrize("preview", PREVIEWS.values(), ids=PREVIEWS)
def test_ties(preview, monkeypatch):
    weight, _, hidden = head(900)
    weight[:] = weight[:3].repeat(300, 1)
    layer = ScreenedSoftmax(weight, preview=preview, candidates=7, exact=True)
    for row in (*hidden[:5], torch.zeros(40)):
        answer = layer.topk(row, 4)
        logits = weight @ row
        torch.testing.assert_close(logits[answer.indices], logits.topk(4).values)
        assert len(set(answer.indices.tolist())) == 4
        assert answer.certified


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e38])
@pytest.mark.parametrize("preview", [Int8Preview(), Int4Preview()], ids=["int8", "int4"])
def test_hidden_states_that_the_kernels_do_not_take(bad, preview):
    weight, bias, hidden = head(900)
    hidden[0, 3] = bad
    layer = ScreenedSoftmax(weight, bias, preview=preview, candidates=7)
    answer = layer.topk(hidden[:2], 2)
    assert not answer.certified[0] or answer.log_prob[0].isfinite().all()
    good = layer.topk(hidden[1:2], 2)
    assert torch.equal(layer.topk(hidden[:1], 2).certified, answer.certified[:1])
    assert torch.equal(answer.indices[1:], good.indices)


def test_exponentials():
    """The kernels' own e^x: to a few units in the last place, 0 far down."""
    scores = -torch.rand(1, 640) * 80
    room = summary.Summary.of(scores)
    blocks = scores.view(10, 64).double()
    truth = (blocks - blocks.amax(-1, keepdim=True)).exp().sum(-1)
    torch.testing.assert_close(torch.from_numpy(room.block_sum[0]).double(), truth, rtol=1e-6, atol=0)
    assert torch.equal(torch.from_numpy(room.block_max[0]), scores.view(10, 64).amax(-1))


@pytest.mark.parametrize("logit_map", [None, SoftCap(60.0)])
def test_normalizer_error_is_of_the_normalizer_in_use(logit_map):
    """Where preview scores tie, the plain form may have other candidates than the kernels have."""
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


def test_where_numba_may_write_nowhere():
    """As in a container whose user owns no folder: numba refuses to decorate, and the plain form answers."""
    code = """
from numba.core.caching import CompileResultCacheImpl
CompileResultCacheImpl._locator_classes = []
import torch
from lastlayer import Int8Preview, ScreenedSoftmax
weight, hidden = torch.randn(500, 8), torch.randn(1, 8)
screen = ScreenedSoftmax(weight, preview=Int8Preview(), candidates=20, exact=True)
assert torch.equal(screen.topk(hidden, 3).indices, (hidden @ weight.T).topk(3).indices)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("NUMBA_CACHE_DIR") == 1
