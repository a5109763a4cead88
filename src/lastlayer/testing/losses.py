"""The laws of the loss, its gradients and their precision."""

import copy
from typing import Any

import torch
from torch import Tensor
from torch.autograd import gradcheck

from lastlayer.layers.base import OutputLayer
from lastlayer.testing.cases import REDUCTIONS, ROWS, Function, LayerCase, assert_equal, rows_for
from lastlayer.testing.tracing import Call


def law_loss_is_likelihood(case: LayerCase) -> None:
    """4. The loss and all its gradients are the oracle's, for every reduction and a non-uniform upstream."""
    if not case.likelihood:
        return
    for reduction in REDUCTIONS:
        layer = case.build(reduction=reduction)
        hidden, targets = rows_for(layer, ignored=2)
        upstream = torch.linspace(-1.5, 2.0, ROWS, dtype=torch.float64) if reduction == "none" else 0.7
        results = []
        for loss_of in case.calls(layer, targets)["loss"]:
            layer.zero_grad()
            leaf = hidden.clone().requires_grad_()
            loss = loss_of(leaf)
            (loss * upstream).sum().backward()
            gradients = {
                name: torch.zeros_like(p) if p.grad is None else p.grad.to_dense().clone()
                for name, p in layer.named_parameters()
            }
            results.append({"loss": loss.detach(), "hidden": leaf.grad, **gradients})
        assert_equal(results[0], results[1])


def law_gradcheck(case: LayerCase) -> None:
    """6a. First derivatives of every differentiable call, by finite differences in float64."""
    for reduction in REDUCTIONS:
        layer = case.build(reduction=reduction)
        hidden, targets = rows_for(layer, 4, ignored=1)
        for name, (call, _) in case.calls(layer, targets).items():
            if name == "loss" or reduction == "none":
                _check_gradients(layer, hidden, call)


def _check_gradients(layer: OutputLayer, hidden: Tensor, call: Function) -> None:
    """`gradcheck` of `call(hidden)` in hidden and parameters, along random directions of both spaces."""
    names = [f"layer.{name}" for name, _ in layer.named_parameters()]

    def of_inputs(hidden: Tensor, *parameters: Tensor) -> Tensor:
        replaced = {name: _DenseGradient.apply(p) for name, p in zip(names, parameters, strict=True)}
        return torch.func.functional_call(Call(layer, call), replaced, (hidden,))  # pyright: ignore[reportArgumentType]

    inputs = [hidden.detach().requires_grad_(), *layer.parameters()]
    assert gradcheck(of_inputs, inputs, masked=False, fast_mode=True)


class _DenseGradient(torch.autograd.Function):
    """The identity; its gradient is dense, since `gradcheck` takes no sparse gradient of a dense input."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, *slope: Tensor) -> Tensor:
        return slope[0].to_dense()


def law_low_precision(case: LayerCase) -> None:
    """6b. In bfloat16, and under autocast, no further from float64 than plain PyTorch operations are."""
    for dtype in (torch.bfloat16, torch.float32):
        layer = case.build(dtype=dtype, reduction="sum")
        hidden, targets = rows_for(layer, 64)
        truth = case.oracle(copy.deepcopy(layer).double(), hidden.double())
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
        exact = copy.deepcopy(layer).double()
        hidden, targets = rows_for(layer)
        leaf = torch.full_like(hidden, size).requires_grad_()
        twin = leaf.detach().double().requires_grad_()
        tolerance = 1e-9 if dtype == torch.float64 else 1e-5
        oracles, losses = case.calls(exact, targets), {}
        for name, (call, _) in case.calls(layer, targets).items():
            ours, true = call(leaf), oracles[name][1](twin)
            assert _within(ours, true, 1.0, tolerance), f"large logits cost {name} its precision"
            losses[name] = ours, true
        if case.likelihood and dtype in (torch.float32, torch.float64):
            for loss in losses["loss"]:
                loss.backward()
            rounding = 32 * torch.finfo(dtype).eps
            for own, of_twin in [(leaf, twin), *zip(layer.parameters(), exact.parameters(), strict=True)]:
                if of_twin.grad is not None and own.grad is not None:
                    close = _within(own.grad.to_dense(), of_twin.grad, ROWS * size**2, rounding)
                    assert close, "large logits cost a gradient its precision"


def _within(actual: Tensor, expected: Tensor, scale: float, tolerance: float) -> bool:
    return bool(((actual.double() - expected).abs() <= tolerance * (scale + expected.abs())).all())
