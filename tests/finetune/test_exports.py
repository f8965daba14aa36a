import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load as tensors_of
from safetensors.torch import load_file, save

from services.finetune import exports, lineage
from services.finetune.exports import Entry, archive, archive_bytes, stored
from services.finetune.lineage import ADAPTER, HEAD, MANIFEST
from services.finetune.trainer.spec import Lora
from tests.finetune.adapters import SIGNER, House, file, head, manifest, registry
from tests.finetune.trainer import world

# peft 0.21 asks transformers by a name that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

IDS = torch.tensor([[2, 17, 40, 99, 5, 311, 8]])


async def whole(entries: list[Entry], offset: int = 0) -> bytes:
    return b"".join([piece async for piece in archive(entries, 1_700_000_000, offset)])


def unpacked(data: bytes, folder: Path) -> Path:
    with tarfile.open(fileobj=io.BytesIO(data)) as opened:
        for member in opened.getmembers():
            assert (member.isfile(), member.mtime, member.uid) == (True, 1_700_000_000, 0)
            (folder / member.name).write_bytes(opened.extractfile(member).read())  # type: ignore[union-attr]
    return folder


async def test_an_archive_is_a_tar_and_every_offset_goes_on_where_it_says() -> None:
    entries = [Entry("a", 3, stored(b"abc")), Entry("empty", 0, stored(b"")), Entry("b", 1_024, stored(b"x" * 1_024))]
    data = await whole(entries)
    assert len(data) == archive_bytes(entries)
    with tarfile.open(fileobj=io.BytesIO(data)) as opened:
        assert [(member.name, member.size) for member in opened.getmembers()] == [("a", 3), ("empty", 0), ("b", 1_024)]
    for offset in (0, 1, 511, 512, 514, 515, 1_024, 1_536, 2_050, len(data) - 1, len(data)):
        assert await whole(entries, offset) == data[offset:]


def drawn(base: Path, lora: Lora) -> tuple[dict[str, torch.Tensor], peft.PeftModel]:
    """An adapter of peft's own making with numbers in every tensor, and the model that carries it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(lora.targets),
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        task_type="CAUSAL_LM",
    )
    tuned = peft.get_peft_model(model, config)
    noise = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, tensor in tuned.named_parameters():
            if "lora_" in name:
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=noise))
    found = {
        name.replace(".default", ""): tensor.detach().clone().contiguous() for name, tensor in tuned.named_parameters() if "lora_" in name
    }
    return found, tuned.eval()


async def published(house: House, lora: Lora, values: dict[str, torch.Tensor], labels: tuple[str, ...] = ()) -> Any:
    """A version of these values, stored as our trainer stores it."""
    parts = {ADAPTER: save(values)} | ({HEAD: file(head(labels))} if labels else {})
    said = manifest(
        house.caller.project_uid, "projects/news/models/titles", parts, version="projects/news/models/titles/versions/1", rank=lora.rank,
        alpha=lora.alpha, rslora=lora.rslora, dora=lora.dora, targets=list(lora.targets), labels=list(labels),
        datasets=[{"dataset_version": "projects/news/datasets/d/versions/1", "sha256": "a" * 64, "use": "train"}],
    )  # fmt: skip
    signed = lineage.sign(said, SIGNER)
    place = lineage.place(said.project_uid, signed.digest)
    for name, data in parts.items():
        await house.objects.put(f"{place}/{name}", data)
    return place, said, signed.envelope


FORMS = [Lora(4, 8.0, targets=("q_proj", "down_proj")), Lora(3, 6.0, targets=("v_proj", "up_proj"), rslora=True, dora=True)]


@pytest.mark.parametrize("lora", FORMS, ids=["lora", "rslora and dora"])
async def test_peft_loads_the_export_and_answers_as_before(finetune_url: str, base: Path, tmp_path: Path, lora: Lora) -> None:
    values, tuned = drawn(base, lora)
    async with registry(finetune_url) as house:
        place, said, envelope = await published(house, lora, values)
        folder = unpacked(await whole(await exports.adapter_entries(house.objects, place, said, envelope)), tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        before = again(IDS).logits
        loaded = peft.PeftModel.from_pretrained(again, folder).eval()
        assert torch.equal(loaded(IDS).logits, tuned(IDS).logits)
        assert not torch.allclose(loaded(IDS).logits, before, atol=1e-2)


@pytest.mark.parametrize("lora", FORMS, ids=["lora", "rslora and dora"])
async def test_merged_weights_answer_as_the_adapter_does(finetune_url: str, base: Path, tmp_path: Path, lora: Lora) -> None:
    values, tuned = drawn(base, lora)
    async with registry(finetune_url) as house:
        place, said, envelope = await published(house, lora, values)
        entries = await exports.merged_entries(house.objects, place, said, envelope, base)
        data = await whole(entries)
        for offset in (1, 700, len(data) // 3, len(data) // 2 + 1, len(data) - 5_000):
            assert await whole(entries, offset) == data[offset:]
    folder = unpacked(data, tmp_path)
    assert (folder / "config.json").read_bytes() == (base / "config.json").read_bytes()
    merged = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(merged(IDS).logits, tuned(IDS).logits, atol=2e-4)


async def test_merging_keeps_the_bases_kind_of_numbers(finetune_url: str, tmp_path: Path) -> None:
    base = world.base(tmp_path / "base")
    whole_base = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(base / "model.safetensors").items()}
    (base / "model.safetensors").write_bytes(save(whole_base))
    lora = FORMS[0]
    values, _ = drawn(base, lora)
    async with registry(finetune_url) as house:
        place, said, envelope = await published(house, lora, values)
        folder = tmp_path / "out"
        folder.mkdir()
        unpacked(await whole(await exports.merged_entries(house.objects, place, said, envelope, base)), folder)
    merged = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    a, b = (values[f"base_model.model.{name}.lora_{kind}.weight"] for kind in "AB")
    wanted = (whole_base[f"{name}.weight"].float() + 2.0 * (b @ a)).to(torch.bfloat16)
    assert torch.allclose(merged[f"{name}.weight"].float(), wanted.float(), rtol=2**-7, atol=1e-6)
    assert all(
        torch.equal(merged[key], value) for key, value in whole_base.items() if not key.endswith(("q_proj.weight", "down_proj.weight"))
    )


async def test_head_manifest_and_card_come_along(finetune_url: str, base: Path, tmp_path: Path) -> None:
    values, _ = drawn(base, FORMS[0])
    async with registry(finetune_url) as house:
        place, said, envelope = await published(house, FORMS[0], values, ("tech", "sport"))
        folder = unpacked(await whole(await exports.adapter_entries(house.objects, place, said, envelope)), tmp_path)
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", HEAD, MANIFEST, "README.md"}
    assert lineage.unsign((folder / MANIFEST).read_bytes(), SIGNER.keys())[0] == said
    assert np.array_equal(tensors_of((folder / HEAD).read_bytes())["weight"].numpy(), head(["tech", "sport"])["weight"])
    card = (folder / "README.md").read_text()
    for line in (
        "# projects/news/models/titles/versions/1",
        "tech, sport",
        "datasets/d/versions/1",
        "| learning_rate | 0.001 |",
        "not private",
    ):
        assert line in card
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 8, ["down_proj", "q_proj"])


def test_a_private_version_says_what_it_promises() -> None:
    said = manifest("p", "projects/news/models/m", {}, privacy={"epsilon": 8.0, "delta": 1e-5, "accountant": "prv"})
    card = exports.model_card(said)
    assert "epsilon 8, delta 1e-05, counted by prv" in card
    assert "protects the examples of the training set, not prompts" in card
