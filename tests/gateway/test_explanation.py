"""ExplanationService through a real gateway server to a fake engine."""

import asyncio
import dataclasses

import grpc
import pytest

from argosy.v1 import content_pb2, explanation_pb2, language_pb2
from argosy_internal.registry.v1 import registry_pb2
from services.chassis.errors import ModelCapability
from services.chassis.identity import CallerVerifier
from services.chassis.status import error_info
from services.gateway.finetune import AUDIENCE as FINETUNE
from services.gateway.ledger import Outcome, Tariff
from services.gateway.servicers.explanation import passes_of
from tests.fakes.edge import KEY, caller, edge, metadata
from tests.fakes.engine import CAPABILITIES, fake_engine
from tests.fakes.finetune import fake_finetune

CAN = (*CAPABILITIES, "EXPLAIN")
LABELS = language_pb2.ZeroShotLabels(labels=["tech", "sport"])
TEXT = "a late goal"


def label_of(text: str = TEXT, **fields: object) -> explanation_pb2.ExplainRequest:
    target = explanation_pb2.ClassifyTarget(text=text, zero_shot=LABELS)
    return explanation_pb2.ExplainRequest(model="models/fake", classify=target, **fields)  # type: ignore[arg-type]


async def refused(call: object) -> tuple[str, dict[str, str]]:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call  # type: ignore[misc]
    info = error_info(error.value)
    assert info is not None
    return info.reason, dict(info.metadata)


async def test_an_explanation_is_reserved_and_settled_by_passes() -> None:
    async with fake_engine(capabilities=CAN) as engine, edge(engine) as at:
        call = at.explanation.Explain(label_of(), metadata=metadata(), timeout=10)
        reply = await call
        assert engine.calls[0].request.explain == label_of(), "the caller's request travels unopened"
        ((reservation, settlement),) = at.ledger.settled.values()
        assert settlement.outcome is Outcome.DONE
        assert settlement.passes == reply.usage.passes == 5
        assert reservation.passes == passes_of(label_of()) >= settlement.passes
        assert reservation.input_tokens >= reply.usage.input_tokens
        tariff = Tariff()
        assert tariff.highest(reservation) >= tariff.price(settlement) > settlement.passes * tariff.pass_nanos
        assert dict(await call.trailing_metadata())["served_by"] == settlement.served_by


async def test_a_model_that_cannot_explain_says_so() -> None:
    async with fake_engine() as engine, edge(engine) as at:
        reason, said = await refused(at.explanation.Explain(label_of(), metadata=metadata(), timeout=5))
        assert (reason, said["capability"]) == ("MODEL_CAPABILITY", "EXPLAIN")
        assert not at.ledger.reserved


async def test_A5_leaving_ends_the_passes_and_settles_once() -> None:
    async with fake_engine(capabilities=CAN, gate=asyncio.Semaphore(0)) as engine, edge(engine) as at:
        call = at.explanation.Explain(label_of(), metadata=metadata(), timeout=10)
        await engine.until(lambda fake: bool(fake.running))
        call.cancel()
        await engine.until(lambda fake: not fake.running)
        assert engine.calls[0].ended == "ABORTED"
        while not at.ledger.settled:
            at.ledger.changed.clear()
            await at.ledger.changed.wait()
        ((_, settlement),) = at.ledger.settled.values()
        assert settlement.outcome is Outcome.CANCELLED


async def test_a_request_id_completes_at_most_once() -> None:
    async with fake_engine(capabilities=CAN) as engine, edge(engine) as at:
        asked = label_of(request_id="11111111-1111-4111-8111-111111111111")
        await at.explanation.Explain(asked, metadata=metadata(), timeout=10)
        reason, _ = await refused(at.explanation.Explain(asked, metadata=metadata(), timeout=10))
        assert reason == "REQUEST_ALREADY_SETTLED"
        assert len(engine.calls) == 1


async def test_neighbours_need_the_scope_of_the_rows_and_a_model_that_has_an_index() -> None:
    blind = dataclasses.replace(caller("blind"), scopes=frozenset({"explain"}))
    async with fake_engine(capabilities=CAN) as engine, edge(engine, callers={"blind": blind, "acme": caller()}) as at:
        asked = explanation_pb2.FindNearestExamplesRequest(model="models/fake", text="x")
        reason, said = await refused(at.explanation.FindNearestExamples(asked, metadata=metadata("blind"), timeout=5))
        assert (reason, said["scope"]) == ("SCOPE_MISSING", "datasets.content")
        reason, said = await refused(at.explanation.FindNearestExamples(asked, metadata=metadata(), timeout=5))
        assert (reason, said["capability"]) == ("MODEL_CAPABILITY", "NEAREST_EXAMPLES")
        assert not at.ledger.reserved


async def test_neighbours_are_found_for_a_version_by_the_vector_that_a_replica_gives() -> None:
    version = "projects/acme/models/titles/versions/1"
    async with (
        fake_finetune(verifier=CallerVerifier({"k": KEY.public_key()}, FINETUNE)) as tuning,
        fake_engine(capabilities=CAN) as engine,
        edge(engine, finetune=tuning.address) as at,
    ):
        who = caller()
        target = registry_pb2.ResolvedTarget(percent=100, base_model="models/fake", tuned_labels=["a", "b"])
        target.model.CopyFrom(content_pb2.ServedModel(version=version, base_digest=engine.digest, adapter_digest="d" * 64))
        tuning.names[who.project_uid, version] = registry_pb2.ResolveModelResponse(targets=[target])
        row = explanation_pb2.NearestExample(dataset_version="projects/acme/datasets/d/versions/1", row=7, similarity=0.5)
        tuning.replies["FindNearest"] = lambda asked: registry_pb2.FindNearestResponse(examples=[row] if asked.vector else [])
        asked = explanation_pb2.FindNearestExamplesRequest(model=version, text="A chip", top_k=3)
        reply = await at.explanation.FindNearestExamples(asked, metadata=metadata(), timeout=10)
        assert list(reply.examples) == [row] and reply.model.version == version
        before, found = tuning.of("FindNearest")
        assert not before.request.vector and found.request.top_k == 3 and len(found.request.vector) % 4 == 0
        assert found.caller is not None and "datasets.content" in found.caller.scopes and found.caller.project_uid == who.project_uid
        ((_, settlement),) = at.ledger.settled.values()
        assert settlement.outcome is Outcome.DONE
        tuning.replies["FindNearest"] = ModelCapability("model", "NEAREST_EXAMPLES")
        reason, _ = await refused(at.explanation.FindNearestExamples(asked, metadata=metadata(), timeout=10))
        assert reason == "MODEL_CAPABILITY" and len(at.ledger.settled) == 1  # nothing more was billed


def test_passes_grow_with_what_may_be_left_out() -> None:
    assert passes_of(label_of("one two three")) == passes_of(label_of("one")) + 2
    assert passes_of(label_of("苹果发布")) >= 4 + 2
    assert passes_of(label_of("One. Two.", unit=explanation_pb2.ATTRIBUTION_UNIT_SENTENCE)) >= 2 + 2
    assert passes_of(label_of("word " * 5_000)) == passes_of(label_of("word " * 6_000))
    cheap = label_of("word " * 500, method=explanation_pb2.ATTRIBUTION_METHOD_GRADIENT_X_INPUT)
    assert passes_of(cheap) < 20
    message = content_pb2.ChatMessage(role=content_pb2.ROLE_USER, parts=[content_pb2.ContentPart(text="four words are here")])
    dialogue = explanation_pb2.GenerationTarget(chat=content_pb2.ChatPrompt(messages=[message, message]), continuation=" yes")
    assert passes_of(explanation_pb2.ExplainRequest(model="models/fake", generation=dialogue)) >= 8 + 2
