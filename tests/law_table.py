"""The table of layers under the law suite; one line a case."""

from lastlayer.testing import LayerCase

CASES: list[LayerCase] = []
