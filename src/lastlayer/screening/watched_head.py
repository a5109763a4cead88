"""A weight and a bias that are kept by reference: checked once, and noticed when they are not what they were."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from lastlayer.functional.changes import count_of_changes
from lastlayer.functional.ordinary import exporting

DTYPES = torch.float16, torch.bfloat16, torch.float32, torch.float64


class WatchedHead(nn.Module, ABC):
    """A module of a weight `(V, d)` and a bias `(V,)` of which something was prepared that has to fit them.

    Where they are parameters of another module, it is watched too: its parameter may be replaced by another one.
    Where another module computed them, its version of them is watched.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self._source: tuple[Any, ...] = ()  # none or one; of a tuple, so that the module is no submodule
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

    def watch(self, source: Any) -> None:
        """Has the module that the weight and bias came from watched: it may replace them, or compute others.

        A module that computes them is watched where it has `head_version()`, which differs after every change.
        """
        if hasattr(source, "head_version") or self._is_head_of(source):
            self._source = (source,)
            self._mark_fresh()

    def _adopt(self) -> None:
        """Takes the weight and the bias that the watched module has now."""
        self._set_head(*(self._head_of(self._source[0]) if self._source else (self.weight, self.bias)))

    def _head_of(self, source: Any) -> tuple[Tensor, Tensor | None]:
        """What a layer with `linear_head()` returns, or the `weight` and `bias` of another."""
        return source.linear_head()[:2] if hasattr(source, "linear_head") else (source.weight, source.bias)

    def _is_head_of(self, source: Any) -> bool:
        weight, bias = self._head_of(source)
        return weight is self.weight and bias is self.bias

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
        tensors = [tensor for tensor in (self.weight, self.bias) if tensor is not None]
        stamp = [(tensor.data_ptr(), count_of_changes(tensor)) for tensor in tensors]
        for source in self._source:
            current = source.head_version() if hasattr(source, "head_version") else self._is_head_of(source)
            return (*stamp, current)
        return tuple(stamp)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_prepared_for": self._is_fresh()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # a copy has memory of its own, and is as fresh or stale as its original
        self._prepared_for = self._stamp() if state["_prepared_for"] else None


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
