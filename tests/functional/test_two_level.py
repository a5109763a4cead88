"""Two levels by compiled loops, by one call for a small batch, by PyTorch's operations: all agree."""

import pytest
import torch

from lastlayer.functional import softmaxes, two_level
from lastlayer.functional.two_level import TwoLevel, two_level_log_prob

WAYS = {
    "small": {},
    "loops": {"SMALL_WORK": 0},
    "both": {"SMALL_WORK": 0, "MANY_ROWS": 2, "LEAST_WORK": 0},
    "products": {"SMALL_WORK": 0, "MANY_ROWS": 0, "LEAST_WORK": 0},
    "plain": {"numba": False},
}
SIZES = torch.tensor([5, 1, 9, 2, 7])


def run(way, monkeypatch, dtype=torch.float64, rows=23, bias=True, sparse=False, frozen=(), threads=1):
    """The log-probabilities and all gradients, by one way."""
    options = dict(WAYS[way])
    monkeypatch.setattr(softmaxes, "_numba_is_there", lambda: options.get("numba", True))
    monkeypatch.setattr(two_level, "SMALL_WORK", options.get("SMALL_WORK", two_level.SMALL_WORK))
    for name in ("MANY_ROWS", "LEAST_WORK"):
        monkeypatch.setattr(softmaxes, name, options.get(name, getattr(softmaxes, name)))
    generator = torch.Generator().manual_seed(5)

    def leaf(name, *shape):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        return values.requires_grad_(name not in frozen)

    leaves = {
        "hidden": leaf("hidden", rows, 6),
        "head_weight": leaf("head_weight", 5, 6),
        "head_bias": leaf("head_bias", 5) if bias else None,
        "weight": leaf("weight", 24, 6),
        "bias": leaf("bias", 24) if bias else None,
    }
    offsets = torch.nn.functional.pad(SIZES.cumsum(0), (1, 0))
    slots = torch.randint(24, (rows,), generator=generator)
    clusters = torch.bucketize(slots, offsets, right=True) - 1
    hidden, *parameters = leaves.values()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        log_prob = two_level_log_prob(hidden, TwoLevel(*parameters), clusters, slots, offsets, sparse=sparse)
        (log_prob * torch.linspace(-1, 2, rows, dtype=dtype)).sum().backward()
    finally:
        torch.set_num_threads(before)
    gradients = {n: None if t is None or t.grad is None else t.grad.to_dense() for n, t in leaves.items()}
    return {"log_prob": log_prob.detach(), **gradients}


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 23, 60])
def test_ways_agree(rows, bias, sparse, monkeypatch):
    expected = run("plain", monkeypatch, rows=rows, bias=bias, sparse=sparse)
    for way in WAYS:
        actual = run(way, monkeypatch, rows=rows, bias=bias, sparse=sparse)
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11, msg=lambda m, way=way: f"{way}: {m}")


def test_ways_agree_in_single_precision(monkeypatch):
    exact = run("plain", monkeypatch)
    for way in WAYS:
        actual = run(way, monkeypatch, dtype=torch.float32)
        for name, value in exact.items():
            torch.testing.assert_close(actual[name].double(), value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_threads_share_the_groups(way, monkeypatch):
    monkeypatch.setattr("lastlayer.kernels.grouped.WORTH_A_THREAD", 1)
    expected = run(way, monkeypatch)
    torch.testing.assert_close(run(way, monkeypatch, threads=3), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("frozen", [["hidden"], ["weight"], ["weight", "bias"], ["head_weight"], ["bias"]])
def test_frozen_tensors_get_no_gradient(way, frozen, monkeypatch):
    expected = run("plain", monkeypatch, sparse=True)
    actual = run(way, monkeypatch, sparse=True, frozen=frozen)
    for name, value in actual.items():
        if name in frozen:
            assert value is None
        else:
            torch.testing.assert_close(value, expected[name], rtol=1e-11, atol=1e-11)
