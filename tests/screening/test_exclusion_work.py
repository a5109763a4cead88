"""What a query with exclusions reads: excluded classes take no candidate's place, and no other rows are read."""

import pytest
import torch
from test_overflow import both_ways, normal, way

from lastlayer import Int4Preview, Int8Preview, ScreenedSoftmax, SVDPreview
from lastlayer.kernels import engine
from lastlayer.kernels.screening import Query
from lastlayer.screening import screen as plain
from lastlayer.screening.compiled import EngineScreen

__all__ = ["way"]  # a fixture
V, D, CANDIDATES, EXCLUDED, K = 2000, 24, 40, 25, 5
SPECTRUM = torch.arange(1, D + 1) ** -0.5
STATES = normal(500, D, seed=9) * SPECTRUM
PREVIEWS = {
    "int8": Int8Preview(),
    "int4": Int4Preview(calibration=STATES),
    "svd": SVDPreview(16, calibration=STATES),
}
every_preview = pytest.mark.parametrize("preview", PREVIEWS.values(), ids=PREVIEWS)


def head():
    return normal(V, D) * SPECTRUM, normal(4, D, seed=2) * SPECTRUM


def query_of(weight, prepared, limits, hidden, query):
    """Indices and certificates, by the engine or by its plain twin."""
    layer = plain.Head(weight, None)
    if engine.available():
        found, unsettled = EngineScreen(layer, prepared, limits).query(hidden, query)
        assert unsettled == 0
    else:
        found = plain.screen(layer, prepared, limits, hidden, query)
    return found.indices, found.certified


@both_ways
@every_preview
@pytest.mark.parametrize("exact", [False, True])
def test_rows_that_are_read(way, preview, exact):
    """All rows that need not be read are NaN: not those of the candidates, the excluded, the classes in play."""
    weight, states = head()
    prepared = preview.prepare(weight, None)
    limits = plain.Limits.of(plain.Head(weight, None), prepared)
    for hidden in states.split(1):
        logits = hidden.double() @ weight.double().T
        excluded = logits.topk(EXCLUDED).indices
        left = logits.scatter(1, excluded, -torch.inf)
        scores = prepared.scores(hidden).scatter(1, excluded, -torch.inf)
        chosen = scores.topk(CANDIDATES).indices
        needed = torch.zeros(V, dtype=torch.bool)
        needed[chosen[0]] = needed[excluded[0]] = True
        if exact:
            upper = scores + 1.001 * prepared.error(hidden).all()
            needed |= upper[0] >= left.gather(1, chosen).topk(K).values[0, -1]
        assert needed.sum() < V / 4
        poisoned = weight.where(needed[:, None], torch.nan)
        indices, certified = query_of(poisoned, prepared, limits, hidden, Query(K, CANDIDATES, exact, excluded))
        rescored = logits.gather(1, chosen)
        among = left if exact else torch.full_like(left, -torch.inf).scatter(1, chosen, rescored)
        assert torch.equal(indices, among.topk(K).indices)
        assert certified.all() or not exact


@both_ways
@pytest.mark.parametrize("scale", [1.0, 10.0, 60.0])
def test_summaries_after_exclusions(way, scale):
    """The sums of blocks whose largest logits were taken out, also where hardly a digit of a sum is left."""
    weight, hidden = head()
    hidden = hidden * scale
    truth = (hidden.double() @ weight.double().T).log_softmax(-1)
    for use in ("screen", "full"):
        layer = ScreenedSoftmax(weight, preview=Int8Preview(), candidates=CANDIDATES, use=use, exact=True)
        for excluded in (truth.topk(EXCLUDED).indices, truth.topk(V - 3 * K).indices):
            values, indices = truth.scatter(1, excluded, -torch.inf).topk(K)
            found = layer.topk(hidden, K, exclude=excluded)
            assert torch.equal(found.indices, indices)
            torch.testing.assert_close(found.log_prob.double(), values, rtol=1e-5, atol=1e-2)


def test_the_bound_of_a_calibrated_svd_weighs_its_coordinates():
    """A bound by plain norms of the dropped coordinates is larger for nearly all hidden states and classes."""
    weight, _ = head()
    prepared = SVDPreview(4, calibration=STATES).prepare(weight, None)
    dropped = weight.double() @ prepared.rotation.weight_side[:, 4:]
    of_states = STATES.double() @ prepared.rotation.hidden_side[:, 4:]
    by_norms = of_states.norm(dim=-1, keepdim=True) * dropped.norm(dim=-1)
    bound = prepared.error(STATES).all().double()
    off = (prepared.scores(STATES).double() - STATES.double() @ weight.double().T).abs()
    assert (off <= bound).all()
    assert bound.mean() < 0.95 * by_norms.mean()
