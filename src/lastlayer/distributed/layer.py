"""What all sharded layers share."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lastlayer.distributed.agreement import check_agreement
from lastlayer.distributed.collectives import copied, from_first
from lastlayer.distributed.ranks import Ranks, copied_here, divided, local, of_own_rows, own_rows, replicated
from lastlayer.functional.ordinary import ordinary
from lastlayer.layers.base import OutputLayer


class ShardedLayer(OutputLayer):
    """A layer whose classes are divided among ranks; made by `shard`.

    Every call computes what that of the layer of one process does, on every rank: all must call it with the same
    hidden states and targets, and all get the same results. At the first call of each kind that is checked; later
    ones are not, as that costs a synchronisation. Derivatives of any order are right by autograd;
    `torch.func` and batched gradients (`is_grads_batched`) raise RuntimeError: collectives have no such rules.

    A subclass comes before the layer's class, `class ShardedX(ShardedLayer, X)`, and overrides the hooks of `X`
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
        """What all ranks must have the same beside settings and the state dict, as of those on "meta"."""
        return layer._planned or {}

    def __init__(self, layer: OutputLayer, ranks: Ranks, copies: Ranks | None) -> None:
        self.check(layer)
        kept = (getattr(layer, name) for name in self.KEPT)
        shared = {id(part): part for part in (*layer.parameters(), *layer.buffers(), *kept)}
        self.__setstate__(copy.deepcopy(vars(layer), shared))  # all of it but for the tensors
        self.ranks, self.copies = ranks, copies
        self._agreed: set[str] = set()
        sparse = {id(parameter) for parameter in layer.sparse_parameters()}
        self._row_sparse = {name for name, parameter in self.named_parameters() if id(parameter) in sparse}
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
            return copied_here(parameter, self.ranks)
        if name in self._row_sparse:
            return copied_here(own_rows(parameter, self.ranks), self.ranks)
        return (divided if self._is_divided(name) else replicated)(parameter, self.ranks)

    def _is_divided(self, name: str) -> bool:
        """Whether a parameter or buffer has a row for each class."""
        return name in self.DIVIDED

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws new parameters, as those of a new layer, for one that was sharded on "meta" and then `to_empty`.

        All ranks call it. Each draws its own classes, from a seed that the first rank draws; what all ranks hold
        is the first one's. Other numbers of ranks give other values.
        """
        reset: Any = getattr(super(), "reset_parameters", None)
        if reset is None:
            raise TypeError(f"{type(self).__name__} has no reset_parameters(): load a state dict")
        device = torch.device(self.ranks.mesh.device_type)
        seed = from_first(torch.randint(1 << 62, (1,), device=device), self.ranks)
        seed = seed if self.copies is None else from_first(seed, self.copies)
        with torch.random.fork_rng([] if device.type == "cpu" else None):
            torch.manual_seed(int(seed) + self.ranks.rank)
            self._with_own_parts(reset)
        for parameter in self.parameters():
            if isinstance(parameter, DTensor) and not parameter.placements[-1].is_shard():
                own = parameter.to_local()
                own.copy_(from_first(own, self.ranks))

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
        strided = [
            part for part in arguments.values() if isinstance(part, Tensor) and part.layout == torch.strided
        ]
        if not ordinary(*strided):
            raise RuntimeError(
                "a layer that lastlayer.distributed.shard made takes plain tensors with values: the transforms of "
                "torch.func, DTensors, fake tensors and those on 'meta' do not go through its collectives"
            )
        if call not in self._agreed:
            facts = {"call": call, **arguments, "training": self.training, "gradients": torch.is_grad_enabled()}
            check_agreement("input", facts, self.ranks)
            self._agreed.add(call)
        return self._with_own_parts(work)

    def _with_own_parts(self, work: Callable[[], Any]) -> Any:
        """`work()` while the modules hold this rank's parts, as plain tensors."""
        for name, parameter in self.named_parameters():
            if not isinstance(parameter, DTensor) and name not in self._row_sparse and name not in self.PLAIN:
                raise RuntimeError(
                    f"{name} of a layer that lastlayer.distributed.shard made must be a DTensor, as in its "
                    f"named_parameters(), and was replaced by a {type(parameter).__name__}: transforms of "
                    "torch.func do not go through its collectives"
                )
        parts = {
            f"layer.{name}": self._part(name, tensor)
            for name, tensor in self._tensors().items()
            if isinstance(tensor, DTensor) or name in self._row_sparse
        }
        return torch.func.functional_call(_Holder(self), parts, (work,))

    def _tensors(self) -> dict[str, Tensor]:
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    def _part(self, name: str, tensor: Tensor) -> Tensor:
        """This rank's part. Its gradient is the mean over the copies; of what each rank uses for its own classes
        alone it is the sum over the ranks."""
        own = local(tensor)
        own = own if self.copies is None else copied(own, self.copies, mean=True)
        return copied(own, self.ranks) if name.startswith(self.PARTIAL) else own

    def _parameter_shapes(self) -> Any:
        """Those of the whole layer, which this rank's parts do not have."""
        return ()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """All parts are DTensors there, over the same memory."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._row_sparse:
            destination[prefix + name] = of_own_rows(destination[prefix + name], self.num_classes, self.ranks)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Whole tensors, as of a layer that is not sharded, are divided first."""
        for name in self._row_sparse & {key.removeprefix(prefix) for key in state_dict}:
            self._load_rows(state_dict, prefix + name, self.get_parameter(name), errors=args[-1])
        for name, own in self._tensors().items():
            found = state_dict.get(prefix + name)
            if not isinstance(own, DTensor) or not isinstance(found, Tensor) or isinstance(found, DTensor):
                continue
            if found.shape == own.shape:  # of others, PyTorch's error names the shapes
                place = divided if own.placements[-1].is_shard() else replicated
                state_dict[prefix + name] = place(found, self.ranks)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _load_rows(self, state_dict: Any, key: str, own: Tensor, errors: list[str]) -> None:
        """This rank's rows in place of those of all ranks."""
        found, shape = state_dict[key], (self.num_classes, *own.shape[1:])
        state_dict[key] = own.detach()
        if found.shape != shape:
            errors.append(f"size mismatch for {key}: the state has {tuple(found.shape)}, the layer {shape}")
        else:
            state_dict[key] = own_rows(found, self.ranks)


class _Holder(nn.Module):
    """A layer whose tensors `functional_call` replaces while some work is done; its calls run no hooks."""

    def __init__(self, layer: ShardedLayer) -> None:
        super().__init__()
        self.layer = layer

    def __call__(self, work: Callable[[], Any]) -> Any:
        return work()
