"""EngineService.Attribute, over a real server and a scripted engine."""

import asyncio
import math
import uuid

import grpc
import pytest

from argosy.v1 import content_pb2, explanation_pb2, language_pb2, usage_pb2
from argosy_internal.engine.v1 import engine_pb2
from services.inference.attributions import by_unit
from services.inference.engine.calls import Prefetch, Weigh, WorkClass
from tests.fakes.host import IDLE, FakeHost, hello
from tests.inference.replicas import TOKENIZER, client, ids, reason, signed, trailers

MODEL = "models/tiny"
LABELS = ["tech", "sport", "world"]
WORD = explanation_pb2.ATTRIBUTION_UNIT_WORD
GRADIENT = explanation_pb2.ATTRIBUTION_METHOD_GRADIENT_X_INPUT
DIGEST = "cd" * 32


def request(**fields):
    return engine_pb2.AttributeRequest(
        generation_id=str(uuid.uuid4()),
        request_id=str(uuid.uuid4()),
        model=content_pb2.ServedModel(version=MODEL),
        explain=explanation_pb2.ExplainRequest(model=MODEL, **fields),
    )


def label_of(text, label=None, labels=LABELS, **fields):
    source = language_pb2.ZeroShotLabels(labels=labels)
    return request(classify=explanation_pb2.ClassifyTarget(text=text, zero_shot=source, label=label), **fields)


def continuation_of(prompt, continuation, **fields):
    return request(generation=explanation_pb2.GenerationTarget(prompt=prompt, continuation=continuation), **fields)


async def explained(replica, message, within_s=10):
    return await replica.stub.Attribute(message, timeout=within_s, metadata=signed())


async def refused(replica, message, within_s=10):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await explained(replica, message, within_s)
    return caught.value


def moved_by(words):
    """The last token of each label grows likelier by a word's worth where the word is in the prompt: {word: {label: nats}}."""

    def scores(prefix, token):
        prompt = TOKENIZER.decode(prefix)
        said = [labels for word, labels in words.items() if word in prompt]
        return -6.0 + sum(worth for labels in said for label, worth in labels.items() if token == ids(" " + label)[-1])

    return scores


GOAL = moved_by({"goal": {"sport": 3.0}, "late": {"sport": 1.0}, "chip": {"sport": -2.0}})


async def test_weights_of_a_label_are_what_each_word_adds():
    host = FakeHost(scores=GOAL)
    async with client(host) as replica:
        reply = await explained(replica, label_of("a late goal, no chip", "sport"))
    weights = {one.span.text: one.weight for one in reply.attributions}
    assert list(weights) == ["a ", "late ", "goal, ", "no ", "chip"]

    def chance(nats):
        contrast = nats / len(ids(" sport"))  # a label's score is the mean over its tokens
        return contrast - math.log(math.exp(contrast) + 2)

    assert reply.target_score == pytest.approx(chance(2.0), abs=1e-5)
    assert reply.baseline_score == pytest.approx(chance(0.0), abs=1e-5)
    assert weights["goal, "] == pytest.approx(chance(2.0) - chance(-1.0), abs=1e-5)
    assert weights["chip"] == pytest.approx(chance(2.0) - chance(4.0), abs=1e-5)
    assert weights["a "] == pytest.approx(0, abs=1e-5)
    assert 0.3 < reply.faithfulness <= 1
    assert reply.model.base_digest == host.hello.digest
    assert {call.work_class for call in host.calls} == {WorkClass.EXPLAIN}


async def test_the_score_is_the_logarithm_of_what_classify_answers():
    async with client(FakeHost()) as replica:
        asked = language_pb2.ClassifyTextRequest(
            model=MODEL, texts=["the tech world"], zero_shot=language_pb2.ZeroShotLabels(labels=LABELS)
        )
        best = (await replica.encode(classify=asked)).classify.results[0].labels[0]
        reply = await explained(replica, label_of("the tech world"))  # unset: the likeliest
        named = await explained(replica, label_of("the tech world", best.label))
    assert math.exp(reply.target_score) == pytest.approx(best.probability, rel=1e-5)
    assert list(reply.attributions) == list(named.attributions)


async def test_weights_of_a_continuation_are_nats_of_all_its_tokens():
    host = FakeHost(scores=moved_by({"hello": {"world": 2.0}}))
    async with client(host) as replica:
        reply = await explained(replica, continuation_of("say hello now", " world world"))
    assert [one.span.text for one in reply.attributions] == ["say ", "hello ", "now"]
    said = -6.0 * len(ids(" world world"))
    assert reply.target_score == pytest.approx(said + 2 * 2.0)
    assert [one.weight for one in reply.attributions] == pytest.approx([0, 2 * 2.0, 0], abs=1e-4)
    assert reply.baseline_score == pytest.approx(said)


async def test_spans_cover_text():
    text = "世界 a é, hello!\n no é"
    async with client() as replica:
        for unit in (0, WORD, explanation_pb2.ATTRIBUTION_UNIT_TOKEN, explanation_pb2.ATTRIBUTION_UNIT_SENTENCE):
            for message in (label_of(text, unit=unit), continuation_of(text, " yes", unit=unit)):
                reply = await explained(replica, message)
                spans = [one.span for one in reply.attributions]
                assert "".join(span.text for span in spans) == text
                assert [span.start_byte for span in spans] == [0, *(span.end_byte for span in spans[:-1])]
                assert spans[-1].end_byte == len(text.encode())
                assert all(text.encode()[span.start_byte : span.end_byte].decode() == span.text for span in spans)


async def test_a_dialogue_is_explained_turn_by_turn():
    turns = [("say hello", content_pb2.ROLE_USER), ("no", content_pb2.ROLE_ASSISTANT), ("the world", content_pb2.ROLE_USER)]
    messages = [content_pb2.ChatMessage(role=role, parts=[content_pb2.ContentPart(text=text)]) for text, role in turns]
    target = explanation_pb2.GenerationTarget(chat=content_pb2.ChatPrompt(messages=messages), continuation=" yes")
    async with client(FakeHost(scores=moved_by({"hello": {"yes": 1.0}}))) as replica:
        reply = await explained(replica, request(generation=target))
    assert [(one.span.source_id, one.span.text) for one in reply.attributions] == [
        ("0", "say "), ("0", "hello"), ("1", "no"), ("2", "the "), ("2", "world"),
    ]  # fmt: skip
    assert [one.span.start_byte for one in reply.attributions] == [0, 4, 0, 0, 4]
    assert max(reply.attributions, key=lambda one: one.weight).span.text == "hello"


async def test_I4_passes_are_those_that_ran():
    host = FakeHost()
    async with client(host) as replica:
        first = await explained(replica, label_of("the tech world yes no hello", "tech"))
        scored = len(host.calls)
        again = await explained(replica, label_of("the tech world yes no hello", "tech"))
    assert first.usage.passes == scored
    assert again.usage.passes == len(host.calls) - scored == first.usage.passes - 16  # the labels' own bias is remembered
    assert 6 + 2 < again.usage.passes <= 6 + 2 + 6  # each word, the whole, nothing, and the deletion test
    read = [len(call.prefix) + sum(map(len, call.continuations)) for call in host.calls[scored:]]
    assert again.usage.input_tokens == sum(read)
    assert again.usage.output_tokens == 0


async def test_one_unit_is_left_out_once():
    host = FakeHost()
    async with client(host) as replica:
        reply = await explained(replica, continuation_of("hello", " yes"))
    assert reply.usage.passes == len(host.calls) == 2
    assert not reply.HasField("faithfulness")
    assert reply.attributions[0].weight == pytest.approx(reply.target_score - reply.baseline_score)


async def test_more_units_than_may_be_are_refused_with_both_numbers():
    host = FakeHost(hello=hello(context=8_192))
    async with client(host) as replica:
        error = await refused(replica, continuation_of("a " * 513, " yes"))
        assert reason(error) == ("FIELD_OUT_OF_RANGE", {"field": "generation.prompt", "asked": "513", "limit": "512", "unit": "units"})
        assert not host.calls


async def test_more_units_than_the_deadline_has_time_for_are_refused_before_any_pass():
    slow = FakeHost(hello=hello(context=4_096))
    async with client(slow) as replica:
        slow.set_load(IDLE.__class__(**{**_fields(IDLE), "prefill_tokens_per_s": 100.0}))
        name, metadata = reason(await refused(replica, label_of("hello " * 200), within_s=5))
    assert (name, metadata["field"], metadata["asked"]) == ("FIELD_OUT_OF_RANGE", "classify.text", "200")
    assert 0 <= int(metadata["limit"]) < 200
    assert not slow.calls


@pytest.mark.parametrize(
    ("message", "expected", "field"),
    [
        (label_of("a", "nobody"), "FIELD_INVALID", "classify.label"),
        (continuation_of("hello " * 1_100, " yes"), "PROMPT_TOO_LONG", "generation.prompt"),
        (label_of("hello " * 400, method=GRADIENT), "PROMPT_TOO_LONG", "classify.text"),
        (continuation_of("a " * 513, " yes", method=GRADIENT), "FIELD_OUT_OF_RANGE", "generation.prompt"),
        (request(classify=explanation_pb2.ClassifyTarget(text="a")), "MODEL_CAPABILITY", "classify.label_source"),
    ],
)
async def test_what_cannot_be_explained_is_refused(message, expected, field):
    async with client(FakeHost(hello=hello(context=2_048))) as replica:
        name, metadata = reason(await refused(replica, message))
    assert (name, metadata["field"]) == (expected, field)


async def test_A5_abort_ends_the_passes_and_tells_what_they_cost():
    host = FakeHost()
    async with client(host) as replica:
        message = label_of("hello " * 60)
        running = asyncio.ensure_future(explained(replica, message))
        await host.until(lambda host: host.totals["done"] >= 20)
        await replica.stub.Abort(engine_pb2.AbortRequest(generation_ids=[message.generation_id]), timeout=5, metadata=signed())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await running
        spent = usage_pb2.Usage.FromString(trailers(caught.value)["argosy-usage-bin"])
        assert 20 <= spent.passes < 60 + 16
        await host.until(lambda host: not host.running)
        assert len(host.calls) < 60 + 16


async def test_A5_a_caller_who_leaves_ends_the_passes():
    host = FakeHost()
    async with client(host) as replica:
        call = replica.stub.Attribute(label_of("hello " * 60), timeout=10, metadata=signed())
        await host.until(lambda host: host.totals["done"] >= 20)
        call.cancel()
        await host.until(lambda host: not host.running)
        assert len(host.calls) < 60 + 16


async def test_F4_engine_lost_while_explaining():
    host = FakeHost()
    async with client(host) as replica:
        host.lose()
        assert reason(await refused(replica, label_of("a")))[0] == "NOT_STARTED"


# --- gradient × input ----------------------------------------------------------------------------------------------------------------


async def test_gradient_weighs_each_token_once_and_units_are_their_sums():
    """The fake's token is worth its id."""
    text = "the world, hello é"
    host = FakeHost()
    async with client(host) as replica:
        for message in (label_of(text, "sport", method=GRADIENT), continuation_of(text, " yes no", method=GRADIENT)):
            occluded = type(message)()
            occluded.CopyFrom(message)
            occluded.explain.method = 0
            occluded.generation_id = str(uuid.uuid4())
            reply, other = await explained(replica, message), await explained(replica, occluded)
            assert [one.span for one in reply.attributions] == [one.span for one in other.attributions]
            assert reply.target_score == pytest.approx(other.target_score, abs=1e-5)
            assert reply.baseline_score == pytest.approx(other.baseline_score, abs=1e-5)
            assert not reply.HasField("faithfulness"), "the cheap mode is not tested"
            assert [one.weight for one in reply.attributions] == pytest.approx(worth(host, text, reply.attributions))


def worth(host, text, found):
    """Sums of the ids in the prompt that was weighed, each unit's that it touches."""
    (prefix,) = [call.prefix for call in host.calls if isinstance(call, Weigh)][-1:]
    said, spans = b"", []
    for token in prefix:
        spans.append((len(said), len(said) + len(TOKENIZER.text_bytes(token))))
        said += TOKENIZER.text_bytes(token)
    at = said.index(text.strip().encode()) - len(text) + len(text.lstrip())
    return by_unit(spans, list(map(float, prefix)), [(at + one.span.start_byte, at + one.span.end_byte) for one in found])


async def test_gradient_takes_three_passes():
    host = FakeHost()
    async with client(host) as replica:
        reply = await explained(replica, continuation_of("the world " * 20, " yes", method=GRADIENT))
    assert reply.usage.passes == 3  # forward, backward, and forward over nothing
    assert len(host.calls) == 2


async def test_gradient_of_a_dialogue_finds_every_turn():
    turns = [(" say hello", content_pb2.ROLE_USER), ("no", content_pb2.ROLE_ASSISTANT), ("the world", content_pb2.ROLE_USER)]
    messages = [content_pb2.ChatMessage(role=role, parts=[content_pb2.ContentPart(text=text)]) for text, role in turns]
    target = explanation_pb2.GenerationTarget(chat=content_pb2.ChatPrompt(messages=messages), continuation=" yes")
    host = FakeHost()
    async with client(host) as replica:
        reply = await explained(replica, request(generation=target, method=GRADIENT))
    assert [(one.span.source_id, one.span.text) for one in reply.attributions] == [
        ("0", " say "), ("0", "hello"), ("1", "no"), ("2", "the "), ("2", "world"),
    ]  # fmt: skip
    by_turn = [[one for one in reply.attributions if one.span.source_id == str(turn)] for turn in range(3)]
    expected = [worth(host, text, found) for (text, _), found in zip(turns, by_turn, strict=True)]
    assert [one.weight for one in reply.attributions] == pytest.approx([weight for turn in expected for weight in turn])


async def test_an_engine_without_gradients_says_so():
    async with client(FakeHost(gradients=False)) as replica:
        name, metadata = reason(await refused(replica, label_of("a", method=GRADIENT)))
    assert (name, metadata["capability"]) == ("MODEL_CAPABILITY", "gradient_x_input")


# --- a model's own labels ------------------------------------------------------------------------------------------------------------


def own(text, method=0, label=None):
    message = request(classify=explanation_pb2.ClassifyTarget(text=text, label=label), method=method)
    message.model.CopyFrom(content_pb2.ServedModel(version="projects/acme/models/tuned/versions/v1", adapter_digest=DIGEST))
    return message


def tuned_host(**fields):
    host = FakeHost(hello=hello(adapter_slots=4))
    host.tuned("p-1", DIGEST, **({"labels": ("x", "y", "z"), "temperature": 2.0, "max_tokens": 64} | fields))
    return host


@pytest.mark.parametrize("method", [0, GRADIENT], ids=["occlusion", "gradient"])
async def test_a_tuned_label_is_explained_by_its_calibrated_probability(method):
    host = tuned_host()
    async with client(host) as replica:
        asked = language_pb2.ClassifyTextRequest(model=MODEL, texts=["the tech world"])
        encoding = engine_pb2.EncodeRequest(
            generation_id=str(uuid.uuid4()), request_id=str(uuid.uuid4()), model=own("a").model, classify=asked
        )
        labels = (await replica.stub.Encode(encoding, timeout=10, metadata=signed())).classify.results[0].labels
        reply = await explained(replica, own("the tech world", method))
        named = await explained(replica, own("the tech world", method, label=labels[2].label))
    assert math.exp(reply.target_score) == pytest.approx(labels[0].probability, rel=1e-5)
    assert math.exp(named.target_score) == pytest.approx(labels[2].probability, rel=1e-5)
    assert [one.span.text for one in reply.attributions] == ["the ", "tech ", "world"]
    assert reply.model.adapter_digest == DIGEST
    assert {call.adapter for call in host.calls if not isinstance(call, Prefetch)} == {DIGEST}
    if not method:
        assert reply.usage.passes == 1 + 3 + 1 + len([2]) * 3  # whole, each word, nothing, and one point of each deletion curve


async def test_passes_over_windows_are_each_counted():
    async with client(tuned_host(max_tokens=3)) as replica:
        reply = await explained(replica, own("the world hello yes no tech", label="x"))
    assert reply.usage.passes > 6 + 2 + 6


async def test_A10_a_foreign_adapter_is_not_found():
    host = tuned_host()
    host.adapters = {("p-2", DIGEST): host.adapters.pop(("p-1", DIGEST))}
    async with client(host) as replica:
        for method in (0, GRADIENT):
            assert reason(await refused(replica, own("a", method)))[0] == "RESOURCE_NOT_FOUND"


def _fields(load):
    return {name: getattr(load, name) for name in load.__struct_fields__}
