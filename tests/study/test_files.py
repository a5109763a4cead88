"""Files are whole or not there: a failure or a Ctrl-C while one is written leaves what was there before."""

import os

import pytest

from lastlayer.study.errors import StudyError
from lastlayer.study.files import write_json, write_whole


@pytest.mark.parametrize(
    ("problem", "raised"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "No space left on device"), StudyError)],
)
def test_what_was_there_stays(tmp_path, problem, raised):
    path = tmp_path / "results.json"
    write_json(path, ["old"])
    before = path.read_bytes()

    def write(temporary):
        temporary.write_text("half of it")
        raise problem

    with pytest.raises(raised):
        write_whole(path, write)
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]
    assert path.read_bytes() == before


def test_pipes_are_written_to(tmp_path):
    """A named pipe stands for /dev/stdout and other devices, which are not ours to replace."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    write_json(path, ["new"])
    assert os.read(reader, 100) == b'[\n "new"\n]\n'
    os.close(reader)
    assert path.is_fifo()
    assert list(tmp_path.iterdir()) == [path]


def test_links_are_followed(tmp_path):
    (tmp_path / "there").mkdir()
    link, file = tmp_path / "link.json", tmp_path / "there" / "file.json"
    write_json(file, ["old"])
    link.symlink_to(file)
    write_json(link, ["new"])
    assert link.is_symlink()
    assert "new" in file.read_text()
