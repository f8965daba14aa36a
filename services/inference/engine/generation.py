"""What a model's directory says of how it wants to be sampled and where its turns end. Pure but for two small files."""

import json
from pathlib import Path
from typing import Any

from services.inference.engine.calls import Sampling


def sampling_of(directory: Path) -> tuple[Sampling, tuple[int, ...]]:
    """Default sampling and end tokens, from generation_config.json where there is one."""
    config = json.loads((directory / "config.json").read_text())
    path = directory / "generation_config.json"
    generation: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    ends = generation.get("eos_token_id", config.get("eos_token_id"))
    sampling = Sampling(
        seed=0,
        temperature=float(generation.get("temperature") or 1.0),
        top_p=float(generation.get("top_p") or 1.0),
        top_k=int(generation.get("top_k") or 0),
        min_p=float(generation.get("min_p") or 0.0),
        repetition=float(generation.get("repetition_penalty") or 1.0),
    )
    return sampling, tuple(ends if isinstance(ends, list) else [] if ends is None else [ends])


def architecture_of(directory: Path) -> str:
    """The model's class by its own name, such as Gemma3ForCausalLM."""
    config = json.loads((directory / "config.json").read_text())
    return str((config.get("architectures") or [config["model_type"]])[0])
