"""A scripted gateway for the client's tests: a real server on a real port, so that no stub is ever mocked."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from argosy.admin.v1 import api_key_pb2, api_key_pb2_grpc, usage_pb2, usage_pb2_grpc
from argosy.v1 import (
    embedding_pb2,
    embedding_pb2_grpc,
    generation_pb2_grpc,
    language_pb2,
    language_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    stream_pb2,
)
from services.chassis.errors import ServiceError
from services.chassis.status import rich
from tests.fakes.tuning import SERVICES, FakeTuning

KEY = "argosy_test_key"


def events(pieces: Sequence[str]) -> list[stream_pb2.GenerationEvent]:
    """A whole, well-formed stream that says `pieces`."""
    said: list[dict[str, Any]] = [{"started": stream_pb2.Started(generation_id="g", prompt_tokens=3)}]
    said += [{"text": stream_pb2.TextDelta(text=piece)} for piece in pieces]
    said.append({"output_finished": stream_pb2.OutputFinished(reason=stream_pb2.FINISH_REASON_STOP)})
    completed = stream_pb2.Completed()
    completed.usage.input_tokens, completed.usage.output_tokens = 3, len(pieces)
    said.append({"completed": completed})
    return [stream_pb2.GenerationEvent(sequence=number, **each) for number, each in enumerate(said, 1)]


@dataclass
class FakeGateway(
    FakeTuning,
    generation_pb2_grpc.GenerationServiceServicer,
    language_pb2_grpc.LanguageServiceServicer,
    embedding_pb2_grpc.EmbeddingServiceServicer,
    api_key_pb2_grpc.ApiKeyServiceServicer,
    usage_pb2_grpc.UsageServiceServicer,
):
    """Says `script` on every stream; `refusals` are raised first, one a call; `breaks` ends streams after so many events."""

    script: list[stream_pb2.GenerationEvent] = field(default_factory=lambda: events(["To", " sea", "."]))
    refusals: list[ServiceError] = field(default_factory=list)
    breaks: tuple[int, ServiceError | None] | None = None  # after so many events: this error, or a silent OK
    hold: threading.Event | None = None  # a stream waits here after its first text
    models: list[str] = field(default_factory=lambda: ["models/a", "models/b", "models/c"])
    seen: list[Any] = field(default_factory=list)  # requests
    calls: int = 0
    timeouts: list[float | None] = field(default_factory=list)
    cancelled: threading.Event = field(default_factory=threading.Event)
    address: str = ""

    def _enter(self, request: Any, context: grpc.ServicerContext) -> None:
        self.calls += 1
        self.seen.append(request)
        self.timeouts.append(context.time_remaining())
        if self.refusals:
            self._refuse(self.refusals.pop(0), context)

    @staticmethod
    def _refuse(error: ServiceError, context: grpc.ServicerContext) -> None:
        answer = rich(error)
        context.set_trailing_metadata((*answer.trailers, ("request_id", "r-1")))
        context.abort(answer.code, answer.sentence)

    def _say(self, request: Any, context: grpc.ServicerContext) -> Iterator[stream_pb2.GenerationEvent]:
        self._enter(request, context)
        context.add_callback(lambda: self.cancelled.set() if not context.is_active() else None)
        context.send_initial_metadata(())
        for number, event in enumerate(self.script):
            if self.breaks and number == self.breaks[0]:
                if self.breaks[1]:
                    self._refuse(self.breaks[1], context)
                return
            yield event
            if self.hold and event.WhichOneof("event") == "text":
                self.hold.wait(20)

    def StreamGenerateText(self, request: Any, context: grpc.ServicerContext) -> Iterator[stream_pb2.GenerationEvent]:
        return self._say(request, context)

    StreamChat = StreamSummarizeText = StreamGenerateText

    def GenerateText(self, request: Any, context: grpc.ServicerContext) -> stream_pb2.GenerationResult:
        self._enter(request, context)
        output = stream_pb2.Output(text="".join(event.text.text for event in self.script))
        return stream_pb2.GenerationResult(started=self.script[0].started, outputs=[output], completed=self.script[-1].completed)

    Chat = SummarizeText = TranslateText = GenerateText

    def ClassifyText(self, request: Any, context: grpc.ServicerContext) -> language_pb2.ClassifyTextResponse:
        self._enter(request, context)
        labels = request.zero_shot.labels or ["positive", "neutral", "negative"]
        reply = language_pb2.ClassifyTextResponse()
        for _ in request.texts:
            result = reply.results.add(windows=1)
            for label in labels:
                result.labels.add(label=label, probability=1 / len(labels))
        return reply

    def AnswerQuestion(self, request: Any, context: grpc.ServicerContext) -> language_pb2.AnswerQuestionResponse:
        self._enter(request, context)
        reply = language_pb2.AnswerQuestionResponse(no_answer_probability=0.25)
        passage = request.passages[0]
        span = reply.answers.add(probability=0.75).span
        span.text, span.start_byte, span.end_byte, span.source_id = passage.text[:4], 0, len(passage.text[:4].encode()), passage.id
        return reply

    def EmbedTexts(self, request: Any, context: grpc.ServicerContext) -> embedding_pb2.EmbedTextsResponse:
        self._enter(request, context)
        return embedding_pb2.EmbedTextsResponse(embeddings=[embedding_pb2.Embedding(values=[1.0, 0.0]) for _ in request.texts])

    def ListModels(self, request: Any, context: grpc.ServicerContext) -> model_pb2.ListModelsResponse:
        """Pages of two."""
        self._enter(request, context)
        at = int(request.page_token or 0)
        found = [
            model_pb2.Model(name=name, context_tokens=32_768, capabilities=[model_pb2.MODEL_CAPABILITY_GENERATE])
            for name in self.models[at : at + 2]
        ]
        return model_pb2.ListModelsResponse(models=found, next_page_token=str(at + 2) if at + 2 < len(self.models) else "")

    def GetCaller(self, request: Any, context: grpc.ServicerContext) -> api_key_pb2.GetCallerResponse:
        """Wants the key."""
        self._enter(request, context)
        if ("authorization", f"Bearer {KEY}") not in context.invocation_metadata():
            from services.chassis.errors import ApiKeyInvalid

            self._refuse(ApiKeyInvalid(), context)
        return api_key_pb2.GetCallerResponse(project="projects/p", scopes=["generate"])

    def CreateApiKey(self, request: Any, context: grpc.ServicerContext) -> api_key_pb2.IssuedApiKey:
        self._enter(request, context)
        return api_key_pb2.IssuedApiKey(api_key=api_key_pb2.ApiKey(name="projects/p/apiKeys/k", scopes=request.api_key.scopes), secret="s3")

    def ListApiKeys(self, request: Any, context: grpc.ServicerContext) -> api_key_pb2.ListApiKeysResponse:
        self._enter(request, context)
        return api_key_pb2.ListApiKeysResponse(api_keys=[api_key_pb2.ApiKey(name="projects/p/apiKeys/k", state="STATE_ACTIVE")])

    def DeleteApiKey(self, request: Any, context: grpc.ServicerContext) -> api_key_pb2.ApiKey:
        self._enter(request, context)
        return api_key_pb2.ApiKey(name=request.name)

    def QueryUsage(self, request: Any, context: grpc.ServicerContext) -> usage_pb2.QueryUsageResponse:
        self._enter(request, context)
        sums = usage_pb2.UsageSum(model="models/a", method="/argosy.v1.GenerationService/Chat", requests=1_234)
        sums.usage.input_tokens = 56_789
        return usage_pb2.QueryUsageResponse(sums=[sums])


@contextmanager
def fake_gateway(**script: Any) -> Iterator[FakeGateway]:
    """Serve until the block is left."""
    fake = FakeGateway(**script)
    server = grpc.server(ThreadPoolExecutor(8))
    for add in (
        generation_pb2_grpc.add_GenerationServiceServicer_to_server,
        language_pb2_grpc.add_LanguageServiceServicer_to_server,
        embedding_pb2_grpc.add_EmbeddingServiceServicer_to_server,
        model_pb2_grpc.add_ModelServiceServicer_to_server,
        api_key_pb2_grpc.add_ApiKeyServiceServicer_to_server,
        usage_pb2_grpc.add_UsageServiceServicer_to_server,
        *SERVICES,
    ):
        add(fake, server)
    fake.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield fake
    finally:
        if fake.hold:
            fake.hold.set()
        server.stop(0).wait()
