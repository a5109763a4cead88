"""`linear_statistics` against plain PyTorch: the head's part of a GRPO and a DPO step, time and memory.

python benchmarks/linear_statistics.py [--rows 1024] [--num-classes 128256] [--rounds 4] [--results PATH]

The plain way holds about nine `(rows, classes)` tensors: 5 GB at the default sizes. A round takes some 15 s.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lastlayer.functional import LinearStatistics, linear_statistics
from lastlayer.study.measuring.measure import interleaved, peak_bytes, write_records

RESULTS = Path(__file__).parent / "results" / "linear_statistics.json"
IN_FEATURES = 512
PLAIN, OURS = "F.linear + log_softmax", "linear_statistics"


class Heads(NamedTuple):
    """The heads of a policy and its reference, their hidden states, and the sampled tokens."""

    hidden: Tensor  # (N, d)
    weight: Tensor  # (V, d)
    other_hidden: Tensor  # (N, d)
    other_weight: Tensor  # (V, d)
    targets: Tensor  # (N,)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--num-classes", type=int, default=128_256)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    heads = make_heads(arguments.rows, arguments.num_classes)
    records = []
    for case, loss in {"GRPO": grpo, "DPO": dpo}.items():
        records += measure(case, loss, heads, arguments.rounds)
    for record in records:
        print("  ".join(f"{key}={value}" for key, value in record.items()))
    write_records(
        arguments.results,
        records,
        notes="forward + backward of the head, gradients of hidden and weight; memory beyond the parameters and "
        "their gradients",
    )


def make_heads(rows: int, num_classes: int) -> Heads:
    """Random ones; the reference is near the policy."""
    hidden, weight = torch.randn(rows, IN_FEATURES), torch.randn(num_classes, IN_FEATURES) * IN_FEATURES**-0.5
    other_hidden, other_weight = hidden + 0.1 * torch.randn_like(hidden), weight.clone()
    targets = torch.randint(num_classes, (rows,))
    return Heads(hidden.requires_grad_(), weight.requires_grad_(), other_hidden, other_weight, targets)


def grpo(found: LinearStatistics) -> Tensor:
    """The loss at the policy that sampled: the ratio is 1, its gradient is not 0."""
    assert found.target_log_prob is not None
    assert found.kl is not None
    ratio = (found.target_log_prob - found.target_log_prob.detach()).exp()
    advantages = torch.linspace(-1, 1, len(ratio))
    return (0.04 * found.kl - ratio * advantages - 0.001 * found.entropy).mean()


def dpo(found: LinearStatistics) -> Tensor:
    """The first half of the rows are the preferred answer, the second the rejected one."""
    assert found.target_log_prob is not None
    assert found.reference_target_log_prob is not None
    preferred, rejected = (found.target_log_prob - found.reference_target_log_prob).chunk(2)
    return -F.logsigmoid(0.1 * (preferred.sum() - rejected.sum()))


def ours(heads: Heads) -> LinearStatistics:
    """All statistics, in chunks."""
    hidden, weight, other_hidden, other_weight, targets = heads
    return linear_statistics(hidden, weight, targets, reference=(other_hidden, other_weight))


def plain(heads: Heads, divergence: bool) -> LinearStatistics:
    """What a trainer writes: log-probabilities of both heads; entropy and divergence where the loss has them."""
    hidden, weight, other_hidden, other_weight, targets = heads
    log_prob = F.linear(hidden, weight).log_softmax(-1)
    with torch.no_grad():
        reference = F.linear(other_hidden, other_weight).log_softmax(-1)
    at = targets[:, None]
    target, of_reference = log_prob.gather(-1, at)[:, 0], reference.gather(-1, at)[:, 0]
    nothing = target[:0]
    if not divergence:
        return LinearStatistics(target, nothing, nothing, None, None, None, of_reference)
    prob = log_prob.exp()
    entropy, kl = -(prob * log_prob).sum(-1), (prob * (log_prob - reference)).sum(-1)
    return LinearStatistics(target, nothing, entropy, None, None, kl, of_reference)


def measure(
    case: str, loss: Callable[[LinearStatistics], Tensor], heads: Heads, rounds: int
) -> list[dict[str, Any]]:
    """One record a peer."""
    leaves = heads.hidden, heads.weight

    def step(statistics: Callable[[], LinearStatistics]) -> Callable[[], None]:
        def run() -> None:
            for leaf in leaves:
                leaf.grad = None
            loss(statistics()).backward()

        return run

    few = heads._replace(
        hidden=heads.hidden[:16], other_hidden=heads.other_hidden[:16], targets=heads.targets[:16]
    )
    step(lambda: ours(few))()  # the engine is loaded before memory is measured
    peers = {PLAIN: step(lambda: plain(heads, divergence=loss is grpo)), OURS: step(lambda: ours(heads))}
    gradient_bytes = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
    memory = {}
    for name, run in peers.items():  # the first run of each, so the warm-up too
        for leaf in leaves:
            leaf.grad = None
        memory[name] = peak_bytes(run) - gradient_bytes
    timings = interleaved(peers, rounds=rounds, warmup=0)
    return [
        {
            "case": case,
            "name": name,
            "num_classes": len(heads.weight),
            "in_features": IN_FEATURES,
            "rows": len(heads.hidden),
            **timing.rounded(),
            "ratio_to_plain": round(timing.ms / timings[PLAIN].ms, 3),
            "peak_bytes": memory[name],
            "memory_ratio_to_plain": round(memory[name] / memory[PLAIN], 4),
        }
        for name, timing in timings.items()
    ]


if __name__ == "__main__":
    main()
