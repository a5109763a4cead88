"""Records of runs that differ in their seed, as one."""

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from lastlayer.study.files import Records
from lastlayer.study.report.figures import figure


def over_seeds(records: Records, by: Sequence[str]) -> Records:
    """One record for each setting of the fields `by`: the mean of every figure that differs, with its spread."""
    groups: dict[tuple[Any, ...], Records] = {}
    for record in records:
        groups.setdefault(tuple(record[name] for name in by), []).append(record)
    return [{name: _combined([run[name] for run in runs]) for name in runs[0]} for runs in groups.values()]


def _combined(values: list[Any]) -> Any:
    if all(value == values[0] for value in values):
        return values[0]
    return f"{figure(mean(values))} ± {figure(stdev(values))}"
