"""The base as the trainer holds it: transformers' own class, built from data, with our attention; trunk and output matrix apart."""

import importlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from services.finetune.trainer.attention import ATTENTION, attend
from services.finetune.trainer.batches import Batch

__all__ = ["Base", "BaseUnsupported", "load"]


class BaseUnsupported(Exception):
    """The base cannot be tuned here; one sentence."""


@dataclass(frozen=True, slots=True)
class Base:
    """A causal model. `trunk` ends with the final norm; `output` [vocabulary, width] may be the embedding itself."""

    model: Any
    width: int
    vocabulary: int
    context: int  # positions
    softcap: float | None  # of the final logits
    end_ids: tuple[int, ...]

    @property
    def device(self) -> torch.device:
        """Where its weights lie."""
        device: torch.device = self.output.device
        return device

    @property
    def output(self) -> torch.Tensor:
        """The output matrix."""
        return cast("torch.Tensor", self.model.get_output_embeddings().weight)

    def states(self, batch: Batch) -> torch.Tensor:
        """Final-norm states of the selected positions: [n, width], float32. The output matrix is not touched."""
        own = {} if batch.segments is None else {"segments": batch.segments}
        answer = self.model.base_model(input_ids=batch.ids, position_ids=batch.positions, use_cache=False, **own)
        return cast("torch.Tensor", answer.last_hidden_state.flatten(0, 1).index_select(0, batch.select)).float()


def load(directory: Path, device: torch.device, gradient_checkpointing: bool = False) -> Base:
    """Read safetensors as float32. No code of the directory runs and nothing is fetched. Raises BaseUnsupported."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers = cast("Any", importlib.import_module("transformers"))
    settings = json.loads((directory / "config.json").read_text())
    names = cast("Any", importlib.import_module("transformers.models.auto.modeling_auto")).MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    name = names.get(settings.get("model_type"))
    if name is None or "auto_map" in settings:
        raise BaseUnsupported("its model type is not a causal language model of this transformers")
    transformers.AttentionInterface.register(ATTENTION, attend)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    model_class = getattr(transformers, name if isinstance(name, str) else name[0])
    config = model_class.config_class.from_pretrained(directory, local_files_only=True)
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds or getattr(config, "is_encoder_decoder", False):
        raise BaseUnsupported("it has layers that are no causal attention")
    config._attn_implementation = ATTENTION
    model, report = model_class.from_pretrained(
        directory, config=config, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    if report["missing_keys"]:
        raise BaseUnsupported("its files lack tensors")
    if gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # its name until 5.20
        enable({"use_reentrant": False})
    if type(model).__name__ == "LlamaForCausalLM" and getattr(config, "pretraining_tp", 1) != 1:
        raise BaseUnsupported("its layers are split for tensor parallelism")
    ends = _ends(directory, settings)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Base(model.to(device), int(config.hidden_size), int(config.vocab_size), int(config.max_position_embeddings), softcap, ends)


def _ends(directory: Path, settings: dict[str, Any]) -> tuple[int, ...]:
    """Ids at which a replica ends an answer, from the same files that it reads."""
    path = directory / "generation_config.json"
    generation = json.loads(path.read_text()) if path.exists() else {}
    ends = generation.get("eos_token_id", settings.get("eos_token_id"))
    return tuple(ends if isinstance(ends, list) else [] if ends is None else [ends])
