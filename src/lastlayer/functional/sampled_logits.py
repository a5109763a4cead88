"""The logits of a few classes, and gradients that hold the rows of these classes alone."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lastlayer.functional.operators import make_operator
from lastlayer.functional.ordinary import ordinary
from lastlayer.functional.precision import as_exact, exact_dtype, no_autocast, product_dtype
from lastlayer.functional.row_sparse import row_sparse
from lastlayer.functional.second_order import HandWritten, gradients
from lastlayer.kernels.backends import grouped_softmax_backend_for
from lastlayer.kernels.grouped import add_rows

# Numbers of one block of gathered class vectors.
BLOCK_NUMBERS = 1 << 22


def sampled_logits(
    hidden: Tensor,  # (N, d)
    weight: Tensor,  # (V, d)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N, K), class ids
    candidates: Tensor,  # (S,) shared by the rows, or (N, S)
    *,
    sparse: bool = False,
) -> tuple[Tensor, ...]:  # (N, K), (N, S)
    """`logits.gather(1, targets)` and `logits[:, candidates]` of `logits = hidden @ weight.T + bias`.

    Only the rows of these classes are read, and of the gradients only these are written; `sparse` ones hold no
    others (coalesced), but in a compiled graph, where all are dense. Shared candidates are one matrix product;
    sets for each row are gathered. Products run in autocast's dtype where it is on; logits are in float32 at
    least. Second derivatives are dense.
    """
    with no_autocast(hidden.device.type):
        rows = hidden.to(product_dtype(hidden))
        if not ordinary(rows, weight, bias, targets, candidates):
            return _plain(rows, weight, bias, targets, candidates)
        if torch.compiler.is_compiling():
            return _OPERATOR(rows, weight, bias, targets, candidates)
        return _SampledLogits.run(rows, weight, bias, targets, candidates, sparse)


def _plain(rows: Tensor, weight: Tensor, bias: Tensor | None, *sets: Tensor) -> tuple[Tensor, ...]:
    """The same by PyTorch's own operations."""

    def logits(ids: Tensor) -> Tensor:
        classes = weight[ids].to(rows.dtype)  # (S, d), or (N, K, d)
        products = as_exact(rows @ classes.T if ids.dim() == 1 else (classes @ rows[:, :, None])[..., 0])
        return products if bias is None else products + bias[ids]

    return tuple(logits(ids) for ids in sets)


class _SampledLogits(HandWritten):
    @staticmethod
    def forward(
        rows: Tensor,  # (N, d), in the dtype of the products
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        candidates: Tensor,
        sparse: bool = False,
    ) -> tuple[Tensor, ...]:
        found = tuple(_products(rows.detach(), weight, ids) for ids in (targets, candidates))
        if bias is not None:
            for logits, ids in zip(found, (targets, candidates), strict=True):
                logits += bias.detach()[ids]
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.sparse = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """With g the upstream gradients: of h the sum of `g_c w_c` over classes, of w_c that of `g_c h`."""
        *leaves, targets, candidates = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]

        def form() -> tuple[Tensor | None, ...]:
            return _form(upstream, wanted, *leaves, targets, candidates, sparse=ctx.sparse)

        def twin(*leaves: Any) -> tuple[Tensor, ...]:
            return _plain(*leaves, targets, candidates)

        return *gradients(form, twin, tuple(leaves), upstream), None, None, None


def _form(
    upstream: Sequence[Tensor],
    wanted: Sequence[bool],
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *sets: Tensor,
    sparse: bool = False,
) -> tuple[Tensor | None, ...]:
    """The gradients of rows, weight and bias."""
    of_rows = of_weight = of_bias = None
    wants_rows, wants_weight, wants_bias = wanted
    parts = [(part.to(rows.dtype), ids) for part, ids in zip(upstream, sets, strict=True)]
    if wants_rows:
        of_targets, of_candidates = (_times_classes(part, weight, ids) for part, ids in parts)
        of_rows = of_candidates.add_(of_targets)
    touched, places = torch.unique(torch.cat([ids.reshape(-1) for ids in sets]), return_inverse=True)
    ends = places.split([ids.numel() for ids in sets])
    placed = [(part, at.view_as(ids)) for (part, ids), at in zip(parts, ends, strict=True)]
    if wants_weight:
        sums = upstream[0].new_zeros(len(touched), weight.shape[1])
        for part, at in placed:
            _add_outer(sums, part, at, rows)
        of_weight = _scattered(touched, sums.to(weight.dtype), len(weight), sparse)
    if wants_bias and bias is not None:
        sums = upstream[0].new_zeros(len(touched))
        for part, at in placed:
            of_ids = part.sum(0, dtype=sums.dtype) if at.dim() == 1 else part.reshape(-1).to(sums.dtype)
            sums.index_add_(0, at.reshape(-1), of_ids)
        of_bias = _scattered(touched, sums.to(bias.dtype), len(weight), sparse)
    return of_rows, of_weight, of_bias


def _products(rows: Tensor, weight: Tensor, ids: Tensor) -> Tensor:  # (N, C), float32 at least
    """The products of rows with the classes `ids (C,)`, or of every row with its own, `ids (N, C)`."""
    if ids.dim() == 1:
        return as_exact(rows @ weight.detach().index_select(0, ids).to(rows.dtype).T)
    products = rows.new_empty(ids.shape, dtype=exact_dtype(rows.dtype))
    for part in _blocks(ids, rows.shape[1]):
        classes = _gathered(weight, ids[part], rows.dtype)
        products[part] = torch.bmm(classes, rows[part, :, None])[..., 0]
    return products


def _times_classes(gradient: Tensor, weight: Tensor, ids: Tensor) -> Tensor:  # (N, C) to (N, d)
    """`sum over c of gradient[n, c] * weight[ids[n, c]]`, `ids (C,)` being those of every row."""
    if ids.dim() == 1:
        return gradient @ weight.detach().index_select(0, ids).to(gradient.dtype)
    sums = gradient.new_empty(len(gradient), weight.shape[1])
    for part in _blocks(ids, weight.shape[1]):
        sums[part] = torch.bmm(gradient[part, None], _gathered(weight, ids[part], gradient.dtype))[:, 0]
    return sums


def _add_outer(sums: Tensor, gradient: Tensor, at: Tensor, rows: Tensor) -> None:
    """Adds `gradient[n, c] * rows[n]` to `sums[at[n, c]]`."""
    compiled = grouped_softmax_backend_for(sums.device, sums.dtype, rows.dtype) == "compiled"
    if at.dim() == 1:
        products = (gradient.T @ rows).to(sums.dtype)
        add_rows(sums, at[:, None], None, products) if compiled else sums.index_add_(0, at, products)
        return
    if compiled:
        add_rows(sums, at.contiguous(), gradient.contiguous(), rows.contiguous())
        return
    for part in _blocks(at, rows.shape[1]):
        outer = as_exact(gradient[part])[..., None] * as_exact(rows[part])[:, None]
        sums.index_add_(0, at[part].reshape(-1), outer.flatten(0, 1))


def _gathered(weight: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:  # (n, C) to (n, C, d)
    return weight.detach().index_select(0, ids.reshape(-1)).to(dtype).unflatten(0, ids.shape)


def _blocks(ids: Tensor, width: int) -> Iterator[slice]:
    """Slices of rows whose gathered vectors are few enough."""
    step = max(1, BLOCK_NUMBERS // max(1, ids.shape[1] * width))
    return (slice(start, start + step) for start in range(0, len(ids), step))


def _scattered(rows: Tensor, values: Tensor, num_rows: int, sparse: bool) -> Tensor:
    if sparse:
        return row_sparse(rows, values, num_rows)
    return values.new_zeros(num_rows, *values.shape[1:]).index_copy_(0, rows, values)


def _empty(rows: Tensor, weight: Tensor, bias: Tensor | None, *sets: Tensor) -> tuple[Tensor, ...]:
    dtype = exact_dtype(rows.dtype)
    return tuple(rows.new_empty(rows.shape[0], ids.shape[-1], dtype=dtype) for ids in sets)


_OPERATOR = make_operator(
    "sampled_logits",
    "Tensor rows, Tensor weight, Tensor? bias, Tensor targets, Tensor candidates",
    _SampledLogits.forward,
    leaves=3,
    empty=_empty,
    results=2,
    gradient=_form,
)
