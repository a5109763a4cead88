"""An ONNX model and its constants on disk: one file, or two where the constants are too large for one."""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import onnx
from onnx import TensorProto
from torch import Tensor

from lastlayer.export.graph import TYPES

EMBEDDED = 1 << 30  # bytes of constants; a protocol buffer ends at 2 GiB
SMALL = 1 << 10  # bytes of a constant that is always in the model: shapes depend on such
ALIGNMENT = 4096  # of a constant in the second file, so that it can be mapped into memory


def save(model: onnx.ModelProto, constants: Mapping[str, Tensor], path: Path) -> None:
    """Writes `path`, and `path` with ".data" appended where the constants take more than EMBEDDED bytes.

    Both are written in a folder beside their place and then moved: on failure there is nothing new.
    """
    folder = Path(tempfile.mkdtemp(".partial", f".{path.name}.", path.parent))
    try:
        data = path.with_name(path.name + ".data")
        if sum(tensor.nbytes for tensor in constants.values()) > EMBEDDED:
            model.graph.initializer.extend(_external(constants, folder / data.name))
        else:
            model.graph.initializer.extend(
                _proto(name, tensor, _bytes(tensor)) for name, tensor in constants.items()
            )
        (folder / path.name).write_bytes(model.SerializeToString())
        for written in sorted(folder.iterdir(), reverse=True):  # the constants first
            written.replace(path.with_name(written.name))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _external(constants: Mapping[str, Tensor], path: Path) -> list[TensorProto]:
    """Writes the large constants one after another; gives where each is."""
    protos = []
    with path.open("wb") as file:
        for name, tensor in constants.items():
            content = _bytes(tensor)
            if len(content) <= SMALL:
                protos.append(_proto(name, tensor, content))
                continue
            proto = _proto(name, tensor)
            file.write(bytes(-file.tell() % ALIGNMENT))
            proto.data_location = TensorProto.EXTERNAL
            place = {"location": path.name, "offset": file.tell(), "length": len(content)}
            for key, value in place.items():
                proto.external_data.add(key=key, value=str(value))
            file.write(content)
            protos.append(proto)
    return protos


def _proto(name: str, tensor: Tensor, content: bytes | None = None) -> TensorProto:
    proto = TensorProto(name=name, data_type=TYPES[tensor.dtype], dims=tensor.shape)
    if content is not None:
        proto.raw_data = content
    return proto


def _bytes(tensor: Tensor) -> bytes:
    """As ONNX stores them: little-endian, row by row."""
    array = tensor.numpy()
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
