"""Random adapters of the tiny models: PEFT's own model as the reference, and the same factors as the engine's `Weights`."""

import copy
from collections.abc import Sequence
from typing import Any

import torch

from services.inference.engine.backend import Factors, Weights

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def peft(model: Any, seed: int, targets: Sequence[str] = ALL, rank: int = 4, dora: bool = False, rslora: bool = False) -> Any:
    """`model` with a random adapter around it; B is not zero, so that it changes tokens."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets), use_dora=dora, use_rslora=rslora)
    tuned = get_peft_model(copy.deepcopy(model), config).eval()
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=source) * 0.2)
            elif "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=source))
    return tuned


def tensors(tuned: Any) -> dict[str, torch.Tensor]:
    """As PEFT saves them."""
    from peft import get_peft_model_state_dict

    return {name: tensor.detach().clone().contiguous() for name, tensor in get_peft_model_state_dict(tuned).items()}


def weights(tuned: Any) -> Weights:
    """As the engine takes them."""
    config = tuned.peft_config["default"]
    scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    factors = {}
    for name, module in tuned.base_model.model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        down, up = (module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach() * scale)
        gain = None
        if config.use_dora:
            merged = module.base_layer.weight.detach() + up @ down
            gain = module.lora_magnitude_vector["default"].weight.detach() / merged.norm(dim=1)
        factors[name] = Factors(down, up, gain)
    return Weights(config.r, factors)
