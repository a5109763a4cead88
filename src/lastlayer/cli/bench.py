"""`lastlayer bench`: the cost of every layer and of PyTorch's own at given sizes."""

from typing import Annotated

import typer

from lastlayer.cli.options import Common, Records
from lastlayer.study.bench import Sizes, run_bench
from lastlayer.study.choices import CHOICES, choose, installed
from lastlayer.study.distributed_bench import SHARDABLE, run_distributed_bench
from lastlayer.study.processes import joined


def bench(
    common: Common,
    num_classes: Annotated[int, typer.Option(min=2, help="V, the number of classes.")] = 50_000,
    in_features: Annotated[int, typer.Option(min=1, help="d, the width of the hidden states.")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="N, the examples of one call.")] = 256,
    k: Annotated[int, typer.Option(min=1, help="How many classes a query returns.")] = 10,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help=f"Which layers, with commas between them: {', '.join(CHOICES)} [default: all that are "
            "installed, or all that can be divided].",
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="About how long each case may take.")] = 20.0,
    distributed: Annotated[
        bool,
        typer.Option(
            "--distributed",
            help="Divide the classes among the processes of torchrun, and report time, bytes sent and memory.",
        ),
    ] = False,
) -> Records:
    """Time a training step and top-k queries: PyTorch's own layers and these, side by side."""
    sizes = Sizes(num_classes, in_features, batch, k)
    if distributed:
        with joined(common.device):
            return run_distributed_bench(sizes, choose(layers or ",".join(SHARDABLE)), common.seed, common.device)
    return run_bench(sizes, choose(layers or ",".join(installed())), seconds, common.seed, common.device)
