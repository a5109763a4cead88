"""Timing: every peer is called the stated number of times, and memory peaks are measured."""

import json

import pytest
import torch

from lastlayer.study.measuring import measure


def test_peers_run_alike():
    calls = {"a": 0, "b": 0}

    def call(name):
        calls[name] += 1

    timings = measure.interleaved(
        {name: lambda name=name: call(name) for name in calls}, rounds=4, warmup=1, repeats=3
    )
    assert calls == {"a": 15, "b": 15}
    assert all(t.runs == 4 and t.low_ms <= t.ms <= t.high_ms for t in timings.values())


def test_timing_is_in_milliseconds():
    timing = measure.Timing.of([0.001, 0.002, 0.009])
    assert timing.ms == pytest.approx(2.0)


def test_peak_sees_what_was_held_and_freed():
    if measure.peak_bytes(lambda: None) == 0 and measure._resident_peak() == 0:
        pytest.skip("this system does not tell its peak memory")
    size = 64 << 20
    peak = measure.peak_bytes(lambda: torch.ones(size // 4).sum())
    assert 0.9 * size < peak < 1.5 * size


def test_results_file_says_where_it_was_measured(tmp_path):
    path = tmp_path / "deep" / "results.json"
    measure.write_records(path, [{"case": "x", "ms": 1.5}], notes="a test")
    content = json.loads(path.read_text())
    assert content["records"] == [{"case": "x", "ms": 1.5}]
    assert {"machine", "torch", "commit", "command", "threads"} <= content["environment"].keys()
