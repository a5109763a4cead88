"""What meets a model's head, and what the model does to its logits; and the head as a layer that does so."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lastlayer.functional.logit_map import GraphBuilder, LogitMap
from lastlayer.layers.full import FullSoftmax
from lastlayer.layers.soft_cap import SoftCap
from lastlayer.transformers.replaced_head import own_head, put_head

EXPONENTS = range(-10, 21, 2)  # the logits tried are plus and minus these powers of 2
TOLERANCE = 1e-5  # relative


class ScaledLogits(LogitMap):
    """`f(x) = scale * x`, or `cap * tanh(scale * x / cap)`, as Cohere's, Granite's and other models have it.

    Args:
        scale: positive.
        cap: the bound, positive; None: no bound.

    Raises:
        ValueError: a scale or cap that is not.
    """

    def __init__(self, scale: float, cap: float | None = None) -> None:
        super().__init__()
        if not 0 < scale < float("inf"):
            raise ValueError(f"scale must be a positive finite number, got {scale!r}")
        self.scale = float(scale)
        self.cap = None if cap is None else SoftCap(cap)

    def forward(self, logits: Tensor) -> Tensor:
        scaled = logits * self.scale
        return scaled if self.cap is None else self.cap(scaled)

    def vjp(self, logits: Tensor, gradient: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        if self.cap is not None:
            gradient = gradient * self.cap.derivative(logits * self.scale)
        return gradient * self.scale, ()

    def to_graph(self, graph: GraphBuilder, logits: str) -> str:
        scaled = graph.add("Mul", logits, self.scale)
        return scaled if self.cap is None else self.cap.to_graph(graph, scaled)

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}"


class _StandIn(nn.Module):
    """Replaces the head, and computes nothing but what it is told."""

    bias = None  # some models read their head's bias

    def __init__(self, compute: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, hidden: Tensor) -> Tensor:
        return self.compute(hidden)


@torch.no_grad()
def hidden_states(
    model: Any,
    batches: Iterable[Tensor],  # of token ids (N, T)
) -> Iterator[Tensor]:  # of (N * T, d)
    """Runs a model over text and yields what its head would have been given; the head itself is not computed.

    Encoder-decoder models get each batch as both input and labels' input. The model must be in `eval()`.
    """
    caught: list[Tensor] = []

    def catch(hidden: Tensor) -> Tensor:
        caught.append(hidden)
        return hidden[..., :1]

    for ids in batches:
        with put_head(model, _StandIn(catch)):
            model(input_ids=ids, **_decoder_inputs(model, ids))
        if not caught:
            raise TypeError(f"{type(model).__name__} did not call its output head")
        yield caught[-1].reshape(-1, caught[-1].shape[-1])
        caught.clear()


def _decoder_inputs(model: Any, ids: Tensor) -> dict[str, Tensor]:
    return {"decoder_input_ids": ids} if getattr(model.config, "is_encoder_decoder", False) else {}


def logit_map_of(model: Any) -> LogitMap | None:
    """The function that a Transformers model applies to each of its head's logits before it returns or uses them.

    None where it applies none; a `SoftCap` for Gemma 2 and its relatives, `ScaledLogits` for Cohere and Granite.
    Found by forward passes with known logits in place of the head's, not by the model's name, so that it is right
    for models that are not known here. The model is left as it was.

    Raises:
        TypeError: a model without an output head, or that does not run on token ids alone, or that does anything
            else: adds a number to each class's logit (`final_logits_bias` of Marian), or bars classes.

    Cost: two forward passes of one token, without the head.

    >>> from transformers import Gemma2Config, Gemma2ForCausalLM
    >>> sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    >>> more = {"vocab_size": 99, "num_key_value_heads": 1, "head_dim": 8}
    >>> config = Gemma2Config(final_logit_softcapping=30.0, **sizes, **more)
    >>> logit_map_of(Gemma2ForCausalLM(config))
    SoftCap(cap=30)
    """
    found = after_head(model)
    if isinstance(found, str):
        raise TypeError(f"the logits of {type(model).__name__} are no function of its head's alone: it {found}")
    return found


def output_layer(model: Any, **options: Any) -> FullSoftmax:
    """The head of a Transformers model as a `FullSoftmax` on the very same parameters, with the model's logit map.

    For hidden states as the head meets them (`hidden_states` yields them), equals the model's own logits after all
    that it does to them, `log_softmax` taken, and its own loss and gradients, without the `(N, V)` logits. Without
    the map the loss of Gemma 2 would be silently another.

    Args:
        model: any model whose head is one matrix, with or without a bias.
        options: those of `FullSoftmax`, such as `reduction` or `z_loss`.

    Raises:
        TypeError: a model whose head is no matrix, or as `logit_map_of`.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=99, **sizes))
    >>> layer, ids = output_layer(model), torch.randint(99, (2, 5))
    >>> hidden = model.model(ids).last_hidden_state
    >>> torch.allclose(layer(hidden[:, :-1], ids[:, 1:]), model(ids, labels=ids).loss)
    True
    """
    head = own_head(model)
    weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 2:
        raise TypeError(f"the head of {type(model).__name__} must be one matrix, got {type(head).__name__}")
    num_classes, width = weight.shape
    layer = FullSoftmax(width, num_classes, bias=False, weight=weight, logit_map=logit_map_of(model), **options)
    layer.bias = bias
    return layer


@torch.no_grad()
def after_head(model: Any) -> LogitMap | str | None:
    """As `logit_map_of`; a string, "it ...", where what the model does is no increasing function of each logit."""
    head: Any = own_head(model)
    num_classes = getattr(head, "out_features", None) or len(head.weight)
    sizes = torch.tensor([2.0**exponent for exponent in EXPONENTS])
    tried = torch.cat([sizes, -sizes])
    if not torch.equal(_final_logits(model, tried.new_zeros(num_classes)), tried.new_zeros(num_classes)):
        return "adds something of its own to the logits of some classes, or masks them"
    parts = [
        _final_logits(model, part.repeat(-(-num_classes // len(part)))[:num_classes])
        for part in tried.split(num_classes)
    ]
    final = torch.cat([part[: len(logits)] for part, logits in zip(parts, tried.split(num_classes), strict=True)])
    scale = float(final[0] / tried[0])
    if not 0 < scale < float("inf"):
        return "applies a function to them that does not increase with the head's logits"
    scale = 1.0 if abs(scale - 1) < TOLERANCE else scale
    if _close(final, scale * tried):
        return None if scale == 1 else ScaledLogits(scale)
    cap = float(final.max())
    found = SoftCap(cap) if scale == 1 else ScaledLogits(scale, cap)
    return found if _close(final, found(tried)) else "applies a function to them that is no scale and no soft cap"


def _final_logits(model: Any, logits: Tensor) -> Tensor:  # (V,) to (V,)
    """The model's output logits where its head returns `logits`, in float32."""
    head = model.get_output_embeddings()
    device = head.weight.device
    ids = torch.full((1, 1), min(1, len(logits) - 1), device=device)
    probe = _StandIn(lambda hidden: logits.to(device).expand(*hidden.shape[:-1], -1).clone())
    # Dropout in training mode must not use up random numbers of the caller's.
    with torch.random.fork_rng([device] if device.type == "cuda" else []), put_head(model, probe):
        try:
            output = model(input_ids=ids, return_dict=True, **_decoder_inputs(model, ids))
        except Exception as problem:  # a model of speech, say; each fails in its own way
            name = type(model).__name__
            raise TypeError(
                f"{name} does not run on token ids alone, which shows its logits: {problem}"
            ) from problem
    return output.logits[0, -1].float().cpu()


def _close(actual: Tensor, expected: Tensor) -> bool:
    return bool(((actual - expected).abs() <= TOLERANCE * expected.abs()).all())
