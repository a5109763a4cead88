"""Mode matching on random distributions: what a softmax of few dimensions cannot express, without an encoder."""

from typing import Any

import torch
from torch import Tensor, nn

from lastlayer.layers.full import FullSoftmax
from lastlayer.layers.mixture import MixtureOfSoftmaxes
from lastlayer.reproduce.softmax_bottleneck.language import MAPS, build

STEPS, RATE = 2500, 0.02
CONCENTRATION = 0.01
KNOTS, COMPONENTS = 100, 3
MODELS = (*MAPS, "mixture of 3")


class FreeContexts(nn.Module):
    """An output layer under contexts that have a vector each, whatever an encoder could make of them."""

    def __init__(self, contexts: int, layer: FullSoftmax | MixtureOfSoftmaxes) -> None:
        super().__init__()
        self.layer = layer
        self.contexts = nn.Parameter(0.5 * torch.randn(contexts, layer.in_features))
        if isinstance(layer, FullSoftmax):
            assert layer.bias is not None
            nn.init.normal_(layer.weight, std=0.5)
            nn.init.zeros_(layer.bias)

    def forward(self) -> Tensor:  # (contexts, words)
        return self.layer.log_prob(self.contexts)


def dirichlet(contexts: int, words: int, seed: int) -> Tensor:  # (contexts, words), float64
    """Distributions over words, most of the mass of each on a few."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape = torch.full((contexts, words), CONCENTRATION + 1, dtype=torch.float64)
        gamma = torch.distributions.Gamma(shape, torch.ones_like(shape)).sample()
        uniform = torch.rand(contexts, words, dtype=torch.float64).clamp(min=1e-300)
    # Gamma(a) = Gamma(a + 1) U^(1/a), in logarithms, as most of them underflow.
    return (gamma.log() + uniform.log() / CONCENTRATION).softmax(-1)


def fit(name: str, contexts: int, words: int, width: int, seed: int, steps: int = STEPS) -> dict[str, Any]:
    """Fits one model by full-batch Adam; the share of contexts whose most probable word it finds, and its KL."""
    target = dirichlet(contexts, words, seed)
    torch.manual_seed(seed)
    model = FreeContexts(contexts, build(name, width, words, COMPONENTS, KNOTS)).double()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=RATE, eps=1e-10)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, 2 * (1 - step / steps) + 0.02)
        optimizer.zero_grad()
        (-(target * model()).sum() / contexts).backward()
        assert model.contexts.grad is not None
        model.contexts.grad *= contexts  # each context learns from its own loss
        optimizer.step()
    with torch.no_grad():
        log_prob = model()
        matched = (log_prob.argmax(-1) == target.argmax(-1)).double().mean()
        entropy = -torch.special.entr(target).sum(-1).mean()
        kl = -(target * log_prob).sum(-1).mean() + entropy
    return {"mode_matched_percent": round(100 * float(matched), 2), "kl_nats": round(float(kl), 4), "steps": steps}
