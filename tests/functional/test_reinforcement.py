"""The losses of `docs/reinforcement.md` equal those of the plain way, which holds all `(N, V)` logits."""

import pytest
import torch

from lastlayer.functional import LinearStatistics, linear_chunks
from pages import ROOT, run_page


@pytest.fixture(scope="module")
def page():
    torch.manual_seed(0)
    names = run_page(ROOT / "docs" / "reinforcement.md")
    with torch.no_grad():  # the reference that the policy has moved away from
        for parameter in names["policy"].double().parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    names["reference"].double()
    return names


def plain_statistics(page, tokens, in_answer, temperature=1.0):
    def log_prob(model):
        return (model.head(model(tokens[:, :-1])) / temperature).log_softmax(-1)

    own, other = log_prob(page["policy"]), log_prob(page["reference"])
    targets, kept = tokens[:, 1:, None], in_answer[:, 1:]
    return LinearStatistics(
        own.gather(-1, targets)[..., 0] * kept,
        (own * 0).sum(-1),
        -(own.exp() * own).sum(-1) * kept,
        None,
        kl=(own.exp() * (own - other)).sum(-1) * kept,
        reference_target_log_prob=other.gather(-1, targets)[..., 0] * kept,
    )


def both_ways(page, loss):
    """Value and gradients of `loss(statistics)` by the page's statistics and by the plain ones."""
    leaves = list(page["policy"].parameters())
    values = [loss(page["statistics"]), loss(lambda *arguments: plain_statistics(page, *arguments))]
    return [(value.detach(), *torch.autograd.grad(value, leaves)) for value in values]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of a few rows, the last one not full."""
    monkeypatch.setattr(linear_chunks, "CHUNK_BYTES", 5 * 500 * 8)


def test_grpo(page):
    tokens, advantages = page["tokens"], torch.tensor([1.0, -1.0, 0.5, 0.0]).double()
    in_answer = (torch.arange(12) >= 5) & (torch.arange(12) < torch.tensor([[12], [9], [11], [12]]))
    old = plain_statistics(page, tokens, in_answer, 0.9).target_log_prob.detach()
    old = old + torch.linspace(-0.5, 0.5, old.numel()).view_as(old)  # ratios within the clip and beyond it

    def loss(statistics):
        return page["grpo_loss"](statistics(tokens, in_answer, 0.9), old, advantages, in_answer[:, 1:])

    ours, theirs = both_ways(page, loss)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_dpo(page):
    pairs, in_answer = (page["preferred"], page["rejected"]), page["in_answer"]

    def loss(statistics):
        return page["dpo_loss"](*(statistics(tokens, in_answer) for tokens in pairs))

    ours, theirs = both_ways(page, loss)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
