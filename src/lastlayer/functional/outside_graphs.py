"""Functions whose work depends on the data, kept out of the graphs that `torch.compile` makes."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def outside_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, run eagerly in the middle of a compiled model: the graph breaks there, and goes on after it.

    `torch.compiler.disable` would import the compiler, a second, as soon as the module that uses it is imported;
    here that waits until something is compiled.
    """
    eager: Any = torch._disable_dynamo(function)  # pyright: ignore[reportPrivateImportUsage]

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return eager(*args, **kwargs) if torch.compiler.is_compiling() else function(*args, **kwargs)

    return call
