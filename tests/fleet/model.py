"""A tiny seeded model that speaks bytes: it answers everything, at once, with nothing."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer

from tests.inference.vocabularies import byte_level


def save(directory: Path) -> Path:
    """A model directory; the same weights each time."""
    directory.mkdir(parents=True)
    text = byte_level()
    tokenizer = Tokenizer.from_str(text)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=8_192,
        bos_token_id=tokenizer.token_to_id("<bos>"),
        eos_token_id=tokenizer.token_to_id("<eos>"),
        pad_token_id=tokenizer.token_to_id("<eos>"),
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory, safe_serialization=True)
    (directory / "tokenizer.json").write_text(text)
    return directory
