"""to_onnx: `topk` of a screen or of a layer as a file for ONNX Runtime, which needs nothing of this library."""

from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
import torch
from onnx import external_data_helper, helper, numpy_helper
from torch import Tensor, nn

from lastlayer.export.graph import TYPES, Graph
from lastlayer.export.screen import HeadGraph, ScreenGraph
from lastlayer.functional.checks import check_count
from lastlayer.functional.ordinary import ordinary
from lastlayer.functional.precision import exact_dtype
from lastlayer.functional.results import ScreenedTopK
from lastlayer.layers.softmax_head import SoftmaxHead
from lastlayer.screening.screened import ScreenedSoftmax
from lastlayer.version import __version__

INPUT = "hidden"
EMBEDDED = 1 << 30  # bytes of constants in the model itself; a protocol buffer ends at 2 GiB
SMALL = 1 << 10  # bytes of a constant that is always in the model: shapes depend on such


def to_onnx(screen_or_layer: nn.Module, path: str | Path, *, k: int = 10) -> None:
    """Writes `screen_or_layer.topk(hidden, k)` as an ONNX model, for any number of rows.

    The input is `hidden (batch, d)`, float32 (float64 for a float64 weight); the outputs, named as in Python:

    | output | shape | of |
    |---|---|---|
    | `log_prob` | `(batch, k)` | all |
    | `indices` | `(batch, k)`, int64 | all |
    | `certified` | `(batch,)`, bool | screens |

    Standard operators of opset 18 only. A screen is exported as what it is: its preview by an integer (or narrow)
    matrix product, the candidates' rows gathered and rescored, the certificate. With `exact=True` the rows that
    are not certified get the full layer's result, within the graph; log-probabilities of the others are under the
    screen's normaliser.

    Args:
        screen_or_layer: a `ScreenedSoftmax` with an `Int8Preview` or an `SVDPreview`; or a layer that ends in one
            softmax over the logits of a matrix: `FullSoftmax`, `SampledSoftmax`, `NoiseContrastive`,
            `NegativeSampling`, `BlackOut`. Logit maps of the library are part of the graph; one of your own where
            it has `to_graph`.
        path: the file. Where the constants take more than 1 GiB they are in a second file, `path` + ".data", which
            has to stay beside it.
        k: classes a row, from 1 to the screen's candidates, or to the layer's classes.

    Raises:
        TypeError: a layer, preview or logit map that has no graph.
        ValueError: `k` out of range; a path whose folder is not there; a layer on "meta", or divided among
            processes.
        RuntimeError: a screen whose weight has changed since it was prepared.
        ImportError: the package onnx is missing (`pip install 'lastlayer[onnx]'`).

    Nothing is written then.

    Cost: the file holds the float32 weight and the preview; ONNX Runtime keeps another copy of the weight,
    rearranged for its matrix product. When NOT to use a screen: for large batches. For 64 rows ONNX Runtime's full
    layer was the faster one (docs/export.md): the graph of a screen with `use="fastest"` computes it from 48 rows
    on, of one with `use="screen"` only where `batch * candidates >= V`: the gathered rows are then more than all.

    >>> import torch, onnxruntime
    >>> from lastlayer import Int8Preview, ScreenedSoftmax
    >>> from lastlayer.export import to_onnx
    >>> screen = ScreenedSoftmax(torch.randn(1000, 32), preview=Int8Preview(), candidates=50, exact=True)
    >>> to_onnx(screen, "head.onnx", k=5)
    >>> session = onnxruntime.InferenceSession("head.onnx")
    >>> hidden = torch.randn(3, 32)
    >>> log_prob, indices, certified = session.run(None, {"hidden": hidden.numpy()})
    >>> bool((torch.from_numpy(indices) == screen.topk(hidden, 5).indices).all()), bool(certified.all())
    (True, True)
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"path must be a file in a folder that is there, got {str(path)!r}")
    if isinstance(screen_or_layer, ScreenedSoftmax):
        graph, outputs = _of_screen(screen_or_layer, k)
    elif isinstance(screen_or_layer, SoftmaxHead):
        graph, outputs = _of_layer(screen_or_layer, k)
    else:
        raise TypeError(
            "screen_or_layer must be a ScreenedSoftmax, or a layer that is a softmax over the logits of one "
            f"matrix, such as FullSoftmax; {type(screen_or_layer).__name__} has no ONNX graph"
        )
    number = TYPES[graph.dtype]
    kinds = {
        "hidden": (number, ["batch", screen_or_layer.in_features]),
        "log_prob": (number, ["batch", k]),
        "indices": (TYPES[torch.int64], ["batch", k]),
        "certified": (TYPES[torch.bool], ["batch"]),
    }
    for name, output in outputs.items():
        graph.rename(output, name)
    hidden, *results = (helper.make_tensor_value_info(name, *kinds[name]) for name in (INPUT, *outputs))
    model = graph.model([hidden], results)
    model.producer_name, model.producer_version = "lastlayer", __version__
    model.doc_string = f"topk(hidden, {k}) of {screen_or_layer}"
    _save(model, graph.constants, path)


def _of_screen(screen: ScreenedSoftmax, k: int) -> tuple[Graph, dict[str, str]]:
    check_count("k", k, 1, screen.candidates)
    screen._check_fresh()
    graph = _graph_of(screen.weight)
    results = ScreenGraph(graph, screen).topk(INPUT, k)
    return graph, dict(zip(ScreenedTopK._fields, results, strict=True))


def _of_layer(layer: SoftmaxHead, k: int) -> tuple[Graph, dict[str, str]]:
    check_count("k", k, 1, layer.num_classes)
    graph = _graph_of(layer.weight)
    log_prob, indices, _ = HeadGraph(graph, *layer.linear_head()).full(INPUT, k)
    return graph, {"log_prob": log_prob, "indices": indices}


def _graph_of(weight: Tensor) -> Graph:
    if not ordinary(weight.detach()):  # on "meta", or a DTensor
        raise ValueError("screen_or_layer must have its whole weight in the memory of this process")
    return Graph(exact_dtype(weight.dtype))


def _save(model: onnx.ModelProto, constants: dict[str, Tensor], path: Path) -> None:
    """Writes `path`, and `path` with ".data" appended where the constants take more than EMBEDDED bytes.

    Both are written in a folder beside their place and then moved: on failure there is nothing new.
    """
    are_large = sum(tensor.nbytes for tensor in constants.values()) > EMBEDDED
    for name, tensor in constants.items():
        proto = numpy_helper.from_array(tensor.numpy(), name)
        if are_large and tensor.nbytes > SMALL:
            external_data_helper.set_external_data(proto, path.name + ".data")
        model.graph.initializer.append(proto)
    with TemporaryDirectory(".partial", f".{path.name}.", path.parent) as folder:
        onnx.save_model(model, Path(folder) / path.name, format="protobuf")
        for written in sorted(Path(folder).iterdir(), reverse=True):  # the constants first
            written.replace(path.with_name(written.name))
