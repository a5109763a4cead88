"""The fixture that runs a kernel's tests on every instruction set; absent ones are skipped by name."""

import pytest

from lastlayer.kernels import engine

HERE = [isa for isa in engine.ISAS if not isa.startswith(engine.FOREIGN)]


@pytest.fixture(params=HERE)
def isa(request):
    """Each instruction set of this architecture in turn; everything in the test runs by it."""
    if not engine.available():
        pytest.skip(f"no compiled engine: {engine.reason()}")
    if request.param not in engine.supported():
        pytest.skip(f"this processor lacks {request.param}")
    with engine.forced(request.param):
        yield request.param
