"""docs/benchmarks.md holds what the results files hold."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("benchmarks_page", ROOT / "benchmarks" / "page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(path, records, **environment):
    where = {"machine": "A(R) Processor", "gpu": None, "threads": 2, "torch": "2.13.0+cpu", "commit": "abc"}
    where |= {"command": "b.py --out /tmp/x", "time": "2026-01-02T03:04:05"} | environment
    path.write_text(json.dumps({"environment": where, "notes": "quick", "records": records}), encoding="utf-8")
    return path


def test_page_is_what_the_files_say(script):
    written = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert script.page(script.RESULTS.glob("*.json")) == written, "run `python benchmarks/page.py`"


def test_a_file_is_a_table_under_its_processor(script, tmp_path):
    shared = {"case": "step", "num_classes": 50_000, "peak_bytes": 2_500_000}
    records = [
        shared | {"name": "a|b", "ms": 12.345, "low_ms": 0.0000123, "recall": 0.5, "curve": [[1, 2]]},
        shared | {"name": "c", "ms": 2.0, "low_ms": 1.0, "recall": None, "curve": [[1, 2]]},
    ]
    old = write(tmp_path / "a_b.json", records[:1])
    new = write(tmp_path / "c_d.json", records, isa="avx2")
    text = script.page([old, new])
    first, second = text.index("## A, avx2"), text.index("## A, before the compiled engine")
    assert first < text.index("### c d") < second < text.index("### a b")
    assert "`benchmarks/results/c_d.json`: `b.py --out x`, 2 threads, PyTorch 2.13.0, commit abc" in text
    assert "**step**, V 50,000\n\n| peak MB | name | ms | low | recall |\n" in text
    assert "| 2.50 | a\\|b | 12.3 | 1.23e-05 | 50% |" in text
    assert "| 2.50 | c | 2.00 | 1.00 | - |" in text


def test_long_tables_are_folded(script, tmp_path):
    records = [{"name": str(i), "ms": float(i)} for i in range(script.LONG)]
    text = script.page([write(tmp_path / "long.json", records)])
    assert '<details markdown="1"><summary>16 rows</summary>\n\n| name | ms |' in text
    assert "<details" not in script.page([write(tmp_path / "short.json", records[1:])])


def test_figures_of_the_readme_are_in_their_files():
    """Each number of a result, as it is written, is a time or a memory of the file that its row names."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|[^|]*\|([^|]*)\| `(\w+\.json)` \|$", text, re.MULTILINE)
    assert len(rows) == 5
    for result, name in rows:
        records = json.loads((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))["records"]
        values = [r[key] / unit for r in records for key, unit in (("ms", 1), ("peak_bytes", 1e6)) if r.get(key)]
        numbers = re.findall(r"[\d,]+\.?\d*", result.replace(", ", " "))
        assert numbers
        for number in numbers:
            decimals = len(number.partition(".")[2])
            assert any(f"{value:,.{decimals}f}" == number for value in values), f"{name} has no {number}"
