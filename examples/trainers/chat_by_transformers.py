"""A trainer of your own: transformers' Trainer and PEFT, run by Argosy with ARGOSY_TRAINER_COMMAND=python,chat_by_transformers.py

Nothing here knows Argosy but the names of files: transformers reports live progress by itself, through its KubeflowCallback.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

spec = json.loads(Path(os.environ["ARGOSY_SPEC_FILE"]).read_text())
base, output = os.environ["ARGOSY_BASE_DIRECTORY"], Path(os.environ["ARGOSY_OUTPUT_DIRECTORY"])
lora, asked = spec["lora"], spec["hyperparameters"]
torch.manual_seed(spec["seed"])
tokenizer = Tokenizer.from_file(f"{base}/tokenizer.json")


def examples(path: str) -> list[dict[str, Any]]:
    """Token ids of each chat, its turns joined: a real trainer renders the base's template and learns the answers alone."""
    chats = [json.loads(line)["messages"] for line in Path(path).read_text().splitlines()]
    texts = ["\n".join(turn["content"] for turn in chat) for chat in chats]
    return [{"input_ids": tokenizer.encode(text).ids[: spec["seq_len"]]} for text in texts]


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A padded batch; padding is neither read nor learnt."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows])
    read = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows])
    return {"input_ids": ids, "attention_mask": read, "labels": ids.masked_fill(read == 0, -100)}


targets = lora["targets"] or ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
config = LoraConfig(
    r=lora["rank"], lora_alpha=lora["alpha"], lora_dropout=lora["dropout"], use_rslora=lora["rslora"], use_dora=lora["dora"],
    target_modules=targets, task_type="CAUSAL_LM",
)  # fmt: skip
model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
arguments = TrainingArguments(
    output_dir=str(output), num_train_epochs=asked["epochs"], max_steps=asked["max_steps"] or -1, learning_rate=asked["learning_rate"],
    per_device_train_batch_size=asked["batch_size"], seed=spec["seed"], logging_steps=1, save_strategy="no", remove_unused_columns=False,
    use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
)  # fmt: skip
trainer = Trainer(model, arguments, data_collator=collate, train_dataset=examples(os.environ["ARGOSY_TRAIN_FILE"]))  # type: ignore[arg-type]
trainer.train()
trainer.save_model()
trainer.save_state()
