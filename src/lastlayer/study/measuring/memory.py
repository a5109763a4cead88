"""How much memory is free, and whether what is about to be made fits into it."""

from contextlib import suppress
from pathlib import Path

import torch

from lastlayer.study.errors import UsageError

LIMITS = (  # of a container: the limit of its control group and what is used of it, in both versions of Linux's
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def require_memory(needed: int, device: torch.device, what: str, advice: str) -> None:
    """A UsageError, with `advice`, if `what` needs more bytes than are free on `device`, where that is known."""
    free = free_bytes(device)
    if free is not None and needed > free:
        sides = f"about {needed / 1e9:,.3g} GB of memory, and {free / 1e9:,.3g} GB are free"
        raise UsageError(f"{what} needs {sides}; {advice} would fit")


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be had: of the GPU, or of the machine and of the container this process is in."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = []
    with suppress(OSError):
        found.append(proc_bytes("meminfo", "MemAvailable"))
    for limit, used in LIMITS:
        with suppress(OSError, ValueError):  # "max" is no number
            found.append(max(0, int(Path(limit).read_text()) - int(Path(used).read_text())))
    return min((free for free in found if free is not None), default=None)


def proc_bytes(file: str, field: str) -> int | None:
    """A field of a file in `/proc` that Linux gives in kB; None where there is no such field.

    Raises:
        OSError: there is no such file.
    """
    for line in Path("/proc", file).read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    return None
