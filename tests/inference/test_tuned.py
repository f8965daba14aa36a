"""Adapters at a replica's door: whose they are, what their heads say, and what is refused."""

import math
import struct
import uuid

import grpc
import msgspec
import pytest
from google.protobuf.json_format import MessageToDict

from argosy.v1 import content_pb2, embedding_pb2, language_pb2, model_pb2
from argosy_internal.engine.v1 import engine_pb2
from services.chassis.identity import Caller
from services.inference.engine.calls import Embed, Generate, Label, Prefetch, Score
from tests.fakes.host import IDLE, FakeHost, hello, likely
from tests.inference.replicas import CALLER, TOKENIZER, client, ids, reason, signed, trailers

DIGEST = "d1" * 32
OTHER = "d2" * 32
STRANGER = Caller(
    project_uid="p-2", project="evil", key_id="k-2", scopes=frozenset({"generate"}), request_id=str(uuid.uuid4()), kv_scope="cd" * 16
)
LABELS = ("good", "bad", "fair")


def model(digest=DIGEST):
    return content_pb2.ServedModel(version="projects/acme/models/tuned/versions/v1", adapter_digest=digest)


def tuned_host(**fields):
    host = FakeHost(says=ids("yes"))
    host.tuned("p-1", DIGEST, **({"labels": LABELS, "temperature": 2.0, "max_tokens": 6, "rank": 4, "memory_bytes": 64} | fields))
    return host


async def encode(replica, digest=DIGEST, caller=CALLER, **task):
    message = engine_pb2.EncodeRequest(generation_id=str(uuid.uuid4()), request_id=str(uuid.uuid4()), model=model(digest), **task)
    return await replica.stub.Encode(message, timeout=10, metadata=signed(caller))


def classify(*texts, **fields):
    return language_pb2.ClassifyTextRequest(model="projects/acme/models/tuned", texts=texts, **fields)


async def generate(replica, digest=DIGEST, caller=CALLER):
    message = engine_pb2.GenerateRequest(generation_id=str(uuid.uuid4()), request_id=str(uuid.uuid4()), model=model(digest), text="so")
    return [event async for event in replica.stub.Generate(message, timeout=10, metadata=signed(caller))]


async def refused(call):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def test_a_tuned_head_labels_texts_by_its_calibrated_softmax_over_windows():
    host = tuned_host()
    async with client(host) as replica:
        text = "abcdefgh"
        response = (await encode(replica, classify=classify(text, "x"))).classify
    prefix, encoded = tuple(TOKENIZER.prefix), TOKENIZER.encode(text)
    size = 6 - len(prefix)
    windows = [(*prefix, *encoded[at : at + size]) for at in range(0, len(encoded), size)]
    assert len(windows) > 1

    def chances(window):
        weights = [math.exp(struct.unpack("<f", struct.pack("<f", likely(window, place)))[0] / 2.0) for place in range(3)]
        return [weight / sum(weights) for weight in weights]

    wanted = {label: sum(column) / len(windows) for label, column in zip(LABELS, zip(*map(chances, windows), strict=True), strict=True)}
    long, short = response.results
    assert {one.label: one.probability for one in long.labels} == pytest.approx(wanted, rel=1e-5)
    assert [one.probability for one in long.labels] == sorted((one.probability for one in long.labels), reverse=True)
    assert (long.windows, short.windows) == (len(windows), 1)
    assert response.calibration == language_pb2.CALIBRATION_TEMPERATURE
    assert response.model.adapter_digest == DIGEST
    assert response.usage.input_tokens == sum(map(len, windows)) + len(prefix) + 1
    labelled = [call for call in host.calls if isinstance(call, Label)]
    assert {(call.adapter, call.owner, call.tenant) for call in labelled} == {(DIGEST, "p-1", "p-1")}


async def test_top_k_bounds_the_labels_and_may_not_exceed_them():
    async with client(tuned_host()) as replica:
        response = (await encode(replica, classify=classify("x", top_k=1))).classify
        assert [len(result.labels) for result in response.results] == [1]
        error = await refused(encode(replica, classify=classify("x", top_k=4)))
    assert reason(error) == ("FIELD_OUT_OF_RANGE", {"field": "top_k", "asked": "4", "limit": "3", "unit": "labels"})


@pytest.mark.parametrize(
    ("asked", "fields", "metadata"),
    [
        (classify("x", multi_label=True), {}, {"field": "multi_label", "capability": "classify_multi_label"}),
        (classify("x"), {"labels": ()}, {"field": "label_source", "capability": "classify_tuned"}),
    ],
)
async def test_what_a_head_cannot_say_is_a_missing_capability(asked, fields, metadata):
    async with client(tuned_host(**fields)) as replica:
        error = await refused(encode(replica, classify=asked))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert reason(error) == ("MODEL_CAPABILITY", metadata)


async def test_every_task_runs_with_the_callers_adapter():
    host = tuned_host()
    async with client(host) as replica:
        await generate(replica)
        zero_shot = language_pb2.ZeroShotLabels(labels=["a", "b"])
        response = (await encode(replica, classify=classify("x", zero_shot=zero_shot))).classify
        assert response.calibration == language_pb2.CALIBRATION_NONE
        await encode(replica, embed=embedding_pb2.EmbedTextsRequest(model="models/m", texts=["x"]))
    assert {type(call) for call in host.calls} == {Prefetch, Generate, Score, Embed}
    assert {(call.adapter, call.owner) for call in host.calls if not isinstance(call, Prefetch)} == {(DIGEST, "p-1")}
    assert sum(isinstance(call, Prefetch) for call in host.calls) == 1  # asked once, then known


async def test_A10_anothers_adapter_and_an_unknown_one_are_refused_alike():
    async with client(tuned_host()) as replica:
        for method in (generate, lambda *args: encode(*args, classify=classify("x"))):
            foreign = await refused(method(replica, DIGEST, STRANGER))
            unknown = await refused(method(replica, OTHER, STRANGER))
            assert foreign.code() is grpc.StatusCode.NOT_FOUND
            assert (foreign.details(), trailers(foreign)) == (unknown.details(), trailers(unknown))
            assert reason(foreign) == ("RESOURCE_NOT_FOUND", {"field": "model"})
        stub, metadata = replica.stub, signed(STRANGER)
        asked = [engine_pb2.PrefetchAdapterRequest(adapter_digest=digest) for digest in (DIGEST, OTHER)]
        foreign, unknown = [await refused(stub.PrefetchAdapter(one, timeout=10, metadata=metadata)) for one in asked]
        assert (foreign.details(), trailers(foreign)) == (unknown.details(), trailers(unknown))
        evicted = await stub.EvictAdapter(engine_pb2.EvictAdapterRequest(adapter_digest=DIGEST), timeout=10, metadata=metadata)
        assert not evicted.evicted
        await generate(replica)  # its owner's is untouched


async def test_T14_an_adapter_trained_with_another_template_is_refused():
    host = tuned_host(template_hash="aa" * 32)
    async with client(host, fingerprint="bb" * 32) as replica:
        error = await refused(generate(replica))
        asked = engine_pb2.PrefetchAdapterRequest(adapter_digest=DIGEST)
        pushed = await refused(replica.stub.PrefetchAdapter(asked, timeout=10, metadata=signed()))
    for each in (error, pushed):
        assert each.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert reason(each) == ("WRONG_STATE", {"field": "model", "state": "TEMPLATE_MISMATCH"})
    assert not [call for call in host.calls if isinstance(call, Generate)]
    async with client(tuned_host(template_hash="aa" * 32), fingerprint="aa" * 32) as replica:
        assert await generate(replica)


@pytest.mark.parametrize(
    ("word", "code", "why"),
    [
        ("adapter_unavailable", grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE"),
        ("adapter_refused", grpc.StatusCode.FAILED_PRECONDITION, "WRONG_STATE"),
        ("adapter_failed", grpc.StatusCode.FAILED_PRECONDITION, "WRONG_STATE"),
        ("deadline", grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
    ],
)
async def test_an_adapter_that_cannot_be_had_is_one_clear_error(word, code, why):
    host = tuned_host()
    host.adapters["p-1", DIGEST] = msgspec.structs.replace(host.adapters["p-1", DIGEST], error=word)
    async with client(host) as replica:
        for call in (generate(replica), encode(replica, classify=classify("x"))):
            error = await refused(call)
            assert (error.code(), reason(error)[0]) == (code, why)


async def test_a_replica_without_slots_lacks_the_capability():
    async with client(FakeHost(hello=hello(adapter_slots=0))) as replica:
        error = await refused(generate(replica))
        info = await replica.stub.GetEngineInfo(engine_pb2.GetEngineInfoRequest(), timeout=10, metadata=signed())
    assert reason(error) == ("MODEL_CAPABILITY", {"field": "model", "capability": "adapters"})
    assert info.adapter_slots == 0 and model_pb2.MODEL_CAPABILITY_CLASSIFY_TUNED not in info.capabilities


async def test_adapters_are_prefetched_listed_reported_and_evicted():
    host = tuned_host(seconds=0.25)
    async with client(host) as replica:
        stub, options = replica.stub, {"timeout": 10, "metadata": signed()}
        info = await stub.GetEngineInfo(engine_pb2.GetEngineInfoRequest(), **options)
        assert info.adapter_slots == 4 and model_pb2.MODEL_CAPABILITY_CLASSIFY_TUNED in info.capabilities
        loaded = await stub.PrefetchAdapter(engine_pb2.PrefetchAdapterRequest(adapter_digest=DIGEST), **options)
        assert loaded.load.ToTimedelta().total_seconds() == 0.25
        shown = {"adapter_digest": DIGEST, "rank": 4, "labels": list(LABELS), "memory_bytes": "64"}
        assert MessageToDict(loaded.adapter, preserving_proto_field_name=True) == shown
        host.set_load(msgspec.structs.replace(IDLE, adapters=(DIGEST,)))
        watch = stub.WatchLoad(engine_pb2.WatchLoadRequest(), **options)
        assert (await anext(aiter(watch))).resident_adapters == [DIGEST]
        watch.cancel()
        listed = await stub.ListAdapters(engine_pb2.ListAdaptersRequest(), **options)
        assert [one.adapter_digest for one in listed.adapters] == [DIGEST]
        foreign = await stub.ListAdapters(engine_pb2.ListAdaptersRequest(), timeout=10, metadata=signed(STRANGER))
        assert not foreign.adapters
        evicted = await stub.EvictAdapter(engine_pb2.EvictAdapterRequest(adapter_digest=DIGEST), **options)
        assert evicted.evicted
        error = await refused(generate(replica))
        assert reason(error)[0] == "RESOURCE_NOT_FOUND"
