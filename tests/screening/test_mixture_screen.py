"""A screened mixture: certificates never lie, `exact` finds the full mixture's classes, bounds hold."""

import copy
import pickle

import pytest
import torch

from lastlayer import (
    PLIF,
    FullSoftmax,
    Int4Preview,
    Int8Preview,
    MixtureOfSoftmaxes,
    ScreenedSoftmax,
    Sigsoftmax,
    SVDPreview,
)
from lastlayer.screening import ScreenedMixture
from lastlayer.screening.exact import full_logits
from lastlayer.screening.mixture_screen import _not_worse

DOUBLE = torch.float64
WIDTH, LATENT, CLASSES, COMPONENTS = 12, 10, 900, 3


def mixture(dtype=DOUBLE, **options):
    """One whose components disagree and whose logits are far apart."""
    torch.manual_seed(7)
    layer = MixtureOfSoftmaxes(WIDTH, CLASSES, COMPONENTS, latent_features=LATENT, **options)
    with torch.no_grad():
        layer.weight.mul_(8)
        layer.latent.weight.mul_(4)
        if layer.bias is not None:
            layer.bias.normal_()
        (layer.prior.weight if layer.prior is not None else layer.prior_logits).normal_()
    return layer.to(dtype)


def hidden_of(rows=6, dtype=DOUBLE):
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(3), dtype=DOUBLE).to(dtype)


LAYERS = {
    "plain": {},
    "sigsoftmax": {"logit_map": Sigsoftmax},
    "plif": {"logit_map": lambda: PLIF(50, 20.0, init_std=1.0)},
    "no-context": {"context_prior": False, "bias": False},
}
PREVIEWS = {
    "int8": Int8Preview(),
    "int4": Int4Preview(),
    "window": SVDPreview(6),
    "most": SVDPreview(9),
}
every_layer = pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS.keys())
every_preview = pytest.mark.parametrize("preview", PREVIEWS.values(), ids=PREVIEWS.keys())


def made(options, dtype=DOUBLE):
    options = {name: value() if name == "logit_map" else value for name, value in options.items()}
    return mixture(dtype, **options)


@every_layer
@every_preview
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
def test_certificates_and_exact(options, preview, dtype):
    layer, hidden = made(options, dtype), hidden_of(40, dtype)
    full = layer.topk(hidden, 5)
    screened = ScreenedSoftmax.from_layer(layer, preview=preview, candidates=20)
    answer = screened.topk(hidden, 5)
    right = (answer.indices == full.indices).all(-1)
    assert right[answer.certified].all(), "a certificate lies"

    exact = screened.topk(hidden, 5, exact=True)
    assert exact.certified.all()
    assert torch.equal(exact.indices, full.indices)
    wrong = (answer.log_prob - layer.log_prob(hidden).gather(-1, answer.indices)).abs()
    assert (wrong <= screened.log_normalizer_error(hidden)[:, None] + 1e-5).all()


def test_int8_proves_most():
    """In one pass over the preview, with few candidates; fewer of them prove less."""
    layer, hidden = mixture(), hidden_of(40)
    shares = [
        ScreenedSoftmax.from_layer(layer, preview=Int8Preview(), candidates=candidates)
        .topk(hidden, 3)
        .certified.double()
        .mean()
        for candidates in (3, 20)
    ]
    assert shares[0] < shares[1]
    assert shares[1] > 0.9


def test_widening_is_of_few_classes(monkeypatch):
    """Some open rows are settled by rescoring what is in play, not by the full mixture."""
    layer, hidden = mixture(), hidden_of(60)
    with torch.no_grad():
        layer.weight.div_(4)
    screened = ScreenedSoftmax.from_layer(layer, preview=Int8Preview(), candidates=3)
    open_rows = int((~screened.topk(hidden, 3).certified).sum())
    dense = []
    full = type(screened)._full
    monkeypatch.setattr(type(screened), "_full", lambda self, *a: (dense.append(1), full(self, *a))[1])
    screened.topk(hidden, 3, exact=True)
    assert open_rows > 10
    assert len(dense) <= 0.75 * open_rows


@every_preview
def test_log_prob_is_normalised_and_bounded(preview):
    layer, hidden = mixture(), hidden_of()
    screened = ScreenedSoftmax.from_layer(layer, preview=preview, candidates=30)
    log_prob = screened.log_prob(hidden)
    torch.testing.assert_close(log_prob.exp().sum(-1), torch.ones(6, dtype=DOUBLE))
    torch.testing.assert_close(screened(hidden), log_prob)
    best = screened.topk(hidden, 4)
    torch.testing.assert_close(log_prob.gather(-1, best.indices), best.log_prob)
    wrong = (best.log_prob - layer.log_prob(hidden).gather(-1, best.indices)).abs().amax(-1)
    assert (wrong <= screened.log_normalizer_error(hidden)).all()
    assert screened.preview_scores(hidden).shape == (6, CLASSES)
    assert screened.sample(hidden, 3).shape == (6, 3)


def test_exact_forward_has_the_argmax():
    layer, hidden = mixture(), hidden_of(30)
    screened = ScreenedSoftmax.from_layer(layer, preview=SVDPreview(4), candidates=10, exact=True)
    assert torch.equal(screened(hidden).argmax(-1), layer.log_prob(hidden).argmax(-1))


@pytest.mark.parametrize("settings", [{"candidates": CLASSES}, {"candidates": 30, "preview": SVDPreview(LATENT)}])
def test_is_the_full_mixture(settings):
    """With every class a candidate, or a window as wide as the latents; its gradients too."""
    layer, hidden = mixture(), hidden_of().requires_grad_()
    screened = ScreenedSoftmax.from_layer(layer, **{"preview": Int8Preview()} | settings)
    torch.testing.assert_close(screened.topk(hidden, 7)[:2], tuple(layer.topk(hidden, 7)))
    leaves = [hidden, *layer.parameters()]
    upstream = torch.randn(6, CLASSES, dtype=DOUBLE)
    answers = [
        (log_prob, *torch.autograd.grad(log_prob, leaves, upstream))
        for log_prob in (screened.log_prob(hidden), layer.log_prob(hidden))
    ]
    torch.testing.assert_close(*answers)


def test_one_component_is_the_plain_screen():
    torch.manual_seed(1)
    layer = MixtureOfSoftmaxes(WIDTH, CLASSES, 1, latent_features=LATENT, dtype=DOUBLE)
    full = FullSoftmax(LATENT, CLASSES, dtype=DOUBLE)
    full.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    settings = {"preview": SVDPreview(6), "candidates": 40}
    one, plain = (ScreenedSoftmax.from_layer(each, **settings) for each in (layer, full))
    hidden = hidden_of()
    torch.testing.assert_close(one.topk(hidden, 5), plain.topk(layer.latents(hidden)[:, 0], 5))


def test_order_needs_normalizers_only_where_components_disagree():
    """Two classes: one best in both components is certain; one best in only one of them is not, until they are."""
    low, high = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    agree = torch.tensor([[[0.2], [0.1]]]), torch.tensor([[[0.1], [0.0]]])
    differ = torch.tensor([[[0.5], [0.0]]]), torch.tensor([[[0.0], [0.4]]])
    assert bool(_not_worse(*agree, low, high))
    assert not bool(_not_worse(*differ, low, high))
    assert bool(_not_worse(*differ, low, low)), "known normalisers decide"
    assert not bool(_not_worse(*reversed(differ), low, low))
    assert bool(_not_worse(agree[0], agree[0], low, high)), "a tie counts as settled"


def test_bounds_hold():
    """True logits within the error, true normalisers between low and high."""
    layer, hidden = mixture(), hidden_of()
    screened = ScreenedSoftmax.from_layer(layer, preview=Int8Preview(), candidates=20)
    with torch.no_grad():
        mixed, _ = screened._mixed(hidden, screened._query(3, False, None), "screen")
        exact = full_logits(layer.latents(hidden).flatten(0, 1), layer.weight, layer.bias).view_as(mixed.logits)
        assert ((exact - mixed.logits).abs() <= mixed.error + 1e-12).all()
        assert (mixed.error[~mixed.rescored[:, None].expand_as(mixed.error)] > 0).all()
        used, low, high = screened._normalizers(mixed)
        true = (exact - mixed.peak[..., None]).logsumexp(-1)
    assert (low <= true).all()
    assert (true <= high).all()
    assert (low <= used).all()
    assert (used <= high).all()


@pytest.mark.parametrize("shape", [(0, WIDTH), (WIDTH,), (2, 3, WIDTH)])
def test_shapes(shape):
    layer = mixture(torch.float32)
    screened = ScreenedSoftmax.from_layer(layer, preview=Int8Preview(), candidates=20)
    hidden = torch.randn(shape)
    answer = screened.topk(hidden, 4)
    assert answer.indices.shape == (*shape[:-1], 4)
    assert answer.certified.shape == shape[:-1]
    assert screened.log_prob(hidden).shape == (*shape[:-1], CLASSES)


def test_state():
    """Stale after a change; copies are screens of their own; half precision."""
    layer, hidden = mixture(), hidden_of()
    screened = ScreenedSoftmax.from_layer(layer, preview=Int8Preview(), candidates=20)
    assert screened.weight is layer.weight
    assert screened.bytes_read < layer.weight.numel() * 8
    for twin in (copy.deepcopy(screened), pickle.loads(pickle.dumps(screened))):
        assert twin.layer.weight is twin.weight
        torch.testing.assert_close(twin.topk(hidden, 3), screened.topk(hidden, 3))
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="refresh"):
        screened.topk(hidden, 3)
    screened.refresh()
    assert torch.equal(screened.topk(hidden, 3, exact=True).indices, layer.topk(hidden, 3).indices)
    half = mixture(torch.bfloat16)
    screened = ScreenedSoftmax.from_layer(half, preview=Int8Preview(), candidates=20)
    assert screened.topk(hidden_of(dtype=torch.bfloat16), 3).log_prob.dtype == torch.float32


@pytest.mark.parametrize("name", PREVIEWS)
@every_layer
def test_round_trip(tmp_path, options, name):
    layer = made(options)
    screened = ScreenedSoftmax.from_layer(layer, preview=PREVIEWS[name], candidates=20, exact=True)
    screened.save(tmp_path)
    again = ScreenedMixture.load(tmp_path, layer)
    assert again.layer is layer
    assert again.weight is layer.weight
    assert again.exact
    for mine, theirs in zip(again.topk(hidden_of(), 3), screened.topk(hidden_of(), 3), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(again.log_prob(hidden_of()), screened.log_prob(hidden_of()))


def test_files_of_another_kind(tmp_path):
    """A mixture's screen is none of a matrix, nor the other way; a layer with another weight is refused."""
    layer, settings = mixture(), {"preview": SVDPreview(6), "candidates": 20}
    screened = ScreenedSoftmax.from_layer(layer, **settings)
    with pytest.raises(TypeError, match="save the layer's state_dict"):
        screened.save(tmp_path / "whole", include_weight=True)
    assert not (tmp_path / "whole").exists()
    screened.save(tmp_path)
    with pytest.raises(ValueError, match=r"holds a lastlayer screened mixture, which ScreenedMixture\.load"):
        ScreenedSoftmax.load(tmp_path, layer.weight, layer.bias)
    with pytest.raises(TypeError, match=r"layer must be a mixture .*, got FullSoftmax"):
        ScreenedMixture.load(tmp_path, FullSoftmax(WIDTH, CLASSES))
    other = mixture()
    with torch.no_grad():
        other.weight[0, 0] += 1
    with pytest.raises(ValueError, match="fingerprint differs"):
        ScreenedMixture.load(tmp_path, other)
    ScreenedSoftmax(layer.weight, layer.bias, **settings).save(tmp_path / "matrix")
    with pytest.raises(ValueError, match=r"holds a lastlayer screen, which ScreenedSoftmax\.load"):
        ScreenedMixture.load(tmp_path / "matrix", layer)


@pytest.mark.parametrize("which", ["screen.json", "screen.safetensors"])
@pytest.mark.parametrize(
    "damage", [lambda content: content[:-9], lambda content: content[:40] + b"#" + content[41:]]
)
def test_damaged_files(tmp_path, which, damage):
    layer = mixture()
    preview = SVDPreview(6, calibration=torch.randn(50, LATENT))
    ScreenedSoftmax.from_layer(layer, preview=preview, candidates=20).save(tmp_path)
    (tmp_path / which).write_bytes(damage((tmp_path / which).read_bytes()))
    with pytest.raises(ValueError, match="screen"):
        ScreenedMixture.load(tmp_path, layer)


def test_bad_input():
    layer = mixture()
    with pytest.raises(ValueError, match="candidates"):
        ScreenedSoftmax.from_layer(layer, preview=Int8Preview(), candidates=0)
    screened = ScreenedSoftmax.from_layer(layer, preview=Int8Preview(), candidates=20)
    with pytest.raises(ValueError, match="k must"):
        screened.topk(hidden_of(), 21)
    with pytest.raises(ValueError, match="hidden"):
        screened.topk(torch.randn(2, LATENT, dtype=DOUBLE), 3)
    hidden = hidden_of()
    hidden[0, 0] = float("nan")
    assert screened.topk(hidden, 3).certified.tolist() == [False, *[True] * 5]
