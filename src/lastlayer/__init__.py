"""Output layers for very many classes: train them without computing every logit, query them without
reading every weight."""

from lastlayer.functional.answers import ScoreTopK, ScreenedTopK, TopK
from lastlayer.layers.base import OutputLayer

__version__ = "0.1.0"

__all__ = ["OutputLayer", "ScoreTopK", "ScreenedTopK", "TopK"]
