"""Increasing functions of one logit, applied to every logit before the softmax."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from lastlayer.functional.ordinary import eager_on_cpu, ordinary
from lastlayer.functional.second_order import HandWritten, gradients
from lastlayer.kernels.softmax_rows import KernelMap

Result = TypeVar("Result")

GRID = 50.0  # a user's map is checked on [-GRID, GRID]


class GraphBuilder(Protocol):
    """An ONNX graph that is being written (`lastlayer.export.graph.Graph`)."""

    dtype: torch.dtype  # of logits

    def add(self, operator: str, *inputs: Any, **attributes: Any) -> str:
        """Adds a node, whose inputs are names, or tensors and numbers for constants; the name of its output."""
        ...


class LogitMap(nn.Module, ABC):
    """An increasing function `f` of one logit: the model is `P(c | h) ∝ exp(f(h · w_c + b_c))`.

    Because `f` is increasing, the best classes are those of the raw logits, so top-k and screening work
    unchanged. A softmax over mapped logits can have a log-probability matrix of a higher rank than `d + 2`.

    Write `forward`. Where the default is too slow, write `vjp` too (the chunked layers call it); `derivative`
    has a default by autograd; `inverse` is for maps that have one; `to_graph` for `lastlayer.export.to_onnx`.

    A map of your own is checked on a grid the first time that a layer takes it; one that decreases is refused.

    >>> import torch, lastlayer
    >>> class Cubic(lastlayer.LogitMap):
    ...     def forward(self, logits):
    ...         return logits + 0.01 * logits**3
    >>> layer = lastlayer.FullSoftmax(8, 100, logit_map=Cubic())
    >>> layer.log_prob(torch.randn(3, 8)).shape
    torch.Size([3, 100])
    """

    increases = False  # whether the check has passed

    @abstractmethod
    def forward(
        self,
        logits: Tensor,  # any shape
    ) -> Tensor:  # the same shape
        """`f(logits)`, elementwise, differentiable."""

    def evaluate(self, logits: Tensor) -> Tensor:
        """`forward` where no gradient is needed."""
        return self(logits)

    def plain(self, logits: Tensor) -> Tensor:
        """`forward` by PyTorch's own operations, for a map whose `forward` has a hand-written gradient."""
        return self(logits)

    def derivative(self, logits: Tensor) -> Tensor:
        """`f'(logits)`, elementwise; not differentiable itself."""
        return self.vjp(logits, torch.ones_like(logits))[0]

    def inverse(self, values: Tensor) -> Tensor:
        """The logits that `forward` maps to `values`."""
        raise NotImplementedError(f"{type(self).__name__} has no inverse()")

    def vjp(
        self,
        logits: Tensor,  # any shape
        gradient: Tensor,  # the same shape: the gradient of `f(logits)`
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """The gradients with respect to the logits, and to `self.parameters()` in their order."""
        parameters = tuple(self.parameters())
        wanted = [parameter for parameter in parameters if parameter.requires_grad]
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            found = torch.autograd.grad(self(leaf), [leaf, *wanted], gradient, materialize_grads=True)
        of_wanted = iter(found[1:])
        return found[0], tuple(next(of_wanted) if p.requires_grad else None for p in parameters)

    def reset_parameters(self) -> None:
        """Sets the parameters as in a new map."""
        if next(self.parameters(), None) is not None:
            raise NotImplementedError(f"{type(self).__name__} has parameters, but no reset_parameters()")

    def settings(self) -> dict[str, Any] | None:
        """The keyword arguments that rebuild this map, without its parameters; None for a user's map."""
        return None

    def to_graph(self, graph: GraphBuilder, logits: str) -> str:
        """Adds the nodes of `forward` to an ONNX graph: the name of `logits` to that of the result."""
        raise TypeError(f"logit_map must have to_graph() to be exported; {type(self).__name__} has no ONNX graph")

    def begin(self) -> "MapPass":
        """A pass over many logits while the parameters stay as they are."""
        return MapPass(self)

    def kernel_map(self) -> KernelMap | None:
        """The description of this map for fused kernels; None if there is no kernel for it."""
        return None


class MapPass:
    """A map over many logits, a part at a time, and the gradients of its parameters, summed over the parts.

    A map that has work to do once a pass, not once a part, overrides `LogitMap.begin` with its own.
    """

    def __init__(self, logit_map: LogitMap) -> None:
        self.logit_map = logit_map
        self.total: tuple[Tensor | None, ...] | None = None

    def values(self, logits: Tensor) -> Tensor:
        """`f(logits)`, always a new tensor."""
        values = self.logit_map.evaluate(logits)
        return values.clone() if values is logits else values

    def back(self, logits: Tensor, gradient: Tensor) -> Tensor:
        """The gradient with respect to the logits; the gradients of the parameters are accumulated."""
        of_logits, of_parameters = self.logit_map.vjp(logits, gradient)
        if self.total is None:
            self.total = of_parameters
        else:
            for total, part in zip(self.total, of_parameters, strict=True):
                if total is not None and part is not None:
                    total += part
        return of_logits

    def add_sums(self, sums: Tensor) -> None:
        """Adds the sums that a kernel accumulated for the parameters."""
        raise NotImplementedError(f"{type(self.logit_map).__name__} has no kernel that accumulates sums")

    def gradients(self) -> tuple[Tensor | None, ...]:
        """The gradients of the map's parameters over all parts."""
        if self.total is not None:
            return self.total
        return tuple(torch.zeros_like(p) if p.requires_grad else None for p in self.logit_map.parameters())


class MapFunction(HandWritten):
    """`logit_map.evaluate(logits)` with the gradient of `logit_map.vjp`."""

    @staticmethod
    def forward(logit_map: LogitMap, logits: Tensor, *parameters: Tensor) -> Tensor:
        return logit_map.evaluate(logits)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.logit_map, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        logit_map, (logits, *parameters) = ctx.logit_map, ctx.saved_tensors

        def form() -> tuple[Tensor | None, ...]:
            of_logits, of_parameters = bound(logit_map, parameters, lambda: logit_map.vjp(logits, upstream[0]))
            return of_logits, *of_parameters

        def twin(logits: Tensor, *parameters: Tensor) -> Tensor:
            return bound(logit_map, parameters, lambda: logit_map.plain(logits))

        return None, *gradients(form, twin, ctx.saved_tensors, upstream)


def apply_map(logit_map: LogitMap, logits: Tensor) -> Tensor:
    """`logit_map.evaluate(logits)` with the gradient of `logit_map.vjp`: autograd keeps no temporaries of it."""
    parameters = tuple(logit_map.parameters())
    if not ordinary(logits, *parameters):
        return logit_map.plain(logits)
    return MapFunction.run(logit_map, logits, *parameters)


def bound(logit_map: LogitMap | None, parameters: Sequence[Tensor], work: Callable[[], Result]) -> Result:
    """`work()` with `parameters` in place of the map's own.

    A backward pass needs those of the forward pass, which are no longer the map's own after `functional_call`.
    """
    own = () if logit_map is None else tuple(logit_map.parameters())
    if torch.compiler.is_compiling() or all(a is b for a, b in zip(own, parameters, strict=True)):
        return work()
    holder = _Holder(logit_map)
    names = [name for name, _ in holder.named_parameters()]
    return torch.func.functional_call(holder, dict(zip(names, parameters, strict=True)), (work,))


class _Holder(nn.Module):
    """A map whose parameters `functional_call` replaces while some work is done."""

    def __init__(self, logit_map: LogitMap | None) -> None:
        super().__init__()
        self.logit_map = logit_map

    def forward(self, work: Callable[[], Result]) -> Result:
        return work()


def in_blocks(size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Flat pieces of tensors of one shape, the last of them to be written: temporaries stay small and in cache.

    The tensors that are written must be contiguous.
    """
    if tensors[0].numel():
        yield from zip(*(tensor.reshape(-1).split(size) for tensor in tensors), strict=True)


def check_logit_map(logit_map: LogitMap | None) -> LogitMap | None:
    """`logit_map`, or an error unless it is a `LogitMap` that does not decrease on a grid (checked once)."""
    if logit_map is None:
        return None
    name = type(logit_map).__name__
    if not isinstance(logit_map, LogitMap):
        raise TypeError(f"logit_map must be a LogitMap (subclass lastlayer.LogitMap), got {name}")
    if logit_map.increases:
        return logit_map
    first = next(logit_map.parameters(), torch.empty(0, device="cpu"))
    if first.is_meta:  # has no values yet
        return logit_map
    with torch.no_grad():
        grid = torch.linspace(-GRID, GRID, 2001, dtype=torch.float64, device=first.device).to(first.dtype)
        values = logit_map(grid)
    if values.shape != grid.shape or not bool(values.isfinite().all()):
        raise ValueError(f"logit_map must be finite and elementwise; {name} is not on [{-GRID}, {GRID}]")
    # A map that saturates is flat up to rounding.
    least = -1e-6 * values.abs().max().clamp(min=1.0)
    falls = values.diff() < (least if values.dtype != torch.float64 else 1e-6 * least)
    if bool(falls.any()) or not bool(values[-1] > values[0]):
        at = float(grid[:-1][falls][0]) if bool(falls.any()) else -GRID
        raise ValueError(f"logit_map must be increasing, or top-k would be wrong; {name} is not, at {at:.3g}")
    logit_map.increases = True
    return logit_map


def barred_classes(bias: Tensor | None) -> Tensor | None:  # (V,) to (V,) bool
    """Which classes a bias of -inf bars: they have no probability, and nothing has a gradient through them.

    None where there are none, if that can be read without a synchronisation.
    """
    if bias is None:
        return None
    barred = bias.detach() == -torch.inf
    return barred if not eager_on_cpu(barred) or bool(barred.any()) else None


def map_barred(logit_map: Callable[[Tensor], Tensor], logits: Tensor, barred: Tensor | None) -> Tensor:
    """`logit_map(logits)`, but -inf at barred classes, whatever the map makes of it (a soft cap a finite number).

    The map sees 0 there, and so its derivative is finite where its gradient is 0.
    """
    if barred is None:
        return logit_map(logits)
    return logit_map(logits.masked_fill(barred, 0)).masked_fill(barred, -torch.inf)
