"""Adapters of tiny models, from a signed directory to tokens: equal to PEFT's own model in float32, alone and mixed."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from services.chassis.objects import open_objects_sync
from services.inference.engine.build import build
from services.inference.engine.calls import (
    Done,
    Embed,
    Embedded,
    FromEngine,
    Generate,
    Label,
    Labelled,
    Limits,
    Sampling,
    Score,
    Scored,
    Token,
)
from services.inference.engine.engine import Engine, run
from services.inference.engine.fetching import Fetcher
from services.inference.engine.inbox import Inbox
from services.inference.engine.kernels import NEEDED, cpu_flags
from tests.inference.engine import tiny, tuned
from tests.inference.engine.tiny import GREEDY, prompts

COUNT = 16
LENGTHS = (50, 1, 7, 33)
BACKENDS = ["eager", pytest.param("fused", marks=pytest.mark.skipif(bool(NEEDED - cpu_flags()), reason="no AVX-512"))]
FAMILIES = ("gemma3", "qwen2")
HEADS = {"a": tuned.head(1, 3, 32), "b": tuned.head(2, 5, 32)}


class House:
    """One tiny model, its adapters in a store, and PEFT's answers."""

    def __init__(self, family: str, directory: Path) -> None:
        self.directory = tiny.save(family, directory, hidden_size=32, head_dim=16)
        self.model = tiny.reference(self.directory)
        self.objects = open_objects_sync(f"file://{directory}/store")
        self.key = tuned.public_key_file(directory)
        _, hello = build(tiny.settings(self.directory))
        self.base = hello.digest
        self.tuned = {"a": tuned.peft(self.model, 1), "b": tuned.peft(self.model, 2, ("q_proj", "v_proj"), rank=9, dora=True)}
        self.digests = {
            "a": self.publish("a", labels=["x", "y", "z"], temperature=2.0, max_tokens=8, pooling="POOLING_LAST"),
            "b": self.publish(
                "b", rank=9, alpha=18.0, dora=True, targets=["q_proj", "v_proj"], labels=list("vwxyz"), pooling="POOLING_MEAN"
            ),
        }

    def publish(self, name: str, **changes: Any) -> str:
        files = tuned.files(self.tuned[name], HEADS[name])
        return tuned.publish(self.objects, files, tuned.manifest(files, self.base, **changes))

    def settings(self, backend: str, **others: Any) -> Any:
        store = {"store_url": f"file://{self.directory}/store", "manifest_public_keys": (self.key,)}
        return tiny.settings(self.directory, backend=backend, **store | others)

    def of(self, name: str) -> Any:
        return self.tuned[name] if name else self.model


@pytest.fixture(scope="module", params=FAMILIES)
def house(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> House:
    return House(request.param, tmp_path_factory.mktemp(request.param))


def through(settings: Any, calls: Sequence[Any]) -> dict[str, list[FromEngine]]:
    """All calls together through a real engine, with its fetcher, to the last Done."""
    runner, hello = build(settings)
    inbox = Inbox()
    engine = Engine(runner, hello, settings, fetch=Fetcher(runner.fetch, inbox).ask)
    said: dict[str, list[FromEngine]] = {call.id: [] for call in calls}

    def hear(events: list[FromEngine]) -> None:
        for event in events:
            if (id := getattr(event, "id", None)) is not None:
                said[id].append(event)
        if all(messages and isinstance(messages[-1], Done) for messages in said.values()):
            inbox.close()

    inbox.put(calls)
    thread = threading.Thread(target=run, args=(engine, inbox, hear), daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert engine.blocks.held == 0
    return said


def generate(id: str, prompt: Sequence[int], adapter: str, **changes: Any) -> Generate:
    limits = Limits(max_output_tokens=COUNT, end_token_ids=(), ignore_end_token=True)
    fields: dict[str, Any] = {"sampling": GREEDY, "limits": limits} | common() | changes
    return Generate(id, tuple(prompt), adapter=adapter, owner=tuned.OWNER, **fields)


def common() -> dict[str, Any]:
    return {"deadline_s": 60.0, "tenant": "t", "cache_salt": b"s"}


def tokens(messages: Sequence[FromEngine]) -> list[int]:
    done = messages[-1]
    assert isinstance(done, Done) and done.error is None, done
    return [message.token_id for message in messages if isinstance(message, Token)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("slots", "step_tokens"), [(3, 512), (1, 11)])
def test_greedy_tokens_equal_peft_alone_mixed_and_in_turns(house: House, backend: str, slots: int, step_tokens: int) -> None:
    """With one slot the adapters take turns; the base's calls, and each adapter's, say what they say alone."""
    asked = {(name, k): prompt for name in ("", "a", "b") for k, prompt in enumerate(prompts(LENGTHS))}
    calls = [generate(f"{name}:{k}", prompt, house.digests.get(name, "")) for (name, k), prompt in asked.items()]
    said = through(house.settings(backend, adapter_slots=slots, max_step_tokens=step_tokens), calls)
    for (name, k), prompt in asked.items():
        assert tokens(said[f"{name}:{k}"]) == tiny.generate(house.of(name), prompt, COUNT), (name, k)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_and_vectors_of_an_adapter_are_its_own(house: House, backend: str) -> None:
    prefix, continuation = prompts((9, 4))
    text = (*prefix, *continuation)
    calls = [
        Score(f"s{name}", tuple(prefix), (tuple(continuation),), adapter=house.digests.get(name, ""), owner=tuned.OWNER, **common())
        for name in ("", "a")
    ]
    calls += [Embed(f"e{name}", (text,), adapter=house.digests.get(name, ""), owner=tuned.OWNER, **common()) for name in ("", "a")]  # type: ignore[list-item]
    said = through(house.settings(backend, adapter_slots=2), calls)
    for name in ("", "a"):
        with torch.inference_mode():
            answer = house.of(name)(torch.tensor([text]), output_hidden_states=True)
        logprobs = torch.log_softmax(answer.logits[0, len(prefix) - 1 : -1], -1).gather(1, torch.tensor(continuation)[:, None])[:, 0]
        scored = next(message for message in said[f"s{name}"] if isinstance(message, Scored))
        torch.testing.assert_close(torch.tensor(scored.continuations[0].logprobs), logprobs, rtol=1e-4, atol=1e-4)
        (vector,) = next(message for message in said[f"e{name}"] if isinstance(message, Embedded)).vectors
        wanted = answer.hidden_states[-1][0].mean(0)
        torch.testing.assert_close(torch.frombuffer(bytearray(vector), dtype=torch.float32), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_T10_labels_of_mixed_heads_are_those_of_each_alone(house: House, backend: str) -> None:
    inputs = tuple(map(tuple, prompts((5, 40, 17))))
    label = {name: Label(name, inputs, house.digests[name], tuned.OWNER, **common()) for name in ("a", "b")}
    settings = house.settings(backend, adapter_slots=2)
    mixed = through(settings, [*label.values(), generate("g", inputs[1], "")])
    for name, (weight, bias) in HEADS.items():
        logits = next(message for message in mixed[name] if isinstance(message, Labelled)).logits
        (alone,) = [message for message in through(settings, [label[name]])[name] if isinstance(message, Labelled)]
        if backend == "fused":
            assert logits == alone.logits
        for raw, each, ids in zip(logits, alone.logits, inputs, strict=True):
            found, same = (torch.frombuffer(bytearray(data), dtype=torch.float32) for data in (raw, each))
            torch.testing.assert_close(found, same, rtol=1e-5, atol=1e-5)
            with torch.inference_mode():
                states = house.of(name)(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
            pooled = states[-1] if name == "a" else states.mean(0)
            torch.testing.assert_close(found, weight @ pooled + bias, rtol=1e-3, atol=1e-3)


def test_F11_a_stream_keeps_its_adapter_and_its_draws_in_any_company(house: House) -> None:
    warm = Sampling(seed=9, temperature=1.2, top_p=0.95)
    settings = house.settings("eager", adapter_slots=1)
    one = generate("1", prompts(LENGTHS)[0], house.digests["a"], sampling=warm)
    alone = tokens(through(settings, [one])["1"])
    others = [generate(f"o{k}", prompt, house.digests["b"]) for k, prompt in enumerate(prompts(LENGTHS))]
    assert tokens(through(settings, [*others[:2], one, *others[2:]])["1"]) == alone


def test_prefixes_are_cached_for_each_adapter_apart(house: House) -> None:
    prompt = prompts(LENGTHS)[0]
    settings = house.settings("eager", adapter_slots=2)
    for names in (("", "a", "b"), ("b", "", "a")):
        said = through(settings, [generate(name or "base", prompt, house.digests.get(name, "")) for name in names])
        for name in names:
            assert tokens(said[name or "base"]) == tiny.generate(house.of(name), prompt, COUNT)
