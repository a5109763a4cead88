"""The exact screen of SmolLM2's head in ONNX Runtime, beside ONNX Runtime's own full head.

    python benchmarks/screening.py states      hidden states of SmolLM2 over WikiText-2 (minutes, once)
    python benchmarks/onnx_export.py [N]       top-10 at batch 1 to 64; agreement on N = 4,096 held-out states

With a number of states of one's own, what is measured is shown, not written. The screens take every batch here
(`use="screen"`); the graph of one with `use="fastest"` computes the full layer from FULL_FROM rows on.
"""

import sys
import tempfile
import time
from pathlib import Path

import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from lastlayer import FullSoftmax, Int8Preview, ScreenedSoftmax
from lastlayer.export import to_onnx
from lastlayer.study.measuring.measure import write_records
from screens.common import HELD_OUT, Call, K, Record, Truth, full_layers, measured, real_head, share

RESULTS = Path(__file__).parent / "results" / "onnx_export.json"
CANDIDATES = (96, 256)
ROUNDS = {1: 31, 8: 15, 16: 11, 32: 9, 64: 7}  # by batch
COMPARED = (1, 8)  # rows of a query whose results are compared
FULL_HEAD, EXPORTED = "onnxruntime, full head by MatMul", "onnxruntime, FullSoftmax exported"


def main(num_states: int = HELD_OUT) -> list[Record]:
    """The results file's records."""
    weight, _, held_out = real_head()
    truth = Truth.of(weight, held_out[:num_states])
    layer = FullSoftmax(weight.shape[1], len(weight), bias=False, weight=torch.nn.Parameter(weight))
    screens = {f"{count} candidates": exact_screen(weight, count) for count in CANDIDATES}
    exported = {EXPORTED: layer}
    exported |= {f"onnxruntime, screen of {name}": screen for name, screen in screens.items()}
    sessions, records = {FULL_HEAD: full_head(weight)}, []
    with tempfile.TemporaryDirectory() as folder:
        for name, module in exported.items():
            path = Path(folder) / "head.onnx"
            start = time.perf_counter()
            to_onnx(module, path, k=K)
            wrote = time.perf_counter()
            sessions[name] = onnxruntime.InferenceSession(path, session_options())
            loaded = time.perf_counter() - wrote
            records.append({"case": "file", "name": name, "bytes": path.stat().st_size, "seconds": wrote - start})
            records[-1]["seconds_to_load"] = loaded
    calls: dict[str, Call] = {name: in_session(session) for name, session in sessions.items()}
    expected = [torch.cat(column) for column in zip(*map(calls[FULL_HEAD], truth.hidden.split(8)), strict=True)]
    for name in exported:
        records += [{"name": name, **agreement(calls[name], truth, expected, rows)} for rows in COMPARED]
    calls |= full_layers(weight)
    for name, screen in screens.items():
        calls[f"lastlayer, screen of {name}"] = lambda hidden, screen=screen: screen.topk(hidden, K)
    for batch, rounds in ROUNDS.items():
        timed = measured(calls, held_out, batch, rounds)
        full_ms = min(record["ms"] for record in timed if record["name"] in (FULL_HEAD, EXPORTED))
        records += [record | {"times_faster_than_onnxruntime_full": full_ms / record["ms"]} for record in timed]
    return records


def exact_screen(weight: Tensor, candidates: int) -> ScreenedSoftmax:
    """A screen whose every result is proved equal to the full layer's."""
    return ScreenedSoftmax(weight, preview=Int8Preview(), candidates=candidates, exact=True, use="screen")


def full_head(weight: Tensor) -> onnxruntime.InferenceSession:
    """The full layer as it is usually exported: a matrix product by the transposed weight, top-k, log-softmax."""
    constants = {"columns": weight.T.contiguous(), "k": torch.tensor([K])}
    nodes = [
        helper.make_node("MatMul", ["hidden", "columns"], ["logits"]),
        helper.make_node("TopK", ["logits", "k"], ["values", "indices"], axis=1),
        helper.make_node("LogSoftmax", ["logits"], ["every"], axis=1),
        helper.make_node("GatherElements", ["every", "indices"], ["log_prob"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "full",
        [helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["batch", weight.shape[1]])],
        [
            helper.make_tensor_value_info("log_prob", TensorProto.FLOAT, ["batch", K]),
            helper.make_tensor_value_info("indices", TensorProto.INT64, ["batch", K]),
        ],
        [numpy_helper.from_array(value.numpy(), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 18)])
    return onnxruntime.InferenceSession(model.SerializeToString(), session_options())


def session_options() -> onnxruntime.SessionOptions:
    """As many threads as PyTorch has; they do not spin between calls, which would slow the other peers."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def in_session(session: onnxruntime.InferenceSession) -> Call:
    """The session as a function of hidden states."""
    return lambda hidden: [torch.from_numpy(part) for part in session.run(None, {"hidden": hidden.numpy()})]


def agreement(call: Call, truth: Truth, expected: list[Tensor], rows: int) -> Record:
    """Results of `rows` states at a time beside those of ONNX Runtime's and of PyTorch's full layer."""
    log_prob, indices, *certified = (
        torch.cat(column) for column in zip(*map(call, truth.hidden.split(rows)), strict=True)
    )
    chosen = torch.stack([truth.weight[at] @ h for at, h in zip(indices, truth.hidden, strict=True)])
    return {
        "case": "agreement",
        "rows_together": rows,
        "states": len(truth.hidden),
        "identical_to_onnxruntime": share((indices == expected[1]).all(-1)),
        "identical_to_pytorch": share((indices == truth.indices).all(-1)),
        "logit_difference_from_pytorch": float((chosen - truth.values).abs().max()),
        "log_prob_difference_from_onnxruntime": float((log_prob - expected[0]).abs().max()),
        "certified": share(certified[0]) if certified else None,
    }


if __name__ == "__main__":
    found = main(*map(int, sys.argv[1:]))
    for record in found:
        print({name: round(value, 4) if isinstance(value, float) else value for name, value in record.items()})
    if len(sys.argv) == 1:
        write_records(
            RESULTS, found, notes=f"top-{K} with log-probabilities; onnxruntime {onnxruntime.__version__}"
        )
