"""A unary reply is the fold of its stream: one code path for both."""

from collections import defaultdict
from collections.abc import AsyncIterator

from argosy.v1 import content_pb2, stream_pb2


async def fold(events: AsyncIterator[bytes]) -> stream_pb2.GenerationResult:
    """All events of one stream as one reply. Whatever `events` raises comes through: a stream that failed has no reply."""
    result = stream_pb2.GenerationResult()
    outputs: dict[int, stream_pb2.Output] = defaultdict(stream_pb2.Output)
    texts: dict[tuple[int, str], list[str]] = defaultdict(list)
    calls: dict[tuple[int, int], content_pb2.ToolCall] = {}
    async for encoded in events:
        event = stream_pb2.GenerationEvent.FromString(encoded)
        match event.WhichOneof("event"):
            case "started":
                result.started.CopyFrom(event.started)
            case "text":
                texts[event.text.index, "text"].append(event.text.text)
                outputs[event.text.index].tokens.extend(event.text.tokens)
            case "reasoning":
                texts[event.reasoning.index, "reasoning"].append(event.reasoning.text)
                outputs[event.reasoning.index].tokens.extend(event.reasoning.tokens)
            case "tool_call":
                part = event.tool_call
                call = calls.get((part.index, part.call))
                if call is None:
                    call = calls[part.index, part.call] = outputs[part.index].tool_calls.add(id=part.id, name=part.name)
                call.arguments_json += part.arguments_json
            case "output_finished":
                outputs[event.output_finished.index].finished.CopyFrom(event.output_finished)
            case "completed":
                result.completed.CopyFrom(event.completed)
    for (index, kind), parts in texts.items():
        setattr(outputs[index], kind, "".join(parts))
    result.outputs.extend(output for _, output in sorted(outputs.items()))
    return result
