"""Useful (supervised) tokens a CPU-second: our loop, transformers.Trainer with PEFT, and TRL's SFTTrainer with packing.

    python -m benchmarks.training [--chats 32] [--threads 1]

The same synthetic chats, LoRA (r16, every linear layer), float32, batches of 8 chats in the same order, one epoch of completion-only
loss; each in a process of its own, by the CPU time of its training calls. TRL packs 8 chats' worth of tokens into rows of its own.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import header, table
from services.finetune.rows import Turn
from services.finetune.trainer.__main__ import keep_memory
from services.finetune.trainer.batches import Example, order
from services.finetune.trainer.model import load
from services.finetune.trainer.rendering import Renderer
from services.finetune.trainer.spec import Hyperparameters, Lora, Method, Spec
from services.finetune.trainer.train import Trainer
from services.pretrained import weights
from services.pretrained.templates import load_template
from services.pretrained.tokenizer import Tokenizer

BATCH, RATE, SEED = 8, 2e-4, 3
WORDS = (
    "harbour ship captain cargo rope sail wind north market price gold silver letter crew storm island map star night water bread salt "
    "wood iron the a of to and in with before after under over quickly slowly carries sells finds keeps repairs counts writes sees"
).split()


def chats(count: int) -> list[list[Turn]]:
    """Seeded nonsense; rendered, 12 to 256 tokens each, about half of them the assistant's."""
    source = random.Random(SEED)

    def say(words: int) -> str:
        return " ".join(source.choice(WORDS) for _ in range(words)) + "."

    made = []
    for _ in range(count):
        words = source.randint(6, 225)
        asked = max(3, int(words * source.uniform(0.2, 0.7)))
        made.append([Turn("user", say(asked)), Turn("assistant", say(max(2, words - asked)))])
    return made


def rendered(directory: Path, count: int) -> list[Example]:
    """The chats as the trainer would see them."""
    tokenizer = Tokenizer.from_directory(directory)
    template = load_template(directory, tokenizer, tokenizer.prefix)
    renderer = Renderer.of(tokenizer, template, (1,))
    return [example for chat in chats(count) for example in renderer.chat(chat)]


def ours(directory: Path, examples: list[Example], precision: str) -> dict[str, Any]:
    """Our loop, with the allocator that its process sets."""
    keep_memory()
    base = load(directory, torch.device("cpu"))
    own = Hyperparameters(learning_rate=RATE, epochs=1, batch_size=BATCH, warmup_ratio=0.0)
    trainer = Trainer(Spec(Method.CHAT, Lora(), own, seed=SEED, precision=precision), base, examples)
    began = time.process_time()
    losses = [trainer.step().loss for _ in range(trainer.target)]
    return {"losses": losses, "seconds": time.process_time() - began}


def rows(examples: list[Example]) -> list[dict[str, list[int]]]:
    """In our order, for a trainer that takes them one after the other."""
    chosen = [examples[at] for at in order(SEED, 0, len(examples))]
    return [
        {
            "input_ids": list(example.ids),
            "labels": [id if any(a <= at < b for a, b in example.spans) else -100 for at, id in enumerate(example.ids)],
        }
        for example in chosen
    ]


def peft_model(directory: Path) -> Any:
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))


def hugging_face(directory: Path, examples: list[Example], folder: str) -> dict[str, Any]:
    """transformers.Trainer over a PEFT model, padded batches."""
    import transformers

    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"), pad_token="<pad>")

    class Sequential(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    trainer = Sequential(
        model=peft_model(directory),
        args=transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=BATCH,
            num_train_epochs=1,
            learning_rate=RATE,
            lr_scheduler_type="cosine",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=rows(examples),
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, padding=True),
    )
    began = time.process_time()
    trainer.train()
    seconds = time.process_time() - began
    return {"losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], "seconds": seconds}


def trl(directory: Path, examples: list[Example], folder: str) -> dict[str, Any]:
    """TRL's SFTTrainer, best-fit packing."""
    import datasets
    import transformers
    import trl as library

    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"), pad_token="<pad>", eos_token="<eos>")
    longest = max(len(example.ids) for example in examples)
    room = max(longest, sum(len(example.ids) for example in examples) * BATCH // len(examples))
    trainer = library.SFTTrainer(
        model=peft_model(directory),
        args=library.SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=1,
            num_train_epochs=1,
            learning_rate=RATE,
            lr_scheduler_type="cosine",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            packing=True,
            max_length=room,
            gradient_checkpointing=False,
            dataset_kwargs={"skip_prepare_dataset": False},
        ),
        train_dataset=datasets.Dataset.from_list(
            [{"input_ids": row["input_ids"], "completion_mask": [int(label >= 0) for label in row["labels"]]} for row in rows(examples)]
        ),
        processing_class=tokenizer,
    )
    began = time.process_time()
    trainer.train()
    seconds = time.process_time() - began
    return {"losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], "seconds": seconds}


LOOPS = ("ours", "ours, bfloat16", "transformers.Trainer + PEFT", "TRL SFTTrainer, packing")


def one(name: str, directory: Path, examples: list[Example]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        if name == LOOPS[2]:
            return hugging_face(directory, examples, folder)
        if name == LOOPS[3]:
            return trl(directory, examples, folder)
    return ours(directory, examples, "bfloat16" if name == LOOPS[1] else "float32")


def main() -> None:
    """Run each loop in its own process and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chats", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=LOOPS, nargs="+", default=LOOPS)
    parser.add_argument("--one", choices=LOOPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    directory = weights.prepare("default", weights.cache_directory(None))
    examples = rendered(directory, options.chats)
    if options.one:
        torch.set_num_threads(options.threads)
        print(json.dumps(one(options.one, directory, examples)))
        return
    header()
    useful = sum(example.supervised for example in examples)
    lengths = [len(example.ids) for example in examples]
    print(f"{len(examples)} chats of {min(lengths)} to {max(lengths)} tokens, {sum(lengths)} in all, {useful} supervised\n", flush=True)
    found = {}
    for name in options.only:
        command = [
            sys.executable,
            "-m",
            "benchmarks.training",
            "--one",
            name,
            "--chats",
            str(options.chats),
            "--threads",
            str(options.threads),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if ran.returncode:
            sys.exit(ran.stderr)
        found[name] = json.loads(ran.stdout.strip().splitlines()[-1])
        print(f"{name}: {found[name]['seconds']:.1f} CPU-s", flush=True)
    slowest = found.get(LOOPS[2], found[options.only[0]])["seconds"]
    print()
    table(
        ("loop", "CPU-s", "useful tokens a CPU-s", "ratio", "loss of step 1", "of the last"),
        *(
            (name, f"{run['seconds']:.1f}", f"{useful / run['seconds']:.0f}", f"{slowest / run['seconds']:.2f}", *_ends(run["losses"]))
            for name, run in found.items()
        ),
    )


def _ends(losses: list[float]) -> tuple[str, str]:
    return f"{losses[0]:.6f}", f"{losses[-1]:.4f}"


if __name__ == "__main__":
    main()
