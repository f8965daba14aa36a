"""Output tokens a second and time to first token: client, gateway, gRPC and engine, against the engine alone.

    python -m benchmarks.served

Both run the default model on the same prompts of mixed length, in turns, so that what else the machine does falls on both alike. Alone
is a `ProcessHost` in this process, given token ids. Served is `python -m services.fleet` and the asyncio client in this process, one
stream a call, given text. A closed loop keeps the asked number of streams open; output is greedy and of fixed length; no two prompts
share a beginning, so the prefix cache is out of it. On this machine client, gateway and engine share the cores.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import uvloop

from argosy.aio import AsyncClient
from argosy.requests import config
from benchmarks.processes import fleet
from benchmarks.record import header, percentile, spread, table
from services.inference.engine.calls import Done, Generate, Limits, Sampling, Token
from services.inference.engine.host import ProcessHost
from services.inference.engine.settings import EngineSettings
from services.pretrained import weights
from services.pretrained.tokenizer import Tokenizer

MODEL = "models/gemma-3-270m"
LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # tokens of a prompt, about
TEXT = (
    "The harbour master kept a book in which every ship was written down: where she came from, what she carried, how long she "
    "meant to stay, and whether her captain could be trusted. In winter few ships came, and he used the time to read the "
    "older pages again."
)


def prompt(number: int, tokens: int) -> str:
    """About so many tokens, and a beginning of its own."""
    words = TEXT.split()
    return f"{number * 7919 % 100_003} {' '.join(words[at % len(words)] for at in range(number, number + max(1, tokens - 6)))}"


@dataclass
class Round:
    """What one way of asking did in one round."""

    seconds: float = 0.0
    tokens: int = 0
    refused: int = 0
    first_s: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Output tokens a second."""
        return self.tokens / self.seconds


Answer = tuple[float, int, int]  # seconds to the first token, tokens in, tokens out
Ask = Callable[[str], Awaitable[Answer]]


class Alone:
    """The engine without a wire."""

    def __init__(self, host: ProcessHost, tokenizer: Tokenizer, tokens: int) -> None:
        self._host, self._tokenizer, self._tokens = host, tokenizer, tokens
        self._ids: dict[str, tuple[int, ...]] = {}
        self._calls = 0

    def read(self, prompts: Sequence[str]) -> None:
        """Tokenise before the clock runs."""
        self._ids |= {text: (*self._tokenizer.prefix, *self._tokenizer.encode(text)) for text in prompts}

    async def ask(self, text: str) -> Answer:
        """One call, to its end."""
        self._calls += 1
        call = Generate(
            id=str(self._calls), prompt=self._ids[text], sampling=Sampling(seed=0, temperature=0.0),
            limits=Limits(self._tokens, (), ignore_end_token=True), deadline_s=300.0, tenant="bench", cache_salt=b"bench",
        )  # fmt: skip
        began, first = time.perf_counter(), 0.0
        async for message in self._host.submit(call):
            if isinstance(message, Token):
                first = first or time.perf_counter() - began
            elif isinstance(message, Done):
                if message.error or message.usage.cached_input_tokens > 0:
                    raise RuntimeError(message.error or "a prompt was found in the prefix cache")
                return first, message.usage.input_tokens, message.usage.output_tokens
        raise RuntimeError("no Done")


class Served:
    """The same through the gateway."""

    def __init__(self, client: AsyncClient, tokens: int) -> None:
        self._client = client
        self._config = config(temperature=0.0, max_output_tokens=tokens)
        self._config.stopping.ignore_end_token = True

    async def ask(self, text: str) -> Answer:
        """One stream, to its end."""
        began, first = time.perf_counter(), 0.0
        async with self._client.stream_generate(text, model=MODEL, config=self._config) as stream:
            async for event in stream.events():
                if not first and event.HasField("text"):
                    first = time.perf_counter() - began
        used = stream.result.completed.usage
        return first, used.input_tokens, used.output_tokens


async def run(ask: Ask, prompts: Sequence[str], streams: int) -> tuple[Round, list[int]]:
    """Keep `streams` calls open until every prompt was answered; also returns the tokens of each prompt."""
    done, left, counted = Round(), list(enumerate(prompts))[::-1], [0] * len(prompts)

    async def caller() -> None:
        while left:
            number, text = left.pop()
            first, counted[number], tokens = await ask(text)
            done.first_s.append(first)
            done.tokens += tokens

    began = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(streams)))
    done.seconds = time.perf_counter() - began
    return done, counted


async def measure(asked: argparse.Namespace) -> None:
    """Both ways at each number of streams, `repeats` times."""
    header()
    number = 0
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="argosy-bench-")))
        door = await stack.enter_async_context(fleet(folder))
        client = await stack.enter_async_context(AsyncClient(door.address, door.api_key))
        host = ProcessHost(EngineSettings())
        stack.push_async_callback(host.close)
        hello = await host.start()
        print(f"- engine: {hello.backend}, {hello.dtype}; {asked.tokens} output tokens; prompts of about {LENGTHS} tokens", flush=True)
        alone = Alone(host, Tokenizer.from_directory(weights.prepare("default", weights.cache_directory(None))), asked.tokens)
        ways: dict[str, Ask] = {"alone": alone.ask, "served": Served(client, asked.tokens).ask}
        for streams in asked.streams:
            rounds: dict[str, list[Round]] = {name: [] for name in ways}
            for repeat in range(-1, asked.repeats):  # the first warms both up and is not kept
                count = streams if repeat < 0 else max(asked.least, asked.per_stream * streams)
                prompts = [prompt(number + each, LENGTHS[each * 7 % len(LENGTHS)]) for each in range(count)]
                number += count
                alone.read(prompts)
                counts = []
                for name in ways if repeat % 2 else reversed(ways):  # either goes first, in turn
                    done, counted = await run(ways[name], prompts, streams)
                    counts.append(counted)
                    if repeat >= 0:
                        rounds[name].append(done)
                if counts[0] != counts[1]:
                    raise RuntimeError("the two ways counted different prompts")
            report(streams, rounds)


def report(streams: int, rounds: dict[str, list[Round]]) -> None:
    """One table for one number of streams."""
    rows: list[Sequence[object]] = [(f"{streams} streams", "tokens/s", "TTFT p50 ms", "TTFT p99 ms", "offered", "accepted", "refused")]
    for name, kept in rounds.items():
        firsts = [[1e3 * each for each in one.first_s] for one in kept]
        answered = sum(len(one.first_s) for one in kept)
        p50, p99 = (spread([percentile(each, share) for each in firsts], ".0f") for share in (0.5, 0.99))
        rows.append((name, spread([one.rate for one in kept], ".1f"), p50, p99, answered, answered, 0))
    ratios = [served.rate / alone.rate for served, alone in zip(rounds["served"], rounds["alone"], strict=True)]
    added = [
        1e3 * (statistics.median(served.first_s) - statistics.median(alone.first_s))
        for served, alone in zip(rounds["served"], rounds["alone"], strict=True)
    ]
    print()
    table(*rows)
    print(f"\nserved / alone at {streams}: **{spread(ratios, '.3f')}** (target 0.9); added TTFT p50 {spread(added, '.1f')} ms", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--per-stream", type=int, default=2, help="calls a stream in a round")
    parser.add_argument("--least", type=int, default=4, help="calls in a round")
    parser.add_argument("--repeats", type=int, default=3)
    uvloop.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
