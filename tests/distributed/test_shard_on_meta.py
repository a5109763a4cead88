"""Layers that no process ever holds whole: sharded on "meta", then filled."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from same_answers import batch, check_equal, make_sharded

from lastlayer import (
    PLIF,
    AdaptiveSoftmax,
    FullSoftmax,
    HierarchicalSoftmax,
    MixtureOfSoftmaxes,
    MonotoneNetwork,
    OneVsAll,
    SampledSoftmax,
    Unigram,
)
from lastlayer.distributed import shard

V = 29
COUNTS = torch.arange(V).flip(0) % 7 + 1.0
WEIGHTS = torch.linspace(0.5, 2.0, V)
MAKES = {
    "full": lambda **kw: FullSoftmax(6, V, class_weights=WEIGHTS, logit_map=PLIF(60, 2.0, init_std=1.0), **kw),
    "adaptive": lambda **kw: AdaptiveSoftmax(6, V, [4, 9], div_value=2.0, counts=COUNTS, **kw),
    "hierarchical": lambda **kw: HierarchicalSoftmax(6, V, clusters=torch.arange(V) % 5, **kw),
    "mixture": lambda **kw: MixtureOfSoftmaxes(6, V, 3, logit_map=MonotoneNetwork(3), **kw),
    "one against all": lambda **kw: OneVsAll(6, V, positive_weight=WEIGHTS, **kw),
    "sampled": lambda **kw: SampledSoftmax(6, V, Unigram(COUNTS), 5, **kw),
}


def query(layer, hidden):
    return layer.scores(hidden) if isinstance(layer, OneVsAll) else layer.log_prob(hidden)


def empty(name, group):
    """A rank's part with memory, but no values."""
    sharded = shard(MAKES[name](device="meta"), group)
    assert all(parameter.is_meta for parameter in sharded.parameters())
    sharded.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in sharded.parameters():
            parameter.to_local().fill_(torch.nan)
    return sharded


def states_load(group, name, folder):
    """The whole layer's state, and a checkpoint."""
    torch.manual_seed(1)
    layer = MAKES[name]()
    hidden, targets = batch(layer, 5, dtype=torch.float32)
    dcp.save({"layer": make_sharded(layer, group).state_dict()}, checkpoint_id=folder, process_group=group)
    from_state, from_checkpoint = empty(name, group), empty(name, group)
    from_state.load_state_dict(layer.state_dict())
    state = {"layer": from_checkpoint.state_dict()}
    dcp.load(state, checkpoint_id=folder, process_group=group)
    from_checkpoint.load_state_dict(state["layer"])
    for sharded in (from_state, from_checkpoint):
        check_equal(query(sharded, hidden), query(layer, hidden), name)
        losses = []
        for each in (layer, sharded):
            torch.manual_seed(2)
            losses.append(each(hidden, targets))
        check_equal(losses[1], losses[0], f"{name}, loss")


def new_parameters(group, name):
    """Those of a new layer: of its own spread, other rows on every rank, the same on all where all hold them."""
    sharded = empty(name, group)
    torch.manual_seed(group.rank())  # only the first one's counts
    sharded.reset_parameters()
    drawn = torch.rand(1)
    torch.manual_seed(group.rank())
    torch.randint(1 << 62, (1,))
    assert torch.equal(drawn, torch.rand(1)), "the rank's own random numbers go on"
    torch.manual_seed(0)
    fresh = MAKES[name]()
    for key, parameter in sharded.named_parameters():
        whole, like = parameter.full_tensor().detach(), fresh.get_parameter(key).detach()
        assert whole.isfinite().all(), key
        spread, expected = whole.std(correction=0), like.std(correction=0)
        assert whole.numel() < 20 or expected / 2 <= spread <= 2 * expected, key
        if parameter.placements[-1].is_shard() and whole.dim() == 2:
            assert len(whole.unique(dim=0)) == len(whole), f"{key}: two ranks have drawn the same"
    hidden, targets = batch(fresh, 5, dtype=torch.float32)
    sharded(hidden, targets).backward()
    whole = MAKES[name]()
    state = {key: t.full_tensor() if hasattr(t, "full_tensor") else t for key, t in sharded.state_dict().items()}
    whole.load_state_dict(state)
    check_equal(query(sharded, hidden), query(whole, hidden), name)


def test_states(pool, tmp_path):
    for name in MAKES:
        pool.run(states_load, 3, name, str(tmp_path / name.replace(" ", "-")))


@pytest.mark.parametrize("ranks", [1, 3])
def test_new_parameters(pool, ranks):
    for name in MAKES:
        pool.run(new_parameters, ranks, name)


def layers_differ(group):
    """Clusters count also where they have no values yet."""
    clusters = (torch.arange(V) + group.rank()) % 5
    with pytest.raises(ValueError, match="same layer, but order differs"):
        shard(HierarchicalSoftmax(6, V, clusters=clusters, device="meta"), group)


def test_layers_that_differ(pool):
    pool.run(layers_differ, 2)
