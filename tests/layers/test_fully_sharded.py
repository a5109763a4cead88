"""`fully_shard` (FSDP2) in a group of one process trains every layer as the same code does without it."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from lastlayer import (
    PLIF,
    AdaptiveSoftmax,
    FullSoftmax,
    HierarchicalSoftmax,
    MixtureOfSoftmaxes,
    MonotoneNetwork,
    NegativeSampling,
    OneVsAll,
    TreeSoftmax,
    Uniform,
)

LAYERS = {
    "full": lambda: FullSoftmax(8, 40, class_weights=torch.linspace(0.1, 1, 40)),
    "plif": lambda: FullSoftmax(8, 40, logit_map=PLIF(7, 2.0)),
    "monotone-network": lambda: FullSoftmax(8, 40, logit_map=MonotoneNetwork(3)),
    "mixture": lambda: MixtureOfSoftmaxes(8, 40, 2),
    "adaptive": lambda: AdaptiveSoftmax(8, 40, [10, 20], div_value=2.0),
    "hierarchical": lambda: HierarchicalSoftmax(8, 40),
    "tree": lambda: TreeSoftmax(8, 40),
    "one-vs-all": lambda: OneVsAll(8, 40),
    "negative-sampling": lambda: NegativeSampling(8, 40, Uniform(40), 5),
}


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", LAYERS)
def test_trains_as_without(name, reduction, mesh):
    """Parameters are freed after the forward pass and gathered again: `"none"` computes its chunks twice."""
    torch.manual_seed(0)
    layer = LAYERS[name]()
    layer.reduction = reduction
    plain = nn.Sequential(nn.Linear(8, 8))
    plain.append(layer)
    sharded = copy.deepcopy(plain)
    for part in sharded:
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    fully_shard(sharded, mesh=mesh)
    inputs, targets = torch.randn(3, 12, 8), torch.randint(40, (3, 12))
    targets[:, 1] = -100
    for model in (plain, sharded):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for rows, ids in zip(inputs, targets, strict=True):
            torch.manual_seed(1)  # what a sampled layer draws
            optimizer.zero_grad()
            model[1](model[0](rows), ids).sum().backward()
            optimizer.step()
    for (name, p), q in zip(plain.named_parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(q.full_tensor(), p, msg=lambda text, name=name: f"{name}: {text}")
