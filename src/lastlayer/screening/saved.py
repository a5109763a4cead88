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
from torch import Tensor, nn

from lastlayer.functional.logit_map import LogitMap, check_logit_map
from lastlayer.screening.calibration import SecondMoment
from lastlayer.screening.int4_preview import Int4Preview
from lastlayer.screening.int8_preview import Int8Preview
from lastlayer.screening.preview import Preview
from lastlayer.screening.screen_rows import ScreenRows
from lastlayer.screening.svd_preview import SVDPreview

SETTINGS, TENSORS, VERSION = "screen.json", "screen.safetensors", 2
SCREEN, MIXTURE = "lastlayer screen", "lastlayer screened mixture"  # formats
HASHED_ROWS = 8192
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

    preview, tensors = screen.preview, {}
    if include_weight:
        tensors |= {"weight": screen.weight} | ({} if screen.bias is None else {"bias": screen.bias})
    settings: dict[str, Any] = {"kind": type(preview).__name__}
    if isinstance(preview, SVDPreview):
        settings |= {"window": preview.window, "storage": preview.storage}
    elif not isinstance(preview, Int4Preview | Int8Preview):
        raise TypeError(f"a {type(preview).__name__} of your own cannot be saved; save its settings yourself")
    calibration = None if isinstance(preview, Int8Preview) else preview.calibration
    if calibration is not None:
        settings["calibration_rows"] = calibration.rows
        tensors["calibration"] = calibration.moment
    logit_map, parameters = _described_map(screen.logit_map)
    tensors |= parameters
    content = save({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()})
    described = {
        "format": format_name,
        "version": VERSION,
        "preview": settings,
        "candidates": screen.candidates,
        "exact": screen.exact,
        "use": screen.use,
        "logit_map": logit_map,
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


def _described_map(logit_map: nn.Module | None) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """A map's name and settings, and its parameters."""
    if logit_map is None:
        return None, {}
    name = type(logit_map).__name__
    if not isinstance(logit_map, LogitMap) or _map_kinds().get(name) is not type(logit_map):
        raise TypeError(
            f"a screen with a {name} of your own as logit_map cannot be saved: save the screen without it, "
            "and pass the map to the constructor again"
        )
    parameters = {MAP + key: tensor for key, tensor in logit_map.state_dict().items()}
    return {"kind": name, "settings": logit_map.settings()}, parameters


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
    if fingerprint(weight, bias) != described["weight_sha256"]:
        raise ValueError(
            f"weight and bias are not those that {folder} was saved for, dtype and every number: "
            "their fingerprint differs"
        )
    preview = _preview(described["preview"], tensors.get("calibration"), folder)
    settings = {"preview": preview, "candidates": described["candidates"], "exact": described["exact"]}
    settings["use"] = described.get("use", "fastest")  # screens of 0.1 had no choice
    return weight, bias, settings | {"logit_map": _map(described["logit_map"], tensors, folder)}


def _read(folder: Path, format_name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        described = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        content = (folder / TENSORS).read_bytes()
    except (OSError, ValueError, RecursionError) as error:  # of both decoders, too
        raise ValueError(f"{folder} does not hold a saved screen: {error}") from None
    wanted = {"preview": dict, "candidates": int, "exact": bool, "weight_sha256": str, "tensors_sha256": str}
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
    for name, kind in wanted.items():
        if not isinstance(described.get(name), kind):
            raise ValueError(f"{folder / SETTINGS}: {name} must be a {kind.__name__}, got {described.get(name)!r}")
    if not isinstance(described.get("logit_map"), dict | None):
        raise ValueError(f"{folder / SETTINGS}: logit_map must be a dict or null, got {described['logit_map']!r}")
    if hashlib.sha256(content).hexdigest() != described["tensors_sha256"]:
        raise ValueError(f"{folder / TENSORS} is truncated or was changed after it was saved")
    try:
        return described, load(content)
    except SafetensorError as error:
        raise ValueError(f"{folder / TENSORS} does not hold tensors: {error}") from None


def _preview(settings: dict[str, Any], moment: Tensor | None, folder: Path) -> Preview:
    kind = settings.get("kind")
    if kind == "Int8Preview":
        return Int8Preview()
    if kind not in ("SVDPreview", "Int4Preview"):
        known = "an SVDPreview, Int4Preview or Int8Preview"
        raise ValueError(f"{folder / SETTINGS}: preview must be {known}, got {kind!r}")
    if settings.get("tail_correction"):
        raise ValueError(f"{folder} has a tail_correction, which SVDPreview no longer takes")
    try:
        calibration = None if moment is None else SecondMoment(moment, int(settings["calibration_rows"]))
        if kind == "Int4Preview":
            return Int4Preview(calibration=calibration)
        return SVDPreview(settings["window"], calibration=calibration, storage=settings["storage"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / SETTINGS} does not describe a preview: {error!r}") from None


def _map(described: dict[str, Any] | None, tensors: dict[str, Tensor], folder: Path) -> LogitMap | None:
    if described is None:
        return None
    kinds, kind = _map_kinds(), described.get("kind")
    if kind not in kinds:
        raise ValueError(f"{folder / SETTINGS}: logit_map must be one of {', '.join(sorted(kinds))}, got {kind!r}")
    parameters = {name.removeprefix(MAP): t for name, t in tensors.items() if name.startswith(MAP)}
    try:
        with torch.device("meta"):  # no memory until the parameters are known to fit
            logit_map = kinds[kind](**described["settings"])
        logit_map.load_state_dict(parameters, assign=True)
        return check_logit_map(logit_map)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder} does not hold the {kind} that it describes: {error}") from None
