"""chunked_loss under the trainers of others: Trainer, PEFT, and the example that uses both."""

import re

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from lastlayer.functional.linear_chunks import LinearChunks  # noqa: E402
from lastlayer.transformers import chunked_loss, top_predictions  # noqa: E402
from lastlayer.transformers.recorded_logits import RecordedLogits  # noqa: E402
from tiny_models import V, batch, make  # noqa: E402


def rows(count, seed):
    ids = torch.randint(3, V, (count, 6), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in ids]


def trained(name, folder, *, chunked, **options):
    """The losses of some steps under Trainer, the metrics, and the trained weights."""
    model = make(name)
    seen = []

    def metrics(evaluation):
        predictions = evaluation.predictions
        seen.append(predictions.shape)
        return {"sum": float(predictions[..., 0].sum()), "top3": float(predictions.sum())}

    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=2,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        **options,
    )
    handle = chunked_loss(model) if chunked else None
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=rows(16, 0),
        eval_dataset=rows(3, 1),
        compute_metrics=metrics,
        preprocess_logits_for_metrics=top_predictions(3),
    )
    trainer.train()
    result = trainer.evaluate()
    if handle is not None:
        handle.undo()
    assert seen == [(3, 6, 3)]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {key: result[key] for key in ("eval_loss", "eval_sum", "eval_top3")}, model.state_dict()


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_trainer(name, tmp_path, monkeypatch):
    """The same losses, metrics and weights; in the evaluation never more than a chunk of logits."""
    expected = trained(name, tmp_path, chunked=False)
    monkeypatch.setattr("lastlayer.transformers.deferred_logits.CHUNK_LOGITS", 2 * V)
    computed, compute = [], RecordedLogits.compute
    monkeypatch.setattr(
        RecordedLogits, "compute", lambda self: (computed.append(self.hidden.shape), compute(self))[1]
    )
    actual = trained(name, tmp_path, chunked=True)
    assert actual[0] == pytest.approx(expected[0], rel=1e-4)
    assert actual[1] == pytest.approx(expected[1], rel=1e-4)
    for key, tensor in expected[2].items():
        torch.testing.assert_close(actual[2][key], tensor, rtol=1e-3, atol=1e-5)
    assert computed
    assert all(shape[:-1].numel() <= 2 for shape in computed)


def test_top_predictions():
    """The first of several outputs; ordinary logits too."""
    logits = torch.randn(2, 3, V)
    for given in (logits, (logits, torch.zeros(1))):
        assert torch.equal(top_predictions(2)(given, None), logits.topk(2).indices)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        top_predictions(0)


def lora(model, **options):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], **options))


@pytest.mark.parametrize("order", ["before", "after", "inside"])
def test_lora(order, monkeypatch):
    """The head is frozen: no gradient is formed for its weight. Before PEFT wraps the model, or after."""
    torch.manual_seed(1)
    model, inputs = make("llama").train(), batch("llama")
    if order == "before":
        handle = chunked_loss(model)
        wrapped = lora(model)
    else:
        wrapped = lora(model)
        handle = chunked_loss(wrapped if order == "after" else wrapped.get_base_model())
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:  # zeros at first
            torch.nn.init.normal_(parameter, std=0.1)
    trainable = [p for p in wrapped.parameters() if p.requires_grad]
    seen, want = [], LinearChunks.want
    monkeypatch.setattr(LinearChunks, "want", lambda self, wanted: (seen.append(wanted), want(self, wanted))[1])
    output = wrapped(**inputs)
    actual = torch.autograd.grad(output.loss, trainable)
    assert output.logits.computed is None
    assert [tuple(wanted[:2]) for wanted in seen] == [(True, False)]  # of hidden and weight
    wrapped.eval()
    torch.testing.assert_close(wrapped(**inputs).loss, output.loss)
    handle.undo()
    wrapped.train()
    output = wrapped(**inputs)
    assert type(output.logits) is Tensor
    torch.testing.assert_close(actual, torch.autograd.grad(output.loss, trainable), rtol=1e-4, atol=1e-6)


def test_compiled_lora():
    """The loss is that of the model inside, and so the logits stay deferred."""
    model, inputs = lora(make("llama")).train(), batch("llama")
    expected = model(**inputs).loss
    with chunked_loss(model):
        output = torch.compile(model, backend="eager")(**inputs)
    assert output.logits.computed is None
    torch.testing.assert_close(output.loss, expected)


def test_heads_that_peft_has_replaced():
    peft = pytest.importorskip("peft")
    for options in (
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ):
        wrapped = peft.get_peft_model(make("llama"), peft.LoraConfig(**options))
        head, keys = wrapped.get_output_embeddings(), list(wrapped.state_dict())
        with pytest.raises(TypeError, match=r"must be an nn\.Linear.*got peft\..*undo what was put there"):
            chunked_loss(wrapped)
        assert wrapped.get_output_embeddings() is head
        assert list(wrapped.state_dict()) == keys


def test_the_example(tmp_path, monkeypatch, output_of):
    """It learns, and with --plain learns the same; what it saves it reads."""
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog lay on the rug . " * 60, encoding="utf-8")
    options = ["--text", text, "--steps", 30, "--length", 12, "--num-classes", 40]
    found = []
    for more in ([], ["--plain"]):
        output = output_of("finetune.py", *options, *more)
        found.append(
            [float(number) for number in re.search(r"perplexity: ([\d.]+)\nright: ([\d.]+)%", output).groups()]
        )
    assert found[0][0] < 20
    assert found[0][1] > 30
    assert found[0] == pytest.approx(found[1], rel=0.02)
