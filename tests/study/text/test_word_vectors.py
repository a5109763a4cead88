"""Vectors of words from their neighbours."""

import torch

from lastlayer import clusters
from lastlayer.study.text.word_vectors import word_vectors


def grammar(tokens=6000):
    """Words 0 to 5 are followed by one of 6 to 11, those by one of 12 to 17, those by one of the first."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(6, (tokens,), generator=generator) + 6 * (torch.arange(tokens) % 3)


def test_words_of_one_kind_are_near_each_other():
    vectors = word_vectors(grammar(), 18, 6)
    ids = clusters.by_embedding(vectors, 3, max_size=6)
    assert [len(ids[kind : kind + 6].unique()) for kind in (0, 6, 12)] == [1, 1, 1]
    assert len(ids.unique()) == 3


def test_vectors_are_of_unit_length_the_same_each_time_and_zero_for_words_that_never_occur():
    state = torch.get_rng_state()
    vectors = word_vectors(grammar(), 20, 6)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(vectors, word_vectors(grammar(), 20, 6))
    assert vectors.shape == (20, 6)
    torch.testing.assert_close(vectors.norm(dim=1), (torch.arange(20) < 18).float())
