"""ModelService: the shared bases, as the replicas describe them."""

from typing import Any, Protocol

from argosy.v1 import model_pb2
from services.chassis import bounds
from services.chassis.errors import FieldInvalid
from services.chassis.lists import PAGE, PageTokens
from services.gateway.catalog import Catalog, Served
from services.gateway.servicers.relay import caller

SERVICE = "argosy.v1.ModelService"


class Models(Protocol):
    """What replicas.Replicas knows of models."""

    catalog: Catalog

    def ready(self, served: Served) -> int:
        """Replicas that could take a call for it now."""
        ...


class ModelServicer:
    """argosy.v1.ModelService, as far as shared bases go."""

    def __init__(self, models: Models, pages: PageTokens) -> None:
        self._models = models
        self._pages = pages

    async def GetModel(self, request: model_pb2.GetModelRequest, context: Any) -> model_pb2.Model:
        """One model."""
        bounds.check(request)
        return self._described(self._models.catalog.resolve(request.name, caller().models, field="name"))

    async def ListModels(self, request: model_pb2.ListModelsRequest, context: Any) -> model_pb2.ListModelsResponse:
        """Every model the key may see, by name."""
        bounds.check(request)
        for field in ("filter", "order_by"):
            if getattr(request, field):
                raise FieldInvalid(field, "not_supported")
        who = caller()
        own = bool(request.parent)  # a project's own models come with tuning; until then it has none
        visible = [] if own else self._models.catalog.visible(who.models)
        scope = (SERVICE, "ListModels", request.parent, who.project_uid)
        after = self._pages.open(request.page_token, *scope) or [""]
        rest = [served for served in visible if served.name > after[0]]
        size = request.page_size or PAGE
        more = self._pages.seal(*scope, after=[rest[size - 1].name]) if len(rest) > size else ""
        return model_pb2.ListModelsResponse(models=[self._described(served) for served in rest[:size]], next_page_token=more)

    def _described(self, served: Served) -> model_pb2.Model:
        model = model_pb2.Model.FromString(served.description)
        model.ready_replicas = self._models.ready(served)
        return model
