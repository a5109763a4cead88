"""Time and memory of peers, side by side: interleaved in one process, medians with their spread."""

import ctypes
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lastlayer.kernels.config import config
from lastlayer.study.measuring.memory import proc_bytes


@dataclass(frozen=True)
class Timing:
    """What repeated runs of one call took."""

    ms: float  # median
    low_ms: float  # lower quartile
    high_ms: float  # upper quartile
    runs: int

    @classmethod
    def of(cls, seconds: list[float]) -> "Timing":
        """The summary of run times in seconds."""
        ordered = sorted(1e3 * second for second in seconds)
        low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.25, 0.75))
        return cls(statistics.median(ordered), low, high, len(ordered))

    def rounded(self) -> dict[str, Any]:
        """The fields as a flat record has them, to a tenth of a millisecond."""
        return {name: round(value, 1) for name, value in asdict(self).items()}


def interleaved(
    peers: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 15,
    warmup: int = 2,
    repeats: int = 1,
    on_round: Callable[[], None] | None = None,
) -> dict[str, Timing]:
    """Times every peer once a round, `rounds` times, so that a busy machine slows all of them alike.

    Args:
        peers: what to call, by name; each call does the whole of the work (the clock
            is read after a GPU has finished).
        rounds: runs of each that count.
        warmup: runs of each before, not counted.
        repeats: calls within one run, for what takes microseconds; times are per call.
        on_round: called after each round, to show progress.
    """
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    names = list(peers)
    for turn in range(-warmup, rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:  # no peer always runs after the same one
            took = seconds_of(partial(_repeat, peers[name], repeats))
            if turn >= 0:
                seconds[name].append(took / repeats)
        if on_round is not None:
            on_round()
    return {name: Timing.of(times) for name, times in seconds.items()}


def _repeat(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()


def seconds_of(call: Callable[[], object]) -> float:
    """What one call takes, a GPU's work included."""
    synchronise()
    start = time.perf_counter()
    call()
    synchronise()
    return time.perf_counter() - start


def synchronise() -> None:
    """Waits for the GPU, where there is one in use."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_bytes(call: Callable[[], object]) -> int:
    """The most memory that `call` holds at once beyond what was held before it; its result is dropped.

    On a GPU as PyTorch's allocator counts it; else the process's own peak resident size, as Linux counts it
    (0 where the system does not tell). Memory that the call finds already mapped and free is given back to the
    system first, so that it counts.
    """
    gc.collect(1)  # such as the graph of the call before
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak to the present size
        before = _resident_peak()
        call()
        return max(0, _resident_peak() - before)
    except OSError:
        return 0


def _resident_peak() -> int:
    return proc_bytes("self/status", "VmHWM") or 0


def environment() -> dict[str, Any]:
    """Where a figure comes from: machine, instruction set, versions, commit, threads, command, time."""
    here = config()
    return {
        "machine": here["processor"],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **{name: here[name] for name in ("threads", "engine", "isa", "why", "supported", "torch")},
        "python": platform.python_version(),
        "numpy": np.__version__,
        "lastlayer": here["version"],
        "commit": _commit(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write_records(path: Path, records: list[dict[str, Any]], *, notes: str = "") -> None:
    """Writes a benchmark's results file: where it was measured, and its flat records."""
    content = {"environment": environment(), "notes": notes, "records": records}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _commit() -> str | None:
    here = Path(__file__).parent
    with suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=10"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return None
