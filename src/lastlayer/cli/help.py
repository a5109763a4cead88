"""`--help` in a terminal of any width."""

import re
import shutil
from typing import Any

from typer.core import TyperCommand

NARROW = 60  # columns, below which an option and its meaning stand one below the other


class Command(TyperCommand):
    """A command whose help stays within the terminal, also where that is narrower than fifty columns."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Writes the help into the formatter."""
        formatter.width = min(formatter.width, max(20, shutil.get_terminal_size().columns - 1))
        super().format_help(ctx, formatter)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes all arguments and options into the formatter."""
        for title, kind in (("Arguments", "argument"), ("Options", "option")):
            parameters = [parameter for parameter in self.get_params(ctx) if parameter.param_type_name == kind]
            records = [record for parameter in parameters if (record := parameter.get_help_record(ctx))]
            if records:
                with formatter.section(title):
                    _write(formatter, [_for_people(*record) for record in records])


def _for_people(name: str, said: str) -> tuple[str, str]:
    """`MODEL` where typer says `MODEL <path>`; `at least 1` for `x>=1`, `0.5 to 1` for `0.5<=x<=1`."""
    said = re.sub(r"([\d.e-]+)<=x<=([\d.e-]+)", r"\1 to \2", said)
    return re.sub(r" <[^<>]*>$", "", name), re.sub(r"x>=([\d.e-]+)", r"at least \1", said)


def _write(formatter: Any, records: list[tuple[str, str]]) -> None:
    if formatter.width >= NARROW:
        formatter.write_dl(records)
        return
    for name, said in records:
        formatter.write_text(name)
        with formatter.indentation():
            formatter.write_text(said)
