"""`log P(path)` through a binary tree: a logistic regression at every node on the way, and its gradient."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lastlayer.functional.first_order import first_order
from lastlayer.functional.outside_graphs import outside_graphs
from lastlayer.functional.precision import as_exact, no_autocast, product_dtype
from lastlayer.functional.row_sparse import GradientMemory, row_sparse
from lastlayer.functional.trees import Tree
from lastlayer.kernels import paths as kernels
from lastlayer.kernels.backends import paths_backend_for


@outside_graphs
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
    others, in memory that `memory` lends. Once differentiable.
    """
    starts, nodes, signs = tree.paths(classes.cpu())
    with no_autocast(hidden.device.type):
        backend = paths_backend_for(hidden.device, product_dtype(hidden), weight.dtype)
        if backend == "compiled" and hidden.dtype == weight.dtype and weight.is_contiguous():
            log_prob: Any = _PathLogProb.apply(hidden, weight, (starts, nodes, signs), sparse, memory)
            return log_prob
        device = hidden.device
        rows = torch.arange(len(hidden), device=device).repeat_interleave(starts.diff().to(device))
        of_nodes = F.embedding(nodes.to(device), weight, sparse=sparse)
        scores = (as_exact(hidden).index_select(0, rows) * as_exact(of_nodes)).sum(1)
        terms = F.logsigmoid(scores * signs.to(device))
        return terms.new_zeros(len(hidden)).index_add(0, rows, terms)


class _PathLogProb(torch.autograd.Function):
    """With x = sign * (h . w), f = sign * sigmoid(-x) and upstream g: of h, g f w summed over the path, its factor
    of g formed in the forward pass; of w, g f h summed over the rows whose path has it."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, paths: Any, sparse: bool, memory: GradientMemory | None
    ) -> Tensor:
        starts, nodes, signs = paths
        hidden = hidden.contiguous()
        log_prob, factors = hidden.new_empty(len(hidden)), hidden.new_empty(len(nodes))
        slope = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        kernels.forward(starts, nodes, signs, hidden, weight, log_prob, factors, slope)
        ctx.save_for_backward(hidden, factors, slope)
        ctx.paths, ctx.sparse, ctx.memory, ctx.num_nodes = (starts, nodes), sparse, memory, len(weight)
        return log_prob

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        hidden, factors, slope = ctx.saved_tensors
        starts, nodes = ctx.paths
        scale = upstream[0].detach().contiguous()
        of_hidden = slope * scale[:, None] if ctx.needs_input_grad[0] else None
        of_weight = None
        if ctx.needs_input_grad[1]:
            ordered, pairs = nodes.sort(stable=True)
            touched, counts = ordered.unique_consecutive(return_counts=True)
            rows = torch.arange(len(hidden)).repeat_interleave(starts.diff())
            values = (ctx.memory or GradientMemory()).lend((len(touched), hidden.shape[1]), hidden)
            kernels.backward(F.pad(counts.cumsum(0), (1, 0)), pairs, rows, factors, scale, hidden, values)
            if ctx.sparse:
                of_weight = row_sparse(touched, values, ctx.num_nodes)
            else:
                of_weight = values.new_zeros(ctx.num_nodes, hidden.shape[1]).index_copy_(0, touched, values)
        return (*first_order("path_log_prob", (of_hidden, of_weight)), None, None, None)
