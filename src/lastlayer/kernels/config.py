"""What runs on this machine, and why."""

import platform
from pathlib import Path
from typing import Any

import torch

from lastlayer.kernels import engine
from lastlayer.version import __version__


def show_config() -> dict[str, Any]:
    """What runs on this machine and why, printed and returned.

    Returns:
        A flat dict: `version`, `torch`, `processor`, `engine` ("compiled" or "plain"), `isa` (None: plain), `why`,
        `supported` (instruction sets that this processor has), `threads`.

    Raises:
        ValueError: `LASTLAYER_MAX_CPU_ISA` is not an instruction set of this processor.

    >>> import lastlayer
    >>> config = lastlayer.show_config()  # doctest: +ELLIPSIS
    version: ...
    >>> config["engine"] in ("compiled", "plain")
    True
    """
    record = config()
    for name, value in record.items():
        print(f"{name}: {', '.join(value) if isinstance(value, list) else value}")
    return record


def config() -> dict[str, Any]:
    """`show_config` without the printing."""
    library = engine.current()
    return {
        "version": __version__,
        "torch": torch.__version__,
        "processor": processor(),
        "engine": "plain" if library is None else "compiled",
        "isa": None if library is None else library.isa,
        "why": engine.reason(),
        "supported": engine.supported(),
        "threads": torch.get_num_threads(),
    }


def processor() -> str:
    """The name of the processor, as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
