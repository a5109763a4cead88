"""A small classifier of scikit-learn's digits (pip install scikit-learn) with a two-level output layer.

python examples/digits.py

Ten classes need no such layer: this shows that it learns and predicts as any other does.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from lastlayer import HierarchicalSoftmax


def main() -> None:
    """Trains on four fifths, predicts the rest."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target, dtype=torch.int64)
    order = torch.randperm(len(labels))
    train, test = order[: 4 * len(order) // 5], order[4 * len(order) // 5 :]
    body = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    output = HierarchicalSoftmax(64, 10, clusters=torch.arange(10) // 4)
    optimizer = torch.optim.Adam([*body.parameters(), *output.parameters()], lr=0.01)
    for _ in range(100):
        loss = output(body(images[train]), labels[train])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        predicted = output.topk(body(images[test]), 1).indices[:, 0]
    print(f"loss {loss.item():.3f}, right: {(predicted == labels[test]).float().mean():.1%} of {len(test)} digits")


if __name__ == "__main__":
    main()
