"""A long experiment as independent cells, each written down when it is done, so that a kill loses one at most."""

import json
from collections.abc import Callable
from pathlib import Path

from lastlayer.study.errors import StudyError, UsageError
from lastlayer.study.files import Record, make_folder, write_json
from lastlayer.study.measuring.measure import environment


class Cells:
    """The finished cells of one experiment, in `folder/results.json`, a list of flat records; the machine is in
    `environment.json` beside it.

    Args:
        folder: made if it is not there.
        resume: go on with what it holds; else a folder with results is refused.

    Raises:
        UsageError: the folder holds results, and `resume` is False.
        StudyError: the folder cannot be written to, or its results cannot be read.
    """

    def __init__(self, folder: Path, resume: bool) -> None:
        self.path = make_folder(folder) / "results.json"
        self.records: list[Record] = []
        if self.path.exists() and not resume:
            raise UsageError(
                f"{folder} holds results: --resume goes on with them, another --out starts beside them"
            )
        write_json(folder / "environment.json", environment())
        if not self.path.exists():
            return
        try:
            self.records = json.loads(self.path.read_text(encoding="utf-8"))
            if not all(isinstance(record, dict) for record in self.records):
                raise ValueError("not a list of records")
        except (OSError, ValueError) as problem:
            raise StudyError(f"cannot read {self.path}: {problem}; remove it to start again") from problem

    def once(self, key: Record, work: Callable[[], Record]) -> Record:
        """The record of the cell that `key` names: found, or worked out and written down."""
        for record in self.records:
            if key.items() <= record.items():
                return record
        try:
            record = key | work()
        except KeyboardInterrupt as stop:
            if self.records:
                stop.add_note(f"what is done is in {self.path}; the same command with --resume goes on from it")
            raise
        self.records.append(record)
        write_json(self.path, self.records)
        return record
