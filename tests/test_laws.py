"""Every law for every layer: a layer in the table of `law_table.py` inherits them all."""

import pytest

from lastlayer.testing import LAWS
from lastlayer.testing.tracing import check_export, law_exports
from law_table import CASES

# Whose programs are those of another row of the same layer with other numbers: half a second each.
NOT_EXPORTED = {
    "full-sparsemax",  # twelve seconds, as its search is unrolled in each call: below, one call
    "full-no-bias", "full-soft-cap", "full-smooth", "full-z-loss", "full-entmax", "full-tied",
    "mixture-one-component", "mixture-mapped",
    "hierarchical-even", "hierarchical-odd", "hierarchical-one-cluster", "hierarchical-own-clusters",
    "hierarchical-sparse", "hierarchical-no-bias",
    "factored-spherical", "factored-spherical-one-class", "factored-taylor",
    "adaptive-two-tails", "adaptive-head-bias", "adaptive-tied", "tree-chain", "tree-given",
}  # fmt: skip
PAIRS = [(case, law) for case in CASES for law in LAWS if law is not law_exports or case.name not in NOT_EXPORTED]


@pytest.mark.parametrize(("case", "law"), PAIRS, ids=[f"{case.name}-{law.__name__}" for case, law in PAIRS])
def test_law(case, law):
    law(case)


def test_each_layer_is_exported():
    assert {case.name for case in CASES} > NOT_EXPORTED
    assert {type(case.make()) for case in CASES} == {
        type(case.make()) for case, law in PAIRS if law is law_exports
    }


def test_a_normalizer_that_searches_is_exported():
    (case,) = [case for case in CASES if case.name == "full-sparsemax"]
    layer = case.build()
    check_export(layer, lambda hidden, targets: (layer.log_prob(hidden),))
