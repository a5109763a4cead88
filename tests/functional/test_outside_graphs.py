"""Screens run inside a compiled model, which breaks its graph there (layers: tests/test_compiled_layers.py)."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from lastlayer import Int4Preview, Int8Preview, ScreenedSoftmax, SVDPreview
from lastlayer.kernels import engine
from lastlayer.screening.compiled import EngineScreen


@pytest.mark.parametrize("preview", [Int8Preview(), Int4Preview(), SVDPreview(4)], ids=["int8", "int4", "svd"])
def test_compiled_model_queries_its_screen_as_the_eager_one(preview, monkeypatch):
    compiled, query = [], EngineScreen.query
    monkeypatch.setattr(EngineScreen, "query", lambda *arguments: compiled.append(1) or query(*arguments))
    linear, hidden = nn.Linear(16, 600), torch.randn(4, 16)
    full = linear(hidden)
    for rows, k in (
        (1, 3),
        (4, 1),
        (4, 5),
    ):  # the first prepares the engine's view of the screen inside the compiled model
        screen = ScreenedSoftmax.from_linear(linear, preview=preview, candidates=40, exact=True, use="screen")
        some = hidden[:rows]
        found = torch.compile(lambda x, screen=screen, k=k: screen.topk(2 * x, k), backend="eager")(some / 2)
        assert torch.equal(found.indices, full[:rows].topk(k).indices)
        assert not engine.available() or compiled.pop(), "the plain code ran"
        logits = torch.compile(lambda x, screen=screen: screen(2 * x) + 1, backend="eager")(some / 2)
        torch.testing.assert_close(logits, screen(some) + 1)
        with torch.no_grad():
            for call in (screen.log_prob, screen.preview_scores, screen.log_normalizer_error):
                torch.testing.assert_close(torch.compile(call, backend="eager")(some), call(some))
            assert torch.compile(screen.sample, backend="eager")(some, 2).shape == (rows, 2)


def test_the_compiler_is_not_imported_before_it_is_used():
    code = (
        "import sys, torch; before = 'torch._dynamo' in sys.modules; import lastlayer; "
        "print(before or 'torch._dynamo' not in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "True\n"
    )
