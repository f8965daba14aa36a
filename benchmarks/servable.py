"""From a published version to its first tuned token: `python -m benchmarks.servable`.

Three replicas of the default model behind one gateway. Each version is another random adapter of rank 16 on every linear layer, published
by import, whose READY is the same transaction as a job's success. The clock starts when the reply says READY; it stops when the gateway
has every replica's word and a stream of the new version has given its first token.
"""

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path

from safetensors.torch import save_file

from argosy import AsyncClient, config
from benchmarks import record
from benchmarks.adapters import TARGETS, tensors
from benchmarks.processes import fleet
from services.pretrained import weights

SCOPES = ("generate", "models.read", "models.write", "usage.read")
BASE = "models/gemma-3-270m"


def adapter(directory: Path, folder: Path, seed: int) -> Path:
    """An adapter as PEFT writes it."""
    folder.mkdir()
    save_file(tensors(directory, seed, 16), folder / "adapter_model.safetensors")
    said = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 16, "lora_alpha": 16, "lora_dropout": 0.0, "bias": "none",
        "target_modules": list(TARGETS), "use_rslora": False, "use_dora": False,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


async def one(client: AsyncClient, folder: Path) -> tuple[float, float]:
    """Seconds to every replica's word, and to the first token after it."""
    version = await client.registry.import_adapter("pushed", folder, method="chat")
    began = time.perf_counter()
    while not (await client.registry.version(version.name)).HasField("servable_time"):
        await asyncio.sleep(0.005)  # a field of the API says it, no event
    told = time.perf_counter()
    async with client.stream_generate("Ships sleep in", model=version.name, config=config(max_output_tokens=2, temperature=0)) as stream:
        async for _ in stream:
            break
    return told - began, time.perf_counter() - told


async def main(options: argparse.Namespace) -> None:
    """Publish and ask, one version after the other."""
    record.header()
    directory = weights.prepare("default", weights.cache_directory(None))
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "fleet").mkdir()
        async with fleet(folder / "fleet", ARGOSY_REPLICAS=str(options.replicas)) as door:
            async with AsyncClient(door.address, door.api_key) as platform:
                project = (await platform.create_project("servable")).name
                key = (await platform.create_key(project, SCOPES)).secret
            async with AsyncClient(door.address, key, model=BASE, timeout_s=60) as client:
                await client.registry.create("pushed", BASE)
                found = [
                    await one(client, await asyncio.to_thread(adapter, directory, folder / f"adapter-{number}", number))
                    for number in range(options.versions + 1)
                ][1:]  # the first warms every path
    whole = [pushed + first for pushed, first in found]
    record.table(
        ("versions", "replicas", "READY to servable on all, ms", "first token after it, ms", "both: p50, ms", "p95, ms", "most, ms"),
        (
            len(found), options.replicas, record.spread([pushed * 1e3 for pushed, _ in found], ".0f"),
            record.spread([first * 1e3 for _, first in found], ".0f"), f"{record.percentile(whole, 0.5) * 1e3:.0f}",
            f"{record.percentile(whole, 0.95) * 1e3:.0f}", f"{max(whole) * 1e3:.0f}",
        ),
    )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", type=int, default=20)
    parser.add_argument("--replicas", type=int, default=3)
    asyncio.run(main(parser.parse_args()))
