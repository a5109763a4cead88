"""The law suite itself: a correct layer passes every law, and each kind of fault breaks one."""

import pytest
import torch
from torch import nn
from torch.autograd.gradcheck import GradcheckError

from lastlayer import OutputLayer
from lastlayer.functional.reduce import at_kept, kept_rows
from lastlayer.testing import LayerCase, certify
from lastlayer.testing.losses import law_gradcheck


class NaiveSoftmax(OutputLayer):
    """The plain layer that everything else must equal."""

    def __init__(self, in_features, num_classes, *, reduction="mean", ignore_index=-100, device=None, dtype=None):
        super().__init__(in_features, num_classes, reduction=reduction, ignore_index=ignore_index)
        self.weight = nn.Parameter(torch.randn(num_classes, in_features, device=device, dtype=dtype))

    def _log_prob(self, hidden):
        return float_or_double(hidden @ self.weight.T).log_softmax(-1)

    def _target_log_prob(self, hidden, targets):
        return self._log_prob(hidden).gather(-1, targets[:, None])[:, 0]


def float_or_double(logits):
    return logits if logits.dtype == torch.float64 else logits.float()


def oracle(layer, hidden):
    return float_or_double(hidden @ layer.weight.T).log_softmax(-1)


class Unnormalised(NaiveSoftmax):
    def _log_prob(self, hidden):
        return hidden @ self.weight.T


class WrongTarget(NaiveSoftmax):
    def _target_log_prob(self, hidden, targets):
        return super()._target_log_prob(hidden, (targets + 1) % self.num_classes)


class UnsortedTopK(NaiveSoftmax):
    def _topk(self, hidden, k, selection):
        values, indices = super()._topk(hidden, k, selection)
        return values.flip(-1), indices.flip(-1)


class DetachedLoss(NaiveSoftmax):
    def _row_loss(self, hidden, targets):
        return super()._row_loss(hidden.detach(), targets)


class DetachedWeight(NaiveSoftmax):
    """Of queries alone: the loss has its gradient."""

    def _log_prob(self, hidden):
        return float_or_double(hidden @ self.weight.detach().T).log_softmax(-1)

    def _target_log_prob(self, hidden, targets):
        return NaiveSoftmax._log_prob(self, hidden).gather(-1, targets[:, None])[:, 0]


class CountsIgnored(NaiveSoftmax):
    def _loss(self, hidden, targets):
        row_loss = at_kept(self._row_loss, *kept_rows(hidden, targets, self.ignore_index))
        return {"mean": row_loss.mean(), "sum": row_loss.sum(), "none": row_loss}[self.reduction]


class ForgetsItsOptions(NaiveSoftmax):
    def __getstate__(self):
        return {**super().__getstate__(), "reduction": "sum"}


class SamplesUniformly(NaiveSoftmax):
    def _sample(self, hidden, num_samples):
        return torch.randint(self.num_classes, (len(hidden), num_samples))


class ConstantGradient(torch.autograd.Function):
    """The identity, whose gradient claims to depend on nothing."""

    @staticmethod
    def forward(log_prob):
        return log_prob.view_as(log_prob)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, upstream):
        return upstream.detach()

    @staticmethod
    def jvp(ctx, tangent):
        return tangent.view_as(tangent)


class OnceDifferentiable(NaiveSoftmax):
    def _target_log_prob(self, hidden, targets):
        return ConstantGradient.apply(super()._target_log_prob(hidden, targets))


class ReadsValues(NaiveSoftmax):
    """Right, but not under `vmap`."""

    def _log_prob(self, hidden):
        return super()._log_prob(hidden) if hidden.sum().item() != 0.5 else hidden


class AcceptsAnything(NaiveSoftmax):
    def topk(self, hidden, k, **selection):
        return super().topk(hidden, min(max(int(k), 1), self.num_classes), **selection)


class ForgetsExclusions(NaiveSoftmax):
    def topk(self, hidden, k, *, exclude=None, allowed=None):
        return super().topk(hidden, k, exclude=None, allowed=allowed)


class ScoresOfTheSelection(NaiveSoftmax):
    """Renormalises over the classes that are left."""

    def _topk(self, hidden, k, selection):
        values, indices = super()._topk(hidden, k, selection)
        if selection is None:
            return values, indices
        left = selection.bar(self._log_prob(hidden)).logsumexp(-1, keepdim=True)
        return values - left, indices


class ScoresPadding(NaiveSoftmax):
    def score(self, hidden, ids):
        return super().score(hidden, ids.clamp(min=0))


def case(layer_class, in_features=5, num_classes=11):
    return LayerCase(
        layer_class.__name__,
        make=lambda **kwargs: layer_class(in_features, num_classes, **kwargs),
        oracle=oracle,
    )


@pytest.mark.parametrize("num_classes", [1, 2, 11])
def test_right_layer_is_certified(num_classes):
    certify(case(NaiveSoftmax, num_classes=num_classes))


@pytest.mark.parametrize(
    "wrong",
    [
        Unnormalised,
        WrongTarget,
        UnsortedTopK,
        DetachedLoss,
        DetachedWeight,
        CountsIgnored,
        ForgetsItsOptions,
        SamplesUniformly,
        OnceDifferentiable,
        ReadsValues,
        AcceptsAnything,
        ForgetsExclusions,
        ScoresOfTheSelection,
        ScoresPadding,
    ],
)
def test_wrong_layer_is_refused(wrong):
    with pytest.raises(Exception):  # noqa: B017 - each law fails in its own way
        certify(case(wrong))


def test_finite_differences_see_a_missing_gradient():
    with pytest.raises(GradcheckError):
        law_gradcheck(case(DetachedWeight))
