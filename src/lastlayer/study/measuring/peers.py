"""What `bench` runs side by side: PyTorch's own layers, these layers, and screens."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lastlayer.layers.base import OutputLayer
from lastlayer.screening import Int8Preview, ScreenedSoftmax, SVDPreview
from lastlayer.study.measuring.cost import loss_of, training_step

Call = Callable[[], object]
Loss = Callable[[Tensor, Tensor], Tensor]

TRAINING_BASELINE = "F.linear + F.cross_entropy"
QUERY_BASELINE = "F.linear + topk"


def zipf_counts(num_classes: int) -> Tensor:  # (V,)
    """Counts that fall as those of words do: class `i` as `1 / (i + 1)`."""
    return (1e9 / torch.arange(1, num_classes + 1, dtype=torch.float64)).ceil().long()


def training_peers(
    linear: nn.Linear,
    layers: dict[str, OutputLayer],
    hidden: Tensor,  # (N, d)
    targets: Tensor,  # (N,)
) -> dict[str, Call]:
    """Forward, backward and an SGD step of every layer."""
    losses: dict[str, tuple[nn.Module, Loss]] = {
        TRAINING_BASELINE: (linear, lambda h, t: F.cross_entropy(linear(h), t))
    }
    for name, options in linear_cross_entropy_settings():

        def loss(h: Tensor, t: Tensor, options: Any = options) -> Tensor:
            return F.linear_cross_entropy(h, linear.weight, t, linear_bias=linear.bias, options=options)

        losses[name] = (linear, loss)
    adaptive = torch_adaptive(linear.in_features, linear.out_features)
    if adaptive is not None:
        adaptive = adaptive.to(hidden.device)
        losses["nn.AdaptiveLogSoftmaxWithLoss"] = (adaptive, lambda h, t: adaptive(h, t).loss)
    losses |= {name: (layer, loss_of(layer, len(hidden))) for name, layer in layers.items()}
    return {name: sgd_step(module, loss, hidden, targets) for name, (module, loss) in losses.items()}


def linear_cross_entropy_settings() -> list[tuple[str, Any]]:
    """PyTorch's fused loss without chunks, with its default ones, and at its best on a CPU; none where absent."""
    if not hasattr(F, "linear_cross_entropy"):
        return []
    return [
        ("F.linear_cross_entropy", None),
        ("F.linear_cross_entropy, chunked", nn.LinearCrossEntropyOptions()),
        (
            "F.linear_cross_entropy, rows of 512",
            nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=512),
        ),
    ]


def torch_adaptive(in_features: int, num_classes: int) -> nn.AdaptiveLogSoftmaxWithLoss | None:
    """PyTorch's adaptive softmax with a twentieth and a quarter of the classes first; None for too few classes."""
    cutoffs = [num_classes // 20, num_classes // 4]
    if not 0 < cutoffs[0] < cutoffs[1]:
        return None
    div_value = 4.0 if in_features >= 16 else 1.0
    return nn.AdaptiveLogSoftmaxWithLoss(in_features, num_classes, cutoffs, div_value=div_value)


def sgd_step(module: nn.Module, loss: Loss, hidden: Tensor, targets: Tensor, lr: float = 1e-3) -> Call:
    """A training step of `loss`, which `module` computes, by SGD or what the layer must have."""
    own = module.own_optimizer(lr) if isinstance(module, OutputLayer) else None
    return training_step(loss, own or torch.optim.SGD(module.parameters(), lr), hidden, targets)


def query_peers(
    linear: nn.Linear,
    layers: dict[str, OutputLayer],
    hidden: Tensor,  # (N, d)
    k: int,
) -> dict[str, Call]:
    """The `k` best classes of every row: all logits, each layer's own `topk`, and a screen of the same weight."""
    calls: dict[str, Call] = {QUERY_BASELINE: lambda: linear(hidden).topk(k)}
    for name, layer in layers.items():
        calls[name] = lambda layer=layer: layer.topk(hidden, k)
    for name, screen in screens(linear, k).items():
        calls[name] = lambda screen=screen: screen.topk(hidden, k)
    return {name: torch.no_grad()(call) for name, call in calls.items()}


def screens(linear: nn.Linear, k: int) -> dict[str, ScreenedSoftmax]:
    """The paper's screen (an eighth of the width, a sixteenth of the classes), and one with `exact=True`."""
    V, d = linear.out_features, linear.in_features
    svd = SVDPreview(max(1, d // 8))
    return {
        f"screened, SVDPreview({svd.window})": ScreenedSoftmax.from_linear(
            linear, preview=svd, candidates=max(k, V // 16)
        ),
        "screened, Int8Preview, exact": ScreenedSoftmax.from_linear(
            linear, preview=Int8Preview(), candidates=min(V, max(k, 64)), exact=True
        ),
    }
