"""A user-defined preview: the logits rounded to tenths; one of its scores can be set to any number."""

import torch

from lastlayer.screening.preview import ErrorBound, PreparedPreview, Preview


class OwnPreview(Preview):
    """Settings: what one score of each row is replaced with."""

    def __init__(self, bad=None):
        self.bad = bad

    def prepare(self, weight, bias):
        return Prepared(weight, bias, self.bad)


class Prepared(PreparedPreview):
    """The layer itself, rounded."""

    def __init__(self, weight, bias, bad):
        self.weight, self.bias, self.bad = weight, bias, bad
        self.bytes_read = weight.nbytes
        self.of_classes = torch.full((1, len(weight)), 0.051)

    def scores(self, hidden):
        scores = (10 * torch.nn.functional.linear(hidden, self.weight, self.bias)).round() / 10
        if self.bad is not None:
            scores[:, 5] = self.bad
        return scores

    def error(self, hidden):
        return ErrorBound(torch.ones(len(hidden), 1), self.of_classes)
