"""EmbeddingService through a real gateway server to a fake engine."""

import grpc
import pytest

from argosy.v1 import embedding_pb2
from services.chassis.status import error_info
from services.gateway.ledger import Outcome
from tests.fakes.edge import edge, metadata
from tests.fakes.engine import fake_engine


async def test_a_vector_for_each_text_billed_by_input() -> None:
    async with fake_engine() as engine, edge(engine) as at:
        request = embedding_pb2.EmbedTextsRequest(model="models/fake", texts=["one", "two", "three"])
        reply = await at.embedding.EmbedTexts(request, metadata=metadata(), timeout=5)
        assert [len(vector.values) for vector in reply.embeddings] == [8, 8, 8]
        ((reservation, settlement),) = at.ledger.settled.values()
        assert reservation.output_tokens == 0 == settlement.output_tokens
        assert (settlement.outcome, settlement.input_tokens) == (Outcome.DONE, engine.calls[0].input_tokens)


async def test_a_model_that_cannot_embed_says_so() -> None:
    async with fake_engine(capabilities=("GENERATE",)) as engine, edge(engine) as at:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await at.embedding.EmbedTexts(embedding_pb2.EmbedTextsRequest(model="models/fake", texts=["x"]), metadata=metadata(), timeout=5)
        info = error_info(error.value)
        assert info is not None and (info.reason, info.metadata["capability"]) == ("MODEL_CAPABILITY", "EMBED")
