"""The laws of the loss, its gradients and their precision."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import gradcheck

from lastlayer.functional.second_order import HandWritten
from lastlayer.layers.base import OutputLayer
from lastlayer.testing.cases import LayerCase
from lastlayer.testing.rows import ROWS, Call, assert_equal, rows_for


def law_loss_is_likelihood(case: LayerCase) -> None:
    """4. The loss and all its gradients are the oracle's, for every reduction and a non-uniform upstream."""
    if not case.likelihood:
        return
    for reduction in ("mean", "sum", "none"):
        layer = case.build(reduction=reduction)
        hidden, targets = rows_for(layer)
        targets[2] = layer.ignore_index
        upstream = torch.linspace(-1.5, 2.0, ROWS, dtype=torch.float64) if reduction == "none" else 0.7
        results = []
        for loss_of in (layer, lambda h, t, layer=layer: case.loss(layer, h, t)):
            layer.zero_grad()
            leaf = hidden.clone().requires_grad_()
            loss = loss_of(leaf, targets)
            (loss * upstream).sum().backward()
            gradients = {
                name: torch.zeros_like(p) if p.grad is None else p.grad.to_dense().clone()
                for name, p in layer.named_parameters()
            }
            results.append({"loss": loss.detach(), "hidden": leaf.grad, **gradients})
        assert_equal(results[0], results[1])


def law_gradcheck(case: LayerCase) -> None:
    """6a. First derivatives of every differentiable call, by finite differences in float64."""
    for reduction in ("mean", "sum", "none"):
        layer = case.build(reduction=reduction)
        hidden, targets = rows_for(layer, 4)
        targets[1] = layer.ignore_index
        if case.likelihood:
            _check_gradients(layer, hidden, lambda layer, h, t=targets: layer(h, t))
    targets = targets.clamp(min=0)
    _check_gradients(layer, hidden, lambda layer, h: layer.target_log_prob(h, targets))
    _check_gradients(layer, hidden, lambda layer, h: layer.log_prob(h))
    _check_gradients(layer, hidden, lambda layer, h: layer.topk(h, 1).log_prob)
    best = layer.topk(hidden, 1).indices
    _check_gradients(layer, hidden, lambda layer, h: layer.score(h, torch.cat([best, targets[:, None]], 1)))
    if layer.num_classes > 1:
        _check_gradients(layer, hidden, lambda layer, h: layer.topk(h, 1, exclude=best).log_prob)


def _check_gradients(layer: OutputLayer, hidden: Tensor, call: Callable[[OutputLayer, Tensor], Tensor]) -> None:
    """`gradcheck` of `call(layer, hidden)` in hidden and parameters, whose gradients may be sparse."""
    names = [name for name, _ in layer.named_parameters()]
    caller = Call(layer, lambda hidden: call(layer, hidden))

    def of_inputs(hidden: Tensor, *parameters: Tensor) -> Tensor:
        dense = {f"layer.{n}": _DenseGradient.run(p) for n, p in zip(names, parameters, strict=True)}
        return torch.func.functional_call(caller, dense, (hidden,))  # pyright: ignore[reportArgumentType]

    assert gradcheck(of_inputs, [hidden.detach().requires_grad_(), *layer.parameters()], masked=False)


class _DenseGradient(HandWritten):
    """The identity; its gradient is dense, since `gradcheck` takes no sparse gradient of a dense input."""

    @staticmethod
    def forward(parameter: Tensor) -> Tensor:
        return parameter.view_as(parameter)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Nothing is saved."""

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        return upstream[0].to_dense()


def law_low_precision(case: LayerCase) -> None:
    """6b. In bfloat16, and under autocast, no further from float64 than plain PyTorch operations are."""
    for dtype in (torch.bfloat16, torch.float32):
        layer = case.build(dtype=dtype, reduction="sum")
        hidden, targets = rows_for(layer, 64)
        exact = copy.deepcopy(layer).double()
        truth = case.oracle(exact, hidden.double())
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
            plain = case.oracle(layer, hidden)
            ours = layer.log_prob(hidden)
            loss = layer(hidden, targets)
            target = layer.target_log_prob(hidden, targets)
        assert ours.dtype == loss.dtype == target.dtype == torch.float32
        allowed = 1.2 * _rms(plain.double() - truth) + 1e-6
        assert _rms(ours.double() - truth) <= allowed, "less accurate than plain PyTorch in this dtype"
        picked = truth.gather(-1, targets[:, None])[:, 0]
        assert _rms(target.double() - picked) <= 2 * allowed, "target_log_prob is less accurate than log_prob"


def _rms(error: Tensor) -> float:
    return float(error.detach().square().mean().sqrt())


# Of hidden states and parameters: their logits, d times the square, are exact in the dtype, and so large that the
# steps between its numbers (in half precision: those of float32) are far above the tolerance.
COMMON = {torch.float16: 8.0, torch.bfloat16: 4096.0, torch.float32: 4096.0, torch.float64: 2.0**20}


def law_large_common_logits(case: LayerCase) -> None:
    """6c. A large number that all logits share costs no precision, in any call or gradient."""
    for dtype, size in COMMON.items():
        layer = case.build(dtype=dtype, reduction="sum")
        case.fill(layer, size)
        hidden, targets = rows_for(layer)
        hidden = torch.full_like(hidden, size)
        exact = copy.deepcopy(layer).double()
        log_prob = case.oracle(exact, hidden.double())
        tolerance = 1e-9 if dtype == torch.float64 else 1e-5

        def close(
            name: str, actual: Tensor, expected: Tensor, scale: float = 1.0, tolerance: float = tolerance
        ) -> None:
            allowed = tolerance * (scale + expected.abs())
            assert ((actual.double() - expected).abs() <= allowed).all(), f"large logits cost {name} its precision"

        at_targets = log_prob.gather(-1, targets[:, None])
        close("log_prob", layer.log_prob(hidden), log_prob)
        close("target_log_prob", layer.target_log_prob(hidden, targets), at_targets[:, 0])
        close("score", layer.score(hidden, targets[:, None]), at_targets)
        best = layer.topk(hidden, layer.num_classes)
        close("topk", best.log_prob, log_prob.gather(-1, best.indices))
        if not case.likelihood:
            continue
        leaf, twin = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
        loss, true_loss = layer(leaf, targets), case.loss(exact, twin, targets)
        close("the loss", loss, true_loss)
        if dtype in (torch.float32, torch.float64):
            loss.backward()
            true_loss.backward()
            rounding = 32 * torch.finfo(dtype).eps
            for ours, true in [(leaf, twin), *zip(layer.parameters(), exact.parameters(), strict=True)]:
                if true.grad is not None and ours.grad is not None:
                    close("a gradient", ours.grad.to_dense(), true.grad, ROWS * size**2, rounding)
