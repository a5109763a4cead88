"""Plain formulas, short enough to check by eye, that the layers of the law table must equal."""

import torch
import torch.nn.functional as F

from lastlayer import SphericalSoftmax


def full_softmax(layer, hidden):
    """`log_softmax(f(hidden @ weight.T + bias))`."""
    logits = hidden @ layer.weight.T
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if layer.bias is not None:
        logits = logits + layer.bias
    if layer.logit_map is not None:
        logits = layer.logit_map(logits)
    return logits.log_softmax(-1)


def full_softmax_loss(layer, hidden, targets):
    """The loss with every option, by `F.cross_entropy`."""
    logits = hidden @ layer.weight.T + (0 if layer.bias is None else layer.bias)
    if layer.logit_map is not None:
        logits = layer.logit_map(logits)
    loss = F.cross_entropy(
        logits,
        targets,
        weight=None if layer.class_weights is None else layer.class_weights.to(logits.dtype),
        label_smoothing=layer.label_smoothing,
        reduction=layer.reduction,
        ignore_index=layer.ignore_index,
    )
    kept = targets != layer.ignore_index
    peak = logits.detach().amax(-1, keepdim=True)
    square = (peak[:, 0] + (logits - peak).logsumexp(-1)).square() * kept
    reduced = {"none": square, "sum": square.sum(), "mean": square.sum() / kept.sum()}[layer.reduction]
    return loss + layer.z_loss * reduced


def hierarchical_softmax(layer, hidden):
    """`log P(cluster) + log P(class | cluster)`, a class at a time."""
    head = accurate(F.linear(hidden, layer.head_weight, layer.head_bias)).log_softmax(-1)
    columns = [None] * layer.num_classes
    for cluster in range(len(layer.offsets) - 1):
        a, b = layer.offsets[cluster : cluster + 2].tolist()
        bias = None if layer.bias is None else layer.bias[a:b]
        inner = accurate(F.linear(hidden, layer.weight[a:b], bias)).log_softmax(-1)
        for place, class_id in enumerate(layer.order[a:b].tolist()):
            columns[class_id] = head[:, cluster] + inner[:, place]
    return torch.stack(columns, -1)


def adaptive_softmax(layer, hidden):
    """The head's own classes, and each tail inside its share of the head, a cluster at a time."""
    weight = layer.head.weight
    by_rank = torch.arange(layer.num_classes) if layer.order is None else layer.order
    if layer.weight is not None:
        weight = torch.cat([layer.weight[by_rank[: layer.cutoffs[0]]], weight])
    head = accurate(F.linear(hidden, weight, layer.head.bias)).log_softmax(-1)
    size = layer.cutoffs[0]
    parts = [head[:, :size]]
    for i, (project, classes) in enumerate(layer.tail):
        inner = accurate(F.linear(F.linear(hidden, project.weight), classes.weight)).log_softmax(-1)
        parts.append(head[:, size + i, None] + inner)
    columns = torch.cat(parts, -1).unbind(-1)
    of_class = {int(class_id): column for class_id, column in zip(by_rank, columns, strict=True)}
    return torch.stack([of_class[y] for y in range(layer.num_classes)], -1)


def tree_softmax(layer, hidden):
    """The product of the turns on the way from the root to each class."""
    scores = accurate(hidden @ layer.weight.T)
    columns = {}
    inner = len(layer.nodes)
    root = ({inner + 1 + n for n in range(inner)} | {0}) - set(layer.nodes.flatten().tolist())

    def walk(node, log_prob):
        if node < layer.num_classes:
            columns[node] = log_prob
            return
        score = scores[:, node - layer.num_classes]
        first, second = layer.nodes[node - layer.num_classes].tolist()
        walk(first, log_prob + F.logsigmoid(score))
        walk(second, log_prob + F.logsigmoid(-score))

    walk(max(root), scores.new_zeros(len(hidden)) if inner else accurate(hidden).sum(1) * 0)
    return torch.stack([columns[y] for y in range(layer.num_classes)], -1)


def accurate(logits):
    """In at least float32."""
    return logits if logits.dtype == torch.float64 else logits.float()


def factored_softmax(layer, hidden):
    """The numerator of every class over the sum of all, for the two losses that have probabilities."""
    outputs = accurate(F.linear(hidden, layer.weight, layer.bias))
    if isinstance(layer.loss, SphericalSoftmax):
        numerator = outputs.square() + layer.loss.epsilon
    else:
        numerator = 1 + outputs + outputs.square() / 2
    return (numerator / numerator.sum(-1, keepdim=True)).log()


def mixture_of_softmaxes(layer, hidden):
    """`log Σ_k π_k softmax(f(weight @ tanh(latent_k) + bias))`."""
    latents = layer.latent(hidden).tanh().unflatten(-1, (layer.num_components, -1))
    prior = layer.prior_logits.expand(len(hidden), -1) if layer.prior is None else layer.prior(hidden)
    logits = latents @ layer.weight.T
    if logits.dtype != torch.float64:
        prior, logits = prior.float(), logits.float()
    if layer.bias is not None:
        logits = logits + layer.bias
    if layer.logit_map is not None:
        logits = layer.logit_map(logits)
    return (prior.log_softmax(-1)[..., None] + logits.log_softmax(-1)).logsumexp(1)


def entmax(layer, hidden):
    """`log p` of sparsemax (alpha 2) or 1.5-entmax: tau of the k largest, with the most k above it."""
    logits = accurate(F.linear(hidden, layer.weight, layer.bias))
    scores = (layer.normalizer.alpha - 1) * (logits - logits.detach().amax(-1, keepdim=True))
    ordered = scores.sort(-1, descending=True).values
    count = torch.arange(1, layer.num_classes + 1, dtype=scores.dtype)
    mean = ordered.cumsum(-1) / count
    if layer.normalizer.alpha == 2.0:
        taus = mean - 1 / count
    else:
        first = torch.ones(layer.num_classes, layer.num_classes).tril()  # of each k the largest k
        spread = ((ordered[:, None] - mean[..., None]).square() * first).sum(-1)
        taus = mean - ((1 - spread) / count).clamp(min=1e-30).sqrt()
    size = (ordered > taus).long().cumprod(-1).sum(-1, keepdim=True)
    prob = (scores - taus.gather(-1, size - 1)).clamp(min=0) ** (1 / (layer.normalizer.alpha - 1))
    return torch.where(prob > 0, prob, 1.0).log().masked_fill(prob == 0, -torch.inf)


def entmax_loss(layer, hidden, targets):
    """The Fenchel-Young loss: `p . z - z_y + (1 - sum(p ** alpha)) / (alpha (alpha - 1))`."""
    alpha, kept = layer.normalizer.alpha, targets != layer.ignore_index
    logits, prob = F.linear(hidden, layer.weight, layer.bias), entmax(layer, hidden).exp()
    logits = logits - logits.detach().amax(-1, keepdim=True)
    own = logits.gather(-1, targets.masked_fill(~kept, 0)[:, None])[:, 0]
    rows = (prob * logits).sum(-1) - own + (1 - (prob**alpha).sum(-1)) / (alpha * (alpha - 1))
    rows = rows.masked_fill(~kept, 0)
    return {"none": rows, "sum": rows.sum(), "mean": rows.sum() / kept.sum()}[layer.reduction]
