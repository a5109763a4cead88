"""What a token may be: an id in a file, a character, a token of a tokenizer, a word in a field of JSON lines."""

import io
import json
import sys

import numpy as np
import pytest
import torch

from lastlayer.study.errors import StudyError, UsageError
from lastlayer.study.text import ids as ids_module
from lastlayer.study.text.corpus import load_corpus
from lastlayer.study.text.reading import Reading

STORY = "".join(f"the {a} saw\nthe {b} and ran\n" for a in ("cat", "dog", "owl") for b in ("hen", "fox")) * 40
GENERATOR = np.random.default_rng(0)
IDS = GENERATOR.zipf(1.5, 5000).clip(max=900)


def names(corpus, ids):
    return [corpus.words[i] for i in ids.tolist()]


def whole(corpus):
    """The text as it was, by name: the training part and the held-out one, of a text that one cut divides."""
    return sorted(names(corpus, torch.cat([corpus.train, corpus.held_out])))


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_raw_ids(tmp_path, dtype):
    path = tmp_path / "train.bin"
    IDS.astype(dtype).tofile(path)
    (tmp_path / "val.bin").write_bytes(IDS[:500].astype(dtype).tobytes())
    corpus = load_corpus([tmp_path], reading=Reading(ids_dtype=dtype))
    assert names(corpus, corpus.train) == [str(i) for i in IDS]
    assert names(corpus, corpus.held_out) == [str(i) for i in IDS[:500]]
    assert corpus.counts.tolist() == sorted(corpus.counts.tolist(), reverse=True)
    assert (corpus.unit, corpus.name) == ("tokens", tmp_path.name)


@pytest.mark.parametrize("shape", [(5000,), (50, 100)])
def test_arrays_of_ids(tmp_path, shape):
    np.save(tmp_path / "ids.npy", IDS.reshape(shape))
    corpus = load_corpus([tmp_path / "ids.npy"])
    assert len(corpus.train) + len(corpus.held_out) == len(IDS)
    assert whole(corpus)[:3] == sorted(str(i) for i in IDS)[:3]


def test_an_id_that_training_lacks_is_unknown(tmp_path):
    np.save(tmp_path / "a-train.npy", IDS)
    np.save(tmp_path / "a-valid.npy", np.array([7, 123_456_789, 7]))
    corpus = load_corpus([tmp_path / "a-train.npy", tmp_path / "a-valid.npy"])
    assert names(corpus, corpus.held_out) == ["7", "<unk>", "7"]


def test_ids_in_lines_and_in_json_lines(tmp_path):
    rows = IDS.reshape(50, 100).tolist()
    plain, commas, fields = tmp_path / "ids.txt", tmp_path / "ids.csv", tmp_path / "ids.jsonl"
    plain.write_text("\n".join(" ".join(map(str, row)) for row in rows))
    commas.write_text("\n".join(",".join(map(str, row)) for row in rows))
    fields.write_text("\n".join(json.dumps({"input_ids": row, "n": 1}) for row in rows))
    first, second = (load_corpus([path], reading=Reading(ids=True)) for path in (plain, commas))
    third = load_corpus([fields], reading=Reading(ids=True, field="input_ids"))
    assert first.fingerprint() == second.fingerprint() == third.fingerprint()
    assert whole(first).count("<eos>") == 50
    assert sum(word != "<eos>" for word in whole(first)) == len(IDS)


def test_the_first_ids_of_many(tmp_path, monkeypatch):
    monkeypatch.setattr(ids_module, "MAX_IDS", 1000)
    np.save(tmp_path / "ids.npy", IDS)
    corpus = load_corpus([tmp_path / "ids.npy"])
    assert len(corpus.train) + len(corpus.held_out) == 1000
    assert corpus.notes == ("of the 5,000 ids in ids.npy the first 1,000 are used",)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.bin", b"\1\2\3", "no whole number of uint16 ids"),
        ("a.bin", IDS.astype("uint32").tobytes(), "give --ids-dtype uint32"),
        ("a.bin", b"", "is empty"),
        ("a.npy", b"no array", "cannot read the token ids"),
        ("a.npy", IDS.astype("float32"), "holds float32"),
        ("a.npy", -IDS, "negative id -900"),
        ("a.npy", np.arange(5), "too short: 5 tokens"),
        ("a.txt", b"1 2 3\n4 five 6\n", "line 2: '4 five 6' is no sequence of token ids"),
        ("a.txt", b"1 2 3\n4 -5 6\n", "line 2: token ids must not be negative, got -5"),
    ],
)
def test_bad_ids(tmp_path, name, content, said):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    with pytest.raises(StudyError, match=said) as caught:
        load_corpus([path], reading=Reading(ids=name.endswith(".txt")))
    assert "\n" not in str(caught.value)


def test_an_array_that_promises_more_than_its_file_holds(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, IDS)
    path.write_bytes(path.read_bytes().replace(b"(5000,), ", b"(9000000000,), ".ljust(9))[:200])
    with pytest.raises(StudyError, match="cannot read the token ids"):
        load_corpus([path])


def test_characters(tmp_path):
    path = tmp_path / "story.txt"
    short = "".join(STORY.splitlines(keepends=True)[:100])  # one piece, whose end is held out
    path.write_text(short, newline="\r\n")
    corpus = load_corpus([path], reading=Reading(characters=True))
    text = "".join(names(corpus, torch.cat([corpus.train, corpus.held_out])))
    assert text.replace("<eos>", "\n") == short
    assert corpus.unit == "characters"


def test_json_lines(tmp_path):
    stories = STORY.split("\n")
    plain, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain.write_text(STORY)
    documents = ["\n".join(stories[i : i + 4]) + "\n" for i in range(0, len(stories) - 1, 4)]
    lines.write_text("".join(json.dumps({"id": 1, "text": text}) + "\n" for text in documents))
    assert load_corpus([lines]).fingerprint() == load_corpus([plain]).fingerprint()
    for content, said in [
        ('{"body": "x"}\n', r"line 1: no field 'text', but 'body'; name one by --field"),
        ('{"text": 5}\n', "the field 'text' holds int, not text"),
        ("[1]\n", "line 1: no field 'text', but no object"),
        ("{nonsense\n", "line 1: no JSON object"),
    ]:
        lines.write_text(content)
        with pytest.raises(StudyError, match=said):
            load_corpus([lines])
    plain.write_text('{"body": "x y"}\n' * 200)
    assert set(load_corpus([plain], reading=Reading(field="body")).words) == {"x", "y", "<eos>", "<unk>"}


def test_standard_input(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text(STORY)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(STORY.encode())))
    corpus = load_corpus([type(path)("-")])
    assert (corpus.name, corpus.fingerprint()) == ("standard input", load_corpus([path]).fingerprint())
    assert not sys.stdin.buffer.closed
    with pytest.raises(UsageError, match="once only"):
        load_corpus([type(path)("-"), type(path)("-")])


def test_a_folder_of_files(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "a.txt").write_text(STORY)
    (tmp_path / "b" / "c.md").write_text(STORY)
    (tmp_path / "b" / "test_of_it.txt").write_text(STORY)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\0\0")
    (tmp_path / ".git" / "HEAD").write_text("hidden")
    corpus = load_corpus([tmp_path])
    assert len(corpus.train) + len(corpus.held_out) == 3 * len(STORY.replace("\n", " e ").split())
    assert corpus.notes == ("left out, not being text: picture.png",)
    assert corpus.name == tmp_path.name


@pytest.fixture
def tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "the", "cat", "dog", "saw", "s", "##aw"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.enable_truncation(2)
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_tokenizer(tokenizer):
    text = tokenizer / "a.txt"
    text.write_text("the cat saw the owl\n" * 100)
    for path in (tokenizer, tokenizer / "tokenizer.json"):
        corpus = load_corpus([text], reading=Reading(tokenizer=path))
        assert names(corpus, corpus.train)[:5] == ["the", "cat", "saw", "the", "[UNK]"]
        assert len(corpus.train) + len(corpus.held_out) == 500
    with pytest.raises(StudyError, match=r"a\.txt is no JSON file of the tokenizers package"):
        load_corpus([text], reading=Reading(tokenizer=text))
    with pytest.raises(UsageError, match="there is no file"):
        load_corpus([text], reading=Reading(tokenizer=tokenizer / "none"))


def test_tokenizers_not_installed(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(StudyError, match=r"pip install 'lastlayer\[transformers\]'"):
        load_corpus([tokenizer / "tokenizer.json"], reading=Reading(tokenizer=tokenizer))


def test_what_contradicts(tmp_path):
    text, array = tmp_path / "a.txt", tmp_path / "a.npy"
    text.write_text(STORY)
    np.save(array, IDS)
    with pytest.raises(UsageError, match="one of --split-signs and --characters, not both"):
        Reading(split_signs=True, characters=True)
    with pytest.raises(UsageError, match="must be one of uint16, uint32; got 'int8'"):
        Reading(ids_dtype="int8")
    with pytest.raises(UsageError, match=r"a\.npy holds token ids and other files text"):
        load_corpus([text, array])
    with pytest.raises(UsageError, match="--characters is for text"):
        load_corpus([array], reading=Reading(characters=True))
    with pytest.raises(UsageError, match="--ids is about files"):
        load_corpus(reading=Reading(ids=True))
