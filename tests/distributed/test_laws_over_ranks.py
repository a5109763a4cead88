"""The laws of every layer hold over three ranks: the column "sharded" of the law table."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lastlayer import FactoredOutput
from lastlayer.distributed import shard
from lastlayer.testing import LAWS, LayerCase
from law_table import CASES

# Second derivatives and barred classes have tests of their own; first derivatives are in `law_loss_is_likelihood`.
# `torch.func`, "meta" and exports do not go through collectives.
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
        if isinstance(layer, FactoredOutput):  # whose weight is no parameter
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


def test_a_wrong_layer_breaks_a_law(pool):
    with pytest.raises(AssertionError):
        pool.run(wrong_law, 3)


def wrong_law(group):
    """A layer whose gradients of hidden states are those of one rank."""
    from lastlayer.distributed import full

    honest, full.copied = full.copied, lambda tensor, ranks: tensor
    try:
        (case,) = [case for case in CASES if case.name == "full-plain"]
        (check,) = [law for law in LAWS if law.__name__ == "law_loss_is_likelihood"]
        check(over_ranks(case, group))
    finally:
        full.copied = honest
        dist.barrier(group)
