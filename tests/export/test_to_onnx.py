"""Exported screens and layers in ONNX Runtime: the results of PyTorch, for any batch, or an error and no file."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from lastlayer import (
    PLIF,
    AdaptiveSoftmax,
    FactoredOutput,
    FullSoftmax,
    HierarchicalSoftmax,
    Int4Preview,
    Int8Preview,
    LogitMap,
    MixtureOfSoftmaxes,
    MonotoneNetwork,
    NegativeSampling,
    OneVsAll,
    SampledSoftmax,
    ScreenedSoftmax,
    Sigsoftmax,
    SoftCap,
    SVDPreview,
    TopKSoftmax,
    TreeSoftmax,
    Uniform,
)
from lastlayer.distributed import shard
from lastlayer.kernels.screening import WHOLE

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from lastlayer.export import onnx as export  # noqa: E402
from lastlayer.export import to_onnx  # noqa: E402
from lastlayer.export.screen import FULL_FROM, ZERO_POINT  # noqa: E402
from lastlayer.transformers.after_head import ScaledLogits  # noqa: E402

V, D, K = 600, 20, 4
PREVIEWS = {
    "int8": Int8Preview(),
    "svd": SVDPreview(10),
    "svd, bfloat16": SVDPreview(10, storage="bfloat16"),
    "svd, int8": SVDPreview(10, storage="int8"),
}


def head(dtype=torch.float32, num_classes=V):
    """A weight some of whose directions matter little, so that both previews are of use, and a bias."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(num_classes, D, generator=generator) * torch.linspace(2, 0.01, D) ** 2
    return weight.to(dtype), torch.randn(num_classes, generator=generator).to(dtype)


def states(rows, dtype=torch.float32, seed=1):
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def screened(preview=PREVIEWS["int8"], dtype=torch.float32, candidates=30, use="screen", **settings):
    weight, bias = head(dtype)
    settings = {"bias": bias, "exact": True, **settings}
    return ScreenedSoftmax(weight, preview=preview, candidates=candidates, use=use, **settings)


@pytest.fixture
def session(tmp_path):
    """A function: a module as a session of ONNX Runtime, and that as a function of hidden states."""

    def make(module, k=K):
        path = tmp_path / "head.onnx"
        to_onnx(module, path, k=k)
        onnx.checker.check_model(path, full_check=True)
        runtime = onnxruntime.InferenceSession(path)
        return lambda hidden: [torch.from_numpy(part) for part in runtime.run(None, {"hidden": hidden.numpy()})]

    return make


def assert_full(found, module, hidden, k=K):
    """The best classes of the full layer, and their log-probabilities within what a preview leaves uncertain."""
    weight, bias, logit_map = module.weight, module.bias, module.logit_map
    logits = torch.nn.functional.linear(hidden.double(), weight.double(), bias.double())
    values, indices = logits.topk(k)
    assert torch.equal(found[1], indices)
    if logit_map is not None:
        logits, values = logit_map.double()(logits), logit_map.double()(values)
    expected = values - logits.logsumexp(-1, keepdim=True)
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("preview", PREVIEWS)
def test_an_exact_screen_gives_the_full_layers_classes_for_any_batch(session, preview, dtype):
    screen = screened(PREVIEWS[preview], dtype)
    run = session(screen)
    for rows in (0, 1, 9, 2 * FULL_FROM):
        hidden = states(rows, dtype).to(torch.promote_types(dtype, torch.float32))
        found = run(hidden)
        assert [part.dtype for part in found] == [hidden.dtype, torch.int64, torch.bool]
        assert_full(found, screen, hidden)
        assert found[2].shape == (rows,)
        assert found[2].all()


@pytest.mark.parametrize("preview", [Int8Preview(), SVDPreview(15)], ids=["int8", "svd"])
def test_without_exact_all_outputs_are_those_of_topk(session, preview):
    """Certificates of some rows only, log-probabilities under the screen's own normaliser."""
    screen = screened(preview, exact=False, candidates=10)
    hidden = states(8)
    hidden[4:] *= torch.linspace(0.01, 0.1, 4)[:, None]  # between the biases, which are close
    found, expected = session(screen)(hidden), screen.topk(hidden, K)
    torch.testing.assert_close(found[0], expected.log_prob, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[1], expected.indices)
    assert torch.equal(found[2], expected.certified)


def test_rows_that_are_not_certified_get_the_full_layers_result_beside_others_that_are(session):
    """Far more classes tie than there are candidates, for half of the rows."""
    weight, _ = head()
    weight[:, 0] = 0.0
    weight[100:200] = 0.0
    weight[100:200, 0] = torch.linspace(50, 50.001, 100)
    hidden = states(10)
    hidden[:, 0] = torch.tensor([1.0, -1.0]).repeat(5)
    screens = [
        ScreenedSoftmax(weight, preview=Int8Preview(), candidates=20, exact=e, use="screen") for e in (0, 1)
    ]
    first, exact = (session(screen)(hidden) for screen in screens)
    assert first[2].tolist() == [False, True] * 5
    assert exact[2].all()
    logits = (hidden.double() @ weight.double().T).topk(K)
    torch.testing.assert_close(logits.values, (hidden.double() @ weight.double().T).gather(-1, exact[1]))
    assert torch.equal(exact[0][1::2], first[0][1::2])  # certified rows keep the screen's result


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_row_that_is_not_finite_is_not_certified_and_changes_no_other(session, bad):
    run, hidden = session(screened()), states(5)
    expected = run(hidden)
    hidden[2, 3] = bad
    found = run(hidden)
    assert found[2].tolist() == [True, True, bad == 1e30, True, True]  # 1e30 is large and finite: the full layer's
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine[[0, 1, 3, 4]], theirs[[0, 1, 3, 4]])


@pytest.mark.parametrize("kind", ["screen", "layer"])
@pytest.mark.parametrize("cap", [None, 3.0])
def test_a_barred_class_is_never_returned(session, kind, cap):
    weight, bias = head()
    bias[torch.arange(V) >= 2] = -torch.inf
    logit_map = None if cap is None else SoftCap(cap)
    if kind == "screen":
        module = screened(bias=bias, logit_map=logit_map)
    else:
        module = FullSoftmax(D, V, logit_map=logit_map)
        module.load_state_dict({"weight": weight, "bias": bias})
    hidden = states(6)
    log_prob, indices, *_ = session(module)(hidden)
    expected = module.topk(hidden, K)
    assert torch.equal(indices, expected.indices)
    assert (indices[:, 2:] == -1).all()
    torch.testing.assert_close(log_prob, expected.log_prob)


MAPS = {
    "none": lambda: None,
    "soft-cap": lambda: SoftCap(5.0),
    "sigsoftmax": Sigsoftmax,
    "plif": lambda: PLIF(50, 4.0, init_std=1.0),
    "monotone-network": lambda: MonotoneNetwork(3),
    "scaled": lambda: ScaledLogits(0.25),
    "scaled-and-capped": lambda: ScaledLogits(0.25, 3.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_a_layer_with_its_logit_map(session, name, dtype):
    torch.manual_seed(0)
    layer = FullSoftmax(D, V, logit_map=MAPS[name](), dtype=dtype)
    with torch.no_grad():
        layer.weight.mul_(20)  # logits of all sizes, beyond PLIF's bound too
    hidden = states(7, dtype)
    found, expected = session(layer)(hidden), layer.topk(hidden, K)
    assert torch.equal(found[1], expected.indices)
    torch.testing.assert_close(
        found[0], expected.log_prob, rtol=1e-5, atol=1e-4 if dtype == torch.float32 else 1e-9
    )


@pytest.mark.parametrize("name", MAPS)
def test_a_screen_with_its_logit_map(session, name):
    torch.manual_seed(0)
    screen = screened(logit_map=MAPS[name]())
    hidden = states(7)
    assert_full(session(screen)(hidden), screen, hidden)


@pytest.mark.parametrize("make", [SampledSoftmax, NegativeSampling])
def test_a_sampled_layer_is_a_full_softmax_and_all_its_classes_can_be_returned(session, make):
    layer = make(D, 30, Uniform(30), 5)
    hidden = states(5)
    found, expected = session(layer, k=30)(hidden), layer.topk(hidden, 30)
    assert torch.equal(found[1], expected.indices)
    torch.testing.assert_close(found[0], expected.log_prob)


@pytest.mark.parametrize(
    ("use", "rows", "is_full"), [("fastest", FULL_FROM, True), ("full", 1, True), ("screen", 1, False)]
)
def test_where_the_full_layer_answers(session, use, rows, is_full):
    """Known by its normaliser, which a coarse screen has another of."""
    screen = screened(SVDPreview(2), candidates=5, exact=False, use=use)
    hidden = states(rows)
    found = session(screen)(hidden)
    full = torch.nn.functional.linear(hidden, screen.weight, screen.bias).log_softmax(-1).gather(-1, found[1])
    assert torch.allclose(found[0], full, atol=1e-5) == is_full


def test_constants_in_a_second_file_where_one_would_be_too_large(monkeypatch, tmp_path):
    screen, hidden = screened(), states(3)
    to_onnx(screen, tmp_path / "one.onnx", k=K)
    monkeypatch.setattr(export, "EMBEDDED", 0)
    to_onnx(screen, tmp_path / "two.onnx", k=K)
    assert {path.name for path in tmp_path.iterdir()} == {"one.onnx", "two.onnx", "two.onnx.data"}
    one, two = (
        onnxruntime.InferenceSession(tmp_path / name).run(None, {"hidden": hidden.numpy()})
        for name in ("one.onnx", "two.onnx")
    )
    assert all(np.array_equal(mine, theirs) for mine, theirs in zip(one, two, strict=True))


def test_the_file_needs_neither_this_library_nor_pytorch(tmp_path):
    to_onnx(screened(), tmp_path / "head.onnx", k=K)
    model = onnx.load(tmp_path / "head.onnx")
    assert {opset.domain for opset in model.opset_import} == {""}  # standard operators alone
    assert model.producer_name == "lastlayer"
    code = (
        "import sys, numpy, onnxruntime\n"
        "session = onnxruntime.InferenceSession('head.onnx')\n"
        f"results = session.run(None, {{'hidden': numpy.ones((2, {D}), 'float32')}})\n"
        "assert not {'torch', 'lastlayer'} & set(sys.modules)\n"
        "print([value.name for value in session.get_outputs()], [part.shape for part in results])"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ended.stdout.strip() == "['log_prob', 'indices', 'certified'] [(2, 4), (2, 4), (2,)]", ended.stderr


def test_no_product_of_whole_numbers_saturates():
    """Without VNNI two products of an unsigned and a signed 8-bit number are added in 16 bits."""
    largest = (WHOLE + 64) // 128 + ZERO_POINT
    assert 2 * largest * 127 < 1 << 15


class Own(LogitMap):
    def forward(self, logits):
        return 2 * logits


class OwnWithGraph(Own):
    def to_graph(self, graph, logits):
        return graph.add("Mul", logits, 2.0)


def test_a_map_of_ones_own_that_has_a_graph(session):
    layer, hidden = FullSoftmax(D, V, logit_map=OwnWithGraph()), states(3)
    torch.testing.assert_close(session(layer)(hidden)[0], layer.topk(hidden, K).log_prob)


def stale():
    screen = screened()
    with torch.no_grad():
        screen.weight.add_(1.0)
    return screen


NO_GRAPH = {
    "hierarchical": (lambda: HierarchicalSoftmax(D, V), TypeError, "HierarchicalSoftmax has no ONNX graph"),
    "tree": (lambda: TreeSoftmax(D, V), TypeError, "TreeSoftmax has no ONNX graph"),
    "adaptive": (lambda: AdaptiveSoftmax(D, V, [50]), TypeError, "AdaptiveSoftmax has no ONNX graph"),
    "mixture": (lambda: MixtureOfSoftmaxes(D, V, 2), TypeError, "MixtureOfSoftmaxes has no ONNX graph"),
    "one-vs-all": (lambda: OneVsAll(D, V), TypeError, "OneVsAll has no ONNX graph"),
    "factored": (lambda: FactoredOutput(D, V), TypeError, "FactoredOutput has no ONNX graph"),
    "linear": (lambda: torch.nn.Linear(D, V), TypeError, "Linear has no ONNX graph"),
    "screened mixture": (
        lambda: ScreenedSoftmax.from_layer(MixtureOfSoftmaxes(D, V, 2), preview=Int8Preview(), candidates=9),
        TypeError,
        "ScreenedMixture has no ONNX graph",
    ),
    "int4": (lambda: screened(Int4Preview()), TypeError, "an Int8Preview or an SVDPreview.*Int4Preview"),
    "own map": (lambda: FullSoftmax(D, V, logit_map=Own()), TypeError, "to_graph.*Own has no ONNX graph"),
    "own map, screened": (lambda: screened(logit_map=Own()), TypeError, "to_graph.*Own has no ONNX graph"),
    "meta": (lambda: FullSoftmax(D, V, device="meta"), ValueError, "whole weight in the memory"),
    "normalizer": (lambda: FullSoftmax(D, V, normalizer=TopKSoftmax(5)), TypeError, "TopKSoftmax.* is no softmax"),
    "stale": (stale, RuntimeError, "refresh"),
}


@pytest.mark.parametrize("name", NO_GRAPH)
def test_what_has_no_graph_is_an_error_and_nothing_is_written(tmp_path, name):
    make, error, says = NO_GRAPH[name]
    path = tmp_path / "head.onnx"
    path.write_bytes(b"as before")
    with pytest.raises(error, match=says):
        to_onnx(make(), path)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("head.onnx", b"as before")]


def test_a_layer_that_is_divided_among_processes(tmp_path):
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        layer = shard(FullSoftmax(D, V), torch.distributed.group.WORLD)
        with pytest.raises(ValueError, match="whole weight in the memory of this process"):
            to_onnx(layer, tmp_path / "head.onnx")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("k", "error"), [(0, ValueError), (31, ValueError), (2.0, TypeError)])
def test_k_out_of_range(tmp_path, k, error):
    with pytest.raises(error, match="k must"):
        to_onnx(screened(), tmp_path / "head.onnx", k=k)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(
        ValueError, match=r"path must be a file in a folder that is there, got .*nowhere/head.onnx"
    ):
        to_onnx(screened(), tmp_path / "nowhere" / "head.onnx")


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "head.onnx"
    path.write_bytes(b"as before")
    monkeypatch.setattr(onnx.ModelProto, "SerializeToString", lambda self: 1 / 0, raising=False)
    with pytest.raises(ZeroDivisionError):
        to_onnx(screened(), path, k=K)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("head.onnx", b"as before")]


def test_without_onnx_it_says_what_to_install():
    code = "import sys; sys.modules['onnx'] = None; import lastlayer; lastlayer.FullSoftmax(2, 3)\n"
    code += "import lastlayer.export"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (
        "ModuleNotFoundError: lastlayer.export needs the package onnx: pip install 'lastlayer[onnx]'"
        in ended.stderr
    )
