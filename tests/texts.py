"""Texts of a few lines as a user gives them: in files."""

from pathlib import Path
from tempfile import TemporaryDirectory

from lastlayer.study.text.corpus import load_corpus


def corpus_of(lines, held_out=None, **options):
    """The corpus of lines; without held-out ones a part of them is held out."""
    with TemporaryDirectory() as folder:
        paths = [Path(folder, "lines.train.txt"), Path(folder, "lines.valid.txt")]
        paths[0].write_text("\n".join(lines) + "\n", encoding="utf-8")
        if held_out is not None:
            paths[1].write_text("\n".join(held_out) + "\n", encoding="utf-8")
        return load_corpus(paths if held_out is not None else paths[:1], **options)
