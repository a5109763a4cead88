"""100,000 classes, a small network, and a training step that touches only the clusters of its targets.

python examples/many_classes.py [--classes 100000] [--steps 200]

Each class is a noisy point; the network must name it. Compare the time of a step with that of `nn.Linear` and
`F.cross_entropy` in place of the layer.
"""

import argparse
import time

import torch
from torch import nn

from lastlayer import HierarchicalSoftmax


def main() -> None:
    """Trains, then queries the five likeliest classes of unseen points."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    points = torch.randn(arguments.classes, 64)
    body = nn.Sequential(nn.Linear(64, 256), nn.Tanh())
    output = HierarchicalSoftmax(256, arguments.classes, sparse=True)
    optimizer = torch.optim.Adagrad([*body.parameters(), *output.parameters()], lr=0.1)
    start = time.perf_counter()
    for step in range(1, arguments.steps + 1):
        targets = torch.randint(min(500, arguments.classes), (256,))  # the classes that occur in this small task
        loss = output(body(points[targets] + 0.1 * torch.randn(256, 64)), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == arguments.steps:
            milliseconds = 1e3 * (time.perf_counter() - start) / step
            print(f"step {step}: loss {loss.item():.3f}, {milliseconds:.1f} ms a step")
    wanted = torch.randint(min(500, arguments.classes), (1000,))
    with torch.no_grad():
        best = output.topk(body(points[wanted] + 0.1 * torch.randn(1000, 64)), 5)
    print(f"right: {(best.indices[:, 0] == wanted).float().mean():.1%} of {len(wanted)} unseen points")


if __name__ == "__main__":
    main()
