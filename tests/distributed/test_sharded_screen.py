"""Screens over ranks: exact where certified, and a proof stays a proof."""

import pytest
import torch
from same_answers import batch, check_equal, make_sharded

from lastlayer import FullSoftmax, Int8Preview, OneVsAll, SoftCap, SVDPreview
from lastlayer.distributed import ShardedScreen

PREVIEWS = {"svd": SVDPreview(4), "int8": Int8Preview()}


def layer_and_batch(V=301, dtype=torch.float32, **options):
    torch.manual_seed(1)
    layer = FullSoftmax(16, V, dtype=dtype, **options)
    with torch.no_grad():
        layer.weight.mul_(torch.linspace(0.5, 8.0, V)[:, None])
    return layer, *batch(layer, 9, dtype=dtype)


def exact_screens_are_the_layer(group, preview, V, options):
    layer, hidden, _ = layer_and_batch(V, **options)
    screen = ShardedScreen(
        make_sharded(layer, group), preview=PREVIEWS[preview], candidates=min(V, 10), exact=True
    )
    k = min(V, 5)
    generator = torch.Generator().manual_seed(4)
    exclude = torch.randint(V, (9, 3), generator=generator)
    exclude[0, :] = -100
    allowed = torch.rand(V, generator=generator) < 0.5
    allowed[0] = True
    last = torch.zeros(V, dtype=torch.bool)
    last[-1] = True  # all classes of other ranks are barred
    for selection in ({}, {"exclude": exclude}, {"allowed": allowed}, {"exclude": exclude, "allowed": last}):
        expected, found = layer.topk(hidden, k, **selection), screen.topk(hidden, k, **selection)
        assert found.certified.all()
        check_equal(found.indices, expected.indices, f"{preview}, {list(selection)}")
        error = screen.log_normalizer_error(hidden)[:, None] + 1e-4
        finite = expected.log_prob > -torch.inf
        assert (((found.log_prob - expected.log_prob).abs() <= error) | ~finite).all()


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_exact_screens(pool, ranks):
    for preview in PREVIEWS:
        pool.run(exact_screens_are_the_layer, ranks, preview, 301, {})
    pool.run(exact_screens_are_the_layer, ranks, "svd", 301, {"logit_map": SoftCap(3.0), "bias": False})
    pool.run(exact_screens_are_the_layer, ranks, "int8", 4, {})
    pool.run(exact_screens_are_the_layer, ranks, "int8", 1, {})


def certificates_are_proofs(group):
    layer, hidden, _ = layer_and_batch(dtype=torch.float64)
    screen = ShardedScreen(make_sharded(layer, group), preview=SVDPreview(14), candidates=6, use="screen")
    best, expected = screen.topk(hidden, 3), layer.topk(hidden, 3)
    assert best.certified.any(), "the test shows nothing where no row is certified"
    assert not best.certified.all(), "the test shows nothing where all rows are certified"
    check_equal(best.indices[best.certified], expected.indices[best.certified], "certified")
    log_prob = screen.log_prob(hidden)
    check_equal(log_prob.exp().sum(1), torch.ones(9, dtype=torch.float64), "normalised")
    error = screen.log_normalizer_error(hidden)
    gap = (log_prob - layer.log_prob(hidden)).gather(1, screen.topk(hidden, 1).indices)[:, 0].abs()
    assert (gap <= error + 1e-9).all()
    check_equal(screen.score(hidden, best.indices), log_prob.gather(1, best.indices), "score")
    draws = screen.sample(hidden[:2], 20_000)
    for row, expected in zip(draws, log_prob, strict=False):
        share = torch.bincount(row, minlength=layer.num_classes) / 20_000
        assert (share - expected.exp()).abs().max() < 5 * (0.25 / 20_000) ** 0.5


def test_certificates(pool):
    for ranks in (2, 3):
        pool.run(certificates_are_proofs, ranks)


def it_follows_training(group):
    layer, hidden, targets = layer_and_batch()
    sharded = make_sharded(layer, group)
    screen = ShardedScreen(sharded, preview=Int8Preview(), candidates=5, exact=True)
    optimizer = torch.optim.SGD(sharded.parameters(), lr=1.0)
    sharded(hidden, targets).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="refresh"):
        screen.topk(hidden, 2)
    screen.refresh()
    check_equal(screen.topk(hidden, 2).indices, sharded.topk(hidden, 2).indices, "refreshed")


def test_a_changed_weight(pool):
    pool.run(it_follows_training, 3)


def others(group):
    layer, hidden, _ = layer_and_batch()
    with pytest.raises(TypeError, match="shard has divided"):
        ShardedScreen(layer, preview=Int8Preview(), candidates=5)
    with pytest.raises(ValueError, match="candidates"):
        ShardedScreen(make_sharded(layer, group), preview=Int8Preview(), candidates=302)
    with torch.no_grad():
        layer.bias[:101] = -torch.inf
    screen = ShardedScreen(make_sharded(layer, group), preview=Int8Preview(), candidates=5, exact=True)
    check_equal(screen.topk(hidden, 5).indices, layer.topk(hidden, 5).indices, "a rank whose classes are barred")
    torch.manual_seed(1)
    several = OneVsAll(16, 301)
    screen = ShardedScreen(make_sharded(several, group), preview=Int8Preview(), candidates=5, exact=True)
    check_equal(screen.topk(hidden, 5).indices, several.topk(hidden, 5).indices, "one against all")


def test_other_layers(pool):
    pool.run(others, 3)
