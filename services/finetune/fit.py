"""Does an adapter fit its base: which tensors a LoRA and a head may have, and of which shapes (pure)."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from services.finetune.tensors import Refused, Tensor

MAX_RANK = 256
MAX_LABELS = 1_000
Modules = Mapping[str, tuple[int, int]]  # linear layer's path in the base → (out, in)

_KEY = re.compile(
    r"base_model\.model\.((?:[A-Za-z0-9_]+\.)*[A-Za-z0-9_]+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector(?:\.weight)?)"
)
_A, _B, _MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector.weight"


@dataclass(frozen=True, slots=True)
class Lora:
    """What an adapter says of itself."""

    rank: int
    alpha: float
    rslora: bool
    dora: bool
    targets: tuple[str, ...]  # linear layers by path or by the end of one, such as `q_proj`

    @property
    def scale(self) -> float:
        """What `B @ A` is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


def canonical(name: str) -> str:
    """A tensor's name as we store it: PEFT writes magnitudes without `.weight`."""
    return name + ".weight" if name.endswith(".lora_magnitude_vector") else name


def targeted(module: str, targets: Iterable[str]) -> bool:
    """Whether a target is the module's path or ends it at a dot."""
    return any(module == target or module.endswith("." + target) for target in targets)


def check_adapter(tensors: Mapping[str, Tensor], lora: Lora, modules: Modules | None = None) -> dict[str, dict[str, Tensor]]:
    """The tensors by module and kind (`lora_A.weight`, …), if they are exactly a LoRA of this form.

    Args:
        tensors: of the file, by name.
        lora: its rank, targets and form.
        modules: the base's linear layers; None: shapes are held against each other alone.

    Raises:
        Refused: `tensor_name`, `tensor_target`, `tensor_module`, `tensor_missing`, `tensor_rank`, `tensor_shape`, `tensor_duplicate`.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _KEY.fullmatch(canonical(name))
        if match is None or (match[2] == _MAGNITUDE and not lora.dora):
            raise Refused("tensor_name", tensor.begin)
        module, kind = match[1], match[2]
        if not targeted(module, lora.targets):
            raise Refused("tensor_target", tensor.begin)
        if modules is not None and module not in modules:
            raise Refused("tensor_module", tensor.begin)
        if kind in found.setdefault(module, {}):
            raise Refused("tensor_duplicate", tensor.begin)
        found[module][kind] = tensor
    wanted = {_A, _B, _MAGNITUDE} if lora.dora else {_A, _B}
    for module, kinds in found.items():
        if kinds.keys() != wanted:
            raise Refused("tensor_missing")
        _check_shapes(kinds, lora.rank, modules[module] if modules is not None else None)
    if not all(any(targeted(module, (target,)) for module in found) for target in lora.targets):
        raise Refused("tensor_missing")
    if modules is not None and {module for module in modules if targeted(module, lora.targets)} != found.keys():
        raise Refused("tensor_missing")
    return found


def _check_shapes(kinds: Mapping[str, Tensor], rank: int, shape: tuple[int, int] | None) -> None:
    a, b = kinds[_A], kinds[_B]
    for tensor in (a, b):
        if len(tensor.shape) != 2:
            raise Refused("tensor_shape", tensor.begin)
    if a.shape[0] != rank or b.shape[1] != rank:
        raise Refused("tensor_rank", a.begin if a.shape[0] != rank else b.begin)
    if shape is not None and (b.shape[0], a.shape[1]) != shape:
        raise Refused("tensor_shape", a.begin if a.shape[1] != shape[1] else b.begin)
    if _MAGNITUDE in kinds and kinds[_MAGNITUDE].shape not in ((b.shape[0],), (1, b.shape[0])):
        raise Refused("tensor_shape", kinds[_MAGNITUDE].begin)


def check_head(tensors: Mapping[str, Tensor], labels: Sequence[str], width: int | None = None) -> None:
    """Return if the tensors are exactly our head: `weight` [labels, width] and `bias` [labels], float32.

    Raises:
        Refused: `head_name`, `head_dtype`, `head_shape`.
    """
    if tensors.keys() != {"weight", "bias"}:
        raise Refused("head_name", 8)
    weight, bias = tensors["weight"], tensors["bias"]
    if {weight.dtype, bias.dtype} != {"F32"}:
        raise Refused("head_dtype", 8)
    if len(weight.shape) != 2 or weight.shape[0] != len(labels) or bias.shape != (len(labels),):
        raise Refused("head_shape", weight.begin)
    if width is not None and weight.shape[1] != width:
        raise Refused("head_shape", weight.begin)
