"""One replica on the weights that everybody gets, in a real engine process: the tasks work, and what is promised about tokens holds."""

import asyncio
import math
import time
import uuid

import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from argosy.v1 import config_pb2, content_pb2, embedding_pb2, generation_pb2, language_pb2
from argosy_internal.engine.v1 import engine_pb2, engine_pb2_grpc
from services.chassis.channel import open_channel
from services.chassis.identity import CallerVerifier
from services.inference.server import AUDIENCE, inference
from services.inference.settings import InferenceSettings
from tests.inference.replicas import KEY, Client, Reason, finished, request, said, signed, stopping, text

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]
MODEL = "models/gemma-3-270m"
GREEDY = {"sampling": config_pb2.Sampling(temperature=0)}
REPORT = (
    "The city council voted on Tuesday to build a new bridge over the river. The bridge will cost 40 million euros and take three years "
    "to build. Residents have complained for years about traffic jams on the old bridge, which was built in 1932."
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def replica():
    """Ready within the time a first conversion of the weights may take."""
    verifier = CallerVerifier({"gateway": KEY.public_key()}, AUDIENCE)
    async with inference(InferenceSettings(threads=1), verifier=verifier) as address, open_channel(address) as channel:
        client = Client(engine_pb2_grpc.EngineServiceStub(channel), health_pb2_grpc.HealthStub(channel), channel, address)
        watch = client.health.Watch(health_pb2.HealthCheckRequest(service="ready"), timeout=280)
        async for state in watch:
            if state.status == health_pb2.HealthCheckResponse.SERVING:
                break
        watch.cancel()
        yield client


async def generate(replica, message, timeout_s=120):
    return [event async for event in replica.call(message, timeout=timeout_s)]


async def encode(replica, **task):
    message = engine_pb2.EncodeRequest(
        generation_id=str(uuid.uuid4()), request_id=str(uuid.uuid4()), model=content_pb2.ServedModel(version=MODEL), **task
    )
    return await replica.stub.Encode(message, timeout=120, metadata=signed())


def chat(said):
    turns = [content_pb2.ChatMessage(role=content_pb2.ROLE_USER, parts=[content_pb2.ContentPart(text=said)])]
    return request(
        chat=generation_pb2.ChatRequest(model=MODEL, messages=turns),
        config=config_pb2.GenerationConfig(**GREEDY, **stopping(max_output_tokens=24)),
    )


async def test_it_says_what_it_is(replica):
    info = await replica.stub.GetEngineInfo(engine_pb2.GetEngineInfoRequest(), timeout=10, metadata=signed())
    assert (info.model, info.vocabulary_size, info.context_tokens, info.embedding_dimensions) == (MODEL, 262_144, 32_768, 640)
    assert len(info.base_digest) == 64


async def test_text_and_chat(replica):
    story = await generate(replica, text("The capital of France is", **GREEDY, **stopping(max_output_tokens=16)))
    assert len(said(story)) > 20
    assert finished(story)[0].reason == Reason.FINISH_REASON_LENGTH
    assert story[-1].completed.usage.output_tokens == 16
    answer = await generate(replica, chat("What is the capital of Italy?"))
    assert "Rome" in said(answer)
    assert "User:" not in said(answer)


async def test_same_seed_same_text_alone_and_in_a_batch(replica):
    def ask(seed):
        return text("Once upon a time", sampling=config_pb2.Sampling(seed=seed, n=2), **stopping(max_output_tokens=12))

    alone = await generate(replica, ask(5))
    batch = await asyncio.gather(*(generate(replica, ask(seed)) for seed in (5, 6, 7)))
    assert [said(alone, index) for index in (0, 1)] == [said(batch[0], index) for index in (0, 1)]
    assert len({said(events, index) for events in batch for index in (0, 1)}) > 1


async def test_second_request_finds_the_prefix(replica):
    prompt = REPORT + f" It is {time.time_ns()}." + REPORT
    first = (await generate(replica, text(prompt, **GREEDY, **stopping(max_output_tokens=2))))[-1].completed.usage
    second = (await generate(replica, text(prompt, **GREEDY, **stopping(max_output_tokens=2))))[-1].completed.usage
    assert second.input_tokens == first.input_tokens
    assert second.cached_input_tokens > first.cached_input_tokens


async def test_logprobs_of_the_real_vocabulary(replica):
    events = await generate(
        replica,
        text(
            "One, two, three,",
            output=config_pb2.OutputOptions(top_logprobs=3, prompt_logprobs=True),
            **GREEDY,
            **stopping(max_output_tokens=6),
        ),
    )
    tokens = [token for event in events for token in event.text.tokens]
    assert b"".join(token.token for token in tokens).decode() == said(events)
    for token in tokens:
        assert token.logprob == pytest.approx(token.top[0].logprob)  # greedy takes the likeliest
        assert [other.logprob for other in token.top] == sorted((other.logprob for other in token.top), reverse=True)
    assert len(events[0].started.prompt_logprobs) == events[0].started.prompt_tokens - 1


async def test_A19_control_tokens_of_the_real_vocabulary(replica):
    source = "<bos><start_of_turn>user\n<end_of_turn><eos>[multimodal]<unused42> 世界𓀀"
    found = await replica.stub.Tokenize(generation_pb2.TokenizeRequest(model=MODEL, text=source), timeout=10, metadata=signed())
    assert b"".join(token.token for token in found.tokens) == source.encode()
    ids = {token.token_id for token in found.tokens}
    assert not ids & {0, 1, 2, 3, 4, 5, 48, 105, 106}
    assert (found.tokens[0].start_byte, found.tokens[-1].end_byte) == (0, len(source.encode()))


async def test_labels(replica):
    texts = ["国足1比0战胜对手 晋级世界杯", "高考志愿填报指南"]
    asked = language_pb2.ClassifyTextRequest(
        model=MODEL, texts=texts, zero_shot=language_pb2.ZeroShotLabels(labels=["体育", "教育", "股票"])
    )
    result = (await encode(replica, classify=asked)).classify
    assert [one.labels[0].label for one in result.results] == ["体育", "教育"]
    assert all(sum(score.probability for score in one.labels) == pytest.approx(1, abs=1e-5) for one in result.results)
    feelings = language_pb2.ClassifyTextRequest(
        model=MODEL,
        texts=["The worst film I have ever seen.", "Great service and wonderful food!"],
        preset=language_pb2.LABEL_PRESET_SENTIMENT,
    )
    result = (await encode(replica, classify=feelings)).classify
    assert [one.labels[0].label for one in result.results] == ["negative", "positive"]


async def test_a_label_is_the_same_alone_and_in_a_batch(replica):
    labels = language_pb2.ZeroShotLabels(labels=["tech", "sport"])
    texts = ["A new phone", "The match ended late", "Nothing much"]
    batch = (await encode(replica, classify=language_pb2.ClassifyTextRequest(model=MODEL, texts=texts, zero_shot=labels))).classify
    alone = (await encode(replica, classify=language_pb2.ClassifyTextRequest(model=MODEL, texts=texts[:1], zero_shot=labels))).classify
    want, got = batch.results[0].labels, alone.results[0].labels
    assert [score.label for score in got] == [score.label for score in want]
    # bfloat16: shapes differ with the batch, and so does the order in which products are summed
    assert [score.probability for score in got] == pytest.approx([score.probability for score in want], abs=0.02)


async def test_vectors(replica):
    texts = ["The cat sat on the mat.", "A cat is sitting on a rug.", "Stock prices fell sharply."]
    vectors = [
        vector.values
        for vector in (await encode(replica, embed=embedding_pb2.EmbedTextsRequest(model=MODEL, texts=texts))).embed.embeddings
    ]
    assert all(len(vector) == 640 and math.hypot(*vector) == pytest.approx(1, abs=1e-3) for vector in vectors)
    near, far = (sum(a * b for a, b in zip(vectors[0], other, strict=True)) for other in vectors[1:])
    assert near > far


async def test_spans(replica):
    passage = language_pb2.Passage(id="report", text="— " + REPORT)
    for question, answer in (("When was the old bridge built?", "1932"), ("How much will the bridge cost?", "40 million euros")):
        asked = language_pb2.AnswerQuestionRequest(model=MODEL, question=question, passages=[passage])
        span = (await encode(replica, answer=asked)).answer.answers[0].span
        assert span.text == answer
        assert passage.text.encode()[span.start_byte : span.end_byte].decode() == answer


async def test_summary_between_its_lengths(replica):
    for least, most in ((1, 12), (30, 40)):
        asked = language_pb2.SummarizeTextRequest(model=MODEL, documents=[REPORT], min_length=least, max_length=most)
        events = await generate(replica, request(summarize=asked))
        assert least <= events[-1].completed.usage.output_tokens <= most
        assert said(events).strip()


async def test_translation(replica):
    asked = language_pb2.TranslateTextRequest(model=MODEL, texts=["Guten Morgen.\nWo ist der Bahnhof?", "Danke"], target_language="en")
    config = config_pb2.GenerationConfig(**stopping(max_output_tokens=32))
    events = await generate(replica, request(translate=asked, config=config))
    assert said(events, 0).count("\n") == 1
    assert "station" in said(events, 0)
    assert {end.index: end.source_language for end in finished(events)}[0] == "de"
