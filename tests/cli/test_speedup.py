"""`lastlayer speedup`: every kind of model, what it writes, and bad input that changes nothing."""

import json
import pickle
import struct

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from lastlayer import ScreenedSoftmax
from lastlayer.cli.app import app
from lastlayer.screening import choose
from lastlayer.screening.trials import query_times
from lastlayer.study.report import verdict
from lastlayer.study.report.verdict import screen_name

FIELDS = {
    "preview", "window", "candidates", "agreement_top1", "agreement_topk", "kl",
    "bytes_read_fraction", "ms", "full_ms", "ratio", "certified_fraction", "dropped", "chosen",
}  # fmt: skip


class Executes:
    """A pickle that wants to run code."""

    def __reduce__(self):
        return (print, ("executed",))


@pytest.fixture
def run(tmp_path):
    def call(*arguments):
        return CliRunner().invoke(app, ["speedup", *map(str, arguments), "--out", str(tmp_path / "out")])

    return call


@pytest.fixture
def hidden(tmp_path):
    generator = torch.Generator().manual_seed(1)
    path = tmp_path / "hidden.npy"
    np.save(path, (torch.randn(300, 16, generator=generator) * torch.logspace(0.3, -1, 16)).numpy())
    return path


@pytest.fixture(params=[3.0])
def times_as_fast(request, monkeypatch):
    """What every screen is found to gain, whatever it would on a head of test size."""

    def times(queries, hidden, rounds, warmup):
        query_times(queries, hidden, 1, 0)
        if rounds == choose.FEW:  # the screen, then the full layer
            return [1.0, request.param]
        return [request.param, *(1.0 for _ in queries[1:])]

    monkeypatch.setattr(choose, "query_times", times)


def weight():
    return torch.randn(2000, 16, generator=torch.Generator().manual_seed(2))


def save_head(path):
    from safetensors.torch import save_file

    if path.suffix.lower() == ".npy":
        with path.open("wb") as file:
            np.save(file, weight().numpy())
    elif path.suffix == ".safetensors":
        save_file({"other": torch.ones(3, 3), "lm_head.weight": weight(), "lm_head.bias": torch.ones(2000)}, path)
    elif path.suffix == ".pth":  # of a trainer
        inside = {"module.other": torch.ones(3, 3), "module.lm_head.weight": weight()}
        torch.save(
            {"epoch": 3, "state_dict": inside, "optimizer": {"state": {0: {"step": torch.ones(2, 2)}}}}, path
        )
    else:
        torch.save({"lm_head.weight": weight(), "step": 3}, path)
    return path


@pytest.mark.usefixtures("times_as_fast")
@pytest.mark.parametrize("suffix", [".npy", ".NPY", ".safetensors", ".pt", ".pth"])
def test_heads(run, tmp_path, hidden, suffix):
    path = save_head(tmp_path / f"head{suffix}")
    result = run(path, "--calibration", hidden, "--k", 3, "--json", tmp_path / "records.json")
    assert result.exit_code == 0, result.output
    records = json.loads((tmp_path / "records.json").read_text())
    assert all(record.keys() == FIELDS for record in records)
    assert sum(record["chosen"] for record in records) == 1
    page = (tmp_path / "out" / "index.html").read_text()
    assert "<title>lastlayer: screens for head" in page
    assert all(screen_name(record) in page for record in records)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["records"] == records
    assert results["head"] == {
        "name": results["head"]["name"],
        "num_classes": 2000,
        "in_features": 16,
        "bytes": 128_000,
    }
    assert "…" not in result.output  # every figure is whole at 80 columns
    screen = ScreenedSoftmax.load(tmp_path / "out" / "screen")
    assert torch.equal(screen.weight, weight())
    assert "times as fast as the full layer, agreement" in result.output


@pytest.mark.usefixtures("times_as_fast")
def test_transformers_folder(run, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=700, n_embd=16, n_layer=1, n_head=2, n_positions=256)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    words = {"[UNK]": 0} | {f"w{i}": i for i in range(1, 700)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("\n".join(" ".join(f"w{(7 * i + j * j) % 699 + 1}" for j in range(20)) for i in range(60)))
    result = run(tmp_path / "model", "--calibration", text, "--tokens", 1024, "--k", 2)
    assert result.exit_code == 0, result.output
    assert "1,024 hidden states from text.txt" in result.output
    saved = json.loads((tmp_path / "out" / "screen" / "screen.json").read_text())
    assert saved["num_classes"] == 700
    assert "ScreenedSoftmax.load with weight=, the model's own in float32" in result.output


def test_bare_head_needs_hidden_states(run, tmp_path):
    result = run(save_head(tmp_path / "head.npy"))
    assert result.exit_code == 2
    assert "--calibration HIDDEN.npy" in result.stderr


def bad_files(folder):
    """Files that are no head, and what is said of each."""
    np.save(folder / "vector.npy", np.ones(5, dtype=np.float32))
    np.save(folder / "integers.npy", np.ones((5, 16), dtype=np.int64))
    np.save(folder / "complex.npy", np.ones((5, 16), dtype=np.complex64))
    with (folder / "archive.npy").open("wb") as file:
        np.savez(file, weight=weight().numpy())
    np.save(folder / "nan.npy", np.full((5, 16), np.nan, dtype=np.float32))
    np.save(folder / "objects.npy", np.array([[Executes()]], dtype=object))
    for path in (
        save_head(folder / "cut.safetensors"),
        save_head(folder / "cut.pt"),
        save_head(folder / "cut.npy"),
    ):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (folder / "broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    (folder / "broken.npy").write_bytes(b"\x93NUMPY")
    (folder / "executes.pt").write_bytes(pickle.dumps(Executes()))
    torch.save({"a": torch.ones(3, 3), "b": torch.ones(4, 4)}, folder / "several.pt")
    torch.save({f"{part}.lm_head.weight": weight() for part in "ab"}, folder / "two-heads.pt")
    torch.save({"step": 1}, folder / "none.pt")
    torch.save({"weight": weight().to_sparse()}, folder / "sparse.pt")
    torch.save({"weight": torch.ones(1).expand(10**5, 10**5)}, folder / "repeated.pt")
    torch.save({"weight": weight(), "bias": torch.ones(1).expand(700)}, folder / "repeated_bias.pt")
    np.save(folder / "promising.npy", np.ones((5, 16), dtype=np.float32))
    promised = (folder / "promising.npy").read_bytes().replace(b"(5, 16), }       ", b"(500000, 16000), }")
    (folder / "promising.npy").write_bytes(promised)
    torch.save({"weight": weight().to("meta")}, folder / "meta.pt")
    torch.save({"weight": torch.full((5, 16), float("nan")).to(torch.float8_e4m3fn)}, folder / "float8.pt")
    (folder / "broken.gguf").write_bytes(b"GGUF no more")
    (folder / "empty").mkdir()
    (folder / "notes.txt").write_text("no head")
    return {
        "cut.safetensors": (1, "cannot read"),
        "cut.pt": (1, "cannot read"),
        "cut.npy": (1, "cannot read"),
        "vector.npy": (1, "floating-point matrix"),
        "integers.npy": (1, "floating-point matrix, got int64"),
        "complex.npy": (1, "floating-point matrix, got complex64"),
        "archive.npy": (1, "several arrays (.npz)"),
        "sparse.pt": (1, "every number of its head"),
        "repeated.pt": (1, "got a view of shape (100000, 100000) that repeats 4 bytes"),
        "repeated_bias.pt": (1, "got a view of shape (700,) that repeats 4 bytes"),
        "promising.npy": (1, "cannot read"),
        "meta.pt": (1, "every number of its head"),
        "float8.pt": (1, "NaN or infinity"),
        "nan.npy": (1, "NaN or infinity"),
        "objects.npy": (1, "cannot read"),
        "broken.safetensors": (1, "cannot read"),
        "broken.npy": (1, "cannot read"),
        "executes.pt": (1, "nothing else is ever unpickled"),
        "several.pt": (1, "give --tensor, one of: a, b"),
        "two-heads.pt": (1, "give --tensor, one of: a.lm_head.weight, b.lm_head.weight"),
        "none.pt": (1, "no matrix"),
        "broken.gguf": (1, "cannot read"),
        "empty": (1, "no config.json"),
        "notes.txt": (2, "no model that is known here"),
        "absent.npy": (2, "there is no model"),
    }


def test_bad_models(run, tmp_path, hidden, capsys):
    for name, (code, said) in bad_files(tmp_path).items():
        result = run(tmp_path / name, "--calibration", hidden)
        assert (result.exit_code, "Traceback" in result.output) == (code, False), (name, result.output)
        assert said in result.stderr, (name, result.stderr)
        assert "executed" not in result.output + capsys.readouterr().out
    assert not (tmp_path / "out" / "screen").exists()


def gguf(path, architecture, tensor_type):
    """A small GGUF file whose only tensor says it is of `tensor_type`."""
    writer = pytest.importorskip("gguf").GGUFWriter(str(path), architecture)
    writer.add_context_length(32)
    writer.add_embedding_length(4)
    writer.add_block_count(1)
    writer.add_head_count(2)
    name = "token_embd.weight"
    writer.add_tensor(name, np.ones((4, 4), dtype=np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    content = bytearray(path.read_bytes())
    at = content.index(name.encode()) + len(name)
    dimensions = struct.unpack_from("<I", content, at)[0]
    struct.pack_into("<I", content, at + 4 + 8 * dimensions, tensor_type)
    path.write_bytes(content)


def bad_transformers(folder):
    """Model folders and GGUF files that are not usable, and what is said of each."""
    transformers = pytest.importorskip("transformers")
    gguf(folder / "architecture.gguf", "nosucharch", 0)
    gguf(folder / "type.gguf", "llama", 999)
    transformers.ViTConfig().save_pretrained(folder / "headless")
    sizes = {"vocab_size": 30, "n_embd": 8, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(**sizes)
    for name in ("no-weights", "executes", "executes-zip", "no-tokenizer"):
        config.save_pretrained(folder / name)
    (folder / "executes" / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Executes()}))
    torch.save({"a": Executes()}, folder / "executes-zip" / "pytorch_model.bin")
    transformers.GPT2LMHeadModel(config).save_pretrained(folder / "no-tokenizer")
    (folder / "brings-code").mkdir()
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    (folder / "brings-code" / "config.json").write_text(json.dumps(own))
    (folder / "brings-code" / "own.py").write_text("print('executed')")
    (folder / "no-json").mkdir()
    (folder / "no-json" / "config.json").write_text("{")
    return {
        "architecture.gguf": (1, "architecture nosucharch is not supported"),
        "type.gguf": (1, "is not a valid GGMLQuantizationType"),
        "headless": (1, "a vit model, which has no output layer over a vocabulary"),
        "no-weights": (1, "no file named model.safetensors"),
        "executes": (1, "nothing else is ever unpickled"),
        "executes-zip": (1, "nothing else is ever unpickled"),
        "no-tokenizer": (2, "no tokenizer to read text with: --calibration HIDDEN.npy"),
        "brings-code": (1, "brings code of its own, which is never run"),
        "no-json": (1, "not a valid JSON file"),
    }


def test_bad_transformers_models(run, tmp_path, capsys):
    for name, (code, said) in bad_transformers(tmp_path).items():
        result = run(tmp_path / name)
        assert (result.exit_code, "Traceback" in result.output) == (code, False), (name, result.output)
        assert said in result.stderr, (name, result.stderr)
        assert "executed" not in result.output + capsys.readouterr().out, name
    assert not (tmp_path / "out" / "screen").exists()


def test_model_without_tokenizer_takes_hidden_states(run, tmp_path, hidden):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 700, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(tmp_path / "model")
    result = run(tmp_path / "model", "--calibration", hidden, "--k", 2)
    assert result.exit_code == 0, result.output
    assert "700 classes, width 16; 300 hidden states from hidden.npy" in result.output


def test_bad_calibration(run, tmp_path, hidden):
    path = save_head(tmp_path / "head.npy")
    np.save(tmp_path / "wide.npy", np.ones((50, 17), dtype=np.float32))
    with (tmp_path / "archive.npy").open("wb") as file:
        np.savez(file, hidden=np.ones((50, 16), dtype=np.float32))
    np.save(tmp_path / "few.npy", np.ones((3, 16), dtype=np.float32))
    np.save(tmp_path / "inf.npy", np.full((50, 16), np.inf, dtype=np.float32))
    cases = {
        "wide.npy": "(n, 16)",
        "archive.npy": "several arrays (.npz)",
        "few.npy": "at least 16",
        "inf.npy": "NaN or infinity",
        "absent.npy": "there is no",
    }
    for name, said in cases.items():
        result = run(path, "--calibration", tmp_path / name)
        assert result.exit_code in (1, 2)
        assert said in result.stderr, (name, result.stderr)
    result = run(path, "--calibration", hidden, "--k", 2001)
    assert result.exit_code == 2


def test_name_of_a_tensor(run, tmp_path, hidden):
    path = save_head(tmp_path / "head.npy")
    result = run(path, "--calibration", hidden, "--tensor", "lm_head.weight")
    assert result.exit_code == 2
    assert "--tensor lm_head.weight is for files of several named tensors" in result.stderr


@pytest.mark.usefixtures("times_as_fast")
@pytest.mark.parametrize("times_as_fast", [0.4, 0.9], indirect=True)
def test_no_screen_slower_than_the_full_layer_is_saved(run, tmp_path, hidden):
    result = run(save_head(tmp_path / "head.npy"), "--calibration", hidden, "--k", 3)
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "out" / "screen").exists()
    output = " ".join(result.output.split())
    assert "Keep the full layer: the fastest screen that agrees" in output
    assert "The cause: this head is too small to gain" in output
    assert "No screen is saved" in output
    records = json.loads((tmp_path / "out" / "results.json").read_text())["records"]
    assert sum(record["chosen"] for record in records) == 1


@pytest.mark.usefixtures("times_as_fast")
def test_progress_and_what_is_left(run, tmp_path, hidden):
    """A line for each step, in a log too."""
    output = run(save_head(tmp_path / "head.npy"), "--calibration", hidden, "--k", 3).output
    lines = [line for line in output.splitlines() if " done" in line]
    assert lines[0] == "querying the full layer (0 of 1 done)"
    assert all(" left)" in line for line in lines[1:])
    assert [line.split(" (")[0] for line in lines[1:3]] == [
        "trying int8, certified",
        "trying SVD, calibrated, float32",
    ]
    assert lines[-1].startswith("comparing their times")


def slow_record(**fields):
    record = {"preview": "int8, certified", "window": None, "candidates": 96, "certified_fraction": 1.0}
    record |= {"agreement_topk": 1.0, "ms": 2.0, "full_ms": 1.0, "ratio": 0.5, "dropped": None, "chosen": True}
    return record | fields


@pytest.mark.parametrize(
    ("weight_bytes", "here", "records", "said"),
    [
        (10**6, {"engine": "compiled"}, [], "this head is too small to gain: its 1.0 MB stay in the cache"),
        (10**8, {"engine": "plain", "why": "no compiler"}, [], "plain PyTorch here (no compiler)"),
        (
            10**8,
            {"engine": "compiled"},
            [slow_record(window=8, dropped="it needs 9 of 9 classes as candidates", chosen=False)],
            "no preview separates these classes",
        ),
        (
            10**8,
            {"engine": "compiled", "processor": "Abacus 3", "isa": "portable"},
            [slow_record(window=8, dropped="2.0 times as slow as the full layer", chosen=False)],
            "this processor (Abacus 3, kernels for portable) runs the full layer as fast",
        ),
    ],
)
def test_the_true_cause_is_named(monkeypatch, weight_bytes, here, records, said):
    monkeypatch.setattr(verdict, "config", lambda: here)
    text = verdict.verdict([slow_record(), *records], weight_bytes, 0.999)
    assert said in text
    assert "is slower than it, 2.00 ms against 1.00 ms" in text


@pytest.mark.usefixtures("times_as_fast")
def test_previews_whose_turn_does_not_come_are_named(run, tmp_path, hidden, monkeypatch):
    monkeypatch.setattr(choose, "LAST_START", 0.0)
    output = run(save_head(tmp_path / "head.npy"), "--calibration", hidden, "--k", 3).output
    assert "Not tried, for --seconds were over: SVD, calibrated, float32, window 2; " in output
    assert "* int8, certified, 96 candidates: 3.00 times as fast" in output
