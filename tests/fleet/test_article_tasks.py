"""Every task of the article, on the weights that everybody gets. The model is small, so what is asserted is the structure, not the wit."""

import math

import pytest

import argosy
from argosy.errors import FailedPrecondition
from argosy.v1 import stream_pb2
from tests.fleet.running import Fleet, Tenant

pytestmark = pytest.mark.timeout(300)  # the first start of all converts the weights
CATEGORIES = ["科技", "政治", "体育", "财经", "娱乐"]
GREEDY = argosy.config(temperature=0, max_output_tokens=24)
PASSAGE = "The Eiffel Tower was completed in 1889 and is 330 metres tall. It stands in Paris."
REPORT = (
    "The city council voted on Tuesday to build a new bridge over the river. The bridge will cost 40 million euros and take three years "
    "to build. Residents have complained for years about traffic jams on the old bridge, which was built in 1932."
)


@pytest.fixture
def tenant(real: Fleet) -> Tenant:
    return real.tenant()


def _is_distribution(labels, expected: list[str]) -> None:
    assert {score.label for score in labels} == set(expected)
    chances = [score.probability for score in labels]
    assert chances == sorted(chances, reverse=True)
    assert math.isclose(sum(chances), 1, abs_tol=1e-5) and all(0 <= chance <= 1 for chance in chances)


async def test_a_story_is_continued(tenant: Tenant) -> None:
    async with tenant.client() as client:
        config = argosy.config(temperature=0.8, seed=7, max_output_tokens=24)
        async with client.stream_generate("Once upon a time, in a harbour town,", config=config) as stream:
            streamed = "".join([piece async for piece in stream])
        whole = await client.generate("Once upon a time, in a harbour town,", config=config)
    assert streamed == whole.outputs[0].text != ""
    assert whole.completed.effective_config.sampling.seed == 7


async def test_a_chat_of_two_turns(tenant: Tenant) -> None:
    async with tenant.client() as client:
        first = await client.chat("What is the capital of France?", config=GREEDY)
        answered = first.outputs[0].text or "Paris."
        turns = [("user", "What is the capital of France?"), ("assistant", answered), ("user", "And of Italy?")]
        second = await client.chat(turns, config=GREEDY)
    assert first.outputs[0].finished.reason in (stream_pb2.FINISH_REASON_STOP, stream_pb2.FINISH_REASON_LENGTH)
    assert second.started.prompt_tokens > first.started.prompt_tokens


async def test_headlines_into_categories(tenant: Tenant) -> None:
    async with tenant.client() as client:
        reply = await client.classify(["苹果公司发布新一代手机芯片", "国家队夺得世界杯冠军"], CATEGORIES)
        several = await client.classify("The striker bought a company.", ["sports", "business"], multi_label=True)
        best = await client.classify("苹果公司发布新一代手机芯片", CATEGORIES, top_k=2)
    assert len(reply.results) == 2
    for result in reply.results:
        _is_distribution(result.labels, CATEGORIES)
    assert {score.label for score in several.results[0].labels} == {"sports", "business"}
    assert all(0 < score.probability < 1 for score in several.results[0].labels)
    assert [score.label for score in best.results[0].labels] == [score.label for score in reply.results[0].labels[:2]]


async def test_a_reviews_sentiment(tenant: Tenant) -> None:
    async with tenant.client() as client:
        reply = await client.sentiment(["An excellent film, I loved every minute.", "Broken on arrival, and nobody answers."])
    for result in reply.results:
        _is_distribution(result.labels, ["positive", "neutral", "negative"])


async def test_a_summary_keeps_its_bounds(tenant: Tenant) -> None:
    async with tenant.client() as client:
        result = await client.summarize(REPORT, min_length=12, max_length=30, config=argosy.config(temperature=0))
        async with client.stream_summarize(REPORT, min_length=12, max_length=30, config=argosy.config(temperature=0)) as stream:
            streamed = "".join([piece async for piece in stream])
        counted = await client.tokenize(result.outputs[0].text)
    assert 12 <= result.completed.usage.output_tokens <= 31  # an end token is counted, too
    assert len(counted.tokens) <= 31
    assert streamed == result.outputs[0].text


async def test_sentences_into_french(tenant: Tenant) -> None:
    async with tenant.client() as client:
        result = await client.translate(["Good morning.", "The ship is here."], "fr", source_language="en", config=GREEDY)
    assert [output.finished.index for output in result.outputs] == [0, 1]
    assert all(output.text.strip() for output in result.outputs)


async def test_a_question_is_answered_by_a_span(tenant: Tenant) -> None:
    async with tenant.client() as client:
        reply = await client.answer("When was the Eiffel Tower completed?", {"tower": PASSAGE}, top_k=3)
        written = await client.answer("When was it completed?", {"tower": PASSAGE}, generative=True, config=GREEDY)
    assert reply.answers and 0 <= reply.no_answer_probability <= 1
    for answer in reply.answers:
        assert answer.span.source_id == "tower"
        assert PASSAGE.encode()[answer.span.start_byte : answer.span.end_byte].decode() == answer.span.text != ""
    total = sum(answer.probability for answer in reply.answers) + reply.no_answer_probability
    assert 0 < total <= 1 + 1e-5
    assert written.usage.output_tokens > 0


async def test_sentences_as_vectors(tenant: Tenant) -> None:
    texts = ["A cat sleeps on the sofa.", "A kitten naps on the couch.", "Interest rates rose again."]
    async with tenant.client() as client:
        reply = await client.embed(texts)
        with pytest.raises(FailedPrecondition) as refused:  # its vectors are not made to be cut
            await client.embed(texts, dimensions=64)
    cat, kitten, rates = (list(each.values) for each in reply.embeddings)
    for vector in (cat, kitten, rates):
        assert math.isclose(sum(x * x for x in vector), 1, abs_tol=1e-4)
    assert (refused.value.reason, refused.value.field) == ("MODEL_CAPABILITY", "dimensions")
    assert _cosine(cat, kitten) > _cosine(cat, rates)


def _cosine(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))
