"""`lastlayer config`: what runs on this machine, and why."""

from lastlayer.cli.options import Common, Records
from lastlayer.kernels.config import show_config


def config(common: Common) -> Records:
    """Show the processor, its instruction sets, which one the kernels run with and why, and the threads."""
    record = show_config()
    return [record | {"supported": ", ".join(record["supported"])}]
