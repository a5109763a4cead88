"""Greedy text of SmolLM2 with its own head and the screened one; the head's share says what is possible."""

import time
from statistics import median

import torch

from lastlayer.study.measuring.measure import Timing, interleaved
from lastlayer.transformers import replace_lm_head
from screens.common import Record, exact_screen_in_four, real_head, smollm2

PROMPTS = (
    "The history of the city began",
    "Q: Why is the sky blue? A:",
    "def fibonacci(n):\n",
    "Once upon a time, in a small village by the sea,",
)
NEW_TOKENS, ROUNDS = 48, 2
OWN, SCREENED = "own head", "screened head"


def decoding(new_tokens: int = NEW_TOKENS) -> list[Record]:
    """Same text, tokens a second, the head's share of a step."""
    head = smollm2()
    model, tokenizer = head.model, head.tokenizer
    own = model.get_output_embeddings()
    heads = {OWN: own, SCREENED: exact_screen_in_four(own.weight, real_head()[1])}
    settings = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    prompts = [tokenizer(prompt, return_tensors="pt") for prompt in PROMPTS]
    seconds: dict[str, list[float]] = {name: [] for name in heads}
    texts: dict[tuple[int, str], torch.Tensor] = {}
    with torch.inference_mode():
        for module in heads.values():
            with replace_lm_head(model, module):
                model.generate(**prompts[0], **settings | {"max_new_tokens": 4})
        for turn in range(ROUNDS * len(prompts)):
            number = turn % len(prompts)
            for name in (OWN, SCREENED) if turn % 2 else (SCREENED, OWN):
                with replace_lm_head(model, heads[name]):
                    start = time.perf_counter()
                    texts[number, name] = model.generate(**prompts[number], **settings)
                    taken = time.perf_counter() - start
                made = texts[number, name].shape[1] - prompts[number].input_ids.shape[1]
                seconds[name].append(taken / made)
        rows = iter(real_head()[2].split(1) * 2)
        alone = interleaved({name: lambda m=m: m(next(rows)[None]) for name, m in heads.items()}, rounds=41)
    records = rates(seconds, alone)
    same = [bool(torch.equal(texts[i, OWN], texts[i, SCREENED])) for i in range(len(prompts))]
    words = [tokenizer.decode(texts[i, SCREENED][0]) for i in range(len(prompts))]
    found = {"prompts": len(same), "identical": sum(same), "new_tokens": new_tokens, "texts": words}
    return [*records, {"case": "same text", **found}]


def rates(seconds: dict[str, list[float]], alone: dict[str, Timing]) -> list[Record]:
    """Milliseconds a token, and what the head's own time lets one expect."""
    step = {name: 1e3 * median(taken) for name, taken in seconds.items()}
    saved = alone[OWN].ms - alone[SCREENED].ms
    return [
        {
            "case": "greedy decoding",
            "name": name,
            "ms_per_token": step[name],
            "low_ms": 1e3 * min(taken),
            "high_ms": 1e3 * max(taken),
            "tokens_per_second": 1e3 / step[name],
            "head_ms": alone[name].ms,
            "head_share": alone[name].ms / step[name],
            "times_faster": step[OWN] / step[name],
            "times_faster_expected": 1.0 if name == OWN else step[OWN] / (step[OWN] - saved),
        }
        for name, taken in seconds.items()
    ]
