"""Exact SGD of a layer with very many classes: `FactoredOutput` and its optimizer `FactoredSGD`.

`state.py` keeps the weight as a product, `step.py` derives and plans an exact SGD step of it, `record.py` carries
gradients from the backward pass to the step, `conditioning.py` keeps the product well conditioned.
"""

from lastlayer.layers.factored.layer import FactoredOutput
from lastlayer.layers.factored.optimizer import FactoredSGD

__all__ = ["FactoredOutput", "FactoredSGD"]
