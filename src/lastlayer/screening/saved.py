"""A screen on disk: settings as JSON; calibration, logit map and weight as safetensors; fingerprints of all.

The preview itself is not stored but prepared again when loaded: a preview that was tampered with could certify
what is not so, and preparing takes seconds.
"""

import hashlib
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from lastlayer.functional.checks import check_choice, check_count
from lastlayer.functional.logit_map import LogitMap
from lastlayer.screening.calibration import SecondMoment
from lastlayer.screening.int4_preview import Int4Preview
from lastlayer.screening.int8_preview import Int8Preview
from lastlayer.screening.preview import Preview
from lastlayer.screening.screen_rows import ScreenRows
from lastlayer.screening.svd_preview import SVDPreview

SETTINGS, TENSORS, VERSION = "screen.json", "screen.safetensors", 2
SCREEN, MIXTURE = "lastlayer screen", "lastlayer screened mixture"  # formats
HASHED_ROWS = 8192
PREVIEWS: dict[str, type[Preview]] = {kind.__name__: kind for kind in (SVDPreview, Int8Preview, Int4Preview)}
MAP = "logit_map."  # before the names of a map's parameters


def fingerprint(weight: Tensor, bias: Tensor | None) -> str:
    """SHA-256 of shapes, dtypes and every number."""
    digest = hashlib.sha256()
    for tensor in (weight, bias):
        digest.update(b"none" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        for block in () if tensor is None else tensor.detach().split(HASHED_ROWS):
            # of a copy: `numpy()` fixes the size of a storage for good, and FSDP frees that of a parameter
            digest.update(block.cpu().clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_screen(screen: ScreenRows, folder: Path, include_weight: bool, format_name: str = SCREEN) -> None:
    """Writes both files; the JSON names the fingerprints of the weight and of the tensors' file."""
    from safetensors.torch import save

    preview, logit_map, tensors = screen.preview, screen.logit_map, {}
    if type(preview) not in PREVIEWS.values():
        raise TypeError(f"a {type(preview).__name__} of your own cannot be saved; save its settings yourself")
    if logit_map is not None and type(logit_map) not in _map_kinds().values():
        raise TypeError(
            f"a screen with a {type(logit_map).__name__} of your own as logit_map cannot be saved: save it "
            "without, and pass the map to the constructor again"
        )
    if include_weight:
        tensors |= {"weight": screen.weight} | ({} if screen.bias is None else {"bias": screen.bias})
    settings: dict[str, Any] = {"kind": type(preview).__name__}
    if isinstance(preview, SVDPreview):
        settings |= {"window": preview.window, "storage": preview.storage}
    if isinstance(preview, SVDPreview | Int4Preview) and preview.calibration is not None:
        settings["calibration_rows"] = preview.calibration.rows
        tensors["calibration"] = preview.calibration.moment
    described_map = None
    if isinstance(logit_map, LogitMap):
        described_map = {"kind": type(logit_map).__name__, "settings": logit_map.settings()}
        tensors |= {MAP + key: tensor for key, tensor in logit_map.state_dict().items()}
    content = save({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()})
    described = {
        "format": format_name,
        "version": VERSION,
        "preview": settings,
        "candidates": screen.candidates,
        "exact": screen.exact,
        "use": screen.use,
        "logit_map": described_map,
        "num_classes": screen.out_features,
        "in_features": screen.in_features,
        "weight_sha256": fingerprint(screen.weight, screen.bias),
        "tensors_sha256": hashlib.sha256(content).hexdigest(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(sealed(described), indent=1) + "\n"
    whole = {TENSORS: content, SETTINGS: text.encode()}
    # written in a folder of a random name that only this user may enter: nobody can put a link in a file's place
    with TemporaryDirectory(suffix=".partial", prefix=".", dir=folder) as own:
        for name, data in whole.items():
            (Path(own) / name).write_bytes(data)
        for name in whole:  # a kill between the two leaves files that do not fit, which `load` says
            (Path(own) / name).replace(folder / name)


def sealed(described: dict[str, Any]) -> dict[str, Any]:
    """The settings with a fingerprint of themselves."""
    own = {name: value for name, value in described.items() if name != "settings_sha256"}
    return own | {"settings_sha256": hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()}


def _map_kinds() -> dict[str, type[LogitMap]]:
    """The library's own maps by name: only these are built from a file."""
    return {kind.__name__: kind for kind in LogitMap.__subclasses__() if kind.__module__.startswith("lastlayer.")}


def load_screen(
    folder: Path, weight: Tensor | None, bias: Tensor | None, format_name: str = SCREEN
) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """`(weight, bias, settings)` of a saved screen; everything is checked before anything is used."""
    for name, given in (("weight", weight), ("bias", bias)):
        if given is not None and not isinstance(given, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(given).__name__}")
    described, tensors = _read(folder, format_name)
    saved = tensors.get("weight")
    if weight is None:
        if saved is None:
            raise ValueError(f"{folder} was saved without its weight: pass load(folder, weight=...)")
        if bias is not None:
            raise ValueError("bias was given without the weight that it belongs to: give both, or none")
        weight, bias = saved, tensors.get("bias")
    if fingerprint(weight, bias) != described.get("weight_sha256"):
        raise ValueError(
            f"weight and bias are not those that {folder} was saved for, dtype and every number: "
            "their fingerprint differs"
        )
    try:
        return weight, bias, _settings(described, tensors)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder / SETTINGS} does not describe a screen: {error!r}") from None


def _read(folder: Path, format_name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        described = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        content = (folder / TENSORS).read_bytes()
    except (OSError, ValueError, RecursionError) as error:  # of both decoders, too
        raise ValueError(f"{folder} does not hold a saved screen: {error}") from None
    if not isinstance(described, dict) or described.get("format") not in (SCREEN, MIXTURE):
        raise ValueError(f"{folder / SETTINGS} does not describe a saved screen")
    if described["format"] != format_name:
        loader = "ScreenedMixture.load(folder, layer)" if format_name == SCREEN else "ScreenedSoftmax.load(folder)"
        raise ValueError(f"{folder} holds a {described['format']}, which {loader} reads")
    if described.get("version") != VERSION:
        raise ValueError(
            f"{folder} has format version {described.get('version')!r}; this lastlayer reads {VERSION}"
        )
    if sealed(described) != described:
        raise ValueError(f"{folder / SETTINGS} was changed after the screen was saved")
    if hashlib.sha256(content).hexdigest() != described.get("tensors_sha256"):
        raise ValueError(f"{folder / TENSORS} is truncated or was changed after it was saved")
    try:
        return described, load(content)
    except SafetensorError as error:
        raise ValueError(f"{folder / TENSORS} does not hold tensors: {error}") from None


def _settings(described: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The arguments of a screen; errors of any kind where they are not what `save_screen` writes."""
    if not isinstance(described["exact"], bool):
        raise ValueError(f"exact must be true or false, got {described['exact']!r}")
    preview = dict(described["preview"])
    kind = PREVIEWS[check_choice("preview", preview.pop("kind"), PREVIEWS)]
    if "calibration" in tensors:
        preview["calibration"] = SecondMoment(tensors["calibration"], preview.pop("calibration_rows"))
    if preview.get("tail_correction") == 0:  # of an earlier version, whose other values are not taken any more
        del preview["tail_correction"]
    return {
        "preview": kind(**preview),
        "candidates": check_count("candidates", described["candidates"], 1),
        "exact": described["exact"],
        "use": described.get("use", "fastest"),  # screens of 0.1 had no choice
        "logit_map": None if described["logit_map"] is None else _map(described["logit_map"], tensors),
    }


def _map(described: dict[str, Any], tensors: dict[str, Tensor]) -> LogitMap:
    kinds = _map_kinds()
    kind = kinds[check_choice("logit_map", described["kind"], sorted(kinds))]
    parameters = {name.removeprefix(MAP): t for name, t in tensors.items() if name.startswith(MAP)}
    with torch.device("meta"):  # no memory until the parameters are known to fit
        logit_map = kind(**described["settings"])
    logit_map.load_state_dict(parameters, assign=True)
    return logit_map
