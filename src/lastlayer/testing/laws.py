"""The laws of `OutputLayer`, each a function of one `LayerCase` that raises where the law is broken."""

from collections.abc import Callable

from lastlayer.testing.cases import LayerCase
from lastlayer.testing.derivatives import law_functional_transforms, law_second_derivatives
from lastlayer.testing.exported import law_exports
from lastlayer.testing.handling import (
    law_any_integer_targets,
    law_any_shape,
    law_refuses_bad_input,
    law_survives_copies,
)
from lastlayer.testing.losses import (
    law_gradcheck,
    law_large_common_logits,
    law_loss_is_likelihood,
    law_low_precision,
)
from lastlayer.testing.probabilities import (
    law_a_bias_of_minus_infinity_bars,
    law_normalised,
    law_samples_follow_the_model,
    law_score_is_gathered,
    law_target_is_gathered,
    law_topk_is_sorted,
    law_topk_of_a_selection,
)
from lastlayer.testing.without_values import law_without_values

LAWS: tuple[Callable[[LayerCase], None], ...] = (
    law_normalised,
    law_target_is_gathered,
    law_score_is_gathered,
    law_topk_is_sorted,
    law_topk_of_a_selection,
    law_a_bias_of_minus_infinity_bars,
    law_loss_is_likelihood,
    law_any_shape,
    law_any_integer_targets,
    law_gradcheck,
    law_second_derivatives,
    law_functional_transforms,
    law_without_values,
    law_exports,
    law_low_precision,
    law_large_common_logits,
    law_survives_copies,
    law_refuses_bad_input,
    law_samples_follow_the_model,
)


def certify(case: LayerCase) -> None:
    """Runs every law on one case; the first that is broken raises."""
    for law in LAWS:
        law(case)
