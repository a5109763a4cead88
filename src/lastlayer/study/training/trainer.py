"""Training within a budget of time or steps; killed at any moment, it goes on where it was."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lastlayer.study.errors import StudyError, UsageError
from lastlayer.study.measuring.measure import seconds_of
from lastlayer.study.processes import of_first, parts_of_state
from lastlayer.study.text.batches import Batches, num_targets
from lastlayer.study.training.checkpoint import load_checkpoint, save_checkpoint
from lastlayer.study.training.evaluation import evaluate
from lastlayer.study.training.language_model import LanguageModel, State, kept_examples, make_optimizers

CURVE_AT = (0.03, 0.08, 0.16, 0.26, 0.38, 0.5, 0.62, 0.75, 0.88, 1.0)  # shares of the budget
CURVE_TOKENS = 4_000
DECAY_FROM, FINAL_RATE = 0.5, 0.05  # the learning rate falls linearly over the second half
CLIP = 0.5
SAVE_EVERY = 20.0  # seconds of training
PROGRESS = ("steps", "seconds", "tokens", "passed", "result")  # what a checkpoint holds beside tensors


@dataclass(frozen=True)
class Budget:
    """How long to train: seconds of training alone, or a number of steps."""

    seconds: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.seconds is not None and not math.isfinite(self.seconds):
            raise UsageError(f"--seconds must be a finite number of seconds, got {self.seconds}")

    def share_used(self, seconds: float, steps: int) -> float:
        """From 0 at the start to 1 at the end."""
        if self.steps is not None:
            return min(1.0, steps / self.steps)
        assert self.seconds is not None
        return min(1.0, seconds / self.seconds)


@dataclass(frozen=True)
class Point:
    """One point of a learning curve."""

    seconds: float  # of training
    tokens: int  # trained on
    perplexity: float | None  # held out; None where `evaluate` has none


class Trainer:
    """One language model in training, with everything that a checkpoint must hold.

    Args:
        model: the model, on its device.
        train: batches to train on; a state is carried from one to the next where the text goes on.
        held_out: batches of the learning curve.
        budget: when to stop; the learning rate follows the share of it that is used.
        learning_rate: of `make_optimizers`.
        path: the checkpoint; None keeps none.
        identity: what a checkpoint must agree with to be resumed: text, sizes, seed, budget.
    """

    def __init__(
        self,
        model: LanguageModel,
        train: Batches,
        held_out: Batches,
        budget: Budget,
        *,
        learning_rate: float,
        path: Path | None = None,
        identity: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.train, self.held_out, self.budget = model, train, held_out, budget
        self.path, self.identity = path, identity or {}
        self.optimizers = make_optimizers(model, learning_rate)
        self.base_rates = [group["lr"] for group in self._groups()]
        self.state: State | None = None
        self.steps, self.seconds, self.tokens = 0, 0.0, 0
        self.curve: list[Point] = []
        self.passed = 0  # how many of CURVE_AT
        self.result: dict[str, Any] | None = None  # set when all is done

    @property
    def share_used(self) -> float:
        """The share of the budget that is used."""
        return self.budget.share_used(self.seconds, self.steps)

    def run(self, on_step: Callable[["Trainer"], object] = lambda trainer: None) -> None:
        """Trains to the end of the budget; `on_step` is called after each step.

        Raises:
            StudyError: the loss is not a number any more; the checkpoint stays at what was good.
            KeyboardInterrupt: with a note of where the checkpoint is.
        """
        saved = self.seconds
        try:
            while self.passed < len(CURVE_AT):
                self.seconds += of_first(seconds_of(self.step))
                on_step(self)
                at_point = self.share_used >= CURVE_AT[self.passed]
                if at_point:
                    self._add_point()
                if at_point or self.seconds - saved > SAVE_EVERY:
                    self.save()
                    saved = self.seconds
        except KeyboardInterrupt as stop:
            if self.path is not None and self.path.exists():
                stop.add_note(f"the checkpoint is {self.path}; the same command with --resume goes on from it")
            raise

    def step(self) -> None:
        """Trains on the next window."""
        window = self.steps % self.train.windows
        state = None if self.train.starts_anew(window) else self.state
        inputs, targets = self.train[window]
        self.model.train()
        examples = self.train.examples(window) if kept_examples(self.model.output) else None
        loss, self.state = self.model(inputs, targets, state, examples)
        if not math.isfinite(float(loss.detach())):
            self._refuse_to_go_on(f"the training loss became {float(loss.detach())}")
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.lstm.parameters(), CLIP)
        self._set_rates()
        for optimizer in self.optimizers:
            optimizer.step()
        self.steps += 1
        self.tokens += num_targets(targets)

    def _set_rates(self) -> None:
        decay = (self.share_used - DECAY_FROM) / (1 - DECAY_FROM)
        scale = 1 - max(0.0, decay) * (1 - FINAL_RATE)
        for group, rate in zip(self._groups(), self.base_rates, strict=True):
            group["lr"] = rate * scale

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def _add_point(self) -> None:
        """One point of the curve, also where a long step has passed several of its shares."""
        quality = evaluate(self.model, self.held_out, CURVE_TOKENS)
        if quality.perplexity is not None and not math.isfinite(quality.perplexity):
            self._refuse_to_go_on("the held-out perplexity is not finite")
        self.curve.append(Point(self.seconds, self.tokens, quality.perplexity))
        self.passed = sum(share <= self.share_used for share in CURVE_AT)

    def _refuse_to_go_on(self, what: str) -> None:
        kept = f"; {self.path} stays as it was before" if self.path and self.path.exists() else ""
        raise StudyError(f"{what} after {self.steps} steps: lower the learning rate with --learning-rate{kept}")

    def save(self) -> None:
        """Writes the checkpoint, where there is a place for one."""
        if self.path is None:
            return
        try:
            save_checkpoint(self.path, self._contents())
        except ValueError as problem:
            self._refuse_to_go_on(str(problem))

    def _contents(self) -> dict[str, Any]:
        progress = {
            "identity": self.identity,
            **{name: getattr(self, name) for name in PROGRESS},
            "curve": [asdict(point) for point in self.curve],
            "model": self.model.state_dict(),
        }
        if self.result is not None:  # done: what only training needs is dropped
            return progress
        return progress | {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "state": self.state,
            "random": _random_state(),
        }

    def resume(self) -> bool:
        """Goes on from the checkpoint if there is one; says whether there was.

        Raises:
            StudyError: the checkpoint is damaged, or of a run that differs.
        """
        if self.path is None or not self.path.exists():
            return False
        saved = load_checkpoint(self.path)
        for name, value in self.identity.items():
            if saved["identity"].get(name) != value:
                raise StudyError(
                    f"{self.path} is of another run ({name} was {saved['identity'].get(name)}, now {value}); "
                    "resume with the same options, or choose another --out"
                )
        self.model.load_state_dict(saved["model"])
        for name in PROGRESS:
            setattr(self, name, saved[name])
        self.curve = [Point(**point) for point in saved["curve"]]
        if self.result is None:
            for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(parts_of_state(optimizer, state))
            device = self.train.device
            self.state = None if saved["state"] is None else tuple(part.to(device) for part in saved["state"])
            _set_random_state(saved["random"])
        return True


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
