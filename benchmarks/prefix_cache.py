"""Time to first token of a second request that shares 1,000 tokens with a first one, through the gateway.

    python -m benchmarks.prefix_cache

Each pair begins with a text that nobody has sent before; its two requests differ in their last words only. One stream at a time.
"""

import argparse
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path

import uvloop

from argosy.aio import AsyncClient
from argosy.requests import config
from benchmarks.processes import fleet
from benchmarks.record import header, spread, table
from benchmarks.served import MODEL, prompt
from services.pretrained import weights
from services.pretrained.tokenizer import Tokenizer


async def first_token(client: AsyncClient, text: str) -> tuple[float, int, int]:
    """Seconds to the first text, tokens of the prompt, and how many of them were cached."""
    began, first = time.perf_counter(), 0.0
    async with client.stream_generate(text, model=MODEL, config=config(temperature=0.0, max_output_tokens=4)) as stream:
        async for event in stream.events():
            if not first and event.HasField("text"):
                first = time.perf_counter() - began
    used = stream.result.completed.usage
    return first, used.input_tokens, used.cached_input_tokens


async def measure(asked: argparse.Namespace) -> None:
    """Pairs, one after another."""
    header()
    tokenizer = Tokenizer.from_directory(weights.prepare("default", weights.cache_directory(None)))
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="argosy-bench-")))
        door = await stack.enter_async_context(fleet(folder))
        client = await stack.enter_async_context(AsyncClient(door.address, door.api_key))
        await first_token(client, prompt(1, 64))
        cold, warm, ratios = [], [], []
        rows: list[tuple[object, ...]] = [("pair", "first ms", "second ms", "ratio", "prompt tokens", "cached in the second")]
        for pair in range(asked.pairs):
            shared = shortened(tokenizer, prompt(1_000 + 13 * pair, 2 * asked.shared), asked.shared - len(tokenizer.prefix))
            first, _, found = await first_token(client, f"{shared} The first ship")
            second, tokens, cached = await first_token(client, f"{shared} Another captain")
            if found:
                raise RuntimeError("the first request found a prefix")
            cold.append(1e3 * first)
            warm.append(1e3 * second)
            ratios.append(second / first)
            rows.append((pair + 1, f"{1e3 * first:.0f}", f"{1e3 * second:.0f}", f"{second / first:.3f}", tokens, cached))
        print()
        table(*rows)
        print(
            f"\nfirst {spread(cold, '.0f')} ms, second {spread(warm, '.0f')} ms, ratio **{spread(ratios, '.3f')}** (target 0.15);"
            f" offered {2 * asked.pairs}, accepted {2 * asked.pairs}, refused 0"
        )


def shortened(tokenizer: Tokenizer, text: str, tokens: int) -> str:
    """The beginning of `text` that holds so many tokens."""
    return text.encode()[: tokenizer.pieces(text)[tokens - 1].end_byte].decode()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--shared", type=int, default=1_000, help="tokens that the two requests of a pair share")
    uvloop.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
