"""NumPy arrays over the memory of tensors whose storage stays as free as it was."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class _Memory:
    """A tensor's memory by NumPy's array interface; the array that is made of it keeps the tensor alive."""

    def __init__(self, tensor: Tensor) -> None:
        kind = np.dtype(str(tensor.dtype).removeprefix("torch."))
        self.tensor = tensor
        self.__array_interface__ = {
            "version": 3,
            "data": (tensor.data_ptr(), False),
            "typestr": kind.str,
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * kind.itemsize for stride in tensor.stride()),
        }


def array_of(tensor: Tensor) -> NDArray[Any]:
    """A view of a CPU tensor of a dtype that NumPy has, for the length of one call.

    `Tensor.numpy()` fixes the size of the storage for good, but FSDP frees a parameter's storage and fills it
    again. So what reads a parameter's memory takes this view, and none is kept.
    """
    if not tensor.numel():  # has no address
        return np.empty(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
    return np.asarray(_Memory(tensor))
