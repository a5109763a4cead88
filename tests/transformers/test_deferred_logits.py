"""Deferred logits: every operation gives what it gives on the real ones; some without computing them."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lastlayer.transformers.deferred_logits import CHUNK_LOGITS, DeferredLogits, defer
from lastlayer.transformers.heads import LinearHead

V, D = 11, 4
INDEX = torch.tensor([1, 0])
MASK = torch.tensor([[True, False, True], [False, True, True]])

RECORDED = {
    "view": lambda x: x.view(-1, V),
    "view, unknown last": lambda x: x.view(6, -1),
    "view, tuple": lambda x: x.view((3, 2, V)),
    "reshape": lambda x: torch.reshape(x, (1, -1, x.size(-1))),
    "flatten": lambda x: x.flatten(0, 1),
    "shift": lambda x: x[..., :-1, :].contiguous(),
    "row": lambda x: x[0],
    "one row": lambda x: x[0, 1],
    "last": lambda x: x[:, -1],
    "new dimension": lambda x: x[:, None],
    "new dimension after": lambda x: x[..., None, :],
    "strided": lambda x: x[:, ::2, :],
    "ids": lambda x: x[INDEX],
    "ids of both": lambda x: x[INDEX, INDEX],
    "mask": lambda x: x[MASK],
    "shift, mask": lambda x: x[..., :-1, :][MASK[:, 1:]],
    "scale": lambda x: 0.5 * x * 3,
    "divide": lambda x: x / 7.0,
    "by name": lambda x: x.mul(other=2.0),
    "cap": lambda x: torch.tanh(x / 3.0) * 3.0,
    "cap and scale": lambda x: torch.tanh(x.mul(2).div(3.0)).mul(5.0) * 0.3,
    "vector": lambda x: x + torch.linspace(-1, 1, V),
    "vector before": lambda x: torch.linspace(-1, 1, V)[None] + x / 3,
    "vectors": lambda x: ((x + torch.ones(V)) * 2 + torch.linspace(0, 1, V)) * 0.7,
    "vector and cap": lambda x: (x + torch.linspace(-1, 1, V)).tanh(),
    "double": lambda x: x.double(),
    "to": lambda x: x.to(torch.float64).to("cpu"),
    "detach": lambda x: x.detach(),
    "float": lambda x: x.float(),
}
OTHER = {
    "negative scale": lambda x: -1.0 * x,
    "zero": lambda x: x * 0,
    "tanh twice": lambda x: x.tanh().tanh(),
    "vector after cap": lambda x: x.tanh() + torch.linspace(-1, 1, V),
    "half": lambda x: x.bfloat16().float(),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "rounded": lambda x: torch.div(x, 3.0, rounding_mode="floor"),
    "twice a vector": lambda x: torch.add(x, torch.ones(V), alpha=2.0),
    "bits": lambda x: x.detach().view(dtype=torch.int32),
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: F.log_softmax(x, dim=-1),
    "sum": lambda x: x.sum(),
    "transpose": lambda x: x.transpose(1, 2),
    "classes": lambda x: x[..., :3],
    "class": lambda x: x[:, :, 2],
    "classes by ids": lambda x: x[:, :, INDEX],
    "last dimension": lambda x: x[..., None],
    "merged": lambda x: x.flatten(1),
    "odd view": lambda x: x.view(V, -1),
    "number": lambda x: x + 1.5,
    "matrix": lambda x: x + torch.ones(3, V),
    "tensor scale": lambda x: x * torch.tensor(2.0),
    "of two": lambda x: x * x,
    "cat": lambda x: torch.cat([x, x], 1),
    "stack": lambda x: torch.stack((x, torch.zeros(x.shape))),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "minus": lambda x: 1 - x,
    "gather": lambda x: x.gather(-1, torch.zeros(2, 3, 1, dtype=torch.int64)),
    "iteration": lambda x: torch.stack([part.logsumexp(-1) for part in x]),
    "clone": lambda x: x.clone(),
    "new": lambda x: x.new_zeros(2),
    "like": lambda x: torch.ones_like(x),
}
QUERIES = {
    "argmax": lambda x: x.argmax(-1),
    "argmax, kept": lambda x: torch.argmax(x, dim=-1, keepdim=True),
    "argmax of columns": lambda x: x.argmax(1),
    "argmax of all": lambda x: x.argmax(),
    "topk": lambda x: x.topk(3),
    "topk, smallest": lambda x: torch.topk(x, 2, 2, largest=False),
    "topk of columns": lambda x: x.topk(2, dim=1),
    "max": lambda x: x.max(-1),
    "max of all": lambda x: x.max(),
    "max, kept": lambda x: torch.max(x, dim=-1, keepdim=True),
    "logsumexp": lambda x: x.logsumexp(-1),
}


def real_and_deferred(bias=True, dtype=torch.float32):
    """The same logits, computed and not, of parameters of their own."""
    torch.manual_seed(0)
    pairs = []
    leaves = [torch.randn(2, 3, D), torch.randn(V, D), torch.randn(V)]
    for make in (F.linear, lambda h, w, b: defer(LinearHead(w, b), h)):
        own = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        pairs.append((make(own[0], own[1], own[2] if bias else None), own))
    return pairs


def gradients(loss, leaves):
    return torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", RECORDED)
def test_the_loss_after(name, bias):
    """Loss and gradients, without the logits; then the logits themselves."""
    operation = RECORDED[name]
    (real, leaves), (deferred, own) = real_and_deferred(bias)
    real, after = operation(real), operation(deferred)
    assert isinstance(after, DeferredLogits)
    assert (after.shape, after.dtype, after.requires_grad) == (real.shape, real.dtype, real.requires_grad)
    if real.dim() == 3:
        real, after = real.flatten(0, 1), after.flatten(0, 1)
    if real.dim() <= 2:
        targets = torch.arange(real.shape[:-1].numel()).reshape(real.shape[:-1]) * 3 % V
        weights = torch.rand(V, dtype=real.dtype)
        for options in ({}, {"reduction": "sum", "ignore_index": 3}, {"weight": weights, "label_smoothing": 0.1}):
            expected, loss = F.cross_entropy(real, targets, **options), F.cross_entropy(after, targets, **options)
            torch.testing.assert_close(loss, expected, check_dtype=True)
            assert after.computed is None
            if real.requires_grad:
                pairs = zip(gradients(loss, own[: 2 + bias]), gradients(expected, leaves[: 2 + bias]), strict=True)
                for actual, wanted in pairs:
                    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(after.materialize(), real)


@pytest.mark.parametrize("name", [*OTHER, *QUERIES])
@pytest.mark.parametrize("gradient", [True, False])
def test_every_other_operation(name, gradient):
    """The very same numbers and gradients, with an ordinary tensor as result."""
    operation = {**OTHER, **QUERIES}[name]
    (real, leaves), (deferred, own) = real_and_deferred()
    with torch.set_grad_enabled(gradient):
        expected, actual = operation(real), operation(deferred)
    assert type(actual) is type(expected)
    pairs = [(actual, expected)] if isinstance(expected, Tensor) else list(zip(actual, expected, strict=True))
    for ours, theirs in pairs:
        assert type(ours) is Tensor
        assert torch.equal(ours, theirs)
        assert ours.requires_grad == theirs.requires_grad
        if theirs.requires_grad:
            torch.testing.assert_close(gradients(ours.sum(), own), gradients(theirs.sum(), leaves))
    rows = name in QUERIES and "columns" not in name and "all" not in name
    if rows and (not gradient or name.startswith("argmax")):
        assert deferred.computed is None


def test_queries_run_over_chunks(monkeypatch):
    monkeypatch.setattr("lastlayer.transformers.deferred_logits.CHUNK_LOGITS", 2 * V)
    (real, _), (deferred, _) = real_and_deferred()
    seen, compute = [], type(deferred.recorded).compute
    monkeypatch.setattr(
        type(deferred.recorded), "compute", lambda self: (seen.append(self.hidden.shape), compute(self))[1]
    )
    with torch.no_grad():
        assert torch.equal((deferred / 3).topk(2).indices, real.topk(2).indices)
    assert seen == [(2, D)] * 3
    assert CHUNK_LOGITS > V


def test_metadata_computes_nothing():
    (real, _), (deferred, _) = real_and_deferred()
    for read in (
        *(lambda x, n=n: getattr(x, n) for n in ("shape", "ndim", "dtype", "device", "layout", "is_cuda")),
        *(lambda x, n=n: getattr(x, n)() for n in ("size", "dim", "numel", "is_floating_point")),
        lambda x: x.size(-1),
        len,
        lambda x: x.requires_grad,
    ):
        assert read(deferred) == read(real)
    assert repr(deferred).startswith("DeferredLogits(shape=(2, 3, 11)")
    assert deferred.computed is None


def test_in_place():
    """On logits that nothing else views, as on real ones; else refused, with nothing changed."""
    (real, _), (deferred, _) = real_and_deferred()
    real[..., :3] = -100.0
    deferred[..., :3] = -100.0
    deferred *= 2.0
    deferred.add_(1.0)
    assert torch.equal(deferred, real * 2.0 + 1.0)
    (real, _), (deferred, _) = real_and_deferred()
    view = deferred.view(-1, V)
    for logits in (view, deferred):
        with pytest.raises(TypeError, match=r"cannot be changed in place.*materialize"):
            logits[..., 0] = 0.0
        with pytest.raises(TypeError, match="cannot be changed in place"):
            logits.mul_(2.0)
    assert torch.equal(view, real.view(-1, V))


def test_computed_once_with_the_gradients_of_its_time():
    """What is first read without gradients has them afterwards."""
    (real, leaves), (deferred, own) = real_and_deferred()
    with torch.no_grad():
        assert not deferred.softmax(-1).requires_grad
    assert deferred.materialize() is deferred.materialize()
    torch.testing.assert_close(gradients(deferred.sin().sum(), own), gradients(real.sin().sum(), leaves))
    with torch.no_grad():
        _, (without, _) = real_and_deferred()
    assert not F.cross_entropy(without.view(-1, V), torch.zeros(6, dtype=torch.int64)).requires_grad
    assert not without.softmax(-1).requires_grad


def test_a_head_that_was_changed():
    _, (deferred, own) = real_and_deferred()
    with torch.no_grad():
        own[1].mul_(2.0)
    for use in (lambda: deferred.sum(), lambda: F.cross_entropy(deferred.view(-1, V), torch.zeros(6).long())):
        with pytest.raises(RuntimeError, match=r"head's parameters were changed.*materialize\(\)"):
            use()


def test_autocast_of_the_time():
    """Logits made under autocast are bfloat16 ones, also when they are used after it."""
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(6, D), torch.randn(V, D), torch.arange(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        real, deferred = F.linear(hidden, weight), defer(LinearHead(weight, None), hidden)
        assert F.cross_entropy(deferred, targets).dtype == F.cross_entropy(real, targets).dtype == torch.float32
    assert deferred.dtype == real.dtype == torch.bfloat16
    torch.testing.assert_close(F.cross_entropy(deferred.float(), targets), F.cross_entropy(real.float(), targets))
    assert F.cross_entropy(deferred, targets).dtype == F.cross_entropy(real, targets).dtype == torch.bfloat16
    assert deferred.computed is None
    assert torch.equal(deferred.materialize(), real)


def test_targets_that_are_probabilities():
    (real, _), (deferred, _) = real_and_deferred()
    soft = torch.rand(6, V).softmax(-1)
    expected = F.cross_entropy(real.view(-1, V), soft)
    torch.testing.assert_close(F.cross_entropy(deferred.view(-1, V), soft), expected)
    assert deferred.computed is None
    soft.requires_grad_()
    torch.testing.assert_close(
        gradients(F.cross_entropy(deferred.view(-1, V), soft), [soft]),
        gradients(F.cross_entropy(real.view(-1, V), soft), [soft]),
    )


def test_classes_in_another_dimension():
    """`(N, C, T)`: the second dimension has the classes."""
    (real, _), (deferred, _) = real_and_deferred()
    targets = torch.zeros(2, V, dtype=torch.int64)
    torch.testing.assert_close(F.cross_entropy(deferred, targets), F.cross_entropy(real, targets))
    targets = torch.zeros(2, 3, dtype=torch.int64)
    torch.testing.assert_close(
        F.cross_entropy(deferred.transpose(1, 2), targets), F.cross_entropy(real.transpose(1, 2), targets)
    )


def test_copied_and_saved():
    with torch.no_grad():
        (real, _), (deferred, _) = real_and_deferred()
    buffer = io.BytesIO()
    torch.save({"logits": deferred}, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=True)["logits"], real)
    assert torch.equal(copy.deepcopy(deferred), real)
    assert torch.equal(torch.from_numpy(deferred.numpy()), real)
    assert deferred.tolist() == real.tolist()
