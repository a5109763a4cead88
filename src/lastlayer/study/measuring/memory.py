"""How much memory is free, and whether what is about to be made fits into it."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Shortage:
    """Memory that would be needed and is not there; as text, `about 41.0 GB of memory, and 12.3 GB are free`."""

    needed: int
    free: int

    @property
    def share(self) -> float:
        """The part of what is needed that would fit."""
        return self.free / self.needed

    def __str__(self) -> str:
        return f"about {size(self.needed)} of memory, and {size(self.free)} are free"


def check_memory(needed: int, device: torch.device) -> Shortage | None:
    """The shortage if `needed` bytes exceed the free memory of `device`; None if they fit, or that is unknown."""
    free = free_bytes(device)
    return Shortage(needed, free) if free is not None and needed > free else None


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be had: of the GPU, or of the machine and of the container this process is in."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [found for found in (_of_the_machine(), _of_the_container()) if found is not None]
    return min(free, default=None)


def proc_bytes(file: str, field: str) -> int | None:
    """A field of a file in `/proc` that Linux gives in kB; None where there is no such field.

    Raises:
        OSError: there is no such file.
    """
    for line in Path("/proc", file).read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    return None


def _of_the_machine() -> int | None:
    with suppress(OSError):
        if (found := proc_bytes("meminfo", "MemAvailable")) is not None:
            return found
    with suppress(OSError, ValueError, AttributeError):  # not Linux: all there is, at least
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _of_the_container() -> int | None:
    """What the limit of the control group leaves, where there is one."""
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):  # "max" is no number
            return max(0, int(Path(limit).read_text()) - int(Path(used).read_text()))
    return None


def size(count: int) -> str:
    """Bytes in the unit that suits them: `512 bytes`, `1.5 GB`, `41 TB`."""
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            return f"{value:.0f} {unit}" if unit == "bytes" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError
