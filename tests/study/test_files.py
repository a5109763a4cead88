"""Files are whole or not there: a failure or a Ctrl-C while one is written leaves what was there before."""

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
