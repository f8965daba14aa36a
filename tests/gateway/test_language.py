"""LanguageService through a real gateway server to a fake engine."""

import grpc
import pytest

from argosy.v1 import language_pb2
from services.chassis.status import error_info
from services.gateway.ledger import Outcome
from tests.fakes.edge import edge, events_of, metadata, text_of
from tests.fakes.engine import fake_engine

LABELS = language_pb2.ZeroShotLabels(labels=["tech", "politics", "sport"])


def classify(**fields: object) -> language_pb2.ClassifyTextRequest:
    asked = {"model": "models/fake", "texts": ["a new phone"], "zero_shot": LABELS} | fields
    return language_pb2.ClassifyTextRequest(**asked)  # type: ignore[arg-type]


async def test_classify_text_answers_and_settles() -> None:
    async with fake_engine() as engine, edge(engine) as at:
        call = at.language.ClassifyText(classify(), metadata=metadata(), timeout=10)
        reply = await call
        assert [score.label for score in reply.results[0].labels] == ["tech", "politics", "sport"]
        ((reservation, settlement),) = at.ledger.settled.values()
        assert settlement.outcome is Outcome.DONE and settlement.input_tokens == engine.calls[0].input_tokens
        assert reservation.output_tokens == 0
        assert dict(await call.trailing_metadata())["served_by"] == settlement.served_by


async def test_sentiment_is_a_preset() -> None:
    async with fake_engine() as engine, edge(engine) as at:
        request = language_pb2.ClassifyTextRequest(
            model="models/fake", texts=["lovely", "dull"], preset=language_pb2.LABEL_PRESET_SENTIMENT
        )
        reply = await at.language.ClassifyText(request, metadata=metadata(), timeout=10)
        assert [score.label for score in reply.results[1].labels] == ["positive", "neutral", "negative"]
        assert engine.calls[0].request.classify == request, "the caller's request travels unopened"


async def test_a_model_without_tuned_labels_says_so() -> None:
    async with fake_engine() as engine, edge(engine) as at:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await at.language.ClassifyText(
                language_pb2.ClassifyTextRequest(model="models/fake", texts=["x"]), metadata=metadata(), timeout=10
            )
        info = error_info(error.value)
        assert info is not None and info.reason == "MODEL_CAPABILITY" and info.metadata["capability"] == "CLASSIFY_TUNED"
        assert not at.ledger.settled and not engine.calls


async def test_summarize_and_translate_stream_and_fold() -> None:
    async with fake_engine() as engine, edge(engine) as at:
        summary = language_pb2.SummarizeTextRequest(model="models/fake", documents=["first part", "second part"], max_length=3)
        events = await events_of(at.language.StreamSummarizeText(summary, metadata=metadata(), timeout=10))
        folded = await at.language.SummarizeText(summary, metadata=metadata(), timeout=10)
        assert text_of(events) == folded.outputs[0].text
        assert at.ledger.reserved[0].output_tokens == 3
        assert engine.calls[0].request.summarize == summary
        request = language_pb2.TranslateTextRequest(model="models/fake", texts=["good day", "night"], target_language="fr")
        events = await events_of(at.language.StreamTranslateText(request, metadata=metadata(), timeout=10))
        folded = await at.language.TranslateText(request, metadata=metadata(), timeout=10)
        assert text_of(events) == folded.outputs[0].text
        assert at.ledger.reserved[-1].output_tokens == 2 * at.gate.relay.placing.output_token_ceiling


async def test_answers_are_extracted_or_written() -> None:
    async with fake_engine() as engine, edge(engine) as at:
        passages = [language_pb2.Passage(id="1", text="the sky is blue")]
        asked = language_pb2.AnswerQuestionRequest(
            model="models/fake", question="which colour", passages=passages, mode=language_pb2.ANSWER_MODE_EXTRACTIVE
        )
        assert (await at.language.AnswerQuestion(asked, metadata=metadata(), timeout=10)).no_answer_probability == 1.0
        asked.mode = language_pb2.ANSWER_MODE_GENERATIVE
        reply = await at.language.AnswerQuestion(asked, metadata=metadata(), timeout=10)
        assert reply.generation.outputs[0].text == "which colour" and reply.usage.output_tokens == 2
        assert text_of(await events_of(at.language.StreamAnswerQuestion(asked, metadata=metadata(), timeout=10))) == "which colour"
        assert [record.method for record in engine.calls] == ["Encode", "Generate", "Generate"]


async def test_spans_cannot_be_streamed() -> None:
    async with fake_engine() as engine, edge(engine) as at:
        asked = language_pb2.AnswerQuestionRequest(
            model="models/fake", question="q", passages=[language_pb2.Passage(id="1", text="t")], mode=language_pb2.ANSWER_MODE_EXTRACTIVE
        )
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await events_of(at.language.StreamAnswerQuestion(asked, metadata=metadata(), timeout=10))
        info = error_info(error.value)
        assert info is not None and (info.reason, info.metadata["field"]) == ("FIELD_INVALID", "mode")
