"""What an engine is asked to be, as one frozen value that also crosses to the child process. Pure."""

from typing import Literal

import msgspec

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16"]
Kind = Literal["argosy", "vllm"]
BackendChoice = Literal["auto", "eager", "fused"]


class EngineSettings(msgspec.Struct, frozen=True):
    """None means: decided from the device, the model or the machine."""

    model: str = "default"  # a directory, a hub id, or "default"
    device: Device = "auto"
    dtype: Dtype = "auto"
    backend: BackendChoice = "auto"
    kv_tokens: int | None = None  # positions in the KV pool; None: a share of the device's free memory, or the CPU default
    max_step_tokens: int | None = None  # tokens computed in one step; None: 512 on a CPU, 4,096 on CUDA
    max_sequences: int = 256  # that hold blocks at once
    max_waiting: int = 4096  # sequences; a call beyond is refused with `queue_full`
    prefix_quota: float = 0.5  # share of the pool that one tenant's unused prefixes may keep, 0..1
    threads: int | None = None  # of the CPU; None: one a core
    cache_dir: str | None = None  # of prepared weights and compiled artefacts; None: the user's cache
    int8: bool = False  # layers on a CPU in int8: about 1.2 times as fast, 94 % of float32's greedy tokens for 99 % (ADR 3)
    store_url: str | None = None  # where adapters lie; None: the base alone is served
    manifest_public_keys: tuple[str, ...] = ()  # `kid=path` of an Ed25519 public key in PEM that signs adapters
    adapter_slots: int = 16  # adapters that one step can mix; more than that take turns
    kind: Kind = "argosy"  # or "vllm": another engine behind the same border
    python: str | None = None  # the interpreter that has vLLM and this package; None: this process's own
    engine_args: tuple[str, ...] = ()  # `name=value` for vLLM
    directory: str | None = None  # where the prepared model lies; None: `model` says
    hang_s: float = 60.0  # without a sign of life while calls run, the child is ended and its calls are lost

    def step_tokens(self, device: str) -> int:
        """The token budget of a step on `device`, a torch device's name."""
        return self.max_step_tokens or (4096 if device.startswith("cuda") else 512)
