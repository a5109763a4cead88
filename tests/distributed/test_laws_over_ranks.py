"""The laws of every layer hold over three ranks: the column "sharded" of the law table."""

from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from same_answers import batch, check_equal, make_sharded
from torch.autograd import gradcheck
from torch.autograd.functional import hessian
from torch.distributed.tensor import DTensor
from torch.func import functional_call, grad, jvp, vmap

from lastlayer import FactoredOutput
from lastlayer.distributed import shard
from lastlayer.distributed.collectives import copied
from lastlayer.testing import LAWS, LayerCase
from law_table import CASES

# Finite and second derivatives and barred classes have tests of their own. `torch.func`, "meta" and exports do not
# go through collectives: they are refused.
LEFT_OUT = (
    "law_gradcheck",
    "law_second_derivatives",
    "law_functional_transforms",
    "law_without_values",
    "law_exports",
    "law_a_bias_of_minus_infinity_bars",
)
SHARDED_LAWS = [law.__name__ for law in LAWS if law.__name__ not in LEFT_OUT]
SHARDED_CASES = [
    "full-every-option",
    "hierarchical-no-bias",
    "adaptive-counts",
    "mixture-mapped",
    "sampled-softmax",
    "factored-taylor-bias",
]


@dataclass(frozen=True)
class ShardedCase(LayerCase):
    """A row of the table, over the ranks of a group."""

    case: Any = None
    group: Any = None

    def build(self, dtype=torch.float64, **kwargs):
        layer = self.case.make(dtype=dtype, **kwargs)
        self.case.spread(layer)
        return shard(layer, self.group)


def over_ranks(case, group):
    def whole(layer):
        """A layer of one process with the parameters of all ranks, differentiable."""
        options = {"reduction": layer.reduction, "ignore_index": layer.ignore_index}
        made = case.make(dtype=next(layer.parameters()).dtype, **options)
        if isinstance(layer, FactoredOutput):  # by parameters
            made.set_weight(layer.weight.full_tensor(), layer.bias.full_tensor())
            return made.eval()
        for name, parameter in layer.named_parameters():
            module, _, own = name.rpartition(".")
            made.get_submodule(module)._parameters[own] = parameter.full_tensor()
        return made

    def loss(layer, hidden, targets):
        return case.loss(whole(layer), hidden, targets)

    return ShardedCase(
        case.name,
        make=lambda **kwargs: shard(case.make(**kwargs), group),
        oracle=lambda layer, hidden: case.oracle(whole(layer), hidden),
        loss_oracle=loss,
        likelihood=case.likelihood,
        fill=case.fill,
        case=case,
        group=group,
    )


def law_holds(group, name, law):
    (case,) = [case for case in CASES if case.name == name]
    (check,) = [each for each in LAWS if each.__name__ == law]
    check(over_ranks(case, group))


@pytest.mark.parametrize("law", SHARDED_LAWS)
@pytest.mark.parametrize("name", SHARDED_CASES)
def test_law(pool, name, law):
    pool.run(law_holds, 3, name, law)


def derivatives_are_right(group, name):
    """6a over ranks: finite differences in float64, for hidden states and all parameters."""
    (case,) = [case for case in CASES if case.name == name]
    layer = case.build(reduction="mean")
    sharded = make_sharded(layer, group)
    hidden, targets = batch(layer, 3)
    sharded.eval()
    best = layer.topk(hidden, 1).indices
    some = torch.cat([best, targets[:, None]], 1)
    calls = {
        "target_log_prob": lambda layer, h: layer.target_log_prob(h, targets),
        "log_prob": lambda layer, h: layer.log_prob(h),
        "topk": lambda layer, h: layer.topk(h, 1, exclude=best).log_prob,
        "score": lambda layer, h: layer.score(h, some),
    }
    if case.likelihood:
        calls["loss"] = lambda layer, h: layer(h, targets.masked_fill(targets == targets[1], layer.ignore_index))
    parts = dict(sharded.named_parameters())
    for call in calls.values():

        def of_inputs(hidden, *parameters, call=call):
            own = zip(parts.items(), parameters, strict=True)
            tensors = {f"layer.{key}": placed(whole, part, sharded.ranks) for (key, part), whole in own}
            return torch.func.functional_call(Caller(sharded, call), tensors, (hidden,))

        wholes = [part.full_tensor().detach().requires_grad_() for part in parts.values()]
        assert gradcheck(of_inputs, [hidden.requires_grad_(), *wholes], fast_mode=True)


def placed(whole, like, ranks):
    """A DTensor of a whole tensor, differentiable: of its rows each rank's gradient has those of all."""
    if like.placements[-1].is_shard():
        whole = copied(whole, ranks)[ranks.span(len(whole))]
    return DTensor.from_local(
        whole, ranks.mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


class Caller(torch.nn.Module):
    """Any call of a layer as a `forward`, for `functional_call`."""

    def __init__(self, layer, call):
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, hidden):
        return self.call(self.layer, hidden)


DIFFERENTIABLE = [name for name in SHARDED_CASES if not name.startswith("factored")]  # by parameters


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_derivatives(pool, name):
    pool.run(derivatives_are_right, 2, name)


def transforms_are_refused(group, name):
    """9b over ranks: `torch.func` is refused on every rank, before any collective, by an error that says so."""
    (case,) = [case for case in CASES if case.name == name]
    layer = case.build(reduction="sum")
    sharded = make_sharded(layer, group).eval()  # without dropout
    hidden, targets = batch(layer, 3)
    whole = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    own = {name: parameter.detach() for name, parameter in sharded.named_parameters()}

    def loss(hidden):
        return sharded(hidden, targets)

    for transform in (
        lambda: grad(loss)(hidden),
        lambda: jvp(loss, (hidden,), (hidden,)),
        lambda: vmap(sharded.log_prob)(hidden[None]),
        lambda: functional_call(sharded, whole, (hidden, targets)),
        lambda: grad(lambda own: functional_call(sharded, own, (hidden, targets)))(own),
        lambda: sharded(hidden.to("meta"), targets.to("meta")),
        lambda: hessian(loss, hidden, vectorize=True),
    ):
        with pytest.raises(RuntimeError, match=r"lastlayer\.distributed"):
            transform()
    if case.likelihood:  # a sampled loss is of another draw
        found = functional_call(sharded, own, (hidden, targets))
        check_equal(found, loss(hidden), "DTensors in place of parameters")


def test_transforms(pool):
    for name in DIFFERENTIABLE:
        pool.run(transforms_are_refused, 2, name)


def wrong_law(group):
    """A layer whose gradients of hidden states are those of one rank."""
    (case,) = [case for case in CASES if case.name == "full-plain"]
    (check,) = [law for law in LAWS if law.__name__ == "law_loss_is_likelihood"]
    with patch("lastlayer.distributed.full.copied", lambda tensor, ranks: tensor), pytest.raises(AssertionError):
        check(over_ranks(case, group))
    dist.barrier(group)


def test_a_wrong_layer_breaks_a_law(pool):
    pool.run(wrong_law, 3)
