"""What all sharded layers share."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lastlayer.distributed.agreement import check_agreement
from lastlayer.distributed.collectives import copied
from lastlayer.distributed.parameters import divided, local, replicated
from lastlayer.distributed.ranks import Ranks
from lastlayer.layers.base import OutputLayer


class ShardedLayer(OutputLayer):
    """A layer whose classes are divided among ranks; made by `shard`.

    It answers every call as the layer of one process does, on every rank: all must call it with the same hidden
    states and targets, and all get the same results. At the first call of each kind that is checked; later ones
    are not, as that costs a synchronisation.

    A subclass stands before the layer's class, `class ShardedX(ShardedLayer, X)`, and overrides the hooks of `X`
    that need the classes of other ranks. In every hook the layer's parameters and buffers are this rank's parts,
    as plain tensors: `self.weight (W, d)` with W of the V classes.

    Args:
        layer: the whole layer, the same on all ranks.
        ranks: those that divide the classes.
        copies: those that hold copies, each for its own part of the data: the gradients of all parameters are
            averaged over them.
    """

    DIVIDED: tuple[str, ...] = ()  # the names of parameters and buffers that have a row for each class
    PARTIAL: tuple[str, ...] = ()  # the parts of the layer that each rank uses for its own classes alone
    PLAIN: tuple[str, ...] = ()  # the names of parameters that stay plain tensors
    KEPT: tuple[str, ...] = ()  # the names of attributes that are not copied, as a subclass divides them itself

    @staticmethod
    def check(layer: Any) -> None:
        """An error unless the layer, of the right class, can be sharded."""

    @staticmethod
    def facts(layer: Any) -> dict[str, Any]:
        """What all ranks must have the same beside settings and the state dict."""
        return {}

    def __init__(self, layer: OutputLayer, ranks: Ranks, copies: Ranks | None) -> None:
        self.check(layer)
        kept = (getattr(layer, name) for name in self.KEPT)
        shared = {id(part): part for part in (*layer.parameters(), *layer.buffers(), *kept)}
        self.__setstate__(copy.deepcopy(vars(layer), shared))  # all of it but for the tensors
        self.ranks, self.copies = ranks, copies
        self._agreed: set[str] = set()
        for module_name, module in self.named_modules():
            prefix = f"{module_name}." if module_name else ""
            for name, parameter in list(module.named_parameters(recurse=False)):
                made = nn.Parameter(self._placed(prefix + name, parameter), requires_grad=parameter.requires_grad)
                module.register_parameter(name, made)
            for name, buffer in list(module.named_buffers(recurse=False)):
                own = self._is_divided(prefix + name)
                device = buffer.device if buffer.is_meta else ranks.mesh.device_type
                setattr(module, name, divided(buffer, ranks) if own else buffer.to(device, copy=True))

    def _placed(self, name: str, parameter: Tensor) -> Tensor:
        if name in self.PLAIN:
            device = parameter.device if parameter.is_meta else self.ranks.mesh.device_type
            return parameter.detach().to(device, copy=True)
        return (divided if self._is_divided(name) else replicated)(parameter, self.ranks)

    def _is_divided(self, name: str) -> bool:
        """Whether a parameter or buffer has a row for each class."""
        return name in self.DIVIDED

    # The calls, whose arguments are compared between the ranks at first.

    def forward(self, hidden: Tensor, targets: Tensor, *weights: Tensor | None, **options: Any) -> Tensor:
        """The training loss, as that of the layer of one process."""
        facts = {"targets": targets, **{f"argument {i + 3}": part for i, part in enumerate(weights)}, **options}
        work = super().forward
        return self._run("forward", lambda: work(hidden, targets, *weights, **options), hidden=hidden, **facts)

    def log_prob(self, hidden: Tensor) -> Tensor:
        """Log-probabilities of every class, on every rank: sends as many numbers as it returns."""
        work = super().log_prob
        return self._run("log_prob", lambda: work(hidden), hidden=hidden)

    def target_log_prob(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """See `OutputLayer`."""
        work = super().target_log_prob
        return self._run("target_log_prob", lambda: work(hidden, targets), hidden=hidden, targets=targets)

    def score(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """See `OutputLayer`."""
        work = super().score
        return self._run("score", lambda: work(hidden, ids), hidden=hidden, ids=ids)

    def topk(self, hidden: Tensor, k: int, *, exclude: Tensor | None = None, allowed: Tensor | None = None) -> Any:
        """See `OutputLayer`; of each rank its k best are sent."""
        work = super().topk
        facts = {"hidden": hidden, "k": k, "exclude": exclude, "allowed": allowed}
        return self._run("topk", lambda: work(hidden, k, exclude=exclude, allowed=allowed), **facts)

    def sample(self, hidden: Tensor, num_samples: int = 1) -> Tensor:
        """See `OutputLayer`; the random numbers are the first rank's."""
        work = super().sample
        return self._run("sample", lambda: work(hidden, num_samples), hidden=hidden, num_samples=num_samples)

    def linear_head(self) -> Any:
        """Raises TypeError: no rank has the whole matrix."""
        raise TypeError(
            f"{type(self).__name__} has no linear_head(), as no rank has all rows; "
            "lastlayer.distributed.ShardedScreen screens it"
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ranks={self.ranks.size}"

    # Written once for all sharded layers.

    def _run(self, call: str, work: Callable[[], Any], **arguments: Any) -> Any:
        """`work()` with this rank's own parts in place of the DTensors."""
        if call not in self._agreed:
            facts = {"call": call, **arguments, "training": self.training, "gradients": torch.is_grad_enabled()}
            check_agreement("input", facts, self.ranks)
            self._agreed.add(call)
        with self._own_parts():
            return work()

    @contextmanager
    def _own_parts(self) -> Iterator[None]:
        """The modules hold this rank's parts meanwhile; `functional_call` would do, but for hooks on modules."""
        replaced: list[tuple[dict[str, Any], str, DTensor]] = []
        try:
            for module_name, module in self.named_modules():
                for table in (module._parameters, module._buffers):
                    for name, tensor in table.items():
                        if isinstance(tensor, DTensor):
                            replaced.append((table, name, tensor))
                            table[name] = self._part(f"{module_name}.{name}", tensor)
            yield
        finally:
            for table, name, tensor in replaced:
                table[name] = tensor

    def _tensors(self) -> dict[str, Tensor]:
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    def _part(self, name: str, tensor: DTensor) -> Any:
        """This rank's part; gradients of what each rank uses for its own classes are summed over the ranks."""
        own = local(tensor, self.copies)
        return copied(own, self.ranks) if name.startswith(self.PARTIAL) else own

    def _parameter_shapes(self) -> Any:
        """Those of the whole layer, which this rank's parts do not have."""
        return ()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Whole tensors, as of a layer that is not sharded, are divided first."""
        for name, own in self._tensors().items():
            found = state_dict.get(prefix + name)
            if not isinstance(own, DTensor) or not isinstance(found, Tensor) or isinstance(found, DTensor):
                continue
            if found.shape == own.shape:  # of others, PyTorch's error names the shapes
                place = divided if own.placements[-1].is_shard() else replicated
                state_dict[prefix + name] = place(found, self.ranks)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
