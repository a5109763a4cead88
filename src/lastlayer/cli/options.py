"""What every verb shares: its common options, its exit codes, its records."""

import inspect
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer
from typer.models import OptionInfo

from lastlayer.kernels import engine
from lastlayer.study.errors import StudyError, Terminated, UsageError
from lastlayer.study.files import Records, is_special, make_folder, write_json

FAILED, BAD_USAGE, INTERRUPTED, TERMINATED = 1, 2, 130, 143  # the last two as a shell has them: 128 + the signal
METAVARS = {int: "N", float: "NUMBER", str: "TEXT", Path: "PATH"}  # in --help, the types of options


@dataclass(frozen=True)
class Common:
    """The common options of a verb, checked and already in force."""

    seed: int
    device: torch.device
    json: Path | None = None

    def keep(self, records: Records) -> None:
        """Writes --json; called before all is done, what was measured outlives a Ctrl-C."""
        if self.json is not None:
            write_json(self.json, records)

    def require_cpu(self) -> None:
        """A UsageError unless --device is a CPU: for what is about CPUs, and would not look at it."""
        if self.device.type != "cpu":
            raise UsageError(f"--device {self.device}: what is measured here is of CPUs; leave it out")


def _common_options(
    json: Annotated[Path | None, typer.Option(help="Also write the results here: a list of flat records.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of every random number.")] = 0,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="Where to compute, such as cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores if not given.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")] = False,
) -> None:
    """Only its signature is used: the options that `verb` adds to each command."""


COMMON = inspect.signature(_common_options).parameters


def verb(run: Callable[..., Records]) -> Callable[..., None]:
    """`run(common, **its own options) -> records` as a command with the common options and exit codes.

    Exit codes: 0 when done, 2 on bad usage, 1 on failure, 130 after Ctrl-C, 143 after SIGTERM: one clear line, and
    no traceback without `--debug`.
    """
    own = list(inspect.signature(run).parameters.values())[1:]  # the first is `common`
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*own, *COMMON.values())]
    for parameter in parameters:
        _name_type(parameter.annotation)

    def command(**given: Any) -> None:
        options = {name: given.pop(name) for name in COMMON}
        try:
            with _sigterm_raises():
                common = _prepare(options)
                common.keep(run(common, **given))
        except (Exception, KeyboardInterrupt) as problem:
            if options["debug"]:
                traceback.print_exc()
            code, said = _ending(problem)
            print(f"lastlayer: {said}", file=sys.stderr)
            raise typer.Exit(code) from None

    command.__name__, command.__doc__ = run.__name__, run.__doc__
    command.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _name_type(annotation: Any) -> None:
    """Gives an option the name of its type that a person knows: `N` where typer says `<int range>`."""
    kind, *details = get_args(annotation)
    kinds = {kind, *get_args(kind)}  # of `int`, of `int | None`, of `list[Path] | None`
    kinds |= {inner for outer in kinds for inner in get_args(outer)}
    for detail in details:
        if isinstance(detail, OptionInfo) and detail.metavar is None:
            detail.metavar = next((name for known, name in METAVARS.items() if known in kinds), None)


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM ends the work inside as Ctrl-C does, so that files stay whole and what was kept is named."""

    def terminate(*_: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():  # where no signal may be caught
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _prepare(options: dict[str, Any]) -> Common:
    try:
        engine.current()  # fails now rather than at the first kernel
    except ValueError as problem:
        raise UsageError(str(problem)) from problem
    if options["threads"] is not None:
        torch.set_num_threads(options["threads"])
    if options["json"] is not None:
        if options["json"].is_dir():
            raise UsageError(f"--json {options['json']} is a folder; give the path of a file")
        if not is_special(options["json"]):
            make_folder(options["json"].parent)  # fails now rather than when the work is done
    if options["seed"] >= 1 << 63:
        raise UsageError(f"--seed must be below 2^63, got {options['seed']}")
    torch.manual_seed(options["seed"])
    return Common(options["seed"], _device(options["device"]), options["json"])


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception as problem:
        raise UsageError(f"--device {name} cannot be used here: {str(problem).splitlines()[0]}") from problem
    return device


def _ending(problem: BaseException) -> tuple[int, str]:
    """The exit code, and what is said of it in one line."""
    match problem:
        case UsageError():
            return BAD_USAGE, str(problem)
        case StudyError():
            return FAILED, str(problem)
        case KeyboardInterrupt():
            sigterm = isinstance(problem, Terminated)
            code, said = (TERMINATED, "terminated") if sigterm else (INTERRUPTED, "interrupted")
            return code, "; ".join([said, *getattr(problem, "__notes__", [])[:1]])
    first = next(iter(str(problem).strip().splitlines()), "no message")
    return FAILED, f"{type(problem).__name__}: {first} (--debug shows where)"
