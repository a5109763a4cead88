"""Text to ids: the vocabulary is the training text's, and every bad text is one clear message."""

import gzip
import lzma
import os

import pytest
import torch

from lastlayer.study.errors import StudyError, UsageError
from lastlayer.study.text.batches import Streams
from lastlayer.study.text.corpus import MIN_TOKENS, load_corpus
from lastlayer.study.text.reading import Reading
from lastlayer.study.text.sources import find_files, library_lines
from texts import corpus_of

STORY = ["the cat saw the dog", "", "the dog ran , and the cat sat"] * 60


def tokens(lines):
    return [word for line in lines for word in [*line.split(), "<eos>"]]


def decode(corpus, ids):
    return [corpus.words[i] for i in ids.tolist()]


def test_ids_say_the_text_by_decreasing_frequency():
    corpus = corpus_of(STORY, STORY[:3], min_count=1)
    assert decode(corpus, corpus.train) == tokens(STORY)
    assert decode(corpus, corpus.held_out) == tokens(STORY[:3])
    assert corpus.counts.tolist() == sorted(corpus.counts.tolist(), reverse=True)
    assert corpus.words[0] == "the"
    assert corpus.counts.tolist() == torch.bincount(corpus.train, minlength=corpus.num_classes).tolist()
    assert corpus.words[-1] == "<unk>"
    assert corpus.counts[-1] == 0


def test_rare_and_held_out_words_are_unknown():
    rare = [*STORY, "a hapax here", "a hapax there"]
    corpus = corpus_of(rare, ["the newcomer sat"], min_count=3)
    assert decode(corpus, corpus.held_out) == ["the", "<unk>", "sat", "<eos>"]
    assert not {"newcomer", "hapax", "here"} & set(corpus.words)
    assert corpus.counts[corpus.words.index("<unk>")] == 6
    assert corpus.counts.sum() == len(corpus.train)


def test_min_count_is_one_where_the_text_knows_unknown():
    once = [*STORY, "a hapax here"]
    assert "hapax" not in corpus_of(once).words
    assert "hapax" in corpus_of([*once, "<unk>"], STORY).words


def test_signs_are_split_when_asked():
    lines = ["The cat's ear, again: <unk>."] * 60
    assert "ear," in corpus_of(lines).words
    split = corpus_of(lines, reading=Reading(split_signs=True)).words
    assert {"ear", ",", "'", "<unk>"} <= set(split)
    assert "ear," not in split


def test_held_out_parts_are_apart_and_everywhere():
    lines = [f"line{i} word{i % 7}" for i in range(20_000)]
    corpus = corpus_of(lines, min_count=1)
    assert len(corpus.train) + len(corpus.held_out) == 3 * len(lines)
    assert 0.04 < len(corpus.held_out) / (3 * len(lines)) < 0.06
    kept = {int(w[4:]) for w in corpus.words if w.startswith("line")}
    gone = sorted(set(range(20_000)) - kept)  # held-out lines are whole, and their words unseen
    assert {line // 2000 for line in gone} == set(range(10))


def test_one_long_line_is_split_between_words():
    corpus = corpus_of([" ".join(["to be or not"] * 5000)])
    assert 0.04 < len(corpus.held_out) / 20_000 < 0.06


def test_embedded_text_is_real():
    lines = [line for line, _ in zip(library_lines(), range(3000), strict=False)]
    corpus = corpus_of(lines, reading=Reading(split_signs=True))
    assert {"def", "self", "(", "import"} <= set(corpus.words)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"\n\n \n", "is empty"),
        (b"word", "one kind of word"),
        (b"word\n" * 500, "one kind of word"),
        (b"one line only of ten words or so it is", "too short: 10 words"),
        ("größer\n".encode("latin-1") * 500, "0xf6, as text in Latin-1"),
        ("some text\n".encode("utf-16") * 500, r"is UTF-16 text, .* iconv -f utf-16 -t"),
        ("\nsome text\n".encode("utf-16-le") * 500, r"is UTF-16LE text, .* iconv -f utf-16le -t"),
        ("some text\n".encode("utf-16-be") * 500, r"is UTF-16BE text, .* iconv -f utf-16be -t"),
        ("some text\n".encode("utf-32") * 500, r"is UTF-32 text, .* iconv -f utf-32 -t"),
        (b"\x7fELF\x02\x00\x00" * 100, "is a binary file"),
        (bytes(range(256)) * 20, "is a binary file: it holds zero bytes"),
        (b"text and " * 1000 + b"\0", "is a binary file: line 1 holds a zero byte"),
        (gzip.compress(b"text " * 500), r"compressed by gzip; its name must end in \.gz"),
        (b"PAR1" + b"text " * 500, "a Parquet file"),
    ],
    ids=[
        *("empty", "blank", "one-word", "one-kind", "one-line", "latin-1", "utf-16", "utf-16le", "utf-16be"),
        *("utf-32", "program", "bytes", "late-zero", "gzip", "parquet"),
    ],
)
def test_bad_text_is_one_clear_message(tmp_path, content, said):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(StudyError, match=said) as caught:
        load_corpus([path])
    assert "text.txt" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_vocabulary_of_one(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(STORY))
    with pytest.raises(StudyError, match="lower --min-count"):
        load_corpus([path], min_count=10_000)


def test_wrong_paths(tmp_path):
    with pytest.raises(UsageError, match="there is no text file"):
        load_corpus([tmp_path / "missing.txt"])
    with pytest.raises(UsageError, match="holds no text: no file"):
        load_corpus([tmp_path])
    (tmp_path / "a.png").write_bytes(b"\x89PNG\0")
    with pytest.raises(UsageError, match="holds no text: only 1 that are not text"):
        load_corpus([tmp_path])
    broken = tmp_path / "text.xz"
    broken.write_bytes(lzma.compress(("\n".join(STORY)).encode())[:-30])
    with pytest.raises(StudyError, match=r"text\.xz is damaged"):
        load_corpus([broken])
    broken.write_bytes(b"not xz at all")
    with pytest.raises(StudyError, match=r"text\.xz is damaged"):
        load_corpus([broken])


def test_files_plain_and_compressed_are_read_in_order(tmp_path):
    first, second = tmp_path / "a.txt", tmp_path / "b.txt.xz"
    first.write_text("\n".join(STORY) + "\n", encoding="utf-8-sig")
    second.write_bytes(lzma.compress("\n".join(STORY).encode()))
    both = load_corpus([first, second], min_count=1)
    assert both.fingerprint() == corpus_of(STORY * 2, min_count=1).fingerprint()
    assert both.fingerprint() != load_corpus([first]).fingerprint()
    assert both.name == "a.txt and 1 more"


def test_split_folder_is_recognised(tmp_path):
    folder = tmp_path / "wiki"
    folder.mkdir()
    for role, text in (("train", STORY), ("valid", STORY[:3]), ("test", ["never read"])):
        (folder / f"wiki.{role}.tokens.xz").write_bytes(lzma.compress("\n".join(text).encode()))
    corpus = load_corpus([folder], min_count=1)
    assert corpus.name == "wiki"
    assert decode(corpus, corpus.held_out) == tokens(STORY[:3])
    assert find_files(sorted(folder.iterdir())) == find_files([folder])
    assert corpus.notes == ("to train on: wiki.train.tokens.xz; held out: wiki.valid.tokens.xz",)


@pytest.mark.skipif("LASTLAYER_DATA" not in os.environ, reason="needs LASTLAYER_DATA")
def test_wikitext_has_its_known_size():
    from pathlib import Path

    corpus = load_corpus([Path(os.environ["LASTLAYER_DATA"]) / "wikitext-2"])
    assert (corpus.num_classes, len(corpus.train), len(corpus.held_out)) == (33_278, 2_088_628, 217_646)


def test_streams_are_contiguous():
    ids = torch.arange(1003)
    streams = Streams(ids, batch=10, window=7, device=torch.device("cpu"))
    inputs = torch.cat([streams[i][0] for i in range(streams.windows)], 1)
    targets = torch.cat([streams[i][1] for i in range(streams.windows)], 1)
    assert torch.equal(inputs, torch.arange(1000).view(10, 100))
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(torch.cat([streams.examples(i) for i in range(streams.windows)], 1), targets)
    with pytest.raises(IndexError):
        streams[streams.windows]


def test_streams_of_a_short_text():
    streams = Streams(torch.arange(MIN_TOKENS), batch=1000, window=5, device=torch.device("cpu"))
    assert streams.batch == (MIN_TOKENS - 1) // 2
    assert streams[0][0].shape == (streams.batch, 2)
