"""What the engine reports of itself, as metrics."""

from services.chassis.telemetry import Telemetry
from services.inference.engine.calls import Load
from services.inference.engine.host import Host

__all__ = ["measure"]


async def measure(engine: Host, telemetry: Telemetry) -> None:
    """Record every load report until cancelled. Counters go by the difference; a new engine process starts at 0 again."""
    before: Load | None = None
    async for load in engine.watch_load():
        if before is None or load.steps < before.steps:
            before = load
        block = engine.hello.block_size if engine.ready else 0
        telemetry.record("argosy.engine.waiting", load.waiting_sequences)
        telemetry.record("argosy.engine.running", load.running_sequences)
        telemetry.record("argosy.engine.queued", load.queued_tokens)
        telemetry.record("argosy.kv.blocks.total", load.total_blocks)
        telemetry.record("argosy.kv.blocks.free", load.free_blocks)
        telemetry.record("argosy.kv.tokens.total", load.total_blocks * block)
        telemetry.record("argosy.kv.tokens.free", load.free_blocks * block)
        if hits := max(0, load.cached_tokens - before.cached_tokens):
            telemetry.record("argosy.kv.tokens.hit", hits)
        if load.steps > before.steps:  # one sample a report: the engine averages the steps between
            telemetry.record("argosy.batch.rows", load.batch)
            telemetry.record("argosy.batch.duration", load.step_s)
        before = load
