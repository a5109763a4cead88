"""`lastlayer bench`: the cost of every layer and of PyTorch's own at given sizes."""

from typing import Annotated

import typer

from lastlayer.cli.options import Common, Records
from lastlayer.study.bench import Sizes, run_bench


def bench(
    common: Common,
    num_classes: Annotated[int, typer.Option(min=2, help="V, the number of classes.")] = 50_000,
    in_features: Annotated[int, typer.Option(min=1, help="d, the width of the hidden states.")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="N, the examples of one call.")] = 256,
    k: Annotated[int, typer.Option(min=1, help="How many classes a query asks for.")] = 10,
    seconds: Annotated[float, typer.Option(min=0.1, help="About how long each case may take in all.")] = 20.0,
) -> Records:
    """Time a training step and a top-k query, PyTorch's own layers and these side by side."""
    return run_bench(Sizes(num_classes, in_features, batch, k), seconds, common.seed, common.device)
