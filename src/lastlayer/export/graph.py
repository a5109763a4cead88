"""An ONNX graph that is being written: nodes, constants and branches, by name."""

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

OPSET = 18  # the first whose reductions all take their axes as an input
IR_VERSION = 8  # the file format that came with it

Value = str | Tensor | float | int | Sequence[int] | None  # a name, or what a constant is made of

TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float64: TensorProto.DOUBLE,
    torch.int64: TensorProto.INT64,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.bool: TensorProto.BOOL,
}


class Graph:
    """Nodes in the order in which they run; `add` gives the name of what a node computes, for later nodes.

    Args:
        dtype: of the constants that are made of Python floats.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Tensor] = {}
        self._numbers = count(1)

    def add(self, operator: str, *inputs: Value, **attributes: Any) -> str:
        """A node of one output."""
        return self.add_all(operator, *inputs, outputs=1, **attributes)[0]

    def add_all(self, operator: str, *inputs: Value, outputs: int, **attributes: Any) -> list[str]:
        """A node of several outputs."""
        names = [f"{operator}_{next(self._numbers)}" for _ in range(outputs)]
        taken = [self._name(value) for value in inputs]
        while taken and not taken[-1]:  # optional inputs that are absent
            taken.pop()
        self.nodes.append(helper.make_node(operator, taken, names, name=names[0], **attributes))
        return names

    def cast(self, value: str, dtype: torch.dtype) -> str:
        """`value` in another type."""
        return self.add("Cast", value, to=TYPES[dtype])

    def constant(self, name: str, value: Tensor) -> str:
        """A tensor that is stored with the graph, once for each name."""
        self.constants[name] = value.detach().cpu().contiguous()
        return name

    def choose(
        self, condition: str, then: Callable[[], Sequence[str]], otherwise: Callable[[], Sequence[str]]
    ) -> list[str]:
        """What `then()` adds and returns where `condition` (one bool) holds, else what `otherwise()` does."""
        branches = [self._branch(part) for part in (then, otherwise)]
        outputs = len(branches[0].output)
        return self.add_all("If", condition, outputs=outputs, then_branch=branches[0], else_branch=branches[1])

    def rename(self, value: str, name: str) -> None:
        """Gives an output its public name."""
        self.nodes.append(helper.make_node("Identity", [value], [name], name=name))

    def model(
        self, inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[onnx.ValueInfoProto]
    ) -> onnx.ModelProto:
        """The model of all nodes, without its constants."""
        graph = helper.make_graph(self.nodes, "lastlayer", inputs, outputs)
        opsets = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, ir_version=IR_VERSION, opset_imports=opsets)

    def _branch(self, part: Callable[[], Sequence[str]]) -> onnx.GraphProto:
        outer, self.nodes = self.nodes, []
        try:
            made = [self.add("Identity", value) for value in part()]
            nodes = self.nodes
        finally:
            self.nodes = outer
        outputs = [onnx.ValueInfoProto(name=name) for name in made]
        return helper.make_graph(nodes, f"branch_{next(self._numbers)}", [], outputs)

    def _name(self, value: Value) -> str:
        if value is None:
            return ""
        if isinstance(value, str):
            return value
        if not isinstance(value, Tensor):
            value = torch.tensor(value, dtype=self.dtype if isinstance(value, float) else torch.int64)
        return self.constant(f"constant_{next(self._numbers)}", value)
