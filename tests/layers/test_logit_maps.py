"""Each logit map: its formula, derivative, inverse, gradients, hostile logits, and its compiled kernel."""

import math

import pytest
import torch
import torch.nn.functional as F

from lastlayer import PLIF, FullSoftmax, MonotoneNetwork, Sigsoftmax, SoftCap
from lastlayer.kernels import engine
from lastlayer.layers import monotone_network

DOUBLE = torch.float64


def plif(num_knots=9, bound=2.0, std=1.0):
    torch.manual_seed(4)
    return PLIF(num_knots, bound, init_std=std).double()


def network(hidden_units=5):
    torch.manual_seed(4)
    made = MonotoneNetwork(hidden_units).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return made


MAPS = {"sigsoftmax": Sigsoftmax, "plif": plif, "network": network, "soft-cap": lambda: SoftCap(3.0)}
every_map = pytest.mark.parametrize("make", MAPS.values(), ids=MAPS.keys())


@every_map
def test_gradients(make):
    """In the logits and every parameter; `derivative` and `vjp` agree with autograd."""
    logit_map = make()
    x = torch.linspace(-3.1, 3.3, 40, dtype=DOUBLE).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: logit_map(x), (x, *logit_map.parameters()))
    (slope,) = torch.autograd.grad(logit_map(x).sum(), x)
    torch.testing.assert_close(logit_map.derivative(x), slope, rtol=1e-12, atol=1e-12)
    upstream = torch.linspace(-1, 2, 40, dtype=DOUBLE)
    gradients = torch.autograd.grad(logit_map(x), (x, *logit_map.parameters()), upstream)
    of_x, of_parameters = logit_map.vjp(x.detach(), upstream)
    torch.testing.assert_close((of_x, *of_parameters), gradients, rtol=1e-12, atol=1e-12)


@every_map
def test_increases(make):
    x = torch.linspace(-30, 30, 2001, dtype=DOUBLE)
    logit_map = make()
    rise = logit_map(x).diff()
    assert (rise >= 0).all()
    if not isinstance(logit_map, SoftCap):
        assert (rise > 0).all()


@every_map
def test_hostile_logits(make):
    """Infinities stay what they are in the limit, nan stays nan, nothing crashes; no logits is no values."""
    logit_map = make().float()
    values = logit_map(torch.tensor([float("-inf"), -1e30, 1e30, float("inf"), float("nan")]))
    assert values[4].isnan()
    assert not values[:4].isnan().any()
    assert values[0] <= values[1] < values[2] <= values[3]
    assert logit_map(torch.empty(3, 0)).shape == (3, 0)
    of_x, parts = logit_map.vjp(torch.empty(0), torch.empty(0))
    assert of_x.shape == (0,)
    assert all(not part.any() for part in parts)


@pytest.mark.parametrize("make", [Sigsoftmax, plif, lambda: SoftCap(40.0)])
def test_inverse(make):
    x = torch.linspace(-60, 60, 241, dtype=DOUBLE)
    logit_map = make()
    torch.testing.assert_close(logit_map.inverse(logit_map(x)), x, rtol=1e-9, atol=1e-9)


def test_sigsoftmax_forms_agree():
    """`softmax(z + log sigmoid z) = softmax(2z - softplus z)`, and GSS(0, 2)."""
    z = torch.linspace(-40, 40, 41, dtype=DOUBLE)
    ours = Sigsoftmax()(z)
    other = 2 * z - torch.logaddexp(z, torch.zeros_like(z))
    torch.testing.assert_close(ours.log_softmax(0), other.log_softmax(0), rtol=1e-12, atol=1e-12)
    weights = z.exp() * torch.sigmoid(z)
    torch.testing.assert_close(ours.softmax(0), weights / weights.sum(), rtol=1e-12, atol=1e-300)
    assert Sigsoftmax()(torch.tensor(-1e4)) == -2e4
    torch.testing.assert_close(Sigsoftmax().inverse(torch.tensor([-4e4, 4e4])), torch.tensor([-2e4, 4e4]))


def gathered(x, raw, bound):
    """PLIF as the papers' code has it."""
    slopes = F.softplus(raw + math.log(math.e - 1))
    width = 2 * bound / len(raw)
    knot = ((x + bound) / width).floor().clamp(0, len(raw) - 1).long()
    before = slopes.cumsum(0) - slopes
    return slopes[knot] * (x - (knot.double() * width - bound)) + width * before[knot]


@pytest.mark.parametrize("num_knots", [1, 7, 50, 1000])
def test_plif_is_the_gather_form(num_knots):
    logit_map = plif(num_knots, 3.0)
    x = (2 * torch.randn(400, dtype=DOUBLE)).requires_grad_()
    upstream = torch.randn(400, dtype=DOUBLE)
    answers = [
        (values, *torch.autograd.grad(values, (x, logit_map.raw_slopes), upstream))
        for values in (logit_map(x), gathered(x, logit_map.raw_slopes, 3.0))
    ]
    torch.testing.assert_close(*answers, rtol=1e-12, atol=1e-12)


def test_plif_shape():
    """Zero at the left bound, continuous at knots, going on with its end slopes; one-sided slopes at a knot."""
    logit_map = plif()
    width, slopes = 4.0 / 9, logit_map.slopes.detach()
    at = lambda *x: logit_map(torch.tensor(x, dtype=DOUBLE)).detach()  # noqa: E731
    torch.testing.assert_close(at(-2.0), torch.zeros(1, dtype=DOUBLE))
    knots = torch.arange(10, dtype=DOUBLE) * width - 2
    tiny = 1e-9
    left, here, right = (at(*(knots + shift).tolist()) for shift in (-tiny, 0, tiny))
    torch.testing.assert_close(here - left, tiny * torch.cat([slopes[:1], slopes]), rtol=1e-5, atol=1e-15)
    torch.testing.assert_close(right - here, tiny * torch.cat([slopes, slopes[-1:]]), rtol=1e-5, atol=1e-15)
    ends = at(-102.0, -2.0, 2.0, 102.0).diff()[[0, 2]] / 100
    torch.testing.assert_close(ends, slopes[[0, -1]])


def test_plif_starts_as_the_softmax():
    hidden, targets = torch.randn(6, 4, dtype=DOUBLE), torch.randint(30, (6,))
    mapped = FullSoftmax(4, 30, logit_map=PLIF(100), dtype=DOUBLE)
    plain = FullSoftmax(4, 30, dtype=DOUBLE)
    plain.load_state_dict({name: p for name, p in mapped.state_dict().items() if "." not in name})
    torch.testing.assert_close(mapped.log_prob(hidden), plain.log_prob(hidden), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mapped(hidden, targets), plain(hidden, targets))


def test_plif_is_accurate_in_float32():
    torch.manual_seed(0)
    logit_map = PLIF(100_000, 20.0, init_std=1.0)
    x = 8 * torch.randn(100_000)
    exact = logit_map.double()(x.double())
    assert (logit_map.float()(x).double() - exact).abs().max() < 5e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_plif_finds_its_segments_in_half_precision(dtype):
    """Half precision does not count to 100,000: it rounds a segment's number to one that is none."""
    torch.manual_seed(0)
    logit_map = PLIF(100_000, 20.0, init_std=1.0)
    x = torch.cat([8 * torch.randn(1000), torch.tensor([-25.0, -20.0, 20.0, 25.0])]).to(dtype)
    exact = logit_map.double()(x.double())
    found = logit_map.to(dtype)(x)
    assert found.dtype == dtype
    assert (found.double() - exact).abs().max() < 4 * torch.finfo(dtype).eps * exact.abs().max()


def test_flat_slope():
    """A slope that underflows is flat, not negative; its gradients are finite."""
    logit_map = PLIF(4, 1.0).double()
    with torch.no_grad():
        logit_map.raw_slopes[1] = -1000.0
    x = torch.linspace(-1.93, 1.87, 20, dtype=DOUBLE).requires_grad_()
    assert (logit_map(x).diff() >= 0).all()
    assert torch.autograd.gradcheck(lambda x, *_: logit_map(x), (x, logit_map.raw_slopes))


def test_frozen_plif_gets_no_gradient():
    layer = FullSoftmax(4, 30, logit_map=PLIF(10, init_std=1.0, frozen=True))
    layer(torch.randn(5, 4), torch.randint(30, (5,))).backward()
    assert layer.logit_map.raw_slopes.grad is None
    assert "raw_slopes" in dict(layer.logit_map.named_parameters())
    assert layer.weight.grad.any()


def test_network_by_blocks(monkeypatch):
    """Blocks of logits answer as all at once, and as the formula."""
    made, x = network(), torch.randn(7, 9, dtype=DOUBLE)
    whole, of_whole = made(x), made.vjp(x, x)
    monkeypatch.setattr(monotone_network, "BLOCK_NUMBERS", 4 * 5)
    torch.testing.assert_close(made(x), whole)
    torch.testing.assert_close(made.vjp(x, x), of_whole)
    unit = torch.sigmoid(F.softplus(made.raw_rates) * x[..., None] + made.shifts)
    formula = F.softplus(made.raw_slope) * x + (F.softplus(made.raw_heights) * unit).sum(-1)
    torch.testing.assert_close(whole, formula)


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: PLIF(0), "num_knots"),
        (lambda: PLIF(-3), "num_knots"),
        (lambda: PLIF(10, 0.0), "bound"),
        (lambda: PLIF(10, -1.0), "bound"),
        (lambda: PLIF(10, float("nan")), "bound"),
        (lambda: PLIF(10, init_std=-1.0), "init_std"),
        (lambda: MonotoneNetwork(0), "hidden_units"),
        (lambda: SoftCap(0.0), "cap"),
        (lambda: SoftCap(float("inf")), "cap"),
        (lambda: SoftCap(float("nan")), "cap"),
    ],
)
def test_bad_sizes(make, argument):
    with pytest.raises(ValueError, match=argument):
        make()


def wavy(logit_map):
    """Slopes that differ, but not from knot to knot, where float32 may fall on either side."""
    with torch.no_grad():
        logit_map.raw_slopes.copy_(torch.sin(torch.linspace(0, 60, logit_map.num_knots)))
    return logit_map


KERNELS = {
    "sigsoftmax": Sigsoftmax,
    "soft-cap": lambda: SoftCap(3.0),
    "plif": lambda: PLIF(7, 2.0, init_std=1.0),
    "plif-many": lambda: wavy(PLIF(100_000, 20.0)),
    "plif-frozen": lambda: PLIF(7, 2.0, init_std=1.0, frozen=True),
}


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("shift", [0.0, -300.0, 300.0], ids=["", "all-low", "all-high"])
@pytest.mark.parametrize("make", KERNELS.values(), ids=KERNELS.keys())
def test_compiled_kernel_is_the_plain_one(isa, make, shift, z_loss):
    """Loss and every gradient, also where all logits are so low or high that a sigmoid is 0 or 1."""
    torch.manual_seed(3)
    layer = FullSoftmax(16, 301, logit_map=make(), z_loss=z_loss)
    if shift and isinstance(layer.logit_map, SoftCap):
        pytest.skip("saturated: no gradient is left")
    with torch.no_grad():
        layer.weight.mul_(4)
        layer.bias.add_(shift)
    hidden, targets = torch.randn(40, 16), torch.randint(301, (40,))
    answers = []
    for dtype in (torch.float32, DOUBLE):
        layer.to(dtype).zero_grad()
        leaf = hidden.detach().clone().to(dtype).requires_grad_()
        loss = layer(leaf, targets)
        loss.backward()
        assert (layer(leaf.detach(), targets) - loss).abs() < 1e-5
        gradients = {name: p.grad.float().clone() for name, p in layer.named_parameters() if p.grad is not None}
        answers.append({"loss": loss.detach().float(), "hidden": leaf.grad.float().clone(), **gradients})
    # The logits themselves are rounded: by 2e-5 where they are 300.
    tolerance = 1e-3 if shift else 2e-5
    torch.testing.assert_close(*answers, rtol=tolerance, atol=tolerance * 0.1)


@pytest.mark.parametrize("make", KERNELS.values(), ids=KERNELS.keys())
def test_compiled_kernel_in_bfloat16(isa, make):
    torch.manual_seed(3)
    layer, hidden, targets = FullSoftmax(16, 301, logit_map=make()), torch.randn(40, 16), torch.randint(301, (40,))
    answers = []
    for kind in (isa, None):
        layer.zero_grad()
        with engine.forced(kind), torch.autocast("cpu", dtype=torch.bfloat16):
            loss = layer(hidden, targets)
        loss.backward()
        answers.append([loss.detach(), *(p.grad.clone() for p in layer.parameters() if p.grad is not None)])
    torch.testing.assert_close(*answers, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(
    "make", [Sigsoftmax, lambda: SoftCap(2.0), lambda: PLIF(6, 2.0), lambda: MonotoneNetwork(3)]
)
def test_second_derivatives(make):
    logit_map = make().double()
    logits = torch.linspace(-1.9, 1.7, 12, dtype=torch.float64).view(3, 4).requires_grad_()
    parameters = dict(logit_map.named_parameters())

    def mapped(logits, *values):
        return torch.func.functional_call(logit_map, dict(zip(parameters, values, strict=True)), (logits,))

    assert torch.autograd.gradgradcheck(mapped, (logits, *parameters.values()))
