"""A training step of a Llama-like model, plain and with chunked_loss: memory, time, distance of the loss.

python benchmarks/chunked_loss.py [--num-classes 128256] [--width 512] [--tokens 2048] [--rounds 5]

About two minutes at the default sizes, and 5 GB of memory.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lastlayer.study.measuring.measure import interleaved, peak_bytes, write_records
from lastlayer.transformers import chunked_loss
from transformers import LlamaConfig, LlamaForCausalLM

RESULTS = Path(__file__).parent / "results" / "chunked_loss.json"


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--num-classes", type=int, default=128_256)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = llama(arguments.num_classes, arguments.width, arguments.tokens)
    ids = torch.randint(arguments.num_classes, (1, arguments.tokens))
    records = measured(model, ids, arguments.rounds)
    for record in records:
        print("  ".join(f"{key}={value}" for key, value in record.items()))
    write_records(arguments.results, records, notes=NOTES)


NOTES = (
    "forward + backward of a one-block Llama, float32. Memory is the peak beyond the parameters and the gradients "
    "that the step leaves; head_with_gradients_bytes counts these too. head: from the last hidden states on"
)


def llama(num_classes: int, width: int, tokens: int) -> LlamaForCausalLM:
    """One block, so that the head is nearly all of it, as it is of small models with so many classes."""
    config = LlamaConfig(
        vocab_size=num_classes,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=8,
        max_position_embeddings=tokens,
    )
    return LlamaForCausalLM(config).train()


def measured(model: LlamaForCausalLM, ids: Tensor, rounds: int) -> list[dict[str, Any]]:
    """One record for the plain model and one for the chunked loss."""

    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state
    hidden.requires_grad_()

    def whole() -> float:
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        return loss.item()

    def head() -> None:
        model.zero_grad()
        hidden.grad = None
        # Nothing holds the logits when the backward pass begins, as in a training loop that drops the output.
        loss = model.loss_function(model.lm_head(hidden), ids, vocab_size=model.config.vocab_size)
        loss.backward()

    def chunked(step: Callable[[], Any]) -> Callable[[], Any]:
        def of_chunks() -> Any:
            with chunked_loss(model):
                return step()

        return of_chunks

    steps = {"plain": (whole, head), "chunked_loss": (chunked(whole), chunked(head))}
    losses = {name: step() for name, (step, _) in steps.items()}
    timings = interleaved({name: step for name, (step, _) in steps.items()}, rounds=rounds, warmup=1)
    records = []
    for name, (step, head_step) in steps.items():
        leaves = [hidden, *model.parameters()]
        step_bytes, of_step = peak(step, leaves)
        head_bytes, of_head = peak(head_step, leaves)
        records.append(
            {
                "case": "training step",
                "name": name,
                "num_classes": model.config.vocab_size,
                "in_features": model.config.hidden_size,
                "batch": ids.numel(),
                **timings[name].rounded(),
                "step_bytes": step_bytes - of_step,
                "head_bytes": head_bytes - of_head,
                "head_with_gradients_bytes": head_bytes,
                "loss": losses[name],
            }
        )
    first = records[0]
    for record in records:
        for field in ("ms", "step_bytes", "head_bytes", "head_with_gradients_bytes"):
            record[f"{field.removesuffix('_bytes')}_ratio_to_plain"] = round(record[field] / first[field], 4)
        record["loss_difference"] = abs(record["loss"] - first["loss"]) / first["loss"]
    return records


def peak(step: Callable[[], object], leaves: list[Tensor]) -> tuple[int, int]:
    """The most memory that a step holds, and how much of it are the gradients of `leaves` that it leaves."""
    for leaf in leaves:
        leaf.grad = None
    most = peak_bytes(step)
    return most, sum(leaf.grad.nbytes for leaf in leaves if leaf.grad is not None)


if __name__ == "__main__":
    main()
