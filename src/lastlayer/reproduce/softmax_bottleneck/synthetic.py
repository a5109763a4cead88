"""Mode matching on random distributions: what a softmax of few dimensions cannot express, without an encoder."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lastlayer.functional.logit_map import LogitMap
from lastlayer.layers.mixture import MixtureOfSoftmaxes
from lastlayer.layers.monotone_network import MonotoneNetwork
from lastlayer.layers.plif import PLIF
from lastlayer.layers.sigsoftmax import Sigsoftmax

STEPS, RATE = 2500, 0.02
CONCENTRATION = 0.01
MAPS: dict[str, Callable[[], LogitMap | None]] = {
    "softmax": lambda: None,
    "sigsoftmax": Sigsoftmax,
    "PLIF": lambda: PLIF(100, 20.0),
    "frozen PLIF": lambda: PLIF(100, 20.0, init_std=1.0, frozen=True),
    "monotone network": lambda: MonotoneNetwork(10),
}
MODELS = (*MAPS, "mixture of 3")


class MappedSoftmax(nn.Module):
    """`log_softmax(f(contexts @ words.T + bias))`: every context has a vector of its own."""

    def __init__(self, contexts: int, words: int, width: int, logit_map: LogitMap | None) -> None:
        super().__init__()
        self.contexts = nn.Parameter(0.5 * torch.randn(contexts, width))
        self.words = nn.Parameter(0.5 * torch.randn(words, width))
        self.bias = nn.Parameter(torch.zeros(words))
        self.logit_map = logit_map

    def forward(self) -> Tensor:  # (contexts, words)
        logits = self.contexts @ self.words.T + self.bias
        return (logits if self.logit_map is None else self.logit_map(logits)).log_softmax(-1)


class Mixed(nn.Module):
    """A mixture of softmaxes over free context vectors."""

    def __init__(self, contexts: int, words: int, width: int, components: int) -> None:
        super().__init__()
        self.contexts = nn.Parameter(0.5 * torch.randn(contexts, width))
        self.mixture = MixtureOfSoftmaxes(width, words, components)

    def forward(self) -> Tensor:  # (contexts, words)
        return self.mixture.log_prob(self.contexts)


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
    if name in MAPS:
        model: nn.Module = MappedSoftmax(contexts, words, width, MAPS[name]())
    else:
        model = Mixed(contexts, words, width, 3)
    model.double()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=RATE, eps=1e-10)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, 2 * (1 - step / steps) + 0.02)
        optimizer.zero_grad()
        loss = -(target * model()).sum() / contexts
        loss.backward()
        assert model.contexts.grad is not None  # pyright: ignore[reportAttributeAccessIssue]
        model.contexts.grad *= contexts  # each context learns from its own loss  # pyright: ignore
        optimizer.step()
    with torch.no_grad():
        log_prob = model()
        matched = (log_prob.argmax(-1) == target.argmax(-1)).double().mean()
        entropy = -torch.special.entr(target).sum(-1).mean()
        kl = -(target * log_prob).sum(-1).mean() + entropy
    return {"mode_matched_percent": round(100 * float(matched), 2), "kl_nats": round(float(kl), 4), "steps": steps}
