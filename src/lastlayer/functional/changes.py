"""Whether a tensor was written since it was last looked at."""

from torch import Tensor


def count_of_changes(tensor: Tensor) -> int:
    """A number that grows whenever the tensor is written (except through `.data`).

    `Tensor._version` is the count of changes by which autograd notices that a saved tensor was written. It is
    documented, as is `torch.autograd.graph.increment_version` to raise it, but there is no public way to read it.

    Raises:
        RuntimeError: an inference tensor, whose changes PyTorch does not count.
    """
    return tensor._version
