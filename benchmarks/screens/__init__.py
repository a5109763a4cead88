"""The parts of `benchmarks/screening.py`, one file each."""
