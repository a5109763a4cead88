"""Which tensors work with hand-written gradients and kernels, and which only with PyTorch's own operations."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.torch_version import TorchVersion

# PyTorch 2.11 says that it exports in all that Dynamo traces: there only exports with strict=False are recognised.
DYNAMO_KNOWS_EXPORTS = TorchVersion(torch.__version__) >= "2.12"


def ordinary(*tensors: Tensor | None) -> bool:
    """Whether all are plain numbers in memory, differentiated backwards by autograd, if at all.

    Not ordinary are tensors of `torch.func` (`grad`, `vmap`, `jvp`), of `is_grads_batched` and of forward-mode AD;
    those on "meta", fake ones, DTensors; and all that `torch.export` traces. For these every function has a plain
    twin, made of PyTorch's own operations. Under `torch.compile` all tensors count as ordinary.
    """
    if torch.compiler.is_compiling():
        return not exporting()
    for tensor in tensors:  # a plain loop, for speed: every small step calls this
        if tensor is not None and not (
            _dispatch_of(type(tensor)) is _dispatch_of(Tensor)
            and not tensor.is_meta
            and _has_memory(tensor)
            and forward_ad.unpack_dual(tensor).tangent is None
        ):
            return False
    return True


def exporting() -> bool:
    """Whether `torch.export` traces this."""
    if torch.compiler.is_dynamo_compiling() and not DYNAMO_KNOWS_EXPORTS:
        return False
    return torch.compiler.is_exporting()


def _dispatch_of(kind: Any) -> Any:
    """The `__torch_dispatch__` of a tensor class: that of fake tensors and DTensors is their own."""
    return kind.__torch_dispatch__


def _has_memory(tensor: Tensor) -> bool:
    """Whether the tensor has storage of its own; the wrapper tensors of a transform have none."""
    try:
        tensor.data_ptr()
    except RuntimeError:
        return False
    return True


def readable(*tensors: Tensor | None) -> bool:
    """Whether Python may read values of these, and use them as shapes: ordinary ones, but not while compiling."""
    return not torch.compiler.is_compiling() and ordinary(*tensors)


def eager_on_cpu(tensor: Tensor) -> bool:
    """Whether Python may read values of `tensor` at no cost: readable, and not on a GPU."""
    return tensor.device.type == "cpu" and readable(tensor)
