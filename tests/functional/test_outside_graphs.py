"""Layers that group their batch run inside a compiled model, which breaks its graph there."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from lastlayer import HierarchicalSoftmax, TreeSoftmax


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("kind", [HierarchicalSoftmax, TreeSoftmax])
def test_compiled_model_trains_as_the_eager_one(kind, sparse):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 8)
            self.output = kind(8, torch.ones(50) if kind is TreeSoftmax else 50, sparse=sparse)

        def forward(self, inputs, targets):
            return self.output(self.body(inputs), targets)

    eager = Model()
    compiled = torch.compile(copy.deepcopy(eager), backend="eager")
    inputs, targets = torch.randn(6, 4), torch.randint(50, (6,))
    targets[0] = -100
    losses = [model(inputs, targets) for model in (eager, compiled)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0])
    for p, q in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(q.grad.to_dense(), p.grad.to_dense())


def test_the_compiler_is_not_imported_before_it_is_used():
    code = (
        "import sys, torch; before = 'torch._dynamo' in sys.modules; import lastlayer; "
        "print(before or 'torch._dynamo' not in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "True\n"
    )
