"""`log P(path)` through a binary tree: a logistic regression at every node of the path, and its gradient."""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lastlayer.functional.operators import make_operator, outside_graphs
from lastlayer.functional.precision import as_exact, exact_dtype, no_autocast
from lastlayer.functional.row_sparse import GradientMemory, row_sparse
from lastlayer.functional.second_order import HandWritten, gradients
from lastlayer.functional.trees import Tree
from lastlayer.kernels import paths as kernels
from lastlayer.kernels.backends import paths_backend_for
from lastlayer.kernels.grouped import scaled_rows


def path_log_prob(
    hidden: Tensor,  # (N, d)
    weight: Tensor,  # (V - 1, d)
    classes: Tensor,  # (N,)
    tree: Tree,
    *,
    sparse: bool = False,
    memory: GradientMemory | None = None,
) -> Tensor:  # (N,)
    """`sum over the nodes n of the class's path of log sigmoid(sign * hidden @ weight[n])`.

    Only nodes on some path are read, and of the gradient only their rows are written; `sparse` ones hold no
    others, in a buffer that `memory` allocates. Second derivatives are dense.
    """
    with no_autocast(hidden.device.type):
        tables = tree.parents, tree.sides, tree.depths
        if torch.compiler.is_compiling() and not sparse:
            return _OPERATOR(hidden, weight, classes, *tables)
        return _along_paths(hidden, weight, classes, *tables, sparse, memory)


@outside_graphs
def _along_paths(
    hidden: Tensor,
    weight: Tensor,
    classes: Tensor,
    parents: Tensor,
    sides: Tensor,
    depths: Tensor,
    sparse: bool = False,
    memory: GradientMemory | None = None,
) -> Tensor:
    classes = classes.cpu().contiguous()
    starts = F.pad(depths.index_select(0, classes).cumsum(0), (1, 0))
    backend = paths_backend_for(hidden.device, hidden.dtype, weight.dtype)
    if backend == "compiled" and weight.is_contiguous():
        wants_slope = torch.is_grad_enabled() and hidden.requires_grad
        tables = classes, starts, parents, sides
        found: Any = _PathLogProb.run(hidden, weight, tables, sparse, memory, wants_slope)
        return found[0]
    return _plain((starts, *_walk_to_root(starts, classes, parents, sides)), hidden, weight, sparse)


def _walk_to_root(starts: Tensor, classes: Tensor, parents: Tensor, sides: Tensor) -> tuple[Tensor, Tensor]:
    """`nodes, signs` of the paths from some classes to the root, one after the other."""
    num_classes, num_pairs = (len(parents) + 1) // 2, int(starts[-1])
    nodes, signs = starts.new_empty(num_pairs), sides.new_empty(num_pairs)
    place, current = starts[:-1], classes
    while len(current):
        above = parents[current]
        on_the_way = above >= 0
        place, current, above = place[on_the_way], current[on_the_way], above[on_the_way]
        nodes[place], signs[place] = above, sides[current]
        place, current = place + 1, above + num_classes
    return nodes, signs


def _plain(paths: Any, hidden: Tensor, weight: Tensor, sparse: bool = False) -> Tensor:
    """The same by PyTorch's own operations."""
    starts, nodes, signs = (part.to(hidden.device) for part in paths)
    rows = torch.arange(len(hidden), device=hidden.device).repeat_interleave(starts.diff())
    of_nodes = F.embedding(nodes, weight, sparse=True) if sparse else weight.index_select(0, nodes)
    scores = (as_exact(hidden).index_select(0, rows) * as_exact(of_nodes)).sum(1)
    terms = F.logsigmoid(scores * signs)
    return terms.new_zeros(len(hidden)).index_add(0, rows, terms)


class _PathLogProb(HandWritten):
    """With x = sign * (h . w), f = sign * sigmoid(-x) and upstream g: of h, g f w summed over the path, its factor
    of g formed in the forward pass; of w, g f h summed over the rows whose path has it."""

    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, tables: Any, sparse: bool, memory: GradientMemory | None, wants_slope: bool
    ) -> tuple[Tensor, Any]:
        classes, starts, parents, sides = tables
        hidden = hidden.contiguous().resolve_neg()
        num_pairs = int(starts[-1])
        nodes, signs = starts.new_empty(num_pairs), sides.new_empty(num_pairs)
        log_prob, factors = hidden.new_empty(len(hidden)), hidden.new_empty(num_pairs)
        slope = torch.empty_like(hidden) if wants_slope else None
        outputs = nodes, signs, log_prob, factors, slope
        kernels.forward(classes, starts, parents, sides, hidden, weight, *outputs)
        return log_prob, ((starts, nodes, signs), factors, slope)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        hidden, weight, _, ctx.sparse, ctx.memory, _ = inputs
        ctx.paths, *ctx.formed = output[1]
        ctx.save_for_backward(hidden, weight)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        twin = partial(_plain, ctx.paths)
        found = gradients(lambda: _form(ctx, upstream[0]), twin, ctx.saved_tensors, upstream[:1])
        return *found, None, None, None, None


def _form(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of hidden and weight."""
    (hidden, weight), (factors, slope), (starts, nodes, _) = ctx.saved_tensors, ctx.formed, ctx.paths
    hidden, scale = hidden.contiguous().resolve_neg(), upstream.contiguous()
    of_hidden = scaled_rows(slope, scale) if ctx.needs_input_grad[0] else None
    if not ctx.needs_input_grad[1]:
        return of_hidden, None
    ordered, pairs = nodes.sort(stable=True)
    touched, counts = ordered.unique_consecutive(return_counts=True)
    rows = torch.from_numpy(np.arange(len(hidden)).repeat(starts.diff().numpy()))
    values = (ctx.memory or GradientMemory()).allocate((len(touched), hidden.shape[1]), hidden)
    kernels.backward(F.pad(counts.cumsum(0), (1, 0)), pairs, rows, factors, scale, hidden, values)
    if ctx.sparse:
        return of_hidden, row_sparse(touched, values, len(weight))
    return of_hidden, torch.zeros_like(weight).index_copy_(0, touched, values)


_OPERATOR = make_operator(
    "path_log_prob",
    "Tensor hidden, Tensor weight, Tensor classes, Tensor parents, Tensor sides, Tensor depths",
    _along_paths,
    leaves=2,
    empty=lambda hidden, *_: hidden.new_empty(hidden.shape[0], dtype=exact_dtype(hidden.dtype)),
)
