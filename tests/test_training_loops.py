"""What `docs/training_loops.md` says of its loops: each trains as the plain loop does."""

import copy
import math

import pytest
import torch
from torch.utils.data import DataLoader

from lastlayer import FactoredOutput, FullSoftmax, HierarchicalSoftmax
from pages import ROOT, run_page

pytest.importorskip("lightning")
pytest.importorskip("accelerate")

OUTPUTS = {
    "dense": lambda **options: FullSoftmax(32, 1000, **options),
    "sparse": lambda **options: HierarchicalSoftmax(32, 1000, sparse=True, **options),
    "factored": lambda **options: FactoredOutput(32, 1000, **options),
}


@pytest.fixture(scope="module")
def page():
    return run_page(ROOT / "docs" / "training_loops.md")


@pytest.fixture
def seeded():
    torch.manual_seed(0)


def batches(page, size):
    return list(DataLoader(page["data"], size))


def weights(model):
    """What training changes: the parameters, and the weight that a `FactoredOutput` has as a product."""
    factored = [model.output.weight] if isinstance(model.output, FactoredOutput) else []
    return [part.detach().clone() for part in [*model.encoder.parameters(), *model.output.parameters(), *factored]]


def assert_same_but_not_untrained(results, before):
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)
    for first, trained in zip(before, results[0], strict=True):
        assert first.shape == () or not torch.equal(first, trained)  # the anchor alone stays as it is


def train(model, optimizers, batches, scaler=None):
    for batch in batches:
        loss = model(*batch)
        (loss if scaler is None else scaler.scale(loss)).backward()
        for optimizer in optimizers:
            optimizer.step() if scaler is None else scaler.step(optimizer)
            optimizer.zero_grad()
        if scaler is not None:
            scaler.update()


@pytest.mark.parametrize("name", OUTPUTS)
def test_loss_scaling_changes_nothing(page, seeded, name):
    model = page["Model"](OUTPUTS[name]())
    results, before = [], weights(model)
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        trained = copy.deepcopy(model)
        train(trained, page["make_optimizers"](trained, 0.01), batches(page, 16), scaler)
        results.append(weights(trained))
    assert_same_but_not_untrained(results, before)


@pytest.mark.parametrize("name", OUTPUTS)
def test_loss_scaling_leaves_out_what_overflows(page, seeded, name):
    """Alone, or accumulated before or after a gradient that does not; and training goes on."""
    model, (first, second, *_) = page["Model"](OUTPUTS[name]()), batches(page, 16)
    plain, before = copy.deepcopy(model), weights(model)
    optimizers, scaler = page["make_optimizers"](model, 0.01), torch.amp.GradScaler("cpu", init_scale=1024.0)
    for factors in ((math.inf,), (1.0, math.inf), (math.inf, 1.0)):
        for factor in factors:
            scaler.scale(factor * model(*first)).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()
        assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))
    assert scaler.get_scale() == 1024 / 2**3
    train(model, optimizers, [second], scaler)
    train(plain, page["make_optimizers"](plain, 0.01), [second])
    assert_same_but_not_untrained([weights(model), weights(plain)], before)


@pytest.mark.parametrize("name", OUTPUTS)
def test_accumulation_with_accelerate_is_one_large_batch(page, seeded, name):
    from accelerate import Accelerator

    model = page["Model"](OUTPUTS[name](reduction="sum"))
    results, before = [], weights(model)
    plain = copy.deepcopy(model)
    train(plain, page["make_optimizers"](plain, 0.01), batches(page, 16))
    results.append(weights(plain))

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, *optimizers = accelerator.prepare(model, *page["make_optimizers"](model, 0.01))
    for batch in batches(page, 8):
        with accelerator.accumulate(model):
            accelerator.backward(2 * model(*batch))  # which divides by the steps
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    results.append(weights(model))
    assert_same_but_not_untrained(results, before)


@pytest.mark.parametrize("name", ["sparse", "factored"])
def test_manual_optimisation_in_lightning_is_a_plain_loop(page, seeded, name):
    module = page["Manual"](OUTPUTS[name]())
    plain, before = copy.deepcopy(module.model), weights(module.model)
    optimizers, parts = page["make_optimizers"](plain, 0.01), batches(page, 8)
    for first, second in zip(parts[::2], parts[1::2], strict=True):
        for part in (first, second):
            (plain(*part) / 2).backward()
        torch.nn.utils.clip_grad_norm_(plain.encoder.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    page["fit"](module)
    assert_same_but_not_untrained([weights(module.model), weights(plain)], before)


def test_a_lightning_checkpoint_resumes_bit_for_bit(page, seeded, tmp_path):
    import lightning

    module = page["Manual"](FactoredOutput(32, 1000))
    resumed, loader = copy.deepcopy(module), DataLoader(page["data"], 8)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}

    def fit(module, epochs, **options):
        trainer = lightning.Trainer(
            accelerator="cpu", devices=1, max_epochs=epochs, enable_checkpointing=False, **quiet
        )
        trainer.fit(module, loader, **options)
        return trainer

    fit(module, 2)
    fit(resumed, 1).save_checkpoint(tmp_path / "first.ckpt")
    again = page["Manual"](FactoredOutput(32, 1000))
    fit(again, 2, ckpt_path=tmp_path / "first.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(weights(again.model), weights(module.model), strict=True))
