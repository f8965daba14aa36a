"""ModelService through a real gateway server: the shared bases, as the replicas describe them."""

from contextlib import AsyncExitStack

import grpc
import pytest

from argosy.v1 import model_pb2
from services.chassis.status import error_info
from tests.fakes.edge import caller, edge, metadata
from tests.fakes.engine import fake_engine


def reason(error: grpc.aio.AioRpcError) -> str:
    info = error_info(error)
    return info.reason if info is not None else ""


async def test_a_model_is_what_its_replicas_say() -> None:
    async with fake_engine() as engine, edge(engine) as at:
        model = await at.models.GetModel(model_pb2.GetModelRequest(name="models/fake"), metadata=metadata(), timeout=5)
        assert (model.name, model.base_digest, model.context_tokens) == ("models/fake", engine.digest, 4_096)
        assert model_pb2.MODEL_CAPABILITY_CHAT_PLAIN in model.capabilities
        assert model.default_config.sampling.temperature == 1.0 and model.ready_replicas == 1


async def test_an_unknown_model_is_not_found() -> None:
    async with fake_engine() as engine, edge(engine) as at:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await at.models.GetModel(model_pb2.GetModelRequest(name="models/none"), metadata=metadata(), timeout=5)
        assert error.value.code() is grpc.StatusCode.NOT_FOUND and reason(error.value) == "RESOURCE_NOT_FOUND"


async def test_models_are_listed_in_pages() -> None:
    async with AsyncExitStack() as stack:
        other = [("models/b", "0b" * 32), ("models/c", "0c" * 32), ("models/fake", "fa" * 32)]
        engines = [await stack.enter_async_context(fake_engine(model=model, digest=digest)) for model, digest in other]
        async with edge(*engines) as at:
            seen, token = [], ""
            while True:
                page = await at.models.ListModels(
                    model_pb2.ListModelsRequest(page_size=2, page_token=token), metadata=metadata(), timeout=5
                )
                seen += [model.name for model in page.models]
                token = page.next_page_token
                if not token:
                    break
            assert seen == ["models/b", "models/c", "models/fake"]
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await at.models.ListModels(model_pb2.ListModelsRequest(page_token="!"), metadata=metadata(), timeout=5)
            assert reason(error.value) == "PAGE_TOKEN_INVALID"


async def test_A10_a_key_sees_the_models_of_its_list() -> None:
    async with AsyncExitStack() as stack:
        one, two = [await stack.enter_async_context(fake_engine(model=f"models/{name}", digest=name)) for name in ("fake", "b")]
        async with edge(one, two, callers={"acme": caller(models=("models/b",))}) as at:
            page = await at.models.ListModels(model_pb2.ListModelsRequest(), metadata=metadata(), timeout=5)
            assert [model.name for model in page.models] == ["models/b"]
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await at.models.GetModel(model_pb2.GetModelRequest(name="models/fake"), metadata=metadata(), timeout=5)
            assert reason(error.value) == "RESOURCE_NOT_FOUND"


async def test_a_project_has_no_models_of_its_own_yet() -> None:
    async with fake_engine() as engine, edge(engine) as at:
        page = await at.models.ListModels(model_pb2.ListModelsRequest(parent="projects/acme"), metadata=metadata(), timeout=5)
        assert not page.models
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await at.models.ListModels(model_pb2.ListModelsRequest(filter="state = READY"), metadata=metadata(), timeout=5)
        assert reason(error.value) == "FIELD_INVALID"
