"""A caller asks why: the parts of a text with their weights, and a bill by passes."""

import math
import uuid

from argosy.v1 import explanation_pb2, language_pb2
from tests.fleet.running import TENANT_SCOPES, Fleet

TEXT = "hello the world, yes 世界 no"


async def test_labels_and_continuations_are_explained_and_billed_by_passes(tiny: Fleet) -> None:
    tenant = tiny.tenant([*TENANT_SCOPES, "explain"])
    async with tenant.client() as client:
        classified = await client.classify(TEXT, ["tech", "sport"])
        by_label = await client.explain(TEXT, labels=["tech", "sport"])
        by_word = await client.explain(TEXT, continuation=" yes")
        cheap = await client.explain(TEXT, continuation=" yes", cheap=True)
        rows = await tenant.records_until(lambda rows: len(rows) >= 4)
    for reply in (by_label, by_word, cheap):
        spans = [one.span for one in reply.attributions]
        assert "".join(span.text for span in spans) == TEXT
        assert all(TEXT.encode()[span.start_byte : span.end_byte].decode() == span.text for span in spans)
        assert all(math.isfinite(one.weight) for one in reply.attributions)
    best = classified.results[0].labels[0]
    assert math.isclose(math.exp(by_label.target_score), best.probability, rel_tol=1e-3)
    assert math.isclose(by_word.target_score, cheap.target_score, rel_tol=1e-3), "both methods explain the same score"
    assert math.isclose(by_word.baseline_score, cheap.baseline_score, rel_tol=1e-3)
    assert 0 <= by_label.faithfulness <= 1 and not cheap.HasField("faithfulness")
    billed = sorted(row.usage.passes for row in rows)
    assert billed == sorted([0, by_label.usage.passes, by_word.usage.passes, cheap.usage.passes])
    assert cheap.usage.passes == 3 < by_word.usage.passes


async def test_every_replica_explains_alike(tiny: Fleet) -> None:
    tenant = tiny.tenant([*TENANT_SCOPES, "explain"])
    source = language_pb2.ZeroShotLabels(labels=["tech", "sport"])
    target = explanation_pb2.ClassifyTarget(text=TEXT, zero_shot=source, label="sport")
    weights = []
    async with tenant.client() as client:
        for _ in range(4):
            request = explanation_pb2.ExplainRequest(model=tiny.model, request_id=str(uuid.uuid4()), classify=target)
            reply = await client.call(client.explanation.Explain, request)
            weights.append([one.weight for one in reply.attributions])
    assert all(math.isclose(a, b, abs_tol=1e-4) for other in weights[1:] for a, b in zip(weights[0], other, strict=True))
