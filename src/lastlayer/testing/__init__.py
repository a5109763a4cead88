"""The law suite: any output layer, yours included, can be certified with it.

from lastlayer.testing import LayerCase, certify
certify(LayerCase("mine", make=lambda **kwargs: MyLayer(8, 23, **kwargs), oracle=my_log_prob))
"""

from lastlayer.testing.cases import LayerCase
from lastlayer.testing.laws import LAWS, certify

__all__ = ["LAWS", "LayerCase", "certify"]
