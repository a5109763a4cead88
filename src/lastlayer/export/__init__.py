"""Trained layers and screens as files for other people's runtimes."""

from importlib.util import find_spec

if find_spec("onnx") is None:
    raise ModuleNotFoundError(
        "lastlayer.export needs the package onnx: pip install 'lastlayer[onnx]'", name="onnx"
    )

from lastlayer.export.onnx import to_onnx

__all__ = ["to_onnx"]
