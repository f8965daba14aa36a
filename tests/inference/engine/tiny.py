"""Tiny seeded models of five families, saved as safetensors, and a loop that drives a runner by hand."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from services.inference.engine.calls import Sampling
from services.inference.engine.eager import EagerBackend
from services.inference.engine.runner import TorchRunner
from services.inference.engine.settings import EngineSettings
from services.inference.engine.step import BLOCK_SIZE, Draw, Row

FAMILIES = ("gemma3", "llama", "qwen2", "qwen3", "mistral", "gemma2")
VOCABULARY = 97
WINDOW = 20  # small enough to matter in a prompt of 50, and no multiple of a block
GREEDY = Sampling(seed=0, temperature=0.0)
DEVICE = os.environ.get("ARGOSY_TEST_DEVICE", "cpu")


def config(family: str, **changes: Any) -> Any:
    import transformers as t

    shared: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "initializer_range": 0.6,
    } | changes
    windows = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    if family == "gemma3":
        return t.Gemma3TextConfig(**shared | windows | {"num_key_value_heads": 1, "query_pre_attn_scalar": 8})
    if family == "gemma2":
        return t.Gemma2Config(**shared | windows, query_pre_attn_scalar=8, attn_logit_softcapping=5.0, final_logit_softcapping=3.0)
    if family == "llama":
        return t.LlamaConfig(**shared)
    if family == "qwen2":
        return t.Qwen2Config(**shared | windows | {"use_sliding_window": True})
    if family == "qwen3":
        return t.Qwen3Config(**shared | {"tie_word_embeddings": True})
    return t.MistralConfig(**shared, sliding_window=WINDOW)


def save(family: str, directory: Path, **changes: Any) -> Path:
    """A model directory with random weights, the same each time; `changes` are fields of its config."""
    import transformers as t

    torch.manual_seed(7)
    with torch.random.fork_rng():
        torch.manual_seed(FAMILIES.index(family) + 1)
        model = t.AutoModelForCausalLM.from_config(config(family, **changes), dtype=torch.float32)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory, safe_serialization=True)
    (directory / "tokenizer.json").write_text("{}")
    return directory


def settings(directory: Path, **others: Any) -> EngineSettings:
    values = {
        "cache_dir": str(directory / "cache"),
        "dtype": "float32",
        "backend": "eager",
        "device": DEVICE,
        "threads": 1,
        "kv_tokens": 2048,
    }
    return EngineSettings(model=str(directory), **values | others)


def runner(directory: Path, kv_tokens: int = 2048) -> TorchRunner:
    own = settings(directory, kv_tokens=kv_tokens)
    return TorchRunner(EagerBackend.load(directory, own, torch.device(DEVICE), torch.float32))


def reference(directory: Path) -> Any:
    """transformers' own model, with its own attention."""
    import transformers as t

    return t.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


def generate(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """transformers' greedy continuation, one token at a time over the whole sequence: no cache of theirs is trusted either."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


class Walk:
    """One sequence of the hand-made loop."""

    def __init__(self, key: int, prompt: Sequence[int], blocks: Iterable[int], sampling: Sampling = GREEDY, index: int = 0) -> None:
        self.key, self.prompt, self.tokens, self.blocks = key, list(prompt), list(prompt), list(blocks)
        self.sampling, self.index, self.computed = sampling, index, 0

    def row(self, budget: int) -> Row:
        """The next chunk of at most `budget` tokens; it draws when it reaches the end."""
        end = min(len(self.tokens), self.computed + budget)
        row = Row(key=self.key, tokens=self.tokens[self.computed : end], start=self.computed, blocks=self.blocks)
        if end == len(self.tokens):
            position = len(self.tokens) - len(self.prompt)
            row.draw = Draw(self.sampling, self.index, position, list(self.tokens), len(self.prompt))
        return row

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.prompt) :]


def drive(runner: TorchRunner, sequences: Sequence[Walk], count: int, budget: int = 10_000) -> list[list[int]]:
    """Run the sequences together until each has `count` tokens; `budget` is each one's chunk."""
    while live := [s for s in sequences if len(s.output) < count]:
        rows = [s.row(budget) for s in live]
        for sequence, row, result in zip(live, rows, runner.step(rows), strict=True):
            assert result.error is None, result.error
            sequence.computed += len(row.tokens)
            if row.draw is not None:
                assert result.token is not None
                sequence.tokens.append(result.token)
    return [s.output for s in sequences]


def tables(count: int, tokens: int) -> list[list[int]]:
    """Block tables that are scattered and interleaved on purpose, each for `tokens`."""
    each = -(-tokens // BLOCK_SIZE)
    return [[(count * n + k) for n in reversed(range(each))] for k in range(count)]


def prompts(lengths: Sequence[int]) -> list[list[int]]:
    source = torch.Generator().manual_seed(11)
    return [torch.randint(3, VOCABULARY, (n,), generator=source).tolist() for n in lengths]


def edit_config(directory: Path, **values: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
