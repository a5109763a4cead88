"""FactoredOutput over many steps against plain SGD in float64: the error stays that of rounding, for any input.

Hidden states that do not span the space are the hard ones: an error of the weight outside their span is never seen
by the loss.
"""

from itertools import cycle

import pytest
import torch

from lastlayer import FactoredOutput, FactoredSGD, SquaredError

TOLERANCE = {torch.float32: 5e-5, torch.float64: 1e-10}
STEPS = {torch.float32: 1000, torch.float64: 500}
SHARES = (0.1, 0.3, 0.5, 0.8, 0.95)


def largest_rate(hidden):
    """The rate at which a step of the summed squared error is singular: 1 / (2 lambda_max(H^T H))."""
    return 0.5 / float(torch.linalg.matrix_norm(hidden, 2) ** 2)


def train(batches, rates, steps, d, v, dtype, seed=0):
    """The relative error of the weight, and the layer, after so many steps on batches in turn."""
    torch.manual_seed(seed)
    layer = FactoredOutput(d, v, loss=SquaredError(), reduction="sum", dtype=dtype)
    optimizer = FactoredSGD(layer, 0.0)
    weight = layer.weight.double()
    turn = cycle(batches)
    for step in range(steps):
        (hidden, targets), rate = next(turn), rates[step * len(rates) // steps]
        rate = rate(hidden) if callable(rate) else rate
        hidden = hidden.to(dtype)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        layer(hidden, targets).backward()
        optimizer.step()
        exact = hidden.double()
        errors = exact @ weight.T
        errors[torch.arange(len(targets)), targets] -= 1
        weight.addmm_(errors.T, exact, alpha=-2 * rate)
    return float((layer.weight.double() - weight).norm() / weight.norm()), layer


def make_batches(kind, d=8, v=30, rows=4):
    """Batches of hidden states in float64 and their targets."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden = {
        "fixed": lambda: [normal(rows, d)],
        "orthogonal": lambda: [torch.linalg.qr(normal(rows, d).T)[0].T.contiguous()],
        "cyclic": lambda: [normal(rows, d) for _ in range(3)],
        "low rank": lambda: [normal(rows, 2) @ basis for basis in [normal(2, d)] for _ in range(64)],
        "single row": lambda: [normal(1, d)],
        "full rank": lambda: [normal(2 * d, d) for _ in range(64)],
    }[kind]()
    return [(h, torch.randint(v, (len(h),), generator=generator)) for h in hidden]


def rates_of(batches, shares):
    """One rate for each share, by the batch that bears the least."""
    least = min(largest_rate(hidden) for hidden, _ in batches)
    return [share * least for share in shares]


@pytest.mark.parametrize("kind", ["fixed", "orthogonal", "cyclic", "low rank", "single row", "full rank"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_long_runs(kind, dtype):
    """Each share of the bound for a fifth of the steps."""
    batches = make_batches(kind)
    error, layer = train(batches, rates_of(batches, SHARES), STEPS[dtype], 8, 30, dtype)
    assert error < TOLERANCE[dtype]
    assert max(layer.consistency()[:3]) < TOLERANCE[dtype]


@pytest.mark.parametrize("share", [0.3, 0.95])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_and_features_of_any_number(share, dtype):
    """Wider layers, batches in which a class repeats, and both forms of the step."""
    for d, rows in ((24, 3), (24, 30), (24, 60)):
        batches = make_batches("cyclic", d, 200, rows)
        error, _ = train(batches, rates_of(batches, [share]), 60, d, 200, dtype)
        assert error < TOLERANCE[dtype] / 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [40, 100])
def test_one_orthogonal_batch_over_and_over(dtype, steps):
    """At a rate of 0.25 / lambda the factor of the old recursion for R was 2 a step."""
    torch.manual_seed(1)
    hidden = (torch.linalg.qr(torch.randn(16, 64).T)[0].T.contiguous() * 8).double()
    error, _ = train([(hidden, torch.arange(16))], [0.5 * largest_rate(hidden)], steps, 64, 1000, dtype)
    assert error < (2e-6 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize(("rows", "steps"), [(16, 150), (1, 400)])
def test_one_batch_of_a_wide_layer(rows, steps):
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(rows, 64, generator=generator, dtype=torch.float64)
    rates = [0.9 * largest_rate(hidden)]
    error, _ = train([(hidden, torch.arange(rows))], rates, steps, 64, 1000, torch.float32)
    assert error < 1e-5


def test_what_drifted_is_seen_and_renewed():
    """R is checked against the batch that uses it at every step, and `consistency` says what is there."""
    hidden, targets = make_batches("fixed")[0]
    errors = []
    for spoils in (False, True):
        torch.manual_seed(0)
        layer = FactoredOutput(8, 30, loss=SquaredError(), reduction="sum", dtype=torch.float64)
        optimizer = FactoredSGD(layer, 0.3 * largest_rate(hidden))
        for _ in range(3):
            optimizer.zero_grad()
            layer(hidden, targets).backward()
            if spoils:
                layer.state.inverse.add_(0.3 * hidden.sum(0))
                assert layer.consistency().inverse > 0.1
            optimizer.step()
            assert layer.consistency().inverse < 1e-12
        errors.append(layer.weight)
    torch.testing.assert_close(*errors, rtol=1e-12, atol=1e-13)
