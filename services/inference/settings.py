"""The variables of an inference replica. Each is `ARGOSY_` and the field's name in capitals; durations carry their unit."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from services.chassis.server import Listener
from services.inference.engine.settings import EngineSettings

__all__ = ["InferenceSettings"]


@dataclass(frozen=True, kw_only=True)
class InferenceSettings:
    """One model on one device, behind one address. None means: decided from the device, the model or the machine."""

    listener: Listener = field(default_factory=Listener)
    # The model.
    model: str = "default"  # a directory, a hub id, or "default"
    model_name: str | None = None  # `models/{name}` as callers say it; None: from the model itself
    chat_template: Path | None = None  # a Jinja file of the operator's; None: the one in the model's directory, else the plain one
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    backend: Literal["auto", "eager", "fused"] = "auto"
    kv_tokens: int | None = field(default=None, metadata={"minimum": 16})  # positions in the KV pool
    max_step_tokens: int | None = field(default=None, metadata={"minimum": 16})  # tokens computed in one step
    max_sequences: int = field(default=256, metadata={"minimum": 1})  # in the running batch
    max_waiting: int = field(default=1_024, metadata={"minimum": 1})  # sequences in the queue; one more is shed
    threads: int | None = field(default=None, metadata={"minimum": 1})  # of the CPU
    cache_dir: str | None = None  # of prepared weights; None: the user's cache
    int8: bool = False  # layers on a CPU in int8: about 1.2 times as fast, 94 % of float32's greedy tokens for 99 %
    # Another engine, for models beyond one GPU.
    engine_kind: Literal["argosy", "vllm"] = "argosy"
    engine_python: str | None = None  # the interpreter that has vLLM and this package; None: this process's own
    engine_args: tuple[str, ...] = ()  # `name=value` for vLLM, such as tensor_parallel_size=2
    # Adapters.
    store_url: str | None = None  # where adapters lie, such as file:///var/lib/argosy; None: the base alone is served
    adapter_slots: int = field(default=16, metadata={"minimum": 0, "maximum": 256})  # adapters that one step can mix; more take turns
    # Whom it believes.
    caller_public_keys: tuple[str, ...] = ()  # `kid=path` of an Ed25519 public key in PEM
    manifest_public_keys: tuple[str, ...] = ()  # `kid=path`, as above, of who signs adapters
    # Streams.
    heartbeat_seconds: float = field(default=15.0, metadata={"minimum": 0.01, "maximum": 15.0})
    write_stall_seconds: float = field(default=30.0, metadata={"minimum": 0.01})  # a full stream not read for this long is ended
    max_stream_seconds: float = field(default=300.0, metadata={"minimum": 1.0})  # deadline of a call without a shorter one
    canary_seconds: float = field(default=60.0, metadata={"minimum": 0.01})  # between golden prompts

    def engine(self) -> EngineSettings:
        """What the engine's process is told."""
        return EngineSettings(
            model=self.model, device=self.device, dtype=self.dtype, backend=self.backend, kv_tokens=self.kv_tokens,
            max_step_tokens=self.max_step_tokens, max_sequences=self.max_sequences, max_waiting=self.max_waiting, threads=self.threads,
            cache_dir=self.cache_dir, int8=self.int8, store_url=self.store_url, manifest_public_keys=self.manifest_public_keys,
            adapter_slots=self.adapter_slots, kind=self.engine_kind, python=self.engine_python, engine_args=self.engine_args,
        )  # fmt: skip
