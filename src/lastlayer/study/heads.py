"""Where a trained head comes from: a Transformers folder or GGUF, safetensors, `.pt` without code, `.npy`."""

import io
import pickle
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lastlayer.study.errors import StudyError, UsageError
from lastlayer.study.files import mapped_array

# What output layers are called in checkpoints, best first; the last are embeddings that a head is tied to.
HEAD_NAMES = (
    "lm_head.weight",
    "output.weight",
    "embed_out.weight",
    "weight",
    "model.embed_tokens.weight",
    "transformer.wte.weight",
    "shared.weight",
)


@dataclass(frozen=True)
class LoadedHead:
    """A trained output layer, and the model and tokenizer around it where there are any."""

    name: str
    weight: Tensor  # (V, d)
    bias: Tensor | None  # (V,)
    model: Any = None
    tokenizer: Any = None


def load_head(path: Path, tensor: str | None = None) -> LoadedHead:
    """The head in `path`; `tensor` names it where a file holds several.

    Raises:
        UsageError: a path that is not there, or of no known kind; a tensor that is not there.
        StudyError: a file that cannot be read, or holds no head.
    """
    if not path.exists():
        raise UsageError(f"there is no model {path}")
    try:
        suffix = path.suffix.lower()
        if path.is_dir() or suffix == ".gguf":
            _refuse_name(path, tensor)
            return _from_transformers(path)
        readers = {".npy": _from_npy, ".safetensors": _from_safetensors, ".pt": _from_pt, ".pth": _from_pt}
        if suffix not in readers:
            kinds = ", ".join([*readers, ".gguf"])
            raise UsageError(f"{path} is no model that is known here: a Transformers folder, or one of {kinds}")
        weight, bias = readers[suffix](path, tensor)
    except StudyError:
        raise
    except Exception as problem:  # every reader fails in its own ways
        if isinstance(problem, pickle.UnpicklingError) or "Weights only load failed" in str(problem):
            raise StudyError(
                f"{path} is no file of weights alone, and nothing else is ever unpickled"
            ) from problem
        if "trust_remote_code" in str(problem):
            raise StudyError(f"{path} brings code of its own, which is never run") from problem
        raise StudyError(f"cannot read {path}: {_first_line(problem)}") from problem
    return LoadedHead(path.name, *_checked(path, weight, bias))


def load_hidden(path: Path, width: int) -> Tensor:  # (n, d), float32
    """Hidden states from a `.npy` file of shape `(..., d)`."""
    try:
        array = mapped_array(path)
    except (OSError, ValueError, EOFError) as problem:
        raise StudyError(f"cannot read {path}: {_first_line(problem)}") from problem
    if array.ndim < 2 or array.shape[-1] != width or array.dtype.kind != "f":
        raise StudyError(f"{path} must hold hidden states (n, {width}), got {array.dtype} {array.shape}")
    hidden = torch.from_numpy(np.array(array, dtype=np.float32, order="C")).reshape(-1, width)
    if not bool(hidden.isfinite().all()):
        raise StudyError(f"{path} holds NaN or infinity")
    return hidden


def _refuse_name(path: Path, tensor: str | None) -> None:
    if tensor is not None:
        raise UsageError(f"--tensor {tensor} is for files of several named tensors, which {path} is not")


def _from_npy(path: Path, tensor: str | None) -> tuple[Tensor, None]:
    _refuse_name(path, tensor)
    array = mapped_array(path)
    if array.dtype.kind != "f":
        raise StudyError(f"{path} must hold a floating-point matrix, got {array.dtype} {array.shape}")
    return torch.from_numpy(array.astype(np.float32)), None


def _from_safetensors(path: Path, tensor: str | None) -> tuple[Tensor, Tensor | None]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        name = _pick(path, {key: file.get_slice(key).get_shape() for key in file.keys()}, tensor)  # noqa: SIM118
        bias = name.removesuffix("weight") + "bias"
        return file.get_tensor(name), file.get_tensor(bias) if bias in file.keys() else None  # noqa: SIM118


def _from_pt(path: Path, tensor: str | None) -> tuple[Tensor, Tensor | None]:
    content = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(content, Tensor):
        _refuse_name(path, tensor)
        return content, None
    if not isinstance(content, dict):
        raise StudyError(f"{path} holds a {type(content).__name__}, not weights")
    tensors = dict(_named(content))
    name = _pick(path, {key: list(value.shape) for key, value in tensors.items()}, tensor)
    return tensors[name], tensors.get(name.removesuffix("weight") + "bias")


def _named(content: dict[Any, Any], before: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint, those of dicts inside it by dotted names."""
    for key, value in content.items():
        if isinstance(value, Tensor):
            yield f"{before}{key}", value
        elif isinstance(value, dict):
            yield from _named(value, f"{before}{key}.")


def _pick(path: Path, shapes: dict[str, list[int]], wanted: str | None) -> str:
    matrices = [name for name, shape in shapes.items() if len(shape) == 2]
    if wanted is not None:
        if wanted not in matrices:
            raise UsageError(
                f"--tensor {wanted} is no matrix in {path}; there are: {', '.join(matrices) or 'none'}"
            )
        return wanted
    known = [name for name in HEAD_NAMES if name in matrices]
    wrapped = [name for name in matrices if name.endswith(f".{HEAD_NAMES[0]}")]  # by a trainer, say
    for likely in (known[:1], wrapped, matrices):
        if len(likely) == 1:
            return likely[0]
    if not matrices:
        raise StudyError(f"{path} holds no matrix that could be a head")
    raise StudyError(f"{path} does not say which is the head; give --tensor, one of: {', '.join(matrices)}")


def _from_transformers(path: Path) -> LoadedHead:
    try:
        from transformers import (
            MODEL_FOR_CAUSAL_LM_MAPPING,
            MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
            AutoConfig,
            AutoModelForCausalLM,
            AutoModelForSeq2SeqLM,
        )
    except ImportError:
        raise StudyError(f"{path} needs Transformers: pip install 'lastlayer[transformers]'") from None
    # never runs code in a model's folder, nor downloads anything
    settings: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if path.is_dir():
        folder = path
        if not (path / "config.json").exists():
            raise StudyError(f"{path} is no Transformers model: it has no config.json")
    else:
        folder, settings = path.parent, settings | {"gguf_file": path.name}
    with redirect_stderr(io.StringIO()):  # progress bars of several libraries
        config = AutoConfig.from_pretrained(folder, **settings)
        kind, known = AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING
        if config.is_encoder_decoder:
            kind, known = AutoModelForSeq2SeqLM, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
        if type(config) not in known:
            raise StudyError(f"{path} is a {config.model_type} model, which has no output layer over a vocabulary")
        model = kind.from_pretrained(folder, dtype=torch.float32, **settings).eval()
        tokenizer = _tokenizer(folder, settings)
    head = model.get_output_embeddings()
    if head is None or not isinstance(getattr(head, "weight", None), Tensor):
        raise StudyError(f"{path} has no output head")
    from lastlayer.transformers.after_head import after_head

    if isinstance(found := after_head(model), str):
        raise StudyError(
            f"{path}: {type(model).__name__} {found}, so that its best classes are not those of its head's logits"
        )
    weight, bias = _checked(path, head.weight.detach(), getattr(head, "bias", None))
    return LoadedHead(path.name, weight, bias, model, tokenizer)


def _tokenizer(folder: Path, settings: dict[str, Any]) -> Any:
    """The model's tokenizer, or None: with hidden states at hand none is needed."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **settings)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return tokenizer if tokenizer.vocab_size else None  # some are made of nothing


def _checked(path: Path, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if weight.dim() != 2 or not weight.is_floating_point() or 0 in weight.shape:
        raise StudyError(f"{path} must hold a floating-point matrix, got {weight.dtype} {tuple(weight.shape)}")
    for part in (weight,) if bias is None else (weight, bias):
        _check_complete(path, part)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise StudyError(
            f"{path}: the head's bias has shape {tuple(bias.shape)}, its weight {tuple(weight.shape)}"
        )
    weight, bias = weight.float().contiguous(), None if bias is None else bias.detach().float()
    if not all(bool(t.isfinite().all()) for t in (weight, bias) if t is not None):
        raise StudyError(f"{path}: the head holds NaN or infinity")
    return weight, bias


def _check_complete(path: Path, tensor: Tensor) -> None:
    """Refuses a tensor that a file of few bytes makes look large, before any memory is taken for it."""
    if tensor.layout != torch.strided or tensor.is_meta:
        raise StudyError(f"{path} must hold every number of its head, got a sparse tensor or one without numbers")
    held = tensor.untyped_storage().nbytes()
    if held < tensor.numel() * tensor.element_size():
        raise StudyError(
            f"{path} must hold every number of its head, got a view of shape {tuple(tensor.shape)} that repeats "
            f"{held:,} bytes; save what .contiguous() makes of it"
        )


def _first_line(problem: BaseException) -> str:
    return next(iter(str(problem).strip().splitlines()), type(problem).__name__)
