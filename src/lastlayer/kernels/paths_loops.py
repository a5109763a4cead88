"""The loops behind `kernels/paths.py`, compiled by numba: importing this module imports numba."""

import numpy as np

from lastlayer.kernels.fast_math import compiled


@compiled
def forward(first, last, starts, nodes, signs, hidden, weight, log_prob, factors, slope):
    d = hidden.shape[1]
    zero, one = hidden.dtype.type(0), hidden.dtype.type(1)
    for n in range(first, last):
        h = hidden[n]
        total = zero
        for p in range(starts[n], starts[n + 1]):
            w = weight[nodes[p]]
            score = zero
            for k in range(d):
                score += w[k] * h[k]
            score *= signs[p]
            decay = np.exp(-abs(score))
            total += min(score, zero) - np.log1p(decay)
            against = (decay if score > zero else one) / (one + decay)  # sigmoid(-score)
            factor = signs[p] * against
            factors[p] = factor
            if slope.shape[0]:
                into = slope[n]
                for k in range(d):
                    into[k] += factor * w[k]
        log_prob[n] = total


@compiled
def backward(first, last, starts, pairs, rows, factors, scale, hidden, of_weight):
    d = hidden.shape[1]
    for u in range(first, last):
        into = of_weight[u]
        for place in range(starts[u], starts[u + 1]):
            p = pairs[place]
            h = hidden[rows[p]]
            factor = factors[p] * scale[rows[p]]
            if place == starts[u]:
                for k in range(d):
                    into[k] = factor * h[k]
            else:
                for k in range(d):
                    into[k] += factor * h[k]
