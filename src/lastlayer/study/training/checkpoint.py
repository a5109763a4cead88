"""A training run as one file: every tensor in safetensors; in its header all else as JSON, and a checksum."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lastlayer.study.errors import StudyError
from lastlayer.study.files import write_whole
from lastlayer.study.processes import whole

HEADER, CHECKSUM = "lastlayer", "sha256"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes nested dicts and lists of tensors and plain values, whole or not at all.

    Raises:
        StudyError: the disk is full, or the folder cannot be written to; an earlier file stays as it was.
        ValueError: a tensor holds a NaN or infinity, which would replace a good checkpoint.
    """
    tensors: dict[str, Tensor] = {}
    plain = _without_tensors(state, "", tensors)
    broken = [name for name, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    if broken:
        raise ValueError(f"{broken[0]} holds a value that is not finite")
    text = json.dumps(plain, allow_nan=False)
    header = {HEADER: text, CHECKSUM: _checksum(text, tensors)}
    write_whole(path, lambda temporary: save_file(tensors, temporary, metadata=header))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote.

    Raises:
        StudyError: the file is truncated, its contents are not what was written, or it is no checkpoint.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if _checksum(header[HEADER], tensors) != header[CHECKSUM]:
            raise ValueError("its checksum does not fit its contents")
        return _with_tensors(json.loads(header[HEADER]), tensors)
    except (SafetensorError, OSError, KeyError, ValueError) as problem:
        reason = f"it has no {problem}" if isinstance(problem, KeyError) else problem
        raise StudyError(
            f"the checkpoint {path} is damaged or of another program ({reason}); remove it to start anew"
        ) from problem


def _checksum(text: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256 of the JSON, and of every tensor's name, dtype, shape and numbers."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _without_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """`value` with each tensor moved to `tensors` and named in its place."""
    if isinstance(value, Tensor):
        tensors[name] = whole(value.detach()).contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {
            "dict": [[key, _without_tensors(v, f"{name}.{key}".lstrip("."), tensors)] for key, v in value.items()]
        }
    if isinstance(value, list | tuple):
        return {"list": [_without_tensors(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]}
    return value


def _with_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _with_tensors(v, tensors) for key, v in content}
    return [_with_tensors(v, tensors) for v in content]
