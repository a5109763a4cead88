"""The fused rows kernel is its plain twin: loss and gradient, both dtypes, hostile rows."""

import pytest
import torch

from lastlayer.functional import linear_cross_entropy
from lastlayer.kernels import softmax_rows
from lastlayer.kernels.softmax_rows import RowTerms, fused, plain

pytest.importorskip("numba")


def chunk_of(rows=9, classes=1003, scale=3.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    logits = (scale * torch.randn(rows, classes, generator=generator)).to(dtype)
    bias = torch.randn(classes, generator=generator)
    ids = torch.randint(classes, (rows,), generator=generator)
    ids[:2] = torch.tensor([0, classes - 1])[:rows]
    return logits, bias, RowTerms(ids, torch.rand(rows, generator=generator), None, None, None)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("with_square", [False, True])
@pytest.mark.parametrize("shape", [(9, 1003), (1, 7), (5, 1), (40, 64)])
def test_equals_plain(monkeypatch, shape, with_square, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    logits, bias, terms = chunk_of(*shape)
    if with_square:
        terms = terms._replace(square=torch.linspace(0, 0.1, shape[0]))
    exact = logits.double() + bias.double()
    expected = plain(exact, terms.scaled(torch.ones(shape[0], dtype=torch.float64)), True)
    kept = logits.clone()
    loss = fused(logits, bias, terms, False)[0]
    assert torch.equal(logits, kept), "rows changed though no gradient was asked for"
    torch.testing.assert_close(loss, expected.float(), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(fused(logits, bias, terms, True)[0], loss, rtol=0, atol=0)
    torch.testing.assert_close(logits, exact.float(), rtol=2e-6, atol=2e-7)


def test_bfloat16_is_rounded_once():
    logits, bias, terms = chunk_of(dtype=torch.bfloat16)
    exact = logits.float() + bias
    expected = plain(exact, terms, True)
    loss = fused(logits, bias, terms, True)[0]
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(logits, exact.bfloat16(), rtol=2**-7, atol=1e-7)  # one unit in the last place
    assert (logits == exact.bfloat16()).float().mean() > 0.999


def test_hostile_rows():
    """Ruled-out classes get exactly nothing; nan stays nan; huge logits stay finite."""
    logits, bias, terms = chunk_of(rows=4)
    bias[5] = float("-inf")
    logits[1] *= 1e30
    logits[2, 7] = float("nan")
    logits[3] -= 1e4
    loss = fused(logits, bias, terms, True)[0]
    assert loss.isfinite().tolist() == [True, True, False, True]
    assert logits[2].isnan().all()
    assert not logits[[0, 1, 3], 5].any()
    torch.testing.assert_close(logits[[0, 1, 3]].sum(1), torch.zeros(3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_layer_is_the_same_either_way(monkeypatch, autocast, z_loss):
    generator = torch.Generator().manual_seed(6)
    leaves = [torch.randn(*shape, generator=generator).requires_grad_() for shape in ((40, 16), (500, 16), (500,))]
    targets = torch.randint(500, (40,), generator=generator)
    targets[3] = -100
    answers = []
    for least in (1, 1 << 40):
        monkeypatch.setattr(softmax_rows, "LEAST_LOGITS", least)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = linear_cross_entropy(leaves[0], leaves[1], targets, bias=leaves[2], z_loss=z_loss)
        answers.append([loss, *torch.autograd.grad(loss, leaves)])
    tolerance = 1e-2 if autocast else 1e-5
    torch.testing.assert_close(*answers, rtol=tolerance, atol=tolerance / 20)


def test_says_when_it_serves(monkeypatch):
    cpu = torch.device("cpu")
    assert softmax_rows.can_fuse(cpu, torch.float32, 1 << 30)
    assert softmax_rows.can_fuse(cpu, torch.bfloat16, 1 << 30)
    assert not softmax_rows.can_fuse(cpu, torch.float32, 1000), "too small to be worth a start"
    assert not softmax_rows.can_fuse(cpu, torch.float64, 1 << 30)
    assert not softmax_rows.can_fuse(torch.device("cuda"), torch.float32, 1 << 30)
    monkeypatch.setattr(softmax_rows, "numba_is_there", lambda: False)
    assert not softmax_rows.can_fuse(cpu, torch.float32, 1 << 30)
