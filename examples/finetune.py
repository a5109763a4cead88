"""Fine-tunes a causal language model with Transformers' own Trainer, without its logits.

python examples/finetune.py                     a small untrained Llama, on a source file of Python's own library
python examples/finetune.py FOLDER --text FILE  a model and tokenizer of yours, on text of yours

Needs `pip install 'lastlayer[transformers]'`. Everything but `chunked_loss` and `top_predictions` is as ever; with
`--plain` these are left out.
"""

import argparse
import collections
import contextlib
import json
import math
import re
import tempfile
from pathlib import Path

import torch

from lastlayer.transformers import chunked_loss, top_predictions
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)


def main():
    """Trains, evaluates, prints, and saves with --out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="folder of a model with its tokenizer")
    parser.add_argument("--text", type=Path, default=Path(json.__file__).parent.parent / "typing.py")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=8, help="rows of a batch")
    parser.add_argument("--num-classes", type=int, default=20_000, help="words of the small Llama")
    parser.add_argument("--plain", action="store_true", help="with all logits, to compare")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)

    text = arguments.text.read_text(encoding="utf-8")
    if arguments.model:
        model = AutoModelForCausalLM.from_pretrained(arguments.model)
        ids = AutoTokenizer.from_pretrained(arguments.model)(text)["input_ids"]
    else:
        model, ids = small_llama(arguments.num_classes, arguments.length), word_ids(text, arguments.num_classes)
    rows = [{"input_ids": row, "labels": row} for row in torch.tensor(ids).split(arguments.length)[:-1]]
    held_out = max(1, len(rows) // 10)

    with (
        contextlib.nullcontext() if arguments.plain else chunked_loss(model),
        tempfile.TemporaryDirectory() as folder,
    ):
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=arguments.steps,
                learning_rate=1e-3,
                per_device_train_batch_size=arguments.rows // 2,
                per_device_eval_batch_size=arguments.rows,
                gradient_accumulation_steps=2,
                save_strategy="no",
                report_to=[],
                logging_steps=max(1, arguments.steps // 5),
            ),
            train_dataset=rows[held_out:],
            eval_dataset=rows[:held_out],
            preprocess_logits_for_metrics=top_predictions(5),
            compute_metrics=accuracies,
        )
        trainer.train()
        result = trainer.evaluate()
        if arguments.out:
            trainer.save_model(arguments.out)
    print(f"perplexity: {math.exp(result['eval_loss']):.1f}")
    print(f"right: {100 * result['eval_top1']:.1f}%, among the best five: {100 * result['eval_top5']:.1f}%")


def accuracies(evaluation):
    """How often the next token is the best prediction, and one of the best five."""
    best, targets = evaluation.predictions[:, :-1], evaluation.label_ids[:, 1:]
    right, kept = best == targets[..., None], targets != -100
    return {"top1": float(right[..., 0][kept].mean()), "top5": float(right.any(-1)[kept].mean())}


def small_llama(num_classes, length):
    """An untrained model of two blocks."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=num_classes, max_position_embeddings=length, **sizes))


def word_ids(text, num_classes):
    """Ids of words and signs by frequency; those beyond the vocabulary share the last."""
    words = re.findall(r"\w+|[^\w\s]|\n", text)
    counts = collections.Counter(words).most_common(num_classes - 1)
    ids = {word: index for index, (word, _) in enumerate(counts)}
    return [ids.get(word, num_classes - 1) for word in words]


if __name__ == "__main__":
    main()
