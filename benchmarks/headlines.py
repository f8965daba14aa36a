"""A classifier tuned on 9,000 Chinese headlines by the trainer's own loop: accuracy and calibration on 1,000 held out.

    OMP_NUM_THREADS=2 python -m benchmarks.headlines --headlines FILE

FILE has one headline a line, `text<TAB>class number`. A seeded split by label holds 1,000 out; of the rest a twentieth calibrates the
temperature, and the others are learnt with LoRA r16 on every linear layer of the default model, in one epoch if nothing else is said.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from benchmarks.record import header, table
from services.finetune.rows import Layout, Row, read_rows
from services.finetune.splits import split
from services.finetune.trainer import measures
from services.finetune.trainer.__main__ import keep_memory
from services.finetune.trainer.batches import Example
from services.finetune.trainer.model import load
from services.finetune.trainer.rendering import Renderer
from services.finetune.trainer.spec import Hyperparameters, Lora, Method, Spec
from services.finetune.trainer.train import Trainer
from services.pretrained import weights
from services.pretrained.templates import PlainTemplate
from services.pretrained.tokenizer import Tokenizer

SEED, HELD, CALIBRATION = 11, 1_000, 0.05


def rows(path: Path) -> list[Row]:
    """The file by way of the reader that the trainer uses."""
    lines = [line.rpartition("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    written = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, _, label in lines)
    found = [row for row in read_rows([written.encode()], Layout("classify")) if isinstance(row, Row)]
    if len(found) != len(lines):
        raise SystemExit(f"{len(lines) - len(found)} lines are no rows")
    return found


def divided(found: list[Row], share: float) -> tuple[list[Row], list[Row]]:
    """What is learnt and what is held back."""
    learnt, held = split([row.digest for row in found], [row.label for row in found], share, SEED)
    return [found[at] for at in learnt], [found[at] for at in held]


def main() -> None:
    """Split, train, calibrate, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--headlines", type=Path, required=True)
    parser.add_argument("--rows", type=int, help="learn from so many only")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--head-learning-rate", type=float)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    keep_memory()
    torch.set_num_threads(options.threads)
    header()
    directory = weights.prepare("default", weights.cache_directory(None))
    found = rows(options.headlines)
    learnt, held = divided(found, HELD / len(found))
    if options.rows:
        learnt, _ = divided(learnt, 1 - options.rows / len(learnt))
    learnt, kept = divided(learnt, CALIBRATION)
    labels = tuple(sorted({row.label for row in found}))
    tokenizer = Tokenizer.from_directory(directory)
    renderer = Renderer(tokenizer, PlainTemplate(), 1)

    def examples(chosen: list[Row]) -> list[Example]:
        return [renderer.labelled(row.text, labels.index(row.label)) for row in chosen]

    own = Hyperparameters(
        learning_rate=options.learning_rate,
        head_learning_rate=options.head_learning_rate,
        epochs=options.epochs,
        batch_size=options.batch,
        warmup_ratio=0.06,
    )
    spec = Spec(Method.CLASSIFY, Lora(dropout=options.dropout), own, seed=SEED, labels=labels, precision=options.precision)
    base = load(directory, torch.device("cpu"))
    trainer = Trainer(spec, base, examples(learnt), examples(kept))
    print(f"\n{len(learnt)} learnt, {len(kept)} to calibrate, {len(held)} held out; {trainer.target} steps", flush=True)
    unseen = examples(held)
    began, used, tokens, shown = time.perf_counter(), time.process_time(), 0, 0.0
    while trainer.done < trainer.target:
        step = trainer.step()
        tokens += step.tokens
        shown += step.loss
        if step.number % 25 == 0:
            print(f"step {step.number}: loss {shown / 25:.4f}, {tokens / (time.perf_counter() - began):.0f} tokens/s", flush=True)
            shown = 0.0
        if step.number % trainer.per_epoch == 0 and trainer.done < trainer.target:
            met = trainer.evaluate(unseen)
            assert met.logits is not None
            told = torch.tensor([example.label for example in unseen])
            print(f"epoch {step.number // trainer.per_epoch}: {measures.accuracy(met.logits, told):.4f} of the held out", flush=True)
    wall, cpu = time.perf_counter() - began, time.process_time() - used
    validation = trainer.evaluate()
    assert validation.logits is not None
    wanted = torch.tensor([example.label for example in trainer.validation])
    heat = measures.temperature(validation.logits, wanted)
    began = time.perf_counter()
    measured = trainer.evaluate(unseen)
    took = time.perf_counter() - began
    assert measured.logits is not None
    wanted = torch.tensor([example.label for example in unseen])
    print()
    table(
        ("held out", "accuracy", "macro-F1", "calibration error", "after temperature", "temperature", "training", "tokens/s", "labelling"),
        (
            len(unseen),
            f"{measures.accuracy(measured.logits, wanted):.4f}",
            f"{measures.macro_f1(measured.logits, wanted):.4f}",
            f"{measures.calibration_error(measured.logits, wanted):.4f}",
            f"{measures.calibration_error(measured.logits, wanted, heat):.4f}",
            f"{heat:.3f}",
            f"{wall:.0f} s, {cpu:.0f} CPU-s",
            f"{tokens / wall:.0f}",
            f"{took / len(unseen) * 1e3:.1f} ms a headline",
        ),
    )


if __name__ == "__main__":
    main()
