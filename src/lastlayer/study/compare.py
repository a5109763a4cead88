"""The same small language model once per output layer, each for the same budget, and what each costs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from lastlayer.study.choices import CHOICES, build_layer
from lastlayer.study.errors import UsageError
from lastlayer.study.files import Record, Records, make_folder, write_json, write_text
from lastlayer.study.measuring.cost import Sample, measure_costs
from lastlayer.study.measuring.measure import environment, seconds_of
from lastlayer.study.measuring.memory import require_memory
from lastlayer.study.processes import is_first, sharded
from lastlayer.study.report.comparison import best_first, in_a_line, show
from lastlayer.study.report.figures import counted, duration
from lastlayer.study.report.page import render
from lastlayer.study.report.tables import say
from lastlayer.study.text.batches import NO_TARGET
from lastlayer.study.text.corpus import Corpus
from lastlayer.study.training.checkpoint import load_checkpoint
from lastlayer.study.training.evaluation import evaluate, rank_held_out, windows_for
from lastlayer.study.training.language_model import LanguageModel
from lastlayer.study.training.trainer import CURVE_AT, CURVE_TOKENS, Budget, Trainer

TOP = 10
TOP_TOKENS = 2_000  # held-out tokens whose top-10 is computed
HELD_OUT_BATCH, HELD_OUT_WINDOW = 10, 50


@dataclass(frozen=True)
class Plan:
    """What is compared, and how."""

    layers: list[str]
    budget: Budget
    width: int = 256
    batch: int = 20
    window: int = 35
    dropout: float = 0.1
    learning_rate: float = 0.2
    held_out_tokens: int = 30_000
    seed: int = 0
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable

    def settings(self) -> dict[str, Any]:
        """Everything but the layers and the device: what two runs must share to be one."""
        apart = ("layers", "budget", "device")
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in apart}
        return asdict(self.budget) | own


class Comparison:
    """One run of `lastlayer compare`.

    Args:
        corpus: the text.
        plan: layers, budget and sizes.
        out: the folder for models, results and report.
        console: where progress is shown.
    """

    def __init__(self, corpus: Corpus, plan: Plan, out: Path, console: Console) -> None:
        self.corpus, self.plan, self.out, self.console = corpus, plan, out, console
        self.train = corpus.training_batches(plan.batch, plan.window, plan.device)
        self.held_out = corpus.held_out_batches(HELD_OUT_BATCH, HELD_OUT_WINDOW, plan.device)

    def run(self, resume: bool = False) -> Records:
        """Trains, measures, reports; the records.

        Raises:
            UsageError: `out` holds an unfinished run and `resume` is False.
            StudyError: `out` cannot be written to, a checkpoint is damaged or of another run, a loss is NaN.
        """
        self._check_memory()
        make_folder(self.out)
        if not resume:
            self._refuse_to_overwrite()
        write_text(self.out / "vocabulary.tsv", self.corpus.vocabulary())
        self._announce()
        try:
            trainers = {name: self._train(name, resume) for name in self.plan.layers}
            with self.console.status("measuring the layers side by side"):
                results = self._measure(trainers)
        except KeyboardInterrupt as stop:
            stop.add_note(f"the same command with --resume goes on from {self.out}")
            raise
        write_json(self.out / "results.json", results)
        write_text(self.out / "index.html", render(results))
        if is_first():
            show(results, self.out, self.console)
        return results["records"]

    def checkpoint(self, name: str) -> Path:
        """Where the model with that layer is kept."""
        return self.out / f"{name}.safetensors"

    def _refuse_to_overwrite(self) -> None:
        for name in self.plan.layers:
            path = self.checkpoint(name)
            if path.exists() and load_checkpoint(path)["result"] is None:
                raise UsageError(
                    f"{self.out} holds an unfinished run: --resume goes on with it, another --out starts "
                    f"beside it, and removing {path} gives it up"
                )

    def _check_memory(self) -> None:
        """Refuses a width that does not fit: the models are kept, each with the state of its optimizers."""
        table = 4 * self.corpus.num_classes * self.plan.width  # of embedding or output layer
        lstm = 4 * 8 * self.plan.width**2
        rows = self.plan.batch * self.plan.window
        logits = 4 * rows * self.corpus.num_classes * max(CHOICES[name].logits for name in self.plan.layers)
        needed = len(self.plan.layers) * (4 * table + 4 * lstm) + 2 * table + logits
        sides = f"a model of {self.corpus.num_classes:,} {self.corpus.unit} at --width {self.plan.width:,}"
        require_memory(needed, self.plan.device, sides, "fewer --layers or a smaller --width")

    def _trainer(self, name: str, path: Path | None) -> Trainer:
        """The run of one layer from its start; the seed is the same for each."""
        torch.manual_seed(self.plan.seed)
        layer = sharded(name, build_layer(name, self.plan.width, self.corpus.counts, len(self.corpus.train)))
        model = LanguageModel(self.corpus.num_classes, layer, self.plan.dropout).to(self.plan.device)
        return Trainer(
            model,
            self.train,
            self.held_out,
            self.plan.budget,
            learning_rate=self.plan.learning_rate,
            path=path,
            identity={"layer": name, "text": self.corpus.fingerprint(), **self.plan.settings()},
        )

    def _announce(self) -> None:
        """Says what is about to be done and about how long it will take."""
        corpus, budget = self.corpus, self.plan.budget
        say(
            self.console,
            f"{corpus.name}: {len(corpus.train):,} {corpus.unit} to train on, {len(corpus.held_out):,} "
            f"held out, {corpus.num_classes:,} different ones",
        )
        for note in corpus.notes:
            say(self.console, note)
        with self.console.status("trying each layer for a step, to tell how long this will take"):
            seconds = sum(map(self._forecast, self.plan.layers))
        length = f"{budget.steps:,} steps" if budget.steps is not None else f"{budget.seconds:g} s of training"
        trained = f"{counted(len(self.plan.layers), 'layer')}, {length} each"
        say(self.console, f"{trained}: about {duration(seconds)} of training and evaluation from now")

    def _forecast(self, name: str) -> float:
        """Seconds of one layer's training, and of reading the held-out text for its curve and at its end."""
        trainer, budget = self._trainer(name, None), self.plan.budget
        trainer.step()  # the first is slower
        training = budget.seconds or (budget.steps or 0) * seconds_of(trainer.step)
        window = seconds_of(lambda: evaluate(trainer.model, self.held_out, 1))
        curve = len(CURVE_AT) * windows_for(self.held_out, CURVE_TOKENS)
        return training + window * (curve + windows_for(self.held_out, self.plan.held_out_tokens))

    def _train(self, name: str, resume: bool) -> Trainer:
        """Trains and evaluates one layer, or takes it from its checkpoint."""
        trainer = self._trainer(name, self.checkpoint(name))
        if resume and trainer.resume() and trainer.result is not None:
            say(self.console, f"{name}: already trained")
            return trainer
        with _progress(name, trainer, self.console) as on_step:
            trainer.run(on_step)
        with self.console.status(f"{name}: reading the held-out text"):
            quality = evaluate(trainer.model, self.held_out, self.plan.held_out_tokens)
            ranking = rank_held_out(trainer.model, self.held_out, TOP, TOP_TOKENS)
        trainer.result = {
            "perplexity": quality.perplexity,
            "zero_probability_share": quality.zero_share,
            "held_out_tokens": quality.tokens,
            "top10_accuracy": ranking.recall,
            "ndcg10": ranking.ndcg,
            "mrr10": ranking.reciprocal_rank,
            "top10_tokens": ranking.tokens,
        }
        trainer.save()
        said = in_a_line(trainer.result, self.corpus.unit)
        say(self.console, f"{name}: {said} after {trainer.tokens:,} tokens")
        return trainer

    def _measure(self, trainers: dict[str, Trainer]) -> dict[str, Any]:
        """The content of results.json, from which the page is made; records are sorted, the best first."""
        layers = {name: trainer.model.output for name, trainer in trainers.items()}
        samples = {name: self._sample(trainer.model) for name, trainer in trainers.items()}
        costs = measure_costs(layers, samples, min(TOP, self.corpus.num_classes))
        records: list[Record] = []
        for name, trainer in trainers.items():
            assert trainer.result is not None  # set when its training ended
            records.append(
                {
                    "layer": name,
                    **trainer.result,
                    "seconds": trainer.seconds,
                    "steps": trainer.steps,
                    "tokens": trainer.tokens,
                    "tokens_per_second": trainer.tokens / trainer.seconds,
                    **costs[name],
                    "num_classes": self.corpus.num_classes,
                    "in_features": self.plan.width,
                    "batch": len(samples[name][1]),
                }
            )
        text = {
            "name": self.corpus.name,
            "unit": self.corpus.unit,
            "training_tokens": len(self.corpus.train),
            "held_out_tokens": len(self.corpus.held_out),
            "num_classes": self.corpus.num_classes,
            "fingerprint": self.corpus.fingerprint(),
        }
        if self.corpus.lengths is not None:
            text["sequences"] = len(self.corpus.lengths[0])
        return {
            "environment": environment(),
            "text": text,
            "settings": self.plan.settings() | {"device": str(self.plan.device)},
            "layers": {name: CHOICES[name].description for name in trainers},
            "records": best_first(records),
            "curves": {name: [asdict(point) for point in trainer.curve] for name, trainer in trainers.items()},
        }

    @torch.no_grad()
    def _sample(self, model: LanguageModel) -> Sample:
        """Hidden states of one training batch's size, from held-out text."""
        model.eval()
        inputs, targets = self.corpus.held_out_batches(self.plan.batch, self.plan.window, self.plan.device)[0]
        hidden, _ = model.encode(inputs, None)
        kept = targets != NO_TARGET
        return hidden[kept], targets[kept]


@contextmanager
def _progress(name: str, trainer: Trainer, console: Console) -> Iterator[Callable[[Trainer], None]]:
    """A bar of the budget used, with the last held-out perplexity and the speed, in a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), TimeRemainingColumn())
    with Progress(
        *columns, console=console, transient=True, expand=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task(name, total=1.0)

        def on_step(at: Trainer) -> None:
            last = at.curve[-1].perplexity if at.curve else None
            perplexity = "" if last is None else f"perplexity {last:,.0f}, "
            said = f"{name}: {perplexity}{at.tokens / at.seconds:,.0f} tokens/s"
            progress.update(task, completed=at.share_used, description=said)

        yield on_step
