"""FactoredSGD: the optimizer of `FactoredOutput`."""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from numbers import Real
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lastlayer.functional.sent_bytes import count_sent
from lastlayer.layers.factored.conditioning import Stabilizer
from lastlayer.layers.factored.record import Gradient, Ledger
from lastlayer.layers.factored.state import FactoredState
from lastlayer.layers.factored.step import plan_step

if TYPE_CHECKING:
    from lastlayer.layers.factored.layer import FactoredOutput


@runtime_checkable
class Trained(Protocol):
    """What the optimizer needs of a `FactoredOutput`."""

    anchor: nn.Parameter
    state: FactoredState
    _ledger: Ledger
    _stabilizer: Stabilizer


class FactoredSGD(torch.optim.Optimizer):
    """Plain SGD on the weight of `FactoredOutput` layers, exact, at O(d^2) an example.

        W <- W - lr (min(1, max_norm / ||g||) g + weight_decay W),    g = dL/dW

    as `torch.optim.SGD` does after `clip_grad_norm_` on this weight alone. Train the rest of the model with any
    other optimizer.

    An ordinary `torch.optim.Optimizer` over one anchor parameter a layer, so learning-rate schedulers, param
    groups, gradient accumulation and `zero_grad` are as usual. Several backward passes before a step are one
    step of all their rows. What scales the anchor's gradient (`clip_grad_norm_` over the model, a loss scaler)
    scales the step; it is NaN where the gradient is not finite, so that `GradScaler` leaves the step out.

    What needs a state of the weight's size (momentum, Adam) cannot be exact in this form and is refused. Nor can
    clipping of single entries: `clip_grad_value_` finds no gradient of this weight, and has no effect on it.

    Args:
        layers: a `FactoredOutput`, several, or param groups `{"params": layers, "lr": ...}`.
        lr: the learning rate.
        weight_decay: coupled decay, of the bias too.
        max_norm: clips the norm of each layer's gradient, weight and bias together.
        process_group: processes that hold the same layers and step together, each on its own part of a batch, as
            in `DistributedDataParallel`: every step is that of all their rows, with the mean of their losses. All
            call `step` together; one that has no backward before it adds no rows. Hidden states and target
            gradients are gathered, O(N d). `torch.distributed.group.WORLD` for all. Of a layer that
            `lastlayer.distributed.shard` divided, the mesh says which processes step together; leave this None.

    Raises:
        TypeError: something that is not a `FactoredOutput`, or momentum and similar options.
        ValueError: no layer, or one twice; a negative number; `process_group` with a layer that is sharded; in
            `step`, a rate at which the step is singular (the message has the largest safe one), a gradient that is
            not finite, or a weight that would overflow: no layer has changed, in no process, and the gradient is
            kept.
        RuntimeError: `step` without a backward before it.

    Warns:
        UserWarning: once, when a step overshoots (reverses a direction of the weight), which is exact but a
            sign of too large a rate; when made without `process_group` where there are several processes, whose
            layers would drift apart if each stepped on its own part of a batch.

    Example:
        >>> import torch
        >>> from lastlayer import FactoredOutput, FactoredSGD
        >>> layer = FactoredOutput(4, 1000)
        >>> optimizer = FactoredSGD(layer, lr=0.1, weight_decay=1e-4)
        >>> scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=10, gamma=0.5)
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     layer(torch.ones(3, 4), torch.tensor([1, 5, 5])).backward()
        ...     optimizer.step()
        ...     scheduler.step()
    """

    def __init__(
        self,
        layers: "FactoredOutput | Iterable[FactoredOutput] | Iterable[dict[str, Any]]",
        lr: float,
        *,
        weight_decay: float = 0.0,
        max_norm: float | None = None,
        process_group: Any = None,
        **refused: Any,
    ) -> None:
        if refused:
            raise TypeError(
                f"FactoredSGD takes no {', '.join(refused)}: the gradient of the weight is never made, so a "
                "state of its size (momentum, Adam) cannot be kept; it takes lr, weight_decay, max_norm and "
                "process_group"
            )
        self._layers: dict[Tensor, Trained] = {}
        self._warned = False
        self._group = process_group
        given: list[Any] = [layers] if isinstance(layers, nn.Module) else list(layers)
        if not given:
            raise ValueError("layers must be at least one FactoredOutput, got none")
        super().__init__(
            given if isinstance(given[0], dict) else [{"params": given}],
            {"lr": lr, "weight_decay": weight_decay, "max_norm": max_norm},
        )
        alone = process_group is None and not all(layer.state.groups for layer in self._layers.values())
        if alone and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            warnings.warn(
                "FactoredSGD steps on the rows that its own process has seen, and steps are not averaged over "
                f"these {dist.get_world_size()} processes: pass process_group=torch.distributed.group.WORLD for "
                "steps on the rows of all",
                stacklevel=2,
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group whose `"params"` are layers."""
        given = param_group["params"]
        layers: list[Any] = [given] if isinstance(given, nn.Module) else list(given)
        for layer in layers:
            if not isinstance(layer, Trained):
                raise TypeError(f"layers must be FactoredOutput layers, got {type(layer).__name__}")
            if self._group is not None and layer.state.groups:
                raise ValueError(
                    f"process_group must be None for a sharded layer, got {self._group}: pass shard a mesh of two "
                    "dimensions, of which the first takes parts of a batch"
                )
        if len(set(layers)) < len(layers):
            raise ValueError("layers must differ: one occurs twice, and would make each step twice")
        super().add_param_group({**param_group, "params": [layer.anchor for layer in layers]})
        _check_settings(self.param_groups[-1])
        for layer in layers:
            self._layers[layer.anchor] = layer
            layer._ledger.owner = self

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One exact step of every layer that has a gradient; none is changed unless all can be."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        plans, error = [], None
        gradients = self._gradients()
        try:
            if not gradients:
                raise RuntimeError(
                    "step() without a backward since the last step or zero_grad(): there is no gradient"
                )
            for layer, gradient, group in gradients:
                settings = {name: group[name] for name in ("weight_decay", "max_norm")}
                plans.append(plan_step(layer.state, gradient, float(group["lr"]), **settings))
        except Exception as problem:  # whatever it is, no other process may step alone
            error = problem
        growths = self._agreed([0.0 if step is None else step.growth for step in plans], error)
        for (layer, _, _), step, growth in zip(gradients, plans, growths, strict=True):
            if step is not None:
                if step.overshoots is not None and not self._warned:
                    self._warned = True
                    warnings.warn(
                        f"lr reverses a direction of the weight in one step; rates up to {step.overshoots:.6g} "
                        "would not on this batch (warned once)",
                        stacklevel=3,  # where step() is called, which PyTorch wraps once
                    )
                step.apply(layer.state)
                layer._stabilizer.after(layer.state, replace(step, growth=growth))
            layer._ledger.close()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As any optimizer's, with the `factors` of each layer's weight, so that training resumes bit for bit.

        As large as the weights again. Not copied: save or copy it before the next step.
        """
        factors = [
            {**layer.state.tensors(), "counters": layer._stabilizer.counters()} for layer in self._layers.values()
        ]
        return {**super().state_dict(), "factors": factors}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Settings, and the factors where they are those of the weight that the layer has: load the model first.

        Raises:
            ValueError: factors of other layers; the settings are loaded then, the layers unchanged.

        Warns:
            UserWarning: the factors are of another weight; the layer keeps its own.
        """
        super().load_state_dict({name: part for name, part in state_dict.items() if name != "factors"})
        saved = state_dict.get("factors")
        if saved is None:
            return
        layers = list(self._layers.values())
        if len(saved) != len(layers):
            raise ValueError(f"state_dict has the factors of {len(saved)} layers, the optimizer {len(layers)}")
        for layer, factors in zip(layers, saved, strict=True):
            if layer.state.load(factors, layer.anchor.dtype):
                layer._stabilizer.load_counters(factors["counters"])
                layer._ledger.forget(layer.anchor)  # what was recorded was read from other factors
            else:
                warnings.warn(
                    "the factors of this state_dict are of another weight than the layer has, and are left out: "
                    "load the model before its optimizer",
                    stacklevel=2,
                )

    def _gradients(self) -> list[tuple[Trained, Gradient, dict[str, Any]]]:
        """Of each layer that has one, over all processes that step together, with the settings."""
        found = []
        for group in self.param_groups:
            _check_settings(group)
            for layer in map(self._layers.__getitem__, group["params"]):
                if layer._ledger.owner is not self:
                    raise RuntimeError("another FactoredSGD was made for this layer since, and owns its steps")
                layer._ledger.apply_scaling(layer.anchor)
                gradient, processes = layer._ledger.take(), layer.state.copies or self._group
                if processes is not None:
                    gradient = _of_all(gradient, layer.state, processes)
                if gradient is not None:
                    found.append((layer, gradient, group))
        return found

    def _agreed(self, growths: list[float], error: Exception | None) -> list[float]:
        """The largest of each growth over the processes that step together; an error in all where one has one.

        So all make a step, and repair after it, or none does. Sends a number for each layer, and one.
        """
        layers = list(self._layers.values())
        own = () if self._group is None else (self._group,)
        groups = {group: dist.get_world_size(group) for layer in layers for group in layer.state.groups or own}
        if not groups and error is None:
            return growths
        facts = torch.zeros(len(layers) + 1, dtype=torch.float64, device=layers[0].state.factor.device)
        facts[0] = error is not None
        facts[1 : len(growths) + 1] = torch.tensor(growths, dtype=torch.float64)
        for group, size in groups.items():
            count_sent("all_reduce", 2 * (size - 1) / size * facts.nbytes)
            dist.all_reduce(facts, dist.ReduceOp.MAX, group=group)
        refused, *agreed = facts.tolist()
        if refused:
            message = None if error is None else str(error)
            for group, size in groups.items():
                messages: list[Any] = [None] * size
                dist.all_gather_object(messages, message, group=group)
                message = message or next((other for other in messages if other), None)
            raise error or ValueError(f"another process cannot make this step, so none makes it: {message}")
        return agreed[: len(growths)]


def _of_all(gradient: Gradient | None, state: FactoredState, group: Any) -> Gradient | None:
    """The mean of the gradients of all processes, which all hold the same state; None where none has one.

    A process without a gradient (None) has no rows. With N rows in the largest part and K targets each, every
    process sends `N (5 d + 4 + 2 K)` numbers to each other.
    """
    facts = (0, 0, 0) if gradient is None else (*gradient.ids.shape, int(gradient.by_total is not None))
    shapes = [part.tolist() for part in _gathered(torch.tensor(facts, device=state.factor.device), group)]
    rows, targets, totals = (max(column) for column in zip(*shapes, strict=True))
    if not targets:  # no process has a gradient
        return None
    d, parts = state.features, {}
    widths = {"hidden": d, "products": 2 * d + 2, "ids": targets, "by_score": targets, "by_norm": 1}
    for name, width in {**widths, "by_total": totals, "by_hidden": d, "sparse": d}.items():
        padded = state.factor.new_zeros(rows, width, dtype=torch.int64 if name == "ids" else None)
        if gradient is not None and width:
            own = getattr(gradient, name).reshape(len(gradient.ids), -1)
            padded[: len(own), : own.shape[1]] = own
        found = zip(_gathered(padded, group), shapes, strict=True)
        parts[name] = torch.cat([part[:count] for part, (count, *_) in found])
    by_total = parts["by_total"].squeeze(1) if totals else None
    parts |= {"by_norm": parts["by_norm"].squeeze(1), "by_total": by_total}
    return Gradient(**parts).scaled(1 / len(shapes))


def _gathered(tensor: Tensor, group: Any) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    count_sent("all_gather", tensor.nbytes * (len(parts) - 1))
    dist.all_gather(parts, tensor, group=group)
    return parts


def _check_settings(group: dict[str, Any]) -> None:
    for name in ("lr", "weight_decay", "max_norm"):
        value = group[name]
        if name == "max_norm" and value is None:
            continue
        if not isinstance(value, Real | Tensor):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if not float(value) >= 0 or (name == "max_norm" and not value):
            raise ValueError(
                f"{name} must be {'positive or None' if name == 'max_norm' else 'at least 0'}, got {value}"
            )
