"""`FullSoftmax` over 1, 2 and 3 ranks equals the layer of one process."""

import copy
from dataclasses import dataclass, field

import pytest
import torch
from same_answers import batch, check_calls, check_indices, make_sharded, queries

from lastlayer import PLIF, FullSoftmax, SoftCap


@dataclass
class Case:
    """A layer's options, and which rows there are."""

    num_classes: int = 11
    options: dict = field(default_factory=dict)
    rows: int = 6
    dtype: torch.dtype = torch.float64


def options_of(name, V):
    weights = torch.linspace(0.2, 2.0, V, dtype=torch.float64)
    return {
        "plain": {},
        "no bias": {"bias": False},
        "smooth": {"label_smoothing": 0.3},
        "z loss": {"z_loss": 0.1},
        "class weights": {"class_weights": weights},
        "soft cap": {"logit_map": SoftCap(2.0)},
        "everything": {
            "class_weights": weights,
            "label_smoothing": 0.15,
            "z_loss": 0.01,
            "logit_map": PLIF(6, 2.0, init_std=1.0),
        },
    }[name]


def targets_of(kind, hidden, V):
    """Targets in one of their forms, and their weights."""
    N, generator = len(hidden), torch.Generator().manual_seed(2)
    ids = torch.randint(V, (N,), generator=generator)
    if kind == "on one rank":
        return (torch.zeros_like(ids),)
    if kind == "some ignored":
        ids[::2] = -100
        return (ids,)
    if kind == "all ignored":
        return (torch.full_like(ids, -100),)
    if kind == "several":
        several = torch.randint(V, (N, 3), generator=generator)
        several[1:, 2] = -100
        return several, torch.rand(N, 3, generator=generator, dtype=torch.float64)
    if kind == "of all classes":
        return (torch.rand(N, V, generator=generator, dtype=torch.float64),)
    return (ids,)


KINDS = ("one", "on one rank", "some ignored", "all ignored", "several", "of all classes")


def losses_are_equal(group, option, V):
    for reduction in ("mean", "sum", "none"):
        torch.manual_seed(1)
        layer = FullSoftmax(5, V, reduction=reduction, dtype=torch.float64, **copy.deepcopy(options_of(option, V)))
        sharded = make_sharded(layer, group)
        kinds = KINDS if reduction == "mean" else ("some ignored", "several")
        for rows, kinds_of_rows in ((6, kinds), (0, kinds[-1:])):
            hidden, _ = batch(layer, rows)
            for kind in kinds_of_rows:
                arguments = targets_of(kind, hidden, V)
                calls = {kind: lambda layer, h, arguments=arguments: layer(h, *arguments)}
                check_calls(layer, sharded, hidden, None, calls, f"{option}, V={V}, {rows} rows, {reduction}")


OPTIONS = ("plain", "no bias", "smooth", "z loss", "class weights", "soft cap", "everything")


@pytest.mark.parametrize("option", OPTIONS)
def test_losses_and_gradients(pool, option):
    pool.run(losses_are_equal, 3, option, 11)


@pytest.mark.parametrize("ranks", [1, 2])
def test_fewer_ranks(pool, ranks):
    for option in ("plain", "everything"):
        pool.run(losses_are_equal, ranks, option, 11)


def test_ranks_without_classes(pool):
    """V = 1 leaves two of three ranks without a class, V = 4 one."""
    for V in (1, 4):
        for option in ("plain", "everything"):
            pool.run(losses_are_equal, 3, option, V)


def queries_are_equal(group, option, V, dtype):
    torch.manual_seed(1)
    layer = FullSoftmax(5, V, dtype=dtype, **options_of(option, V))
    sharded = make_sharded(layer, group)
    for rows in (6, 0):
        hidden, targets = batch(layer, rows, dtype=dtype)
        name = f"{option}, V={V}, {rows} rows"
        check_calls(layer, sharded, hidden, targets, queries(layer, hidden, targets), name)
        check_indices(layer, sharded, hidden, name)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_queries(pool, ranks):
    pool.run(queries_are_equal, ranks, "everything", 11, torch.float64)
    if ranks == 3:
        pool.run(queries_are_equal, ranks, "no bias", 11, torch.float64)
        pool.run(queries_are_equal, ranks, "plain", 4, torch.float64)
        pool.run(queries_are_equal, ranks, "plain", 1, torch.float64)
        pool.run(queries_are_equal, ranks, "soft cap", 11, torch.float32)


def bars(group):
    """The classes of a whole rank, and one of another, have a bias of -inf."""
    torch.manual_seed(1)
    layer = FullSoftmax(5, 12, dtype=torch.float64, logit_map=SoftCap(3.0))
    with torch.no_grad():
        layer.bias[:5] = -torch.inf
    sharded = make_sharded(layer, group)
    hidden, _ = batch(layer, 6)
    targets = torch.tensor([7, 11, 5, 6, 2, 8])  # one of them barred
    calls = {
        "loss": lambda layer, h: layer(h, targets.masked_fill(targets == 2, 5)),
        **queries(layer, hidden, targets),
    }
    check_calls(layer, sharded, hidden, targets, calls, "barred")
    check_indices(layer, sharded, hidden, "barred")


def test_barred_classes(pool):
    for ranks in (1, 2, 3):
        pool.run(bars, ranks)


def second_derivatives(group):
    layer = FullSoftmax(5, 11, dtype=torch.float64, **options_of("everything", 11))
    hidden, targets = batch(layer, 4)

    def twice(layer, h):
        (slope,) = torch.autograd.grad(layer(h, targets), h, create_graph=True)
        return slope.square()

    check_calls(layer, make_sharded(layer, group), hidden, targets, {"second derivatives": twice}, "")


def test_second_derivatives(pool):
    pool.run(second_derivatives, 3)
