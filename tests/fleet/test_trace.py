"""One trace: the caller's span, the gateway's, the replica's, and the engine's part in it."""

from typing import Any

from opentelemetry import trace

import argosy
from tests.fleet.running import Tenant

CALLER = trace.SpanContext(0xAB << 120 | 0x1234, 0xCD << 56 | 0x56, is_remote=False, trace_flags=trace.TraceFlags(trace.TraceFlags.SAMPLED))


async def test_one_trace_from_the_caller_to_the_engines_steps(tenant: Tenant) -> None:
    with trace.use_span(trace.NonRecordingSpan(CALLER)):
        async with tenant.client() as client, client.stream_chat("Hello", config=argosy.config(max_output_tokens=8)) as stream:
            _ = [piece async for piece in stream]
    used = stream.result.completed.usage
    spans = await tenant.fleet.spans(f"{CALLER.trace_id:032x}", lambda found: any("StreamChat" in span["name"] for span in found))
    door = _one(spans, "argosy.v1.GenerationService/StreamChat", f"{CALLER.span_id:016x}")
    replica = _one(spans, "argosy.internal.engine.v1.EngineService/Generate", door["span"])
    engine = _one(spans, "engine generate", replica["span"])
    for phase in ("queue", "prefill", "decode"):
        _one(spans, phase, engine["span"])
    for span in (door, engine):
        assert span["attributes"]["gen_ai.usage.output_tokens"] == used.output_tokens
        assert span["attributes"]["gen_ai.usage.input_tokens"] == used.input_tokens
    assert "Hello" not in str(spans), "no content"


def _one(spans: list[dict[str, Any]], name: str, parent: str) -> dict[str, Any]:
    (found,) = [span for span in spans if span["name"] == name]
    assert found["parent"] == parent, (name, spans)
    return found
