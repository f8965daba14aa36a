"""An AsyncLLM without a model: it says the tokens that `alone` says, one a turn, and aborts as vLLM does when its stream is closed."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from services.inference.engine.calls import Sampling
from tests.fakes.runner import alone, history_of, logprob

VOCABULARY = 1000


@dataclass
class FakeAsyncLLM:
    """`asked` are the requests so far; `aborted` those that were closed before their end."""

    errored: bool = False
    fails: Callable[[str], Exception | None] = lambda id: None
    asked: list[SimpleNamespace] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)

    async def generate(self, inputs: dict[str, Any], params: Any, id: str, *, priority: int) -> AsyncIterator[Any]:
        """One token a turn of the loop."""
        self.asked.append(SimpleNamespace(id=id, inputs=inputs, params=params, priority=priority))
        if (failure := self.fails(id)) is not None:
            raise failure
        prompt = inputs["prompt_token_ids"]
        sampling = Sampling(params.seed or 0, temperature=params.temperature)
        try:
            for place, token in enumerate(alone(prompt, sampling, 0, params.max_tokens, VOCABULARY)):
                await asyncio.sleep(0)
                state = history_of((*prompt, *alone(prompt, sampling, 0, place, VOCABULARY)))
                stopped = token in params.stop_token_ids
                reason = "stop" if stopped else "length" if place == params.max_tokens - 1 else None
                ids = params.logprob_token_ids or ([token] if params.logprobs is not None else [])
                if params.logprobs == -1:
                    ids = range(VOCABULARY)
                row = {each: SimpleNamespace(logprob=logprob(state, each), rank=None) for each in (*ids, token)} if ids else None
                output = SimpleNamespace(token_ids=[token], logprobs=row and [row], finish_reason=reason)
                yield SimpleNamespace(outputs=[output], num_cached_tokens=16, prompt_logprobs=None)
                if stopped:
                    return
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted.append(id)
            raise


def params(**keywords: Any) -> SimpleNamespace:
    """In the place of SamplingParams, with its defaults."""
    return SimpleNamespace(
        **({"seed": None, "temperature": 1.0, "stop_token_ids": [], "logprobs": None, "logprob_token_ids": None} | keywords)
    )
