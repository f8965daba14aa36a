"""Many adapters over one model: mixed in a batch, taking turns, and loaded, against PEFT on the same prompts, interleaved in one run.

    python benchmarks/adapters.py                       all of it
    python benchmarks/adapters.py --no-peft             ours alone
    python benchmarks/adapters.py --no-turns            one batch, and loading

The adapters are random, rank 16 on every linear layer, signed and stored as a trainer's would be; what they say is nonsense, what they
cost is not. Ratios are taken within a repetition; the tables give their median and range.
"""

import argparse
import asyncio
import hashlib
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # run from a clone, installed or not

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from safetensors.torch import save
from tokenizers import Tokenizer

from benchmarks import record
from benchmarks.engine import prompts
from services.chassis import signing
from services.chassis.objects import SyncObjects, open_objects_sync
from services.inference.engine.calls import AdapterReady, Done, Generate, Limits, Prefetch, Sampling, Token
from services.inference.engine.host import ProcessHost
from services.inference.engine.settings import EngineSettings
from services.pretrained import weights

OWNER = "00000000-0000-4000-8000-000000000001"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def shapes(directory: Path) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of the layers that an adapter changes."""
    config = json.loads((directory / "config.json").read_text())
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    sizes = {"q_proj": (heads, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, heads)}
    sizes |= {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    return {
        f"model.layers.{i}.{'mlp' if name in ('gate_proj', 'up_proj', 'down_proj') else 'self_attn'}.{name}": size
        for i in range(config["num_hidden_layers"])
        for name, size in sizes.items()
    }


def tensors(directory: Path, seed: int, rank: int) -> dict[str, torch.Tensor]:
    """One adapter by PEFT's names."""
    source = torch.Generator().manual_seed(seed)
    found = {}
    for path, (outputs, inputs) in shapes(directory).items():
        found[f"base_model.model.{path}.lora_A.weight"] = torch.randn((rank, inputs), generator=source) * 0.02
        found[f"base_model.model.{path}.lora_B.weight"] = torch.randn((outputs, rank), generator=source) * 0.02
    return found


def publish(objects: SyncObjects, data: bytes, base: str, key: Ed25519PrivateKey, rank: int) -> str:
    """Store and sign one; its digest."""
    sha256 = hashlib.sha256(data).hexdigest()
    said = {
        "project_uid": OWNER,
        "base_digest": base,
        "method": "TUNE_METHOD_CHAT",
        "rank": rank,
        "alpha": float(rank),
        "targets": list(TARGETS),
        "parts": [{"name": "adapter.safetensors", "sha256": sha256, "total_bytes": str(len(data))}],
    }
    payload = signing.statement({"adapter.safetensors": sha256}, signing.ADAPTER_MANIFEST, said)
    digest = signing.digest_of(payload)
    objects.put(f"adapters/{OWNER}/{digest}/adapter.safetensors", data)
    objects.put(f"adapters/{OWNER}/{digest}/manifest.json", signing.seal(payload, signing.IN_TOTO, key, "bench"))
    return digest


class Ours:
    """A child process behind a `ProcessHost`, as a replica runs it."""

    def __init__(self, settings: EngineSettings) -> None:
        self.host = ProcessHost(settings)
        self.calls = 0

    async def one(self, row: Sequence[int], count: int, adapter: str = "") -> float:
        """Seconds until `count` tokens of one prompt have come."""
        self.calls += 1
        began = time.perf_counter()
        call = Generate(
            id=f"call-{self.calls}",
            prompt=tuple(row),
            sampling=Sampling(seed=0, temperature=0.0),
            limits=Limits(count, (), ignore_end_token=True),
            deadline_s=600.0,
            tenant="bench",
            cache_salt=self.calls.to_bytes(8, "big"),  # of its own: no prompt is found in the prefix cache
            adapter=adapter,
            owner=OWNER,
        )
        came = 0
        async for message in self.host.submit(call):
            came += isinstance(message, Token)
            if isinstance(message, Done) and message.error:
                raise RuntimeError(message.error)
        assert came == count
        return time.perf_counter() - began

    async def batch(self, rows: Sequence[Sequence[int]], count: int, adapters: Sequence[str]) -> tuple[float, list[float]]:
        """Tokens a second over all rows, and how long each took; adapters go round."""
        began = time.perf_counter()
        names = [adapters[place % len(adapters)] for place in range(len(rows))]
        took = await asyncio.gather(*(self.one(row, count, name) for row, name in zip(rows, names, strict=True)))
        return len(rows) * count / (time.perf_counter() - began), list(took)

    async def load(self, digest: str) -> float:
        """Seconds that the engine says loading took; 0 if it was there."""
        self.calls += 1
        seconds = 0.0
        async for message in self.host.submit(Prefetch(f"load-{self.calls}", digest, OWNER, 60.0)):
            if isinstance(message, AdapterReady):
                assert message.error is None, message.error
                seconds = message.seconds
        return seconds


class Peft:
    """transformers and PEFT in bfloat16: all adapters in memory, one active at a time, or named by row in one padded batch."""

    def __init__(self, directory: Path, files: Sequence[dict[str, torch.Tensor]], rank: int, threads: int) -> None:
        import transformers
        from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

        torch.set_num_threads(threads)
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS))
        self.model: Any = None
        for place, file in enumerate(files):
            if self.model is None:
                self.model = get_peft_model(model, config, adapter_name="0", autocast_adapter_dtype=False)
            else:
                self.model.add_adapter(str(place), config)
            set_peft_model_state_dict(self.model, {name: tensor.bfloat16() for name, tensor in file.items()}, adapter_name=str(place))
        self.model = self.model.to(torch.bfloat16).eval()

    def switching(self, rows: Sequence[Sequence[int]], count: int) -> float:
        """Tokens a second, a prompt after another, each with its own adapter."""
        began = time.perf_counter()
        for place, row in enumerate(rows):
            self.model.set_adapter(str(place % len(self.model.peft_config)))
            self._generate([row], count)
        return len(rows) * count / (time.perf_counter() - began)

    def mixed(self, rows: Sequence[Sequence[int]], count: int) -> float:
        """Tokens a second in one padded batch with an adapter for each row."""
        began = time.perf_counter()
        names = [str(place % len(self.model.peft_config)) for place in range(len(rows))]
        self._generate(rows, count, adapter_names=names)
        return len(rows) * count / (time.perf_counter() - began)

    def _generate(self, rows: Sequence[Sequence[int]], count: int, **more: Any) -> None:
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        with torch.inference_mode():
            self.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False, **more)


async def measure(asked: argparse.Namespace, root: Path) -> None:
    """Run all, and print the tables."""
    directory = weights.prepare(asked.model, weights.cache_directory(None))
    base = weights.digest(directory, weights.cache_directory(None))
    rows = prompts(Tokenizer.from_file(str(directory / "tokenizer.json")))
    key = Ed25519PrivateKey.generate()
    (root / "key.pem").write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    objects = open_objects_sync(f"file://{root}/store")
    files = [tensors(directory, seed, asked.rank) for seed in range(asked.slots)]
    data = [save(file) for file in files]
    count = 4 * asked.slots + asked.loads
    digests = [publish(objects, data[n], base, key, asked.rank) if n < asked.slots else "" for n in range(count)]
    for n in range(asked.slots, count):  # the same numbers under another digest cost as much
        digests[n] = publish(objects, save(tensors(directory, n, asked.rank)), base, key, asked.rank)
    settings = EngineSettings(
        model=asked.model,
        threads=asked.threads,
        store_url=f"file://{root}/store",
        manifest_public_keys=(f"bench={root}/key.pem",),
        adapter_slots=asked.slots,
    )
    ours = Ours(settings)
    await ours.host.start()
    peft = Peft(directory, files, asked.rank, asked.threads) if asked.peft else None
    try:
        await loading(ours, digests[4 * asked.slots :])
        await in_one_batch(ours, peft, rows[: asked.slots], digests[: asked.slots], asked)
        if asked.turns:
            await in_turns(ours, rows, digests[: 4 * asked.slots], asked)
    finally:
        await ours.host.close()


async def in_one_batch(
    ours: Ours, peft: Peft | None, rows: Sequence[Sequence[int]], digests: Sequence[str], asked: argparse.Namespace
) -> None:
    """As many calls as slots: the base alone, one adapter for all, one for each; and PEFT."""
    forms: dict[str, list[float]] = {"base alone": [], "one adapter": [], "an adapter each": []}
    forms |= {"PEFT, switching": [], "PEFT, named by row": []} if peft is not None else {}
    for repeat in range(-1, asked.repeats):
        found = {
            "base alone": (await ours.batch(rows, asked.tokens, [""]))[0],
            "one adapter": (await ours.batch(rows, asked.tokens, digests[:1]))[0],
            "an adapter each": (await ours.batch(rows, asked.tokens, digests))[0],
        }
        if peft is not None:
            found["PEFT, switching"] = await asyncio.to_thread(peft.switching, rows, asked.tokens)
            found["PEFT, named by row"] = await asyncio.to_thread(peft.mixed, rows, asked.tokens)
        if repeat >= 0:  # the first warms
            for form, rate in found.items():
                forms[form].append(rate)
    print(f"\n## {len(rows)} calls in one batch, {asked.tokens} tokens each, rank {asked.rank}\n")
    each = forms["an adapter each"]
    table = [("form", "tokens/s", "an adapter each ÷ this")]
    table += [
        (form, record.spread(rates, ".1f"), record.spread([a / b for a, b in zip(each, rates, strict=True)]))
        for form, rates in forms.items()
    ]
    record.table(*table)


async def in_turns(ours: Ours, rows: Sequence[Sequence[int]], digests: Sequence[str], asked: argparse.Namespace) -> None:
    """2 × slots clients, each with one call in flight after another, over more and more adapters in turn."""
    clients = 2 * asked.slots
    counts = [asked.slots * quarter // 4 for quarter in (1, 4, 6, 8, 12, 16)]
    rates: dict[int, list[float]] = {count: [] for count in counts}
    waits: dict[int, list[float]] = {count: [] for count in counts}
    for digest in digests:
        await ours.load(digest)
    for repeat in range(-1, asked.repeats):
        for count in counts:
            numbers, took = itertools.count(), list[float]()

            async def client(count: int = count, numbers: Iterator[int] = numbers, took: list[float] = took) -> None:
                while (number := next(numbers)) < 4 * clients:
                    took.append(await ours.one(rows[number % len(rows)], asked.tokens, digests[number % count]))

            began = time.perf_counter()
            await asyncio.gather(*(client() for _ in range(clients)))
            if repeat >= 0:
                rates[count].append(len(took) * asked.tokens / (time.perf_counter() - began))
                waits[count].append(record.percentile(took, 0.95))
    print(f"\n## {clients} clients in {asked.slots} slots, {4 * clients} calls of {asked.tokens} tokens\n")
    whole = rates[asked.slots]
    table = [("adapters", "÷ slots", "tokens/s", "÷ at 1 × slots", "p95 of a call, s")]
    for count in counts:
        share = record.spread([a / b for a, b in zip(rates[count], whole, strict=True)])
        table.append((str(count), f"{count / asked.slots:.2f}", record.spread(rates[count], ".1f"), share, record.spread(waits[count])))
    record.table(*table)


async def loading(ours: Ours, digests: Sequence[str]) -> None:
    """From the store into the engine, while nothing else runs."""
    seconds = [await ours.load(digest) for digest in digests]
    found = record.spread([1e3 * one for one in seconds], ".0f")
    print(f"\nLoading: fetched from a local directory, verified and packed, {len(seconds)} adapters: {found} ms")


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--loads", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-turns", dest="turns", action="store_false")
    parser.add_argument("--no-peft", dest="peft", action="store_false")
    asked = parser.parse_args()
    record.header()
    with tempfile.TemporaryDirectory() as room:
        asyncio.run(measure(asked, Path(room)))


if __name__ == "__main__":
    main()
