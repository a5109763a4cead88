"""`lastlayer speedup`: every kind of model, what it writes, and bad input that leaves things alone."""

import json
import pickle

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from lastlayer import ScreenedSoftmax
from lastlayer.cli import app

FIELDS = {
    "preview", "window", "candidates", "agreement_top1", "agreement_topk", "kl",
    "bytes_read_fraction", "ms", "full_ms", "ratio", "certified_fraction", "chosen",
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


def weight():
    return torch.randn(2000, 16, generator=torch.Generator().manual_seed(2))


def save_head(path):
    from safetensors.torch import save_file

    if path.suffix == ".npy":
        np.save(path, weight().numpy())
    elif path.suffix == ".safetensors":
        save_file({"other": torch.ones(3, 3), "lm_head.weight": weight(), "lm_head.bias": torch.ones(2000)}, path)
    else:
        torch.save({"lm_head.weight": weight(), "step": 3}, path)
    return path


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".pt"])
def test_heads(run, tmp_path, hidden, suffix):
    path = save_head(tmp_path / f"head{suffix}")
    result = run(path, "--calibration", hidden, "--k", 3, "--json", tmp_path / "records.json")
    assert result.exit_code == 0, result.output
    records = json.loads((tmp_path / "records.json").read_text())
    assert all(record.keys() == FIELDS for record in records)
    assert sum(record["chosen"] for record in records) == 1
    assert (tmp_path / "out" / "frontier.png").stat().st_size > 1000
    screen = ScreenedSoftmax.load(tmp_path / "out" / "screen")
    assert torch.equal(screen.weight, weight())
    assert "too small to gain" in result.output or "times as fast" in result.output


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


def test_bare_head_needs_hidden_states(run, tmp_path):
    result = run(save_head(tmp_path / "head.npy"))
    assert result.exit_code == 2
    assert "--calibration HIDDEN.npy" in result.stderr


def bad_files(folder):
    """Files that are no head, and what is said of each."""
    np.save(folder / "vector.npy", np.ones(5, dtype=np.float32))
    np.save(folder / "nan.npy", np.full((5, 16), np.nan, dtype=np.float32))
    np.save(folder / "objects.npy", np.array([[Executes()]], dtype=object))
    (folder / "broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    (folder / "broken.npy").write_bytes(b"\x93NUMPY")
    (folder / "executes.pt").write_bytes(pickle.dumps(Executes()))
    torch.save({"a": torch.ones(3, 3), "b": torch.ones(4, 4)}, folder / "several.pt")
    torch.save({"step": 1}, folder / "none.pt")
    (folder / "broken.gguf").write_bytes(b"GGUF no more")
    (folder / "empty").mkdir()
    (folder / "notes.txt").write_text("no head")
    return {
        "vector.npy": (1, "floating-point matrix"),
        "nan.npy": (1, "NaN or infinity"),
        "objects.npy": (1, "cannot read"),
        "broken.safetensors": (1, "cannot read"),
        "broken.npy": (1, "cannot read"),
        "executes.pt": (1, "nothing else is ever unpickled"),
        "several.pt": (1, "give --tensor, one of: a, b"),
        "none.pt": (1, "no matrix"),
        "broken.gguf": (1, ""),
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


def test_bad_calibration(run, tmp_path, hidden):
    path = save_head(tmp_path / "head.npy")
    np.save(tmp_path / "wide.npy", np.ones((50, 17), dtype=np.float32))
    np.save(tmp_path / "few.npy", np.ones((3, 16), dtype=np.float32))
    np.save(tmp_path / "inf.npy", np.full((50, 16), np.inf, dtype=np.float32))
    cases = {
        "wide.npy": "(n, 16)",
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
