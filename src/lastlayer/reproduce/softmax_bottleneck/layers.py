"""The output layers of the study, by the names that its tables have."""

from collections.abc import Callable

from lastlayer.functional.logit_map import LogitMap
from lastlayer.layers.full import FullSoftmax
from lastlayer.layers.mixture import MixtureOfSoftmaxes
from lastlayer.layers.monotone_network import MonotoneNetwork
from lastlayer.layers.plif import PLIF
from lastlayer.layers.sigsoftmax import Sigsoftmax

MAPS: dict[str, Callable[[int], LogitMap | None]] = {  # of the number of knots
    "softmax": lambda knots: None,
    "sigsoftmax": lambda knots: Sigsoftmax(),
    "PLIF": PLIF,
    "frozen PLIF": lambda knots: PLIF(knots, init_std=1.0, frozen=True),
    "monotone network": lambda knots: MonotoneNetwork(10),
}


def build(
    name: str, width: int, num_classes: int, components: int, knots: int = 100_000
) -> FullSoftmax | MixtureOfSoftmaxes:
    """A mixture of so many components; or a softmax, of the logits through one of `MAPS` or of more features."""
    if name.startswith("mixture"):
        return MixtureOfSoftmaxes(width, num_classes, components)
    if name == "wide softmax":
        return FullSoftmax(wide(width, num_classes, components), num_classes)
    return FullSoftmax(width, num_classes, logit_map=MAPS[name](knots))


def wide(width: int, num_classes: int, components: int) -> int:
    """The width at which a language model with a plain softmax has the parameters of the one with the mixture."""

    def plain(w: int) -> int:  # embedding, output layer, LSTM
        return num_classes * (2 * w + 1) + 8 * w * w + 8 * w

    wanted = plain(width) + (width + 1) * components * width + width * components
    while plain(width) < wanted:
        width += 1
    return width
