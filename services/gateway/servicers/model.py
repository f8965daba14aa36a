"""ModelService: the shared bases as the replicas describe them, a project's own models as finetune keeps them, in one list."""

from typing import Any, Protocol

from argosy.v1 import model_pb2
from services.chassis import bounds
from services.chassis.errors import FieldInvalid, ResourceNotFound, StoreUnavailable
from services.chassis.identity import Caller
from services.chassis.lists import PAGE, PageTokens
from services.gateway.catalog import Catalog, Served, offered
from services.gateway.servicers.forwarded import Forwarding
from services.gateway.servicers.relay import caller

SERVICE = "argosy.v1.ModelService"
BASES, OWN = "bases", "own"  # the two parts of the list of all models, in this order


class Models(Protocol):
    """What replicas.Replicas knows of models."""

    catalog: Catalog

    def ready(self, served: Served) -> int:
        """Replicas that could take a call for it now."""
        ...


class ModelServicer:
    """GetModel and ListModels; all else is forwarded."""

    def __init__(self, models: Models, pages: PageTokens, finetune: Forwarding) -> None:
        self._models = models
        self._pages = pages
        self._finetune = finetune

    async def GetModel(self, request: model_pb2.GetModelRequest, context: Any) -> model_pb2.Model:
        """One model."""
        bounds.check(request)
        who = caller()
        if not request.name.startswith("projects/"):
            return self._described(self._models.catalog.resolve(request.name, who.models, field="name"))
        if self._finetune.off or not _owns(who, request.name) or not _allowed(who, request.name):
            raise ResourceNotFound("name")
        model = await self._finetune.ask(SERVICE, "GetModel", request, model_pb2.Model.FromString, who)
        return self._completed(model)

    async def ListModels(self, request: model_pb2.ListModelsRequest, context: Any) -> model_pb2.ListModelsResponse:
        """Every model the key may see, by name: the bases, then the own ones."""
        bounds.check(request)
        who = caller()
        if request.parent and not _owns(who, f"{request.parent}/"):
            raise ResourceNotFound("parent")
        for field in ("filter", "order_by"):
            if getattr(request, field) and not request.parent:
                raise FieldInvalid(field, "needs_parent")
        scope = (SERVICE, "ListModels", request.parent, request.filter, request.order_by, who.project_uid)
        part, after = self._pages.open(request.page_token, *scope) or [OWN if request.parent else BASES, ""]
        size = request.page_size or PAGE
        page = model_pb2.ListModelsResponse()
        if part == BASES:
            rest = [served for served in self._models.catalog.visible(who.models) if served.name > after]
            page.models.extend(self._described(served) for served in rest[:size])
            if len(rest) > size:
                page.next_page_token = self._pages.seal(*scope, after=[BASES, rest[size - 1].name])
                return page
            part, after = OWN, ""
        if self._finetune.off:
            return page
        bases_alone = self._pages.seal(*scope, after=[OWN, ""])
        if len(page.models) == size:
            page.next_page_token = bases_alone
            return page
        try:
            more = await self._own(request, size - len(page.models), after, who, page)
        except StoreUnavailable:
            if not page.models:
                raise
            page.next_page_token = bases_alone  # they are not held back: the next page says what is missing
            return page
        if more:
            page.next_page_token = self._pages.seal(*scope, after=[OWN, more])
        return page

    async def _own(self, request: model_pb2.ListModelsRequest, size: int, after: str, who: Caller, page: Any) -> str:
        """Append own models to `page`; returns finetune's token of the next."""
        asked = model_pb2.ListModelsRequest(
            parent=f"projects/{who.project}", page_size=size, page_token=after, filter=request.filter, order_by=request.order_by
        )
        found = await self._finetune.ask(SERVICE, "ListModels", asked, model_pb2.ListModelsResponse.FromString, who)
        page.models.extend(self._completed(model) for model in found.models if _allowed(who, model.name))
        return str(found.next_page_token)

    def _described(self, served: Served) -> model_pb2.Model:
        model = model_pb2.Model.FromString(served.description)
        model.ready_replicas = self._models.ready(served)
        return model

    def _completed(self, model: model_pb2.Model) -> model_pb2.Model:
        """An own model, with what only its base's replicas know."""
        base = self._models.catalog.base(model.base_model, model.base_digest)
        if base is None:
            return model
        described = model_pb2.Model.FromString(base.description)
        for field in ("context_tokens", "vocabulary_size", "embedding_dimensions", "architecture", "base_digest"):
            if not getattr(model, field):
                setattr(model, field, getattr(described, field))
        if not model.HasField("default_config"):
            model.default_config.CopyFrom(described.default_config)
        if model.default_version:  # else it can do nothing yet
            names = offered(base.capabilities, has_head=model_pb2.MODEL_CAPABILITY_CLASSIFY_TUNED in model.capabilities)
            model.ClearField("capabilities")
            model.capabilities.extend(sorted(model_pb2.ModelCapability.Value(f"MODEL_CAPABILITY_{name}") for name in names))
            model.ready_replicas = self._models.ready(base)
        return model


def _owns(who: Caller, name: str) -> bool:
    return name.startswith(f"projects/{who.project}/")


def _allowed(who: Caller, name: str) -> bool:
    return not who.models or name in who.models
