"""The engine's only wiring: settings in, a warm runner and its Hello out."""

import logging
import os
import time
from pathlib import Path

import torch

from services.inference.engine.attribution import gradients_of
from services.inference.engine.backend import Backend
from services.inference.engine.calls import Hello
from services.inference.engine.eager import EagerBackend
from services.inference.engine.generation import architecture_of, sampling_of
from services.inference.engine.kernels import Unsupported
from services.inference.engine.runner import Source, TorchRunner, pack
from services.inference.engine.settings import EngineSettings
from services.inference.engine.step import BLOCK_SIZE, Row
from services.pretrained import weights

log = logging.getLogger(__name__)

AGREEMENT = 0.99  # cosine of two hidden states in bfloat16; a mask that is one off gives less


def build(settings: EngineSettings, progress: weights.Progress | None = None) -> tuple[TorchRunner, Hello]:
    """Prepare, load and warm the model. Raises ModelRefused, ModelUnavailable (weights) or Unsupported (kernels), each with a sentence."""
    began = time.monotonic()
    cache = weights.cache_directory(settings.cache_dir)
    directory = weights.prepare(settings.model, cache, progress)
    digest = weights.digest(directory, cache)
    prepared = time.monotonic()
    torch.set_num_threads(settings.threads or len(os.sched_getaffinity(0)))
    device = _device(settings)
    backend = _backend(directory, settings, device, _dtype(settings, device))
    loaded = time.monotonic()
    source = _source(settings, digest)
    runner = TorchRunner(backend, source, gradients_of(backend, directory, source).weigh)
    runner.warm_up(settings.step_tokens(device.type))
    if isinstance(backend, EagerBackend) and device.type == "cuda" and backend.dtype != torch.float32:
        settle_attention(backend)
        backend.capture(settings.max_sequences)
    log.info(
        "engine ready",
        extra={
            "backend": backend.name,
            "prepare_s": round(prepared - began, 3),
            "load_s": round(loaded - prepared, 3),
            "warm_up_s": round(time.monotonic() - loaded, 3),
        },
    )
    return runner, _hello(settings, directory, digest, runner)


def _source(settings: EngineSettings, digest: str) -> Source | None:
    """Where adapters come from; None without a store."""
    if settings.store_url is None or not settings.adapter_slots:
        return None
    from services.chassis.objects import open_objects_sync  # neither is needed to serve the base alone
    from services.chassis.signing import public_keys
    from services.inference.engine.artifacts import Artifacts

    url = settings.store_url
    return Artifacts(lambda: open_objects_sync(url), public_keys(settings.manifest_public_keys), digest)


def settle_attention(backend: EagerBackend) -> None:
    """Attend with varlen_attn if it says what the gathered form says: chunks over older blocks, decodes beside them, pages out of order."""
    texts, tables = [[3 + n % 7 for n in range(60)], [5 + n % 5 for n in range(40)]], [[2, 0, 5, 3], [4, 1, 6]]
    answers: dict[bool, list[torch.Tensor]] = {}
    for varlen in (False, True):
        backend.varlen = varlen
        try:
            answers[varlen] = []
            for cuts in (((0, 24), (0, 39)), ((24, 59), (39, 40)), ((59, 60), (39, 40))):
                rows = [Row(k, texts[k][begin:end], begin, tables[k], pool=True) for k, (begin, end) in enumerate(cuts)]
                answers[varlen].append(backend.forward(pack(rows, backend.device)[0]).float())
        except (RuntimeError, ImportError, TypeError) as error:
            log.warning("varlen_attn cannot read these pages, attention is gathered: %s", error)
            backend.varlen = False
            return
    backend.varlen = all(
        bool((torch.cosine_similarity(a, b) > AGREEMENT).all()) for a, b in zip(answers[False], answers[True], strict=True)
    )
    log.info("varlen_attn %s", "is used" if backend.varlen else "disagrees with the gathered form, which is used")


def _device(settings: EngineSettings) -> torch.device:
    if settings.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(settings.device)


def _dtype(settings: EngineSettings, device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it natively, else float32."""
    if settings.dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[settings.dtype]
    native = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def _backend(directory: Path, settings: EngineSettings, device: torch.device, dtype: torch.dtype) -> Backend:
    if settings.int8 and (device.type != "cpu" or settings.backend == "eager"):
        raise Unsupported("Layers in int8 are computed by the fused backend on a CPU, and another was asked for.")
    if device.type == "cpu" and settings.backend != "eager":
        try:
            from services.inference.engine.fused import FusedBackend  # its kernels need a compiler; eager needs none of it

            return FusedBackend.load(directory, settings)
        except Unsupported as error:
            if settings.int8:  # never ignored: the eager backend has none
                raise Unsupported(f"Layers in int8 need the fused backend, which cannot run this model here: {error}") from error
            if settings.backend == "fused":
                raise
            log.warning("the fused backend cannot run this model here, the eager one will: %s", error)
    return EagerBackend.load(directory, settings, device, dtype)


def _hello(settings: EngineSettings, directory: Path, digest: str, runner: TorchRunner) -> Hello:
    backend = runner.backend
    sampling, ends = sampling_of(directory)
    return Hello(
        model=settings.model,
        digest=digest,
        architecture=architecture_of(directory),
        device=str(backend.device),
        dtype=str(getattr(backend, "dtype", torch.bfloat16)).removeprefix("torch."),
        vocabulary=backend.vocabulary,
        context=runner.context,
        width=backend.width,
        block_size=BLOCK_SIZE,
        blocks=backend.blocks,
        default_sampling=sampling,
        end_token_ids=ends,
        backend=backend.name,
        adapter_slots=runner.slots,
    )
