"""A long experiment as independent cells, each written down when it is done, so that a kill loses one at most."""

import json
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from lastlayer.study.errors import StudyError, UsageError
from lastlayer.study.files import Record, Records, make_folder, write_json
from lastlayer.study.measuring.measure import environment


class Cells:
    """The finished cells of one experiment, in `folder/results.json`: the machine, and a list of flat records.

    Args:
        folder: made if it is not there.
        resume: go on with what it holds; else a folder with results is refused.
        console: where progress is shown.

    Raises:
        UsageError: the folder holds results, and `resume` is False.
        StudyError: the folder cannot be written to, or its results cannot be read.
    """

    def __init__(self, folder: Path, resume: bool, console: Console) -> None:
        self.path = make_folder(folder) / "results.json"
        self.status = console.status("")  # updated by what takes long inside a cell
        self.environment = environment()
        self.records: Records = []
        if not self.path.exists():
            return
        if not resume:
            raise UsageError(
                f"{folder} holds results: --resume goes on with them, another --out starts beside them"
            )
        try:
            self.records = json.loads(self.path.read_text(encoding="utf-8"))["records"]
            if not all(isinstance(record, dict) for record in self.records):
                raise ValueError("not a list of records")
        except (OSError, ValueError, TypeError, KeyError) as problem:
            raise StudyError(f"cannot read {self.path}: {problem}; remove it to start again") from problem

    def measure(self, keys: Records, work: Callable[[Record], Record]) -> Records:
        """The record of each cell, `key | work(key)`: found, or worked out and written down."""
        with self.status:
            records = []
            for number, key in enumerate(keys, 1):
                self.status.update(f"{number} of {len(keys)}: {', '.join(map(str, key.values()))}")
                records.append(self._once(key, work))
        return records

    def _once(self, key: Record, work: Callable[[Record], Record]) -> Record:
        for record in self.records:
            if key.items() <= record.items():
                return record
        try:
            record = key | work(key)
        except KeyboardInterrupt as stop:
            if self.records:
                stop.add_note(f"what is done is in {self.path}; the same command with --resume goes on from it")
            raise
        self.records.append(record)
        write_json(self.path, {"environment": self.environment, "records": self.records})
        return record
