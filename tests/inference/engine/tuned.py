"""Random adapters of the tiny models: PEFT's own model as the reference, and the same factors as the engine's `Weights`."""

import copy
import hashlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from safetensors.torch import save

from services.chassis import signing
from services.inference.engine.backend import Factors, Weights

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def peft(model: Any, seed: int, targets: Sequence[str] = ALL, rank: int = 4, dora: bool = False, rslora: bool = False) -> Any:
    """`model` with a random adapter around it; B is not zero, so that it changes tokens."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets), use_dora=dora, use_rslora=rslora)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks this transformers by an old name
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


KEY = Ed25519PrivateKey.generate()
KEYS = {"signer": KEY.public_key()}
OWNER = "11111111-1111-4111-8111-111111111111"


def manifest(files: Mapping[str, bytes], base: str, **changes: Any) -> dict[str, Any]:
    """The predicate about `files`, as proto-JSON; `changes` are its fields."""
    said: dict[str, Any] = {
        "project_uid": OWNER,
        "model": "projects/acme/models/tuned",
        "base_digest": base,
        "method": "TUNE_METHOD_CHAT",
        "rank": 4,
        "alpha": 8.0,
        "targets": list(ALL),
        "parts": [
            {"name": name, "sha256": hashlib.sha256(data).hexdigest(), "total_bytes": str(len(data))}
            for name, data in sorted(files.items())
        ],
    }
    return {name: value for name, value in (said | changes).items() if value is not None}


def publish(objects: Any, files: Mapping[str, bytes], said: Mapping[str, Any], key: Ed25519PrivateKey = KEY, owner: str = OWNER) -> str:
    """Put an adapter where pods look for it, signed; returns its digest."""
    subjects = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    payload = signing.statement(subjects, signing.ADAPTER_MANIFEST, said)
    digest = signing.digest_of(payload)
    for name, data in files.items():
        objects.put(f"adapters/{owner}/{digest}/{name}", data)
    objects.put(f"adapters/{owner}/{digest}/manifest.json", signing.seal(payload, signing.IN_TOTO, key, "signer"))
    return digest


def files(tuned: Any, head: tuple[torch.Tensor, torch.Tensor] | None = None) -> dict[str, bytes]:
    """What a trainer would have written."""
    found = {"adapter.safetensors": save(tensors(tuned))}
    if head is not None:
        found["head.safetensors"] = save({"weight": head[0], "bias": head[1]})
    return found


def head(seed: int, labels: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    return torch.randn((labels, width), generator=source), torch.randn(labels, generator=source)


def public_key_file(directory: Path) -> str:
    """The signer's, as settings name it."""
    path = directory / "manifest-key.pem"
    path.write_bytes(KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return f"signer={path}"
