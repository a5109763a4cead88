"""The dependencies of every Debian package as a sequence of items, one a line: real data for a recommender.

python benchmarks/debian_items.py FOLDER FILE

FOLDER is `shared/data/debian-packages` (LASTLAYER_DATA); FILE is what `examples/next_item.py --items` and
`lastlayer compare --items` read. What a package depends on is to its other dependencies what an item is to those
bought with it: few are in most baskets, and most in few.
"""

import argparse
import lzma
from io import TextIOWrapper
from pathlib import Path

DEPENDENCIES = 4  # the field of a line, between tabs


def main() -> None:
    """Writes the packages that have two dependencies or more."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    written = 0
    with arguments.file.open("w", encoding="utf-8") as file:
        for part in ("train", "test"):
            with TextIOWrapper(lzma.open(arguments.folder / f"packages.{part}.tsv.xz"), "utf-8") as packages:
                for package in packages:
                    items = package.rstrip("\n").split("\t")[DEPENDENCIES].split()
                    if len(items) > 1:
                        file.write(" ".join(items) + "\n")
                        written += 1
    print(f"{written:,} sequences")


if __name__ == "__main__":
    main()
