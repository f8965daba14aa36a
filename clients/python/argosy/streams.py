"""What a stream of events adds up to. Shared by the blocking and the asyncio client."""

from argosy.errors import StreamLost
from argosy.v1 import content_pb2, stream_pb2


class Fold:
    """Adds events up to the `GenerationResult` that the unary twin of the method would have answered."""

    def __init__(self) -> None:
        self._started = stream_pb2.Started()
        self._completed: stream_pb2.Completed | None = None
        self._outputs: dict[int, stream_pb2.Output] = {}
        self._last = 0

    def _output(self, index: int) -> stream_pb2.Output:
        output = self._outputs.get(index)
        if output is None:
            output = self._outputs[index] = stream_pb2.Output()
            output.finished.index = index
        return output

    def add(self, event: stream_pb2.GenerationEvent) -> None:
        """Take the next event. Raises StreamLost where one is missing."""
        if event.sequence != self._last + 1:
            gap = f"The stream skipped from event {self._last} to {event.sequence}"
            raise StreamLost(gap, reason="STREAM_LOST", last_sequence=self._last)
        self._last = event.sequence
        match event.WhichOneof("event"):
            case "started":
                self._started.CopyFrom(event.started)
            case "text":
                output = self._output(event.text.index)
                output.text += event.text.text
                output.tokens.extend(event.text.tokens)
            case "reasoning":
                output = self._output(event.reasoning.index)
                output.reasoning += event.reasoning.text
                output.tokens.extend(event.reasoning.tokens)
            case "tool_call":
                self._tool_call(event.tool_call)
            case "output_finished":
                self._output(event.output_finished.index).finished.CopyFrom(event.output_finished)
            case "completed":
                self._completed = event.completed

    def _tool_call(self, delta: stream_pb2.ToolCallDelta) -> None:
        calls = self._output(delta.index).tool_calls
        while len(calls) <= delta.call:
            calls.append(content_pb2.ToolCall())
        call = calls[delta.call]
        call.id, call.name = call.id or delta.id, call.name or delta.name
        call.arguments_json += delta.arguments_json

    def result(self) -> stream_pb2.GenerationResult:
        """The whole answer. Raises StreamLost if the stream ended without its `Completed`, whatever its status said."""
        if self._completed is None:
            raise StreamLost("The stream ended before it was complete", reason="STREAM_LOST", last_sequence=self._last)
        outputs = [self._outputs[index] for index in sorted(self._outputs)]
        return stream_pb2.GenerationResult(started=self._started, outputs=outputs, completed=self._completed)
