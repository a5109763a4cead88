"""Every law for every layer: a layer in the table of `law_table.py` inherits them all."""

import pytest

from lastlayer.testing import LAWS
from law_table import CASES


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_law(case, law):
    law(case)
