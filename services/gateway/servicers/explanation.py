"""ExplanationService: why a model answers as it does. Billed by passes, so the reservation counts the units that may be left out."""

import dataclasses
from typing import Any

from argosy.v1 import embedding_pb2, explanation_pb2
from services.chassis import bounds
from services.chassis.errors import ModelCapability, ScopeMissing
from services.gateway.servicers.neighbours import CAPABILITY, Neighbours
from services.gateway.servicers.plans import attribution, encoding, plan, sticky_key, tokens_of
from services.gateway.servicers.relay import Relay, caller

SERVICE = "argosy.v1.ExplanationService"
CONTENT = "datasets.content"
MOST_UNITS = 512  # a replica refuses more
NEAREST = 10  # rows where the caller does not say
BESIDE = 2 + 6  # passes with all units and with none, and those of the deletion test
BIAS = 16  # over neutral texts, where a replica does not yet know what labels score by themselves
SENTENCE_ENDS = ".!?…\n。！？；"


class ExplanationServicer:
    """argosy.v1.ExplanationService."""

    def __init__(self, relay: Relay, neighbours: Neighbours | None = None) -> None:
        self._relay = relay
        self._neighbours = neighbours

    async def Explain(self, request: explanation_pb2.ExplainRequest, context: Any) -> explanation_pb2.ExplainResponse:
        """What in the input speaks for the target."""
        made = await plan(self._relay, request, context, method=f"/{SERVICE}/Explain", capability="EXPLAIN")
        made = dataclasses.replace(made, passes=passes_of(request))
        return await self._relay.attribute(made, attribution(made, request), context)

    async def FindNearestExamples(
        self, request: explanation_pb2.FindNearestExamplesRequest, context: Any
    ) -> explanation_pb2.FindNearestExamplesResponse:
        """Training rows near a text: a replica embeds it as the version does, finetune searches. Whether that can be is asked first."""
        bounds.check(request)
        who = caller()
        if CONTENT not in who.scopes:  # beside `explain`, which the door has asked for
            raise ScopeMissing(CONTENT)
        found = await self._relay.resolve(request.model, who, sticky_key(context))
        if self._neighbours is None or not found.adapter:
            raise ModelCapability("model", CAPABILITY)  # a base has learnt no rows of ours
        made = await plan(self._relay, request, context, method=f"/{SERVICE}/FindNearestExamples", capability="EXPLAIN")
        made = dataclasses.replace(made, passes=1)
        await self._neighbours.find(made.served.name, [], 0, who)  # before anything is billed
        asked = embedding_pb2.EmbedTextsRequest(model=request.model, texts=[request.text], work_class=request.work_class)
        reply = (await self._relay.encode(made, encoding(made, request, embed=asked), context)).embed
        top_k = request.top_k if request.HasField("top_k") else NEAREST
        examples = await self._neighbours.find(made.served.name, list(reply.embeddings[0].values), top_k, who)
        return explanation_pb2.FindNearestExamplesResponse(examples=examples, model=reply.model, usage=reply.usage)


def passes_of(asked: explanation_pb2.ExplainRequest) -> int:
    """The most passes that an explanation takes."""
    classify = asked.WhichOneof("target") == "classify"
    bias = BIAS if classify and asked.classify.WhichOneof("label_source") is not None else 0
    if asked.method == explanation_pb2.ATTRIBUTION_METHOD_GRADIENT_X_INPUT:
        return 3 + bias  # forward, backward, and forward over nothing
    if classify:
        texts = [asked.classify.text]
    elif asked.generation.WhichOneof("input") == "prompt":
        texts = [asked.generation.prompt]
    else:
        texts = [part.text for message in asked.generation.chat.messages for part in message.parts]
    return min(MOST_UNITS, sum(_units(text, asked.unit) for text in texts)) + BESIDE + bias


def _units(text: str, unit: explanation_pb2.AttributionUnit.ValueType) -> int:
    """Rather too many: the replica, which cuts the text, counts."""
    match unit:
        case explanation_pb2.ATTRIBUTION_UNIT_TOKEN:
            return tokens_of(len(text.encode(errors="replace")))
        case explanation_pb2.ATTRIBUTION_UNIT_SENTENCE:
            return 1 + sum(text.count(end) for end in SENTENCE_ENDS)
        case _:
            spaced = text.encode("ascii", "ignore").split()
            return 1 + len(spaced) + sum(not character.isascii() for character in text)  # each may be a word
