"""EngineService.Encode and the typed tasks, over a real server and a scripted engine."""

import asyncio
import math

import grpc
import pytest

from argosy.v1 import config_pb2, embedding_pb2, language_pb2
from services.inference.engine.calls import Embed, FinishReason, Generate, Score
from tests.fakes.host import FakeHost, hello
from tests.inference.replicas import TOKENIZER, Reason, client, finished, ids, reason, request, said, stopping

MODEL = "models/tiny"
LABELS = ["tech", "sport", "world"]


async def refused(call):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return reason(caught.value)


def prefers(word, where):
    """Scores under which `word` is likely after a prompt that holds `where`, and every other token is equally unlikely."""
    wanted = set(ids(word, " " + word))

    def scores(prefix, token):
        return -0.5 if where in TOKENIZER.decode(prefix) and token in wanted else -4.0

    return scores


def zero_shot(texts, labels=LABELS, **fields):
    return language_pb2.ClassifyTextRequest(model=MODEL, texts=texts, zero_shot=language_pb2.ZeroShotLabels(labels=labels), **fields)


# --- labels -------------------------------------------------------------------------------------------------------------------------


async def test_classify_gives_probabilities_best_first():
    host = FakeHost(scores=prefers("sport", "goal"))
    async with client(host) as replica:
        response = (await replica.encode(classify=zero_shot(["a goal", "nothing"]))).classify
    first, second = response.results
    assert first.labels[0].label == "sport"
    assert sum(score.probability for score in first.labels) == pytest.approx(1)
    assert [score.probability for score in second.labels] == pytest.approx([1 / 3] * 3)
    assert (first.windows, response.calibration) == (1, language_pb2.CALIBRATION_NONE)
    assert response.model.base_digest == host.hello.digest
    scored = [call for call in host.calls if isinstance(call, Score)]
    assert response.usage.input_tokens == sum(len(call.prefix) + sum(map(len, call.continuations)) for call in scored)
    assert response.usage.HasField("cached_input_tokens")


async def test_classify_removes_the_prompts_own_bias():
    """A label that is likely whatever the text says gains nothing from it."""
    tech = set(ids("tech", " tech"))
    async with client(FakeHost(scores=lambda prefix, token: -0.1 if token in tech else -5.0)) as replica:
        response = (await replica.encode(classify=zero_shot(["hello"]))).classify
    assert [score.probability for score in response.results[0].labels] == pytest.approx([1 / 3] * 3)


async def test_classify_bias_is_found_once_a_project():
    host = FakeHost()
    async with client(host) as replica:
        await replica.encode(classify=zero_shot(["hello"]))
        first = len(host.calls)
        again = (await replica.encode(classify=zero_shot(["hello"]))).classify
    assert len(host.calls) == first + 1
    assert again.usage.input_tokens > 0


async def test_classify_multi_label_judges_each_alone():
    async with client(FakeHost(scores=prefers("tech", "chip"))) as replica:
        response = (await replica.encode(classify=zero_shot(["chip"], multi_label=True, top_k=2))).classify
    (result,) = response.results
    assert len(result.labels) == 2
    assert result.labels[0].label == "tech"
    assert result.labels[0].probability > 0.9
    assert sum(score.probability for score in result.labels) > 1


async def test_classify_sentiment_preset():
    async with client(FakeHost(scores=prefers("negative", "bad"))) as replica:
        asked = language_pb2.ClassifyTextRequest(model=MODEL, texts=["bad"], preset=language_pb2.LABEL_PRESET_SENTIMENT)
        response = (await replica.encode(classify=asked)).classify
    assert {score.label for score in response.results[0].labels} == {"positive", "neutral", "negative"}
    assert response.results[0].labels[0].label == "negative"


async def test_classify_reads_long_texts_in_windows():
    host = FakeHost(hello=hello(context=128))
    async with client(host) as replica:
        response = (await replica.encode(classify=zero_shot(["ab " * 200]))).classify
    assert response.results[0].windows > 1
    read = [TOKENIZER.decode(call.prefix) for call in host.calls if isinstance(call, Score)]
    assert sum(prompt.count("ab") for prompt in read) >= 200  # nothing was cut
    assert all(len(call.prefix) + max(map(len, call.continuations)) <= 128 for call in host.calls)


async def test_classify_without_labels_needs_a_tuned_model():
    async with client() as replica:
        name, _ = await refused(replica.encode(classify=language_pb2.ClassifyTextRequest(model=MODEL, texts=["a"])))
    assert name == "MODEL_CAPABILITY"


# --- vectors ------------------------------------------------------------------------------------------------------------------------


async def test_embed_is_normalised_and_in_order():
    host = FakeHost()
    async with client(host) as replica:
        texts = [f"text {number}" for number in range(40)]
        whole = (await replica.encode(embed=embedding_pb2.EmbedTextsRequest(model=MODEL, texts=texts))).embed
        raw = (await replica.encode(embed=embedding_pb2.EmbedTextsRequest(model=MODEL, texts=texts[:1], normalize=False))).embed
    assert len(whole.embeddings) == 40
    assert all(math.hypot(*vector.values) == pytest.approx(1, abs=1e-5) for vector in whole.embeddings)
    length = math.hypot(*raw.embeddings[0].values)
    assert list(whole.embeddings[0].values) == pytest.approx([value / length for value in raw.embeddings[0].values], abs=1e-5)
    assert len([call for call in host.calls if isinstance(call, Embed)]) == 3  # two batches, and the one text
    assert whole.usage.input_tokens == sum(len(ids) for call in host.calls[:2] for ids in call.inputs)


async def test_embed_weighs_windows_by_their_tokens():
    host = FakeHost(hello=hello(context=64))
    async with client(host) as replica:
        asked = embedding_pb2.EmbedTextsRequest(model=MODEL, texts=["ab" * 60], normalize=False)
        response = (await replica.encode(embed=asked)).embed
    windows = [ids for call in host.calls for ids in call.inputs]
    assert len(windows) == 2
    expected = [
        sum(len(ids) * value for ids, value in zip(windows, column, strict=True))
        for column in zip(*map(host._vector, windows), strict=True)
    ]
    total = sum(map(len, windows))
    assert list(response.embeddings[0].values) == pytest.approx([value / total for value in expected], abs=1e-5)


@pytest.mark.parametrize(("dimensions", "expected"), [(4, "MODEL_CAPABILITY"), (9, "FIELD_OUT_OF_RANGE"), (8, None)])
async def test_embed_dimensions_are_never_bent(dimensions, expected):
    async with client() as replica:
        call = replica.encode(embed=embedding_pb2.EmbedTextsRequest(model=MODEL, texts=["a"], dimensions=dimensions))
        if expected is None:
            assert len((await call).embed.embeddings[0].values) == dimensions
        else:
            assert (await refused(call))[0] == expected


# --- spans --------------------------------------------------------------------------------------------------------------------------


def question(*passages, **fields):
    found = [language_pb2.Passage(id=f"p{number}" if len(passages) > 1 else "", text=text) for number, text in enumerate(passages)]
    return language_pb2.AnswerQuestionRequest(model=MODEL, question="who", passages=found, **fields)


def span_scores(answer, none=-9.0):
    """Scores that follow `answer` from the prompt's end and then end; every other way is unlikely."""
    path = TOKENIZER.encode(" " + answer)
    nothing = TOKENIZER.encode(" none")
    ends = {*TOKENIZER.newline_ids, 2}

    def scores(prefix, token):
        prompt = TOKENIZER.decode(prefix)
        written = TOKENIZER.encode(prompt[prompt.rindex(":") + 1 :]) if ":" in prompt else []
        if written == path[: len(written)]:
            wanted = {path[len(written)]} if len(written) < len(path) else ends
            if token in wanted:
                return -0.01
        if written == nothing[: len(written)] and len(written) < len(nothing) and token == nothing[len(written)]:
            return none
        return -10.0

    return scores


@pytest.mark.parametrize("answer", ["new bridge", "世界", "yes"])
async def test_extracted_answers_are_real_spans(answer):
    passages = ["the old 世 one", "a new bridge, 世界 é yes"]
    async with client(FakeHost(scores=span_scores(answer))) as replica:
        response = (await replica.encode(answer=question(*passages, top_k=3))).answer
    best = response.answers[0]
    assert best.span.text == answer
    assert best.span.source_id == "p1"
    total = response.no_answer_probability + sum(one.probability for one in response.answers)
    assert 0 < total <= 1 + 1e-5
    for one in response.answers:
        passage = passages[int(one.span.source_id[1:])].encode()
        assert passage[one.span.start_byte : one.span.end_byte].decode() == one.span.text
    probabilities = [one.probability for one in response.answers]
    assert probabilities == sorted(probabilities, reverse=True)


async def test_no_answer_is_an_answer():
    async with client(FakeHost(scores=span_scores("nowhere", none=-0.01))) as replica:
        response = (await replica.encode(answer=question("the old one"))).answer
    assert not response.answers
    assert response.no_answer_probability > 0.5


async def test_answers_are_found_beyond_the_first_window():
    passage = "the old one. " * 60 + "it was yes."
    async with client(FakeHost(scores=span_scores("yes"), hello=hello(context=300))) as replica:
        response = (await replica.encode(answer=question(passage))).answer
    assert response.answers[0].span.text == "yes"
    assert passage.encode()[response.answers[0].span.start_byte :].startswith(b"yes")


async def test_F4_engine_lost_while_encoding():
    host = FakeHost()
    async with client(host) as replica:
        host.lose()
        assert (await refused(replica.encode(classify=zero_shot(["a"]))))[0] == "NOT_STARTED"


# --- tasks that write ---------------------------------------------------------------------------------------------------------------


def sentences(call, index):
    """The engine says one short line, then the model would go on."""
    return [*ids(" yes", "\n"), *ids(" tech") * 5]


def summary(documents, **fields):
    return request(summarize=language_pb2.SummarizeTextRequest(model=MODEL, documents=documents, **fields))


async def test_summary_keeps_between_its_lengths():
    async with client(FakeHost(says=lambda call, index: iter(lambda: ids("a")[0], None))) as replica:
        events = await replica.generate(summary(["the tech world"], min_length=3, max_length=5))
    assert said(events) == "aaaaa"
    assert finished(events)[0].reason == Reason.FINISH_REASON_LENGTH
    assert events[-1].completed.usage.output_tokens == 5
    async with client(FakeHost(says=ids("a", "\n", "b", "c", "\n", "d"))) as replica:
        events = await replica.generate(summary(["the tech world"], min_length=3, max_length=5))
    assert said(events) == "abc"  # the first line end came before the minimum
    assert finished(events)[0].reason == Reason.FINISH_REASON_STOP


async def test_summary_of_a_long_text_reads_all_of_it_in_windows():
    host = FakeHost(says=lambda call, index: ids(" yes", "\n"), hello=hello(context=1_024))
    async with client(host) as replica:
        events = await replica.generate(summary(["".join(f"word{number} " for number in range(400))], max_length=50))
    calls = [call for call in host.calls if isinstance(call, Generate)]
    prompts = [TOKENIZER.decode(call.prompt) for call in calls]
    assert len(calls) > 2
    assert all(any(f"word{number} " in prompt or f"word{number}\n" in prompt for prompt in prompts) for number in range(400))
    assert "yes\nyes" in prompts[-1]  # the last call merges what the others said
    assert said(events) == "yes"
    assert len(finished(events)) == 1
    usage = events[-1].completed.usage
    assert usage.input_tokens == sum(len(call.prompt) for call in calls)


@pytest.mark.parametrize(
    ("fields", "config", "field"),
    [
        ({"min_length": 9, "max_length": 8}, {}, "summarize.min_length"),
        ({"max_length": 600}, {}, "max_length"),
        ({}, stopping(max_output_tokens=5), "config.stopping.max_output_tokens"),
        ({}, {"sampling": config_pb2.Sampling(n=2)}, "config.sampling.n"),
    ],
)
async def test_summary_refuses_what_it_cannot_keep(fields, config, field):
    async with client() as replica:
        message = summary(["a"], **fields)
        message.config.CopyFrom(config_pb2.GenerationConfig(**config))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await replica.generate(message)
    assert reason(caught.value)[1]["field"] == field


def translation(texts, source="en", target="fr", **config):
    asked = language_pb2.TranslateTextRequest(model=MODEL, texts=texts, source_language=source, target_language=target)
    return request(translate=asked, config=config_pb2.GenerationConfig(**config))


async def test_translation_has_an_output_a_text():
    host = FakeHost(says=lambda call, index: [*ids(" x"), *ids("y" * TOKENIZER.decode(call.prompt).count("hello")), *ids("\n")])
    async with client(host) as replica:
        events = await replica.generate(translation([f"{'hello ' * number}" + "the" for number in range(1, 30)]))
    few_shot = TOKENIZER.decode(host.calls[0].prompt).count("hello") - 1
    for number in range(1, 30):
        assert said(events, number - 1) == "x" + "y" * (number + few_shot)
    assert sorted(end.index for end in finished(events)) == list(range(29))
    assert {end.source_language for end in finished(events)} == {"en"}
    assert events[-1].completed.usage.input_tokens == sum(len(call.prompt) for call in host.calls)
    assert events[-1].completed.effective_config.sampling.temperature == 0  # a task is greedy unless asked otherwise


async def test_translation_keeps_every_line():
    host = FakeHost(says=lambda call, index: ids(" x", "\n"))
    async with client(host) as replica:
        events = await replica.generate(translation(["hello\n\nthe world\n  yes"]))
    assert said(events) == "x\n\nx\n  x"
    assert len([call for call in host.calls if isinstance(call, Generate)]) == 3
    assert len(finished(events)) == 1


async def test_translation_length_is_of_the_whole_text():
    host = FakeHost(says=lambda call, index: [*ids("abc"), *ids("\n")])
    async with client(host) as replica:
        events = await replica.generate(translation(["hello\nthe\nyes"], **stopping(max_output_tokens=4)))
    assert said(events) == "abc\na"
    assert finished(events)[0].reason == Reason.FINISH_REASON_LENGTH


@pytest.mark.parametrize(
    ("source", "target", "field"), [("en", "xx", "target_language"), ("qq", "fr", "source_language"), ("en", "fr-XX", "target_language")]
)
async def test_translation_refuses_languages_it_cannot_name(source, target, field):
    async with client() as replica:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await replica.generate(translation(["hello"], source, target))
    assert reason(caught.value) == ("UNSUPPORTED_LANGUAGE", {"field": field})


@pytest.mark.parametrize(
    ("text", "tag"), [("世界你好", "zh"), ("привет, что это?", "ru"), ("this is the house", "en"), ("das ist nicht gut", "de")]
)
async def test_translation_detects_the_source(text, tag):
    async with client(FakeHost(says=ids(" x", "\n"))) as replica:
        events = await replica.generate(translation([text], source=""))
    assert finished(events)[0].source_language == tag


async def test_detecting_a_language_is_billed():
    host = FakeHost(says=ids(" x", "\n"))
    async with client(host) as replica:
        events = await replica.generate(translation(["xyzzy"], source=""))
    scored = [call for call in host.calls if isinstance(call, Score)]
    assert scored  # no script and no small word tells it
    read = sum(len(call.prefix) + sum(map(len, call.continuations)) for call in scored)
    written = [call for call in host.calls if isinstance(call, Generate)]
    assert events[-1].completed.usage.input_tokens == read + sum(len(call.prompt) for call in written)


async def test_translation_refuses_a_text_without_letters():
    async with client() as replica:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await replica.generate(translation(["123 ..."], source=""))
    assert reason(caught.value)[0] == "UNSUPPORTED_LANGUAGE"


async def test_written_answers_use_the_passages():
    host = FakeHost(says=ids(" yes", "\n", "no"))
    async with client(host) as replica:
        asked = language_pb2.AnswerQuestionRequest(
            model=MODEL, question="is it?", passages=[language_pb2.Passage(text="it is")], mode=language_pb2.ANSWER_MODE_GENERATIVE
        )
        events = await replica.generate(request(answer=asked))
    assert said(events) == "yes"
    assert finished(events)[0].reason == Reason.FINISH_REASON_STOP
    prompt = TOKENIZER.decode(host.calls[0].prompt)
    assert prompt.index("it is") < prompt.index("is it?")


async def test_one_failed_output_ends_the_batch():
    def script(call, index):
        return [FinishReason.ERROR] if "bad" in TOKENIZER.decode(call.prompt) else [*ids(" x"), asyncio.Event()]

    host = FakeHost(says=script)
    async with client(host) as replica:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await replica.generate(translation(["hello", "bad", "the"]))
        await host.until(lambda fake: not fake.running)
    assert reason(caught.value)[0] == "INTERNAL"


async def test_A19_control_tokens_in_tasks_stay_plain_text():
    host = FakeHost(says=ids(" x", "\n"))
    spelled = "<bos><turn> </turn>[image]"
    async with client(host) as replica:
        await replica.generate(translation([spelled + "hello"]))
        await replica.generate(summary([spelled]))
        await replica.encode(classify=zero_shot([spelled], labels=["<eos>", "tech"]))
        await replica.encode(answer=question(spelled))
        await replica.encode(embed=embedding_pb2.EmbedTextsRequest(model=MODEL, texts=[spelled]))
    control = set(TOKENIZER.control.values())
    for call in host.calls:
        inputs = {"Generate": lambda c: [c.prompt], "Score": lambda c: [c.prefix], "Embed": lambda c: c.inputs}[type(call).__name__](call)
        for prompt in inputs:
            assert not set(prompt[1:]) & control
        if isinstance(call, Score):
            assert not {token for continuation in call.continuations for token in continuation} & control
