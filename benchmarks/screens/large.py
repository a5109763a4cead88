"""V = 800,000, d = 512: the paper's size, on a weight made to be as hard to screen as a trained one."""

import torch
from torch import Tensor

from lastlayer.functional.sampling import sample_classes
from screens.common import (
    Record,
    Truth,
    agreement,
    exact_screen,
    exact_screen_in_four,
    full_layers,
    measured,
    svd_screen,
)

CLASSES, WIDTH, CALIBRATION, HELD_OUT = 800_000, 512, 12_288, 1_024
EXPONENTS = -0.2, -0.6  # how the weight's and the hidden states' directions decay
MEAN, PULL, LOGITS = 1.0, 0.3, 3.4  # of the common direction, towards the wanted row, of the logits' spread
SETTINGS = ((32, 8192, "bfloat16"), (64, 4096, "int8"), (128, 4096, "int8"))


def realistic(
    num_classes: int, width: int, rows: int, common: float = MEAN, pull: float = PULL
) -> tuple[Tensor, Tensor]:  # (V, d), (rows, d)
    """A weight and hidden states with what SmolLM2's head and states have, measured on them:

    - the weight's singular values fall slowly (about i^-0.2), the states' standard deviations fast (i^-0.6), both
      in one hidden basis that is no coordinate axis;
    - rows share a common direction (0.7 of their length), along which the states have their mean;
    - rows gather around 1,000 topics; frequent classes have the longer rows (by half);
    - each state points at the row of a class drawn by Zipf's law, so far that the best logit stands about 6
      standard deviations above the mean (SmolLM2: 5.3).

    At SmolLM2's V a calibrated SVD preview of d/8 with 64, 256, 1,024 candidates keeps the best of 512 held-out
    states in .959, .986, 1.000 of cases, of d/16 in .924, .973, .998; SmolLM2's own, at d/8: .930, .981, .994.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    place = torch.arange(1, width + 1).float()
    of_weight, of_hidden = (place**exponent for exponent in EXPONENTS)
    of_weight /= of_weight.norm()
    topics = normal(1000, width)
    weight = normal(num_classes, width)
    for block in weight.split(1 << 16):  # in place: the matrix is 1.6 GB
        block += topics[torch.randint(1000, (len(block),), generator=generator)]
        block *= of_weight / 2**0.5
    direction = normal(width) * of_weight
    weight += common * direction / direction.norm()
    ranks = torch.arange(1, num_classes + 1)
    weight *= (1.2 - 0.4 * ranks.log() / ranks[-1].float().log())[:, None]
    wanted = sample_classes(-ranks.log()[None], rows, generator=generator)[0]
    shape = of_hidden / of_hidden.norm()
    towards = weight[wanted] - common * direction / direction.norm()
    hidden = pull * towards / towards.norm(dim=-1, keepdim=True) + normal(rows, width) * shape
    hidden += direction / direction.norm()
    basis = torch.linalg.qr(normal(width, width)).Q
    for block in weight.split(1 << 16):
        block.copy_(block @ basis)
    hidden = hidden @ basis
    spread = (hidden[:64] @ weight.T).std(-1).mean()
    return weight, hidden * (LOGITS / spread)


def large(classes: int = CLASSES) -> list[Record]:
    """Exact screens and SVD previews, at batch 1."""
    weight, hidden = realistic(classes, WIDTH, CALIBRATION + HELD_OUT)
    calibration, held_out = hidden[:CALIBRATION], hidden[CALIBRATION:]
    four = exact_screen_in_four(weight, calibration)
    screens = {"int4, exact": four, "int8, exact": exact_screen(weight)}
    for window, candidates, storage in SETTINGS:
        name = f"SVD window {window}, {candidates:,} candidates, {storage}"
        screens[name] = svd_screen(weight, window, candidates, storage=storage, calibration=calibration)
    sizes = {"num_classes": classes, "in_features": WIDTH}
    records: list[Record] = []
    truth = Truth.of(weight, held_out)
    for name, screen in screens.items():
        records.append({"name": name, **sizes, **agreement(screen, truth)})
    peers = full_layers(weight) | {
        name: lambda hidden, screen=screen: screen.topk(hidden, 10) for name, screen in screens.items()
    }
    previews = {name: screen._prepared.bytes_read for name, screen in screens.items()}
    return records + [sizes | record for record in measured(peers, held_out, 1, 11, previews)]
