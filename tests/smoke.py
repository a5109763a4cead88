"""What an installed lastlayer must do: `python smoke.py`, outside the source tree, with only the wheel installed.

`python smoke.py plain` expects a wheel that was built without a compiler, and so runs the plain PyTorch twins.
"""

import subprocess
import sys
import warnings
from importlib.metadata import distribution, version
from importlib.resources import files
from pathlib import Path

import torch

import lastlayer

EXTRAS = ("typer", "rich", "matplotlib", "transformers", "onnx", "onnxruntime")


def it_is_the_installed_package() -> None:
    """Not a source tree that happens to be on the path; with the marker that its types are to be read."""
    assert Path(lastlayer.__file__).is_relative_to(sys.prefix), lastlayer.__file__
    assert lastlayer.__version__ == version("lastlayer")
    assert files("lastlayer").joinpath("py.typed").is_file()
    needed = {line.split(">")[0] for line in distribution("lastlayer").requires or [] if "extra ==" not in line}
    assert needed == {"torch", "numpy", "safetensors"}, needed


def import_brings_no_extra() -> None:
    """Importing the library imports nothing that only an extra installs."""
    imported = [name for name in EXTRAS if name in sys.modules]
    assert not imported, imported


def the_engine_runs(plain: bool) -> None:
    """The compiled kernels, or in a wheel that has none their twins, after one warning."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        engine = lastlayer.show_config()["engine"]
    assert engine == ("plain" if plain else "compiled"), engine
    assert len(seen) == plain, seen


def layers_train() -> None:
    """Loss, gradients, an optimizer's step, sparse where the layer is; and the factored step."""
    torch.manual_seed(0)
    hidden, targets = torch.randn(32, 16), torch.randint(1000, (32,))
    for layer in (
        lastlayer.FullSoftmax(16, 1000),
        lastlayer.HierarchicalSoftmax(16, 1000, sparse=True),
        lastlayer.TreeSoftmax(16, 1000, sparse=True),
        lastlayer.FactoredOutput(16, 1000),
    ):
        factored = isinstance(layer, lastlayer.FactoredOutput)
        optimizer = lastlayer.FactoredSGD(layer, 0.1) if factored else torch.optim.SGD(layer.parameters(), 0.1)
        before = layer(hidden, targets)
        before.backward()
        optimizer.step()
        assert layer(hidden, targets) < before, type(layer).__name__
        assert layer.eval().topk(hidden, 3).indices.shape == (32, 3)


def a_screen_is_exact() -> None:
    """Certified, and the full layer's classes."""
    torch.manual_seed(0)
    weight, hidden = torch.randn(3000, 32), torch.randn(4, 32)
    for preview in (lastlayer.Int8Preview(), lastlayer.Int4Preview(), lastlayer.SVDPreview(16)):
        screen = lastlayer.ScreenedSoftmax(weight, preview=preview, candidates=64, exact=True, use="screen")
        found = screen.topk(hidden, 5)
        assert bool(found.certified.all())
        assert torch.equal(found.indices, (hidden @ weight.T).topk(5).indices)


def the_command_says_what_to_install() -> None:
    """The `lastlayer` command is there, and names the extra that it lacks."""
    command = Path(sys.executable).with_name("lastlayer")
    ended = subprocess.run([command, "config"], capture_output=True, text=True)
    said = "lastlayer: the command needs typer, rich, matplotlib: pip install 'lastlayer[cli]'\n"
    assert (ended.returncode, ended.stderr) == (1, said), ended


def main() -> None:
    """Every check; the first that fails raises."""
    plain = sys.argv[1:] == ["plain"]
    it_is_the_installed_package()
    import_brings_no_extra()
    the_engine_runs(plain)
    layers_train()
    a_screen_is_exact()
    the_command_says_what_to_install()
    print(f"lastlayer {lastlayer.__version__} from {Path(lastlayer.__file__).parent}: all checks passed")


if __name__ == "__main__":
    main()
