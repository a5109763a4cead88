"""The d x d Gram matrix and its rotations."""

import pytest
import torch

from lastlayer.functional import gram


def test_gram_matrix_is_taken_by_blocks(monkeypatch):
    monkeypatch.setattr(gram, "BLOCK_ROWS", 7)
    rows = torch.randn(23, 5)
    torch.testing.assert_close(gram.gram_matrix(rows), rows.double().T @ rows.double(), rtol=1e-13, atol=1e-13)


def test_principal_rotation_is_the_svd():
    weight = torch.randn(30, 6, dtype=torch.float64)
    rotation = gram.principal_rotation(gram.gram_matrix(weight)).weight_side
    kept = torch.linalg.vector_norm(weight @ rotation, dim=0)
    torch.testing.assert_close(kept, torch.linalg.svdvals(weight))
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(6, dtype=torch.float64))


def test_calibrated_rotation_keeps_logits_and_whitens():
    """S3: B h'^T = W h^T exactly, and h' has second moment I."""
    hidden = torch.randn(400, 6, dtype=torch.float64) * torch.tensor([9.0, 3.0, 1.0, 0.5, 0.2, 0.1]).double()
    weight = torch.randn(30, 6, dtype=torch.float64)
    moment = hidden.T @ hidden / len(hidden)
    weight_side, hidden_side, squares = gram.calibrated_rotation(gram.gram_matrix(weight), moment)
    logits = (hidden @ hidden_side) @ (weight @ weight_side).T
    torch.testing.assert_close(logits, hidden @ weight.T, rtol=1e-9, atol=1e-9)
    rotated = hidden @ hidden_side
    torch.testing.assert_close(rotated.T @ rotated / len(hidden), torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close((weight @ weight_side).square().sum(0), squares, rtol=1e-9, atol=0)


def test_calibrated_rotation_is_the_best_of_its_rank():
    hidden = torch.randn(400, 6, dtype=torch.float64) * torch.tensor([9.0, 3.0, 1.0, 0.5, 0.2, 0.1]).double()
    weight = torch.randn(30, 6, dtype=torch.float64)
    moment = hidden.T @ hidden / len(hidden)
    weight_side, hidden_side, squares = gram.calibrated_rotation(gram.gram_matrix(weight), moment)
    logits = hidden @ weight.T
    torch.testing.assert_close(squares.sum() * len(hidden), logits.square().sum())
    lost = logits - (hidden @ hidden_side[:, :2]) @ (weight @ weight_side[:, :2]).T
    best = torch.linalg.svdvals(logits)[2:].square().sum()  # Eckart and Young
    torch.testing.assert_close(lost.square().sum(), best, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("rows", "low", "high"), [(2, 0.5, 1.0), (200_000, 0.0, 0.01)])
def test_shrinkage_fades_with_rows(rows, low, high):
    moment = torch.diag(torch.tensor([4.0, 1.0, 0.5], dtype=torch.float64))
    shrunk = gram.shrunk_moment(moment, rows).diagonal()
    share = 1 - (shrunk[0] - shrunk[2]) / 3.5
    assert low <= share <= high
    assert (shrunk > 0).all()


def test_white_moment_is_left_alone():
    white = 3 * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(gram.shrunk_moment(white, 100), (3 * (1 + gram.RIDGE)) * white / 3)
