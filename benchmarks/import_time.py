"""What `import lastlayer` adds to `import torch`: fresh processes, interleaved, bytecode written before.

python benchmarks/import_time.py            (about a minute)

Python's garbage collector may go over all objects of PyTorch once while lastlayer is imported, as it does from
time to time in any program that makes objects; `collector_ms` is its part of the time.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from lastlayer.study.measuring.measure import write_records

RESULTS = Path(__file__).parent / "results" / "import_time.json"
ROUNDS = 15
CODE = """
import gc, time
{before}
passes = []
gc.callbacks.append(lambda phase, info: passes.append(time.perf_counter()))
start = time.perf_counter()
import {name}
print(time.perf_counter() - start, sum(passes[1::2]) - sum(passes[::2]))
"""
PEERS = {
    "import torch": CODE.format(before="", name="torch"),
    "import lastlayer, after torch": CODE.format(before="import torch", name="lastlayer"),
}


def seconds(code: str, bytecode: str) -> tuple[float, float]:
    """What one fresh process prints: of the import, and of the garbage collector meanwhile."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment = kept | {"PYTHONPYCACHEPREFIX": bytecode}
    command = [sys.executable, "-c", code]
    whole, collector = subprocess.run(command, capture_output=True, check=True, env=environment).stdout.split()
    return float(whole), float(collector)


def main() -> None:
    """Measures and writes the results file."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in PEERS}
    with tempfile.TemporaryDirectory() as bytecode:
        for turn in range(-1, ROUNDS):
            for name, code in PEERS.items():
                took = seconds(code, bytecode)
                if turn >= 0:
                    times[name].append(took)
    records = []
    for name, runs in times.items():
        wholes, collectors = ([1e3 * part for part in column] for column in zip(*runs, strict=True))
        record = {"name": name, "ms": statistics.median(wholes), "low_ms": min(wholes), "high_ms": max(wholes)}
        records.append(record | {"collector_ms": statistics.median(collectors), "runs": ROUNDS})
        print(records[-1])
    write_records(RESULTS, records, notes="low and high are the least and the most")


if __name__ == "__main__":
    main()
