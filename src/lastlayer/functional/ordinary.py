"""Which tensors hand-written gradients and kernels take, and which PyTorch's own operations must take."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def ordinary(*tensors: Tensor | None) -> bool:
    """Whether all are plain numbers in memory, differentiated backwards by autograd, if at all.

    Not ordinary are tensors of `torch.func` (`grad`, `vmap`, `jvp`), of `is_grads_batched` and of forward-mode AD;
    those on "meta", fake ones, DTensors; and all that `torch.export` traces. For these every function has a plain
    twin, made of PyTorch's own operations. Under `torch.compile` all tensors count as ordinary.
    """
    if torch.compiler.is_compiling():
        return not torch.compiler.is_exporting()
    for tensor in tensors:  # a plain loop: every small step begins with it
        if tensor is not None and not (
            _dispatch_of(type(tensor)) is _dispatch_of(Tensor)
            and not tensor.is_meta
            and _has_memory(tensor)
            and forward_ad.unpack_dual(tensor).tangent is None
        ):
            return False
    return True


def _dispatch_of(kind: Any) -> Any:
    """How a class of tensors has operations done: fake tensors and DTensors have a way of their own."""
    return kind.__torch_dispatch__


def _has_memory(tensor: Tensor) -> bool:
    """Whether there is memory of its own behind it, as there is none where a transform stands in for it."""
    try:
        tensor.data_ptr()
    except RuntimeError:
        return False
    return True


def readable(*tensors: Tensor | None) -> bool:
    """Whether Python may read values of these, and make shapes of them: ordinary ones, but not while compiling."""
    return not torch.compiler.is_compiling() and ordinary(*tensors)


def eager_on_cpu(tensor: Tensor) -> bool:
    """Whether Python may read values of `tensor` at no cost: readable, and not on a GPU."""
    return tensor.device.type == "cpu" and readable(tensor)
