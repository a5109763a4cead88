"""A weight and a bias that are kept by reference: checked once, and noticed when they are not what they were."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

DTYPES = torch.float16, torch.bfloat16, torch.float32, torch.float64


class WatchedHead(nn.Module, ABC):
    """A module of a weight `(V, d)` and a bias `(V,)` of which something was prepared that has to fit them."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        check_head(weight, bias)
        self.out_features, self.in_features = weight.shape
        for name, tensor in (("weight", weight), ("bias", bias)):
            if isinstance(tensor, nn.Parameter) or tensor is None:
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)

    @abstractmethod
    def refresh(self) -> None:
        """Prepares anew, and calls `_mark_fresh`."""

    def _mark_fresh(self) -> None:
        self._prepared_for: tuple[int, ...] | None = self._stamp()

    def _check_fresh(self) -> None:
        if self._prepared_for != self._stamp():
            raise RuntimeError(
                "the weight has changed or moved since the preview was prepared: call refresh() first"
            )

    def _stamp(self) -> tuple[int, ...]:
        """Changes whenever the weight or bias is written or moved (except through `.data`)."""
        weight, bias = self._own("weight"), self._own("bias")
        assert weight is not None
        of_weight = weight.data_ptr(), _version(weight)
        return of_weight if bias is None else (*of_weight, bias.data_ptr(), _version(bias))

    def _own(self, name: str) -> Tensor | None:
        """A parameter or buffer, without the detour that `nn.Module` takes: a fortieth of a query's time."""
        found = self._parameters.get(name)
        return self._buffers.get(name) if found is None else found

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_prepared_for": self._prepared_for == self._stamp()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # a copy has memory of its own, and is as fresh or stale as its original
        self._prepared_for = self._stamp() if state["_prepared_for"] else None


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def check_head(weight: Tensor, bias: Tensor | None) -> None:
    """An error unless they are a finite `(V, d)` matrix of a floating type that is computed with, and its bias."""
    for name, tensor, dims in (("weight", weight, 2), ("bias", bias, 1)):
        if name == "bias" and tensor is None:
            continue
        if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES or tensor.layout != torch.strided:
            what = f"{tensor.dtype}, {tensor.layout}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a dense floating-point tensor of 16 to 64 bits, got {what}")
        if tensor.dim() != dims or 0 in tensor.shape or len(tensor) != len(weight):
            expected = "(V, d)" if dims == 2 else f"({len(weight)},)"
            raise ValueError(f"{name} must have shape {expected}, got {tuple(tensor.shape)}")
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} must be finite, got NaN or infinity")
