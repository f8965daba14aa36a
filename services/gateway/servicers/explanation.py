"""ExplanationService: why a model answers as it does. Billed by passes, so the reservation counts the units that may be left out."""

import dataclasses
from typing import Any, NoReturn

from argosy.v1 import explanation_pb2
from services.chassis import bounds
from services.chassis.errors import ModelCapability, ScopeMissing
from services.gateway.servicers.plans import attribution, plan, sticky_key, tokens_of
from services.gateway.servicers.relay import Relay, caller

SERVICE = "argosy.v1.ExplanationService"
CONTENT = "datasets.content"
MOST_UNITS = 512  # a replica refuses more
BESIDE = 2 + 6  # passes with all units and with none, and those of the deletion test
BIAS = 16  # over neutral texts, where a replica does not yet know what labels score by themselves
SENTENCE_ENDS = ".!?…\n。！？；"


class ExplanationServicer:
    """argosy.v1.ExplanationService."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    async def Explain(self, request: explanation_pb2.ExplainRequest, context: Any) -> explanation_pb2.ExplainResponse:
        """What in the input speaks for the target."""
        made = await plan(self._relay, request, context, method=f"/{SERVICE}/Explain", capability="EXPLAIN")
        made = dataclasses.replace(made, passes=passes_of(request))
        return await self._relay.attribute(made, attribution(made, request), context)

    async def FindNearestExamples(self, request: explanation_pb2.FindNearestExamplesRequest, context: Any) -> NoReturn:
        """Training rows near an input."""
        bounds.check(request)
        if CONTENT not in caller().scopes:  # beside `explain`, which the door has asked for
            raise ScopeMissing(CONTENT)
        await self._relay.resolve(request.model, caller(), sticky_key(context))
        raise ModelCapability("model", "NEAREST_EXAMPLES")  # no model has an index of its rows yet


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
