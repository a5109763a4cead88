"""The verbs of the command line. A new verb is its import and a word below; a paper of `reproduce` likewise."""

from typing import Annotated

import typer

import lastlayer
from lastlayer.cli.bench import bench
from lastlayer.cli.compare import compare
from lastlayer.cli.config import config
from lastlayer.cli.help import Command
from lastlayer.cli.options import verb
from lastlayer.cli.reproduce import hierarchical_softmax, large_sparse_targets, softmax_bottleneck, svd_softmax
from lastlayer.cli.speedup import speedup

PLAIN = {"rich_markup_mode": None, "no_args_is_help": True, "add_completion": False}
app = typer.Typer(**PLAIN, pretty_exceptions_enable=False)
for run in (compare, speedup, bench, config):
    app.command(run.__name__, cls=Command)(verb(run))
reproduce = typer.Typer(**PLAIN, help="A paper's figures, each beside what is measured here.")
for run in (svd_softmax, hierarchical_softmax, softmax_bottleneck, large_sparse_targets):
    reproduce.command(run.__name__.replace("_", "-"), cls=Command)(verb(run))
app.add_typer(reproduce, name="reproduce")


def _show_version(requested: bool) -> None:
    if requested:
        print(f"lastlayer {lastlayer.__version__}")
        raise typer.Exit


@app.callback()
def _lastlayer(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Output layers for very many classes: train them without computing every logit, query them without
    reading every weight."""
