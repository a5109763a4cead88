"""What `import lastlayer` adds to `import torch`: fresh processes, interleaved.

python benchmarks/import_time.py            (about a minute)
"""

import statistics
import subprocess
import sys
from pathlib import Path

from lastlayer.study.measuring.measure import write_records

RESULTS = Path(__file__).parent / "results" / "import_time.json"
ROUNDS = 15
CODE = "import time, torch; start = time.perf_counter(); import lastlayer; print(time.perf_counter() - start)"
CODE_TORCH = "import time; start = time.perf_counter(); import torch; print(time.perf_counter() - start)"


def seconds(code: str) -> float:
    """What one fresh process prints."""
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)


def main() -> None:
    """Measures and writes the results file."""
    times: dict[str, list[float]] = {"import torch": [], "import lastlayer, after torch": []}
    for _ in range(ROUNDS):
        for name, code in zip(times, (CODE_TORCH, CODE), strict=True):
            times[name].append(1e3 * seconds(code))
    records = [
        {"name": name, "ms": statistics.median(ms), "low_ms": min(ms), "high_ms": max(ms), "runs": ROUNDS}
        for name, ms in times.items()
    ]
    for record in records:
        print(record)
    write_records(RESULTS, records, notes="low and high are the least and the most")


if __name__ == "__main__":
    main()
