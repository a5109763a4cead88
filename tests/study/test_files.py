"""Files are written whole or not at all: a failure or Ctrl-C keeps the previous file."""

import os
import stat
import time

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


def test_a_planted_link_is_not_written_through(tmp_path):
    """In a folder that others can write to: neither under a name that can be guessed, nor at any other time."""
    mine = tmp_path / "mine"
    mine.write_text("precious")
    (tmp_path / ".results.json.partial").symlink_to(mine)
    modes = []

    def write(temporary):
        modes.append(stat.S_IMODE(temporary.parent.stat().st_mode))
        temporary.write_text("new")

    write_whole(tmp_path / "results.json", write)
    assert (modes, mine.read_text()) == ([0o700], "precious")
    assert (tmp_path / "results.json").read_text() == "new"


def test_another_users_link_is_refused(tmp_path, monkeypatch):
    mine, link = tmp_path / "mine", tmp_path / "results.json"
    mine.write_text("precious")
    link.symlink_to(mine)
    if os.getuid() == 0:
        os.lchown(link, 12_345, 12_345)
    else:
        me = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: me + 1)
    with pytest.raises(StudyError, match="a symbolic link that another user made"):
        write_json(link, ["new"])
    assert mine.read_text() == "precious"


def test_what_a_killed_process_left_is_removed(tmp_path):
    path = tmp_path / "results.json"
    old, young = tmp_path / ".results.json.abc.partial", tmp_path / ".results.json.def.partial"
    for folder in (old, young):
        folder.mkdir()
        (folder / "results.json").write_text("half")
    os.utime(old, (time.time() - 3600,) * 2)
    write_json(path, ["new"])
    assert sorted(tmp_path.iterdir()) == [young, path]


def test_umask_decides_who_may_read(tmp_path):
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "results.json", [])
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "results.json").stat().st_mode) == 0o640
