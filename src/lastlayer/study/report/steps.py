"""What a long command is doing, how far it is, and about how long it will still take."""

import time
from typing import Self

from rich.console import Console

from lastlayer.study.report.figures import duration
from lastlayer.study.report.tables import say

EVERY = 10.0  # seconds between lines about the same thing, where the output is no terminal


class Steps:
    """A line that changes, in a terminal; elsewhere, such as in a log, a line now and then."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.status = console.status("...") if console.is_terminal else None
        self.said, self.at = "", 0.0

    def __enter__(self) -> Self:
        if self.status is not None:
            self.status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.status is not None:
            self.status.stop()

    def say(self, doing: str, done: int, total: int, seconds_left: float | None) -> None:
        """Shows that `done` steps of `total` are done, and what the next one is."""
        left = "" if seconds_left is None else f", about {duration(seconds_left)} left"
        line = f"{doing} ({done} of {total} done{left})"
        if self.status is not None:
            self.status.update(line)
        elif doing != self.said or time.monotonic() - self.at > EVERY:
            say(self.console, line)
            self.said, self.at = doing, time.monotonic()
