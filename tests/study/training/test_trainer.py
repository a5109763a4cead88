"""Training learns, stops on its budget, resumes when killed, and never replaces a good checkpoint by a bad one."""

import math
import sys

import pytest
import torch

from lastlayer.study.choices import CHOICES, build_layer, choose, installed
from lastlayer.study.errors import StudyError, UsageError
from lastlayer.study.text.batches import Streams
from lastlayer.study.training import trainer as training
from lastlayer.study.training.checkpoint import load_checkpoint, save_checkpoint
from lastlayer.study.training.evaluation import Quality, evaluate, rank_held_out
from lastlayer.study.training.language_model import LanguageModel
from lastlayer.study.training.trainer import Budget, Trainer
from texts import corpus_of

CORPUS = corpus_of(["the cat saw the dog and", "the dog ran ; the cat sat"] * 150, min_count=1)
CPU = torch.device("cpu")


def trainer(layer="full", steps=30, path=None, seed=0, **budget):
    torch.manual_seed(seed)
    output = build_layer(layer, 8, CORPUS.counts, len(CORPUS.train))
    model = LanguageModel(CORPUS.num_classes, output, dropout=0.3)
    return Trainer(
        model,
        Streams(CORPUS.train, 4, 5, CPU),
        Streams(CORPUS.held_out, 2, 5, CPU),
        Budget(**(budget or {"steps": steps})),
        learning_rate=0.2,
        path=path,
        identity={"seed": seed, "steps": steps},
    )


class Killed(BaseException):
    """As abrupt as a signal: nothing of ours catches it."""


def kill_at(step):
    def check(at):
        if at.steps == step:
            raise Killed

    return check


def parameters(run):
    return {name: value.clone() for name, value in run.model.state_dict().items()}


@pytest.mark.parametrize("layer", ["full", "hierarchical"])
def test_training_learns(layer):
    run = trainer(layer, steps=150)
    before = evaluate(run.model, run.held_out, 10_000)
    run.run()
    after = evaluate(run.model, run.held_out, 10_000)
    assert before.perplexity > 6
    assert after.perplexity < 2
    assert (after.tokens, run.steps, run.tokens) == (before.tokens, 150, run.tokens)
    assert rank_held_out(run.model, run.held_out, 2, 10_000)[0] > 0.8
    assert [point.tokens for point in run.curve] == sorted({point.tokens for point in run.curve})
    assert run.curve[-1].tokens == run.tokens


def test_a_factored_layer_has_its_own_sgd():
    """It learns."""
    run = trainer("factored", steps=150)
    before = evaluate(run.model, run.held_out, 10_000).perplexity
    run.run()
    assert evaluate(run.model, run.held_out, 10_000).perplexity < 0.7 * before


def test_evaluation_is_the_models_own_probability():
    run = trainer()
    inputs, targets = run.held_out[0]
    run.model.eval()
    hidden, _ = run.model.encode(inputs, None)
    expected = run.model.output.log_prob(hidden).gather(-1, targets[..., None]).mean().neg().exp()
    quality = evaluate(run.model, run.held_out, targets.numel())
    assert quality.perplexity == pytest.approx(float(expected.detach()), rel=1e-5)
    assert quality.tokens == targets.numel()


@pytest.mark.parametrize("layer", ["umax", "augment-reduce"])
def test_a_number_is_kept_for_each_place_of_the_text(layer):
    """It changes at the targets that were trained on, and nowhere else."""
    run = trainer(layer, steps=3)
    before = run.model.output.normalizers.clone()
    run.run()
    changed = (run.model.output.normalizers != before).nonzero()[:, 0]
    trained = torch.cat([run.train.examples(number).flatten() for number in range(3)])
    assert torch.equal(changed, trained.sort().values)


def test_tokens_of_probability_0_are_counted():
    """By the layer's own log-probabilities; a layer of scores has neither share nor perplexity."""
    run = trainer("topk-softmax")
    inputs, targets = run.held_out[0]
    run.model.eval()
    log_prob = run.model.output.log_prob(run.model.encode(inputs, None)[0])
    none = log_prob.gather(-1, targets[..., None]) == -math.inf
    assert 0 < none.sum() < none.numel()
    assert evaluate(run.model, run.held_out, targets.numel()) == Quality(
        None, float(none.double().mean()), targets.numel()
    )
    assert evaluate(trainer().model, run.held_out, 1).zero_share == 0
    assert evaluate(trainer("one-vs-all").model, run.held_out, targets.numel()) == Quality(
        None, None, targets.numel()
    )


def test_seconds_are_a_budget_too():
    run, ends = trainer(seconds=0.2), []
    run.run(lambda at: ends.append(at.seconds))
    assert all(end < 0.2 for end in ends[:-1])  # no step begins when the time is over
    assert run.seconds == ends[-1] >= 0.2
    assert run.share_used == 1
    run._set_rates()
    assert all(
        group["lr"] == pytest.approx(rate * training.FINAL_RATE)
        for group, rate in zip(run._groups(), run.base_rates, strict=True)
    )


@pytest.mark.parametrize(
    ("layer", "killed_at"),
    [("full", 1), ("full", 30), ("hierarchical", 17), ("factored", 17), ("augment-reduce", 17)],
)
def test_killed_and_resumed_equals_uninterrupted(tmp_path, layer, killed_at, monkeypatch):
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)  # after each step, dropout and all
    whole = trainer(layer)
    whole.run()
    path = tmp_path / "run.safetensors"
    with pytest.raises(Killed):
        trainer(layer, path=path).run(kill_at(killed_at))
    torch.rand(7)  # another program's random numbers
    again = trainer(layer, path=path)
    assert again.resume() == (killed_at > 1)
    assert again.steps == killed_at - 1
    again.run()
    assert all(torch.equal(value, parameters(whole)[name]) for name, value in parameters(again).items())
    assert [p.perplexity for p in again.curve] == [p.perplexity for p in whole.curve]
    assert (again.steps, again.tokens) == (whole.steps, whole.tokens)


def test_passes_start_with_an_empty_state(monkeypatch):
    seen = []
    run = trainer(steps=3)
    windows = run.train.windows
    run.steps = windows - 1
    forward = run.model.forward
    monkeypatch.setattr(run.model, "forward", lambda x, y, state, _: seen.append(state) or forward(x, y, state))
    run.step(), run.step(), run.step()
    assert [state is None for state in seen] == [True, True, False]  # fresh, a new pass, carried


def test_nan_is_refused_before_anything_is_overwritten(tmp_path):
    path = tmp_path / "run.safetensors"
    run = trainer(path=path)
    run.run()
    good = path.read_bytes()
    with torch.no_grad():
        run.model.lstm.weight_hh_l0[0, 0] = math.nan
    with pytest.raises(StudyError, match=r"model\.lstm\.weight_hh_l0 holds .* --learning-rate"):
        run.save()
    run.passed = 0
    with pytest.raises(StudyError, match=r"loss became nan after 30 steps.*stays as it was"):
        run.run()
    assert path.read_bytes() == good


def test_another_run_is_not_resumed(tmp_path):
    path = tmp_path / "run.safetensors"
    trainer(path=path).run()
    with pytest.raises(StudyError, match="steps was 30, now 40"):
        trainer(path=path, steps=40).resume()
    assert not trainer(path=tmp_path / "none").resume()


def test_finished_run_is_resumed_as_finished(tmp_path):
    path = tmp_path / "run.safetensors"
    run = trainer(path=path)
    run.run()
    run.result = {"perplexity": 3.5}
    run.save()
    again = trainer(path=path)
    assert again.resume()
    assert again.result == {"perplexity": 3.5}
    assert all(torch.equal(value, parameters(run)[name]) for name, value in parameters(again).items())
    assert "optimizers" not in load_checkpoint(path)


@pytest.mark.parametrize("damage", [lambda b: b[:-100], lambda b: b[:50], lambda b: b"", lambda b: b"x" * 99])
def test_damaged_checkpoint_is_a_clear_message(tmp_path, damage):
    path = tmp_path / "run.safetensors"
    save_checkpoint(path, {"a": torch.arange(1000.0)})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(StudyError, match=r"run\.safetensors is damaged"):
        load_checkpoint(path)


def test_no_changed_byte_is_taken_for_a_checkpoint(tmp_path):
    """Each byte of the file in turn, those of the numbers and those of the header."""
    path = tmp_path / "run.safetensors"
    save_checkpoint(path, {"a": torch.arange(9.0), "b": [torch.tensor(3), {"steps": 12, "loss": 0.5}]})
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(StudyError, match="is damaged or of another program"):
            load_checkpoint(path)


def test_checkpoint_gives_back_what_it_took(tmp_path):
    state = {"t": [torch.eye(2), (3, None)], "deep": {0: {"x": torch.tensor(5)}, "s": "text"}, "b": True}
    save_checkpoint(tmp_path / "c", state)
    back = load_checkpoint(tmp_path / "c")
    assert torch.equal(back["t"][0], torch.eye(2))
    assert back["t"][1] == [3, None]
    assert back["deep"][0]["x"] == 5
    assert (back["deep"]["s"], back["b"]) == ("text", True)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_failing_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    save_checkpoint(path, {"a": torch.ones(3)})

    def disk_is_full(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lastlayer.study.training.checkpoint.save_file", disk_is_full)
    with pytest.raises(StudyError, match="No space left on device"):
        save_checkpoint(path, {"a": torch.zeros(3)})
    assert torch.equal(load_checkpoint(path)["a"], torch.ones(3))
    assert list(tmp_path.iterdir()) == [path]


def test_layers_by_name():
    assert choose(" full, hierarchical,full ") == ["full", "hierarchical"]
    for wrong in ("full,fool", "", ","):
        with pytest.raises(UsageError, match="the layers are: full, hierarchical"):
            choose(wrong)


def test_a_layer_whose_package_is_missing(monkeypatch):
    assert installed() == list(CHOICES)
    monkeypatch.setitem(sys.modules, "entmax", None)
    assert set(CHOICES) - set(installed()) == {"sparsemax", "entmax"}
    with pytest.raises(StudyError, match=r"entmax needs the entmax package: pip install 'lastlayer\[entmax\]'"):
        choose("full,entmax")


@pytest.mark.parametrize("name", list(CHOICES))
@pytest.mark.parametrize(("in_features", "num_classes"), [(6, 40), (1, 2), (33, 1000)])
def test_every_choice_builds(name, in_features, num_classes):
    counts = torch.arange(num_classes, 0, -1)
    layer = build_layer(name, in_features, counts)
    assert (layer.in_features, layer.num_classes) == (in_features, num_classes)
    twin = build_layer(name, in_features, counts)  # a resumed run makes the very same layer
    layer.load_state_dict(twin.state_dict())
    hidden, targets = torch.randn(5, in_features), torch.arange(5) % num_classes
    losses = []
    for one in (layer, twin):
        torch.manual_seed(0)  # of what is sampled
        losses.append(one(hidden, targets))
    assert torch.equal(*losses)
    assert CHOICES[name].description
