"""Other ways to the ten best classes of SmolLM2's head: PyTorch in 8 bits, FAISS, hnswlib; recall and time.

Built indexes are kept in STORE. hnswlib has no wheel everywhere; where it cannot be imported it is left out.
"""

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from screens.common import (
    STORE,
    Call,
    K,
    Record,
    Truth,
    exact_screen,
    exact_screen_in_four,
    full_layers,
    measured,
    real_head,
    share,
    svd_screen,
)

QUERIES = 512
LINKS, BUILDING = 32, 200  # of the graphs: M and efConstruction
LISTS, PROBES, REACHES = 256, (8, 32, 128), (100, 400, 1600)


def peers(num_queries: int = QUERIES) -> list[Record]:
    """Recall of the true top 10 on held-out queries, time at batch 1, and whether probabilities come with it."""
    weight, calibration, held_out = real_head()
    held_out = held_out[:num_queries]
    ours = {
        "int4, exact": exact_screen_in_four(weight, calibration),
        "int8, exact": exact_screen(weight),
        "SVD d/8, 1,024 candidates, calibrated": svd_screen(
            weight, weight.shape[-1] // 8, 1024, calibration=calibration
        ),
    }
    calls = full_layers(weight)
    indices: dict[str, Call] = {name: lambda h, call=call: call(h).indices for name, call in calls.items()}
    indices |= eight_bits(weight)
    indices |= {name: lambda h, screen=screen: screen.topk(h, K).indices for name, screen in ours.items()}
    with_probabilities = set(indices)  # all logits, or a normaliser: what follows finds neighbours alone
    indices |= faiss_indexes(weight)
    indices |= hnswlib_graph(weight)
    truth = Truth.of(weight, held_out).indices
    records = measured(indices, held_out, 1, 21)
    for record in records:
        search = indices[record["name"]]
        with torch.inference_mode():
            found = torch.cat([torch.as_tensor(search(row)).long() for row in held_out.split(1)])
        record["recall"] = share((found.unsqueeze(-1) == truth.unsqueeze(-2)).any(-2))
        record["probabilities"] = record["name"] in with_probabilities
    return records


def build_indexes() -> None:
    """Builds what is not on disk yet."""
    weight, _, _ = real_head()
    faiss_indexes(weight)
    hnswlib_graph(weight)


def eight_bits(weight: Tensor) -> dict[str, Call]:
    """PyTorch's own 8-bit weights: packed and multiplied in bfloat16; and the dynamic quantisation of modules."""
    scale = weight.abs().amax(-1) / 127
    packed = (weight / scale[:, None]).round().to(torch.int8)
    scale = scale.bfloat16()
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    found: dict[str, Call] = {
        "PyTorch int8 weight only (_weight_int8pack_mm, bfloat16)": lambda h: (
            torch.ops.aten._weight_int8pack_mm(h.bfloat16(), packed, scale).topk(K).indices
        )
    }
    quantize = getattr(getattr(torch, "ao", None), "quantization", None)
    if quantize is not None and hasattr(quantize, "quantize_dynamic"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # announces its end
            dynamic = quantize.quantize_dynamic(nn.Sequential(linear), {nn.Linear}, dtype=torch.qint8)
        found["PyTorch quantize_dynamic, int8"] = lambda h: dynamic(h).topk(K).indices
    return found


def faiss_indexes(weight: Tensor) -> dict[str, Call]:
    """FAISS: every row, inverted lists, graph; all by inner product."""
    if importlib.util.find_spec("faiss") is None:
        print("FAISS is not installed: left out")
        return {}
    import faiss

    vectors, width = weight.numpy(), weight.shape[1]
    faiss.omp_set_num_threads(torch.get_num_threads())
    flat = faiss.IndexFlatIP(width)
    flat.add(vectors)

    def inverted() -> Any:
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, LISTS, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors)
        index.add(vectors)
        return index

    def linked() -> Any:
        index = faiss.IndexHNSWFlat(width, LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = BUILDING
        index.add(vectors)
        return index

    def kept(name: str, build: Callable[[], Any]) -> Any:
        return on_disk(name, build, lambda index, path: faiss.write_index(index, str(path)), faiss.read_index)

    lists, graph = kept("faiss-ivf", inverted), kept("faiss-hnsw", linked)

    def probing(probes: int) -> Call:
        settings = faiss.SearchParametersIVF(nprobe=probes)  # pyright: ignore[reportCallIssue]
        return lambda h: lists.search(h.numpy(), K, params=settings)[1]

    def reaching(reach: int) -> Call:
        settings = faiss.SearchParametersHNSW(efSearch=reach)  # pyright: ignore[reportAttributeAccessIssue]
        return lambda h: graph.search(h.numpy(), K, params=settings)[1]

    found: dict[str, Call] = {"FAISS flat": lambda h: flat.search(h.numpy(), K)[1]}
    found |= {f"FAISS IVF {LISTS}, {probes} probed": probing(probes) for probes in PROBES}
    return found | {f"FAISS HNSW M={LINKS}, ef={reach}": reaching(reach) for reach in REACHES}


def hnswlib_graph(weight: Tensor) -> dict[str, Call]:
    """hnswlib's graph, where it can be imported."""
    if importlib.util.find_spec("hnswlib") is None:
        print("hnswlib is not installed: left out")
        return {}
    hnswlib = importlib.import_module("hnswlib")
    vectors = weight.numpy()

    def build() -> Any:
        graph = hnswlib.Index(space="ip", dim=vectors.shape[1])
        graph.init_index(max_elements=len(vectors), ef_construction=BUILDING, M=LINKS)
        graph.add_items(vectors, num_threads=torch.get_num_threads())
        return graph

    def load(path: str) -> Any:
        graph = hnswlib.Index(space="ip", dim=vectors.shape[1])
        graph.load_index(path, max_elements=len(vectors))
        return graph

    def reaching(reach: int) -> Call:
        def search(hidden: Tensor) -> Any:
            graph.set_ef(reach)
            return graph.knn_query(hidden.numpy(), k=K, num_threads=1)[0].astype("int64")

        return search

    graph = on_disk("hnswlib", build, lambda index, path: index.save_index(str(path)), load)
    return {f"hnswlib M={LINKS}, ef={reach}": reaching(reach) for reach in REACHES[1:]}


def on_disk(
    name: str, build: Callable[[], Any], write: Callable[[Any, Path], object], read: Callable[[str], Any]
) -> Any:
    """An index that takes minutes to build, kept in STORE."""
    path = STORE / f"{name}.index"
    if path.exists():
        return read(str(path))
    index, temporary = build(), path.with_suffix(".partial")
    write(index, temporary)
    temporary.replace(path)
    return index
