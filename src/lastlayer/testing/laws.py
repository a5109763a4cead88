"""The laws of `OutputLayer`, each a function of one `LayerCase` that raises where the law is broken."""

from collections.abc import Callable

from lastlayer.testing import derivatives, handling, losses, probabilities, tracing
from lastlayer.testing.cases import LayerCase

LAWS: tuple[Callable[[LayerCase], None], ...] = tuple(
    law
    for module in (probabilities, losses, handling, derivatives, tracing)
    for name, law in vars(module).items()
    if name.startswith("law_")
)


def certify(case: LayerCase) -> None:
    """Runs every law on one case; the first that is broken raises."""
    for law in LAWS:
        law(case)
