"""A weight and a bias that are kept by reference: checked once, and noticed when they are not what they were."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lastlayer.functional.changes import count_of_changes
from lastlayer.functional.ordinary import exporting

DTYPES = torch.float16, torch.bfloat16, torch.float32, torch.float64


class Watched(NamedTuple):
    """Where a module that the weight or bias came from keeps it."""

    module: nn.Module
    name: str
    own: str  # "weight" or "bias"

    def current(self) -> Tensor | None:
        """What the module has there now."""
        return getattr(self.module, self.name)


@runtime_checkable
class ComputedHead(Protocol):
    """A module whose weight and bias are not kept but computed, as of a `FactoredOutput`."""

    def linear_head(self) -> tuple[Tensor, Tensor | None, nn.Module | None]:
        """Copies of weight and bias, and the logit map."""
        ...

    def head_version(self) -> Any:
        """Differs after every change of what `linear_head` computes."""
        ...


class WatchedHead(nn.Module, ABC):
    """A module of a weight `(V, d)` and a bias `(V,)` of which something was prepared that has to fit them.

    Where they are parameters of another module, it is watched too: its parameter may be replaced by another one.
    Where another module computed them, its version of them is watched.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self._watched: tuple[Watched, ...] = ()  # of a tuple, so that the module is no submodule
        self._computed: tuple[ComputedHead, ...] = ()  # none or one
        self._set_head(weight, bias)

    @abstractmethod
    def refresh(self) -> None:
        """Prepares anew, and calls `_mark_fresh`."""

    def _set_head(self, weight: Tensor, bias: Tensor | None) -> None:
        check_head(weight, bias)
        self.out_features, self.in_features = weight.shape
        for name, tensor in (("weight", weight), ("bias", bias)):
            if hasattr(self, name):
                delattr(self, name)
            if isinstance(tensor, nn.Parameter) or tensor is None:
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)

    def watch(self, module: object) -> None:
        """Has the module that the weight and bias came from watched: it may replace them, or compute others."""
        if isinstance(module, ComputedHead):
            self._computed = (module,)
            self._mark_fresh()
        elif isinstance(module, nn.Module):
            self._watched = tuple(_places(module, self.weight, self.bias))
            self._mark_fresh()

    def _adopt(self) -> None:
        """Takes the weight and the bias that the watched module has now, or computes."""
        for module in self._computed:
            weight, bias, _ = module.linear_head()
            self._set_head(weight, bias)
            return
        found = {"weight": self.weight, "bias": self.bias} | {w.own: w.current() for w in self._watched}
        assert found["weight"] is not None
        self._set_head(found["weight"], found["bias"])

    def _mark_fresh(self) -> None:
        self._prepared_for: tuple[Any, ...] | None = self._stamp()

    def _is_fresh(self) -> bool:
        return self._prepared_for == self._stamp()

    def _check_fresh(self) -> None:
        if exporting():
            raise RuntimeError(
                f"{type(self).__name__} of lastlayer cannot be exported by torch.export, as the work of a query "
                "depends on its values: lastlayer.export.to_onnx writes a screen as an ONNX file"
            )
        if not self._is_fresh():
            raise RuntimeError(
                "the weight was changed, moved or replaced since the preview was prepared: call refresh() first"
            )

    def _stamp(self) -> tuple[Any, ...]:
        """Changes whenever the weight or bias is written, moved or replaced (except through `.data`)."""
        weight, bias = self.weight, self.bias
        stamp = (weight.data_ptr(), count_of_changes(weight))
        if bias is not None:
            stamp = (*stamp, bias.data_ptr(), count_of_changes(bias))
        if self._watched:
            own = {"weight": weight, "bias": bias}
            stamp = (*stamp, *(place.current() is own[place.own] for place in self._watched))
        return (*stamp, *(module.head_version() for module in self._computed))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_prepared_for": self._is_fresh()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # a copy has memory of its own, and is as fresh or stale as its original
        self._prepared_for = self._stamp() if state["_prepared_for"] else None


def _places(module: nn.Module, weight: Tensor, bias: Tensor | None) -> Iterator[Watched]:
    for own, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            if getattr(module, own, 0) is None:
                yield Watched(module, own, own)
            continue
        for part in module.modules():
            names = [name for name, there in _own_tensors(part) if there is tensor]
            yield from (Watched(part, name, own) for name in names[:1])


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def check_head(weight: Tensor, bias: Tensor | None) -> None:
    """An error unless they are a finite `(V, d)` matrix of a floating type that is computed with, and its bias.

    A bias of -inf bars its class.
    """
    for name, tensor, dims in (("weight", weight, 2), ("bias", bias, 1)):
        if name == "bias" and tensor is None:
            continue
        if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES or tensor.layout != torch.strided:
            what = f"{tensor.dtype}, {tensor.layout}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a dense floating-point tensor of 16 to 64 bits, got {what}")
        if tensor.is_inference():
            raise ValueError(
                f"{name} must not be an inference tensor: PyTorch does not count its changes, so a stale preview "
                f"could not be noticed; pass {name}.clone(), made outside torch.inference_mode()"
            )
        if tensor.dim() != dims or 0 in tensor.shape or len(tensor) != len(weight):
            expected = "(V, d)" if dims == 2 else f"({len(weight)},)"
            raise ValueError(f"{name} must have shape {expected}, got {tuple(tensor.shape)}")
        barred = (
            tensor == -torch.inf if name == "bias" else torch.zeros((), dtype=torch.bool, device=tensor.device)
        )
        if not bool((tensor.isfinite() | barred).all()):
            allowed = "finite, or -inf to bar a class" if name == "bias" else "finite"
            raise ValueError(f"{name} must be {allowed}; got NaN or infinity")
        if bool(barred.all()):
            raise ValueError("bias must leave at least one class, got -inf alone")
