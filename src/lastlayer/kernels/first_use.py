"""A sign of life while kernels are compiled: once on a machine, and then for ten seconds and more.

numba keeps what it compiled on disk, and tells its listeners when it has to compile after all; a call of what is
compiled tells nobody, and so pays nothing. What is said is a warning of the logger "lastlayer", as Matplotlib says
that it builds its font cache: it appears on stderr, unless a program sends it elsewhere or has it left out.
Imports numba.
"""

import logging
from time import monotonic
from typing import Any

from numba.core import event

PATIENCE = 1.0  # seconds of compiling that nobody need hear of


class Notice(event.Listener):
    """Warns once, where compiling kernels of this package has taken longer than PATIENCE and goes on."""

    def __init__(self) -> None:
        self.said = False
        self._depth, self._began, self._spent = 0, 0.0, 0.0

    def on_start(self, event: Any) -> None:
        """A kernel begins, perhaps inside another that calls it."""
        if not _is_own(event):
            return
        now = monotonic()
        if self._depth == 0:
            self._began = now
        self._depth += 1
        if not self.said and self._spent + now - self._began > PATIENCE:
            self.said = True
            logging.getLogger("lastlayer").warning(
                "lastlayer: compiling kernels for this machine, once; a first use can take half a minute"
            )

    def on_end(self, event: Any) -> None:
        """A kernel is done."""
        if not _is_own(event):
            return
        self._depth -= 1
        if self._depth == 0:
            self._spent += monotonic() - self._began


def _is_own(event: Any) -> bool:
    return str(event.data["dispatcher"].py_func.__module__).startswith("lastlayer.")  # some have None


event.register("numba:compile", NOTICE := Notice())
