"""The asyncio client. `client.py` is made from this file by tools/gen_sync_client.py: edit here, then run `make protos`.

Every call has a deadline, carries a request id, fails with a type from `argosy.errors`, and is repeated only where the fleet makes that
safe (see `channel.py`). A stream is cancelled when its block is left, by whatever way.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from argosy import aio_tuning, requests
from argosy.admin.v1 import (
    api_key_pb2,
    api_key_pb2_grpc,
    project_pb2,
    project_pb2_grpc,
    quota_pb2,
    quota_pb2_grpc,
    usage_pb2,
    usage_pb2_grpc,
)
from argosy.aio_datasets import AsyncDatasets
from argosy.aio_jobs import AsyncJobs
from argosy.aio_registry import AsyncRegistry
from argosy.channel import Target
from argosy.errors import from_rpc
from argosy.specs import Money
from argosy.streams import Fold
from argosy.v1 import (
    config_pb2,
    content_pb2,
    dataset_pb2_grpc,
    embedding_pb2,
    embedding_pb2_grpc,
    explanation_pb2,
    explanation_pb2_grpc,
    finetune_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    language_pb2,
    language_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    stream_pb2,
)

Reply = TypeVar("Reply")
UNARY_TIMEOUT_S = 60.0
STREAM_TIMEOUT_S = 300.0  # the fleet's cap


class AsyncGenerationStream:
    """A generation as it is written. Use it in a `with` block: leaving the block ends the generation in the engine.

    Iterating gives the text of the first output as it comes; `events()` gives every event; `result` is the whole after the end.
    """

    def __init__(self, call: Any) -> None:
        self._call = call
        self._fold = Fold()
        self._result: stream_pb2.GenerationResult | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._call.cancel()  # after a normal end this does nothing

    async def events(self) -> AsyncIterator[stream_pb2.GenerationEvent]:
        """Every event, in order. Raises ArgosyError; StreamLost where the stream breaks after its start."""
        try:
            async for event in self._call:
                self._fold.add(event)
                yield event
        except grpc.RpcError as error:
            raise from_rpc(error) from None
        self._result = self._fold.result()

    async def __aiter__(self) -> AsyncIterator[str]:
        async for event in self.events():
            if event.WhichOneof("event") == "text" and event.text.index == 0 and event.text.text:
                yield event.text.text

    @property
    def result(self) -> stream_pb2.GenerationResult:
        """What the unary twin would have answered. Raises ValueError before the end."""
        if self._result is None:
            raise ValueError("the stream has not ended: read it to its end first")
        return self._result


class AsyncClient:
    """One connection to a fleet. `model` is what calls use that name none.

    Unset arguments come from ARGOSY_ADDRESS, ARGOSY_API_KEY, ARGOSY_CA. Replies are the messages of argosy.v1, typed and complete: text,
    probabilities, the model that answered, and what was charged.
    """

    def __init__(
        self,
        address: str | None = None,
        api_key: str | None = None,
        *,
        ca: Path | None = None,
        model: str = "",
        timeout_s: float = UNARY_TIMEOUT_S,
    ) -> None:
        given: dict[str, Any] = {"address": address, "api_key": api_key, "ca": ca}
        self._target = Target(**{name: value for name, value in given.items() if value is not None})
        self.model = model
        self.timeout_s = timeout_s
        self._channel = self._target.open_aio()
        self.generation = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self.language = language_pb2_grpc.LanguageServiceStub(self._channel)
        self.embedding = embedding_pb2_grpc.EmbeddingServiceStub(self._channel)
        self.explanation = explanation_pb2_grpc.ExplanationServiceStub(self._channel)
        self.model_service = model_pb2_grpc.ModelServiceStub(self._channel)
        self.dataset_service = dataset_pb2_grpc.DatasetServiceStub(self._channel)
        self.finetune_service = finetune_pb2_grpc.FineTuneServiceStub(self._channel)
        self.project_service = project_pb2_grpc.ProjectServiceStub(self._channel)
        self.api_key_service = api_key_pb2_grpc.ApiKeyServiceStub(self._channel)
        self.quota_service = quota_pb2_grpc.QuotaServiceStub(self._channel)
        self.usage_service = usage_pb2_grpc.UsageServiceStub(self._channel)
        self.datasets = AsyncDatasets(self)
        self.jobs = AsyncJobs(self)
        self.registry = AsyncRegistry(self)
        self._project = ""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connection; calls under way are cancelled."""
        await self._channel.close(None)

    async def call(self, method: Callable[..., Awaitable[Reply]], request: Any, *, timeout_s: float | None = None) -> Reply:
        """Any unary method of a stub above, with this client's deadline, credential and errors."""
        try:
            return await method(request, timeout=timeout_s or self.timeout_s, metadata=self._target.metadata)
        except grpc.RpcError as error:
            raise from_rpc(error) from None

    async def stream(self, method: Any, request: Any, *, timeout_s: float | None = None) -> AsyncIterator[Any]:
        """Any server-streaming method of a stub above, message by message. Leaving the loop cancels the call."""
        call = method(request, timeout=timeout_s or STREAM_TIMEOUT_S, metadata=self._target.metadata)
        try:
            async for message in call:
                yield message
        except grpc.RpcError as error:
            raise from_rpc(error) from None
        finally:
            call.cancel()  # after a normal end this does nothing

    async def pages(self, method: Callable[..., Awaitable[Any]], request: Any, field: str) -> AsyncIterator[Any]:
        """What a list method answers, page by page; `field` names the repeated one."""
        while True:
            page = await self.call(method, request)
            for each in getattr(page, field):
                yield each
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def project(self) -> str:
        """The key's own project, `projects/{p}`; asked for once."""
        if not self._project:
            self._project = (await self.caller()).project
        return self._project

    def _stream(self, method: Any, request: Any, timeout_s: float | None) -> AsyncGenerationStream:
        return AsyncGenerationStream(method(request, timeout=timeout_s or STREAM_TIMEOUT_S, metadata=self._target.metadata))

    # Generation

    async def generate(
        self, prompt: str, *, model: str | None = None, config: config_pb2.GenerationConfig | None = None, timeout_s: float | None = None
    ) -> stream_pb2.GenerationResult:
        """Continue a raw prompt."""
        request = generation_pb2.GenerateTextRequest(
            model=model or self.model, request_id=requests.request_id(), prompt=prompt, config=config
        )
        return await self.call(self.generation.GenerateText, request, timeout_s=timeout_s)

    def stream_generate(
        self, prompt: str, *, model: str | None = None, config: config_pb2.GenerationConfig | None = None, timeout_s: float | None = None
    ) -> AsyncGenerationStream:
        """Continue a raw prompt, as it is written."""
        request = generation_pb2.GenerateTextRequest(
            model=model or self.model, request_id=requests.request_id(), prompt=prompt, config=config
        )
        return self._stream(self.generation.StreamGenerateText, request, timeout_s)

    async def chat(
        self,
        messages: str | Iterable[requests.Message],
        *,
        model: str | None = None,
        config: config_pb2.GenerationConfig | None = None,
        tools: Iterable[content_pb2.ToolDeclaration] = (),
        timeout_s: float | None = None,
    ) -> stream_pb2.GenerationResult:
        """The assistant's next turn."""
        request = requests.chat(messages, model or self.model, config, tools)
        return await self.call(self.generation.Chat, request, timeout_s=timeout_s)

    def stream_chat(
        self,
        messages: str | Iterable[requests.Message],
        *,
        model: str | None = None,
        config: config_pb2.GenerationConfig | None = None,
        tools: Iterable[content_pb2.ToolDeclaration] = (),
        timeout_s: float | None = None,
    ) -> AsyncGenerationStream:
        """The assistant's next turn, as it is written."""
        return self._stream(self.generation.StreamChat, requests.chat(messages, model or self.model, config, tools), timeout_s)

    async def count_tokens(self, prompt: str, *, model: str | None = None) -> generation_pb2.CountTokensResponse:
        """Tokens of a prompt, and the room that is left for an answer."""
        request = generation_pb2.CountTokensRequest(model=model or self.model, prompt=prompt)
        return await self.call(self.generation.CountTokens, request)

    async def tokenize(self, text: str, *, model: str | None = None) -> generation_pb2.TokenizeResponse:
        """The tokens of a text: ids, raw bytes, spans."""
        request = generation_pb2.TokenizeRequest(model=model or self.model, text=text)
        return await self.call(self.generation.Tokenize, request)

    # Language

    async def classify(
        self,
        texts: str | Sequence[str],
        labels: Sequence[str] = (),
        *,
        instruction: str = "",
        multi_label: bool = False,
        top_k: int | None = None,
        model: str | None = None,
        timeout_s: float | None = None,
    ) -> language_pb2.ClassifyTextResponse:
        """Labels with probabilities, best first, for each text. Without `labels`, those the model was tuned on."""
        request = language_pb2.ClassifyTextRequest(
            model=model or self.model,
            request_id=requests.request_id(),
            texts=[texts] if isinstance(texts, str) else texts,
            multi_label=multi_label,
            top_k=top_k,
        )
        if labels:
            request.zero_shot.labels.extend(labels)
            request.zero_shot.instruction = instruction
        return await self.call(self.language.ClassifyText, request, timeout_s=timeout_s)

    async def sentiment(
        self, texts: str | Sequence[str], *, model: str | None = None, timeout_s: float | None = None
    ) -> language_pb2.ClassifyTextResponse:
        """Positive, neutral or negative, with probabilities, for each text."""
        request = language_pb2.ClassifyTextRequest(
            model=model or self.model,
            request_id=requests.request_id(),
            texts=[texts] if isinstance(texts, str) else texts,
            preset=language_pb2.LABEL_PRESET_SENTIMENT,
        )
        return await self.call(self.language.ClassifyText, request, timeout_s=timeout_s)

    def _summarize_request(
        self,
        documents: str | Sequence[str],
        model: str | None,
        instruction: str,
        min_length: int | None,
        max_length: int | None,
        config: config_pb2.GenerationConfig | None,
    ) -> language_pb2.SummarizeTextRequest:
        return language_pb2.SummarizeTextRequest(
            model=model or self.model,
            request_id=requests.request_id(),
            documents=[documents] if isinstance(documents, str) else documents,
            instruction=instruction,
            min_length=min_length,
            max_length=max_length,
            config=config,
        )

    async def summarize(
        self,
        documents: str | Sequence[str],
        *,
        instruction: str = "",
        min_length: int | None = None,
        max_length: int | None = None,
        model: str | None = None,
        config: config_pb2.GenerationConfig | None = None,
        timeout_s: float | None = None,
    ) -> stream_pb2.GenerationResult:
        """One summary of the documents, between `min_length` and `max_length` model tokens."""
        request = self._summarize_request(documents, model, instruction, min_length, max_length, config)
        return await self.call(self.language.SummarizeText, request, timeout_s=timeout_s)

    def stream_summarize(
        self,
        documents: str | Sequence[str],
        *,
        instruction: str = "",
        min_length: int | None = None,
        max_length: int | None = None,
        model: str | None = None,
        config: config_pb2.GenerationConfig | None = None,
        timeout_s: float | None = None,
    ) -> AsyncGenerationStream:
        """`summarize`, as it is written."""
        request = self._summarize_request(documents, model, instruction, min_length, max_length, config)
        return self._stream(self.language.StreamSummarizeText, request, timeout_s)

    async def translate(
        self,
        texts: str | Sequence[str],
        target_language: str,
        *,
        source_language: str = "",
        model: str | None = None,
        config: config_pb2.GenerationConfig | None = None,
        timeout_s: float | None = None,
    ) -> stream_pb2.GenerationResult:
        """Each text in the target language (BCP 47, as `fr`); output i belongs to text i. An empty source is detected."""
        request = language_pb2.TranslateTextRequest(
            model=model or self.model,
            request_id=requests.request_id(),
            texts=[texts] if isinstance(texts, str) else texts,
            source_language=source_language,
            target_language=target_language,
            config=config,
        )
        return await self.call(self.language.TranslateText, request, timeout_s=timeout_s)

    async def answer(
        self,
        question: str,
        passages: str | Iterable[str] | Mapping[str, str],
        *,
        generative: bool = False,
        top_k: int | None = None,
        model: str | None = None,
        config: config_pb2.GenerationConfig | None = None,
        timeout_s: float | None = None,
    ) -> language_pb2.AnswerQuestionResponse:
        """Spans of the passages that answer the question, or with `generative` an answer in the model's own words."""
        request = language_pb2.AnswerQuestionRequest(
            model=model or self.model,
            request_id=requests.request_id(),
            question=question,
            passages=requests.passages(passages),
            mode=language_pb2.ANSWER_MODE_GENERATIVE if generative else language_pb2.ANSWER_MODE_EXTRACTIVE,
            top_k=top_k,
            config=config,
        )
        return await self.call(self.language.AnswerQuestion, request, timeout_s=timeout_s)

    async def embed(
        self,
        texts: str | Sequence[str],
        *,
        dimensions: int | None = None,
        normalize: bool | None = None,
        query: bool = False,
        model: str | None = None,
        timeout_s: float | None = None,
    ) -> embedding_pb2.EmbedTextsResponse:
        """A vector for each text, in order."""
        request = embedding_pb2.EmbedTextsRequest(
            model=model or self.model,
            request_id=requests.request_id(),
            texts=[texts] if isinstance(texts, str) else texts,
            purpose=embedding_pb2.EMBEDDING_PURPOSE_QUERY if query else embedding_pb2.EMBEDDING_PURPOSE_DOCUMENT,
            dimensions=dimensions,
            normalize=normalize,
        )
        return await self.call(self.embedding.EmbedTexts, request, timeout_s=timeout_s)

    async def explain(
        self,
        text: str,
        label: str | None = None,
        *,
        labels: Sequence[str] = (),
        continuation: str | None = None,
        cheap: bool = False,
        unit: str = "word",
        model: str | None = None,
        timeout_s: float | None = None,
    ) -> explanation_pb2.ExplainResponse:
        """What in the text speaks for a label, the likeliest unless one is named, or with `continuation` for that text after it.

        `unit` is word, token or sentence. `cheap` takes gradient times input instead of leaving units out one at a time.
        """
        request = requests.explain(text, label, labels=labels, continuation=continuation, cheap=cheap, unit=unit, model=model or self.model)
        return await self.call(self.explanation.Explain, request, timeout_s=timeout_s)

    async def nearest(
        self, text: str, *, top_k: int | None = None, model: str | None = None, timeout_s: float | None = None
    ) -> Sequence[explanation_pb2.NearestExample]:
        """The training rows of a tuned model that are most like a text, nearest first; the key needs `datasets.content`."""
        request = explanation_pb2.FindNearestExamplesRequest(model=model or self.model, text=text, top_k=top_k)
        return (await self.call(self.explanation.FindNearestExamples, request, timeout_s=timeout_s)).examples

    # Tuning: the rest is in `datasets`, `jobs` and `registry`

    async def tune(
        self,
        path: str | Path,
        *,
        base: str,
        method: str,
        model: str = "",
        held_out: str | Path = "",
        text_columns: Sequence[str] = (),
        label_column: str = "",
        delimiter: str = "",
        header: bool | None = None,
        skip_bad_rows: bool = False,
        max_cost: Money | None = None,
        deadline_s: float | None = None,
        quote_only: bool = False,
        sent: aio_tuning.Sent | None = None,
        **choices: Any,
    ) -> aio_tuning.AsyncTuning:
        """A file of rows to a job under way: upload, check, queue; then `wait()` for the version, or follow `events()`.

        `method` is classify, chat or preference; `choices` are the keywords of `argosy.specs.spec`, as rank, epochs, seed. `model` names
        what gets the version and is called like the file unless said otherwise. `held_out` is a file to measure on; without it a tenth of
        the rows is kept back. Raises DatasetRejected, with the findings by line, where rows are bad.
        """
        return await aio_tuning.tune(
            self,
            path,
            base=base,
            method=method,
            model=model,
            held_out=held_out,
            text_columns=text_columns,
            label_column=label_column,
            delimiter=delimiter,
            header=header,
            skip_bad_rows=skip_bad_rows,
            max_cost=max_cost,
            deadline_s=deadline_s,
            quote_only=quote_only,
            sent=sent,
            **choices,
        )

    # Models, keys, usage

    async def models(self, *, page_size: int = 0) -> AsyncIterator[model_pb2.Model]:
        """Every model that the key may use, page by page."""
        request = model_pb2.ListModelsRequest(page_size=page_size)
        async for model in self.pages(self.model_service.ListModels, request, "models"):
            yield model

    async def create_project(self, project_id: str, *, display_name: str = "") -> project_pb2.Project:
        """A new project; needs the scope `platform`."""
        request = project_pb2.CreateProjectRequest(
            project_id=project_id, project=project_pb2.Project(display_name=display_name), request_id=requests.request_id()
        )
        return await self.call(self.project_service.CreateProject, request)

    async def create_key(
        self, project: str, scopes: Sequence[str], *, display_name: str = "", models: Sequence[str] = (), ttl_s: float | None = None
    ) -> api_key_pb2.IssuedApiKey:
        """A new API key for `projects/{p}`; its secret is in this reply and nowhere else."""
        request = api_key_pb2.CreateApiKeyRequest(
            parent=project,
            api_key=api_key_pb2.ApiKey(display_name=display_name, scopes=scopes, models=models),
            request_id=requests.request_id(),
        )
        if ttl_s is not None:
            request.api_key.expire_time.FromDatetime(datetime.now(UTC) + timedelta(seconds=ttl_s))
        return await self.call(self.api_key_service.CreateApiKey, request)

    async def keys(self, project: str, *, page_size: int = 0) -> AsyncIterator[api_key_pb2.ApiKey]:
        """Every key of a project, page by page; never a secret."""
        request = api_key_pb2.ListApiKeysRequest(parent=project, page_size=page_size)
        async for key in self.pages(self.api_key_service.ListApiKeys, request, "api_keys"):
            yield key

    async def delete_key(self, name: str) -> None:
        """Revoke a key: new calls fail within two seconds, running streams within five."""
        await self.call(self.api_key_service.DeleteApiKey, api_key_pb2.DeleteApiKeyRequest(name=name, request_id=requests.request_id()))

    async def caller(self) -> api_key_pb2.GetCallerResponse:
        """Whose key this is: project, scopes, limits."""
        return await self.call(self.api_key_service.GetCaller, api_key_pb2.GetCallerRequest())

    async def usage(
        self,
        project: str,
        *,
        group_by: Sequence[usage_pb2.UsageGroup.ValueType] = (),
        interval: usage_pb2.UsageInterval.ValueType = usage_pb2.USAGE_INTERVAL_TOTAL,
    ) -> AsyncIterator[usage_pb2.UsageSum]:
        """What a project used, summed by group and interval, page by page."""
        request = usage_pb2.QueryUsageRequest(parent=project, group_by=group_by, interval=interval)
        async for each in self.pages(self.usage_service.QueryUsage, request, "sums"):
            yield each

    async def request_usage(self, project: str, request_id: str) -> usage_pb2.GetRequestUsageResponse:
        """What one request used, by its request id."""
        request = usage_pb2.GetRequestUsageRequest(parent=project, request_id=request_id)
        return await self.call(self.usage_service.GetRequestUsage, request)

    async def quota(self, project: str) -> quota_pb2.QuotaUsage:
        """What is left of a project's quotas."""
        return await self.call(self.quota_service.GetQuotaUsage, quota_pb2.GetQuotaUsageRequest(name=f"{project}/quotaPolicy"))
