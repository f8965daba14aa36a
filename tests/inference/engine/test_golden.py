"""Greedy tokens of tiny models equal transformers' token for token, however the work is cut."""

from pathlib import Path
from typing import Any

import pytest
import torch

from services.inference.engine.build import build
from services.inference.engine.calls import Done, Generate, Limits, Sampling, Token
from services.inference.engine.engine import Engine
from services.inference.engine.runner import TorchRunner, pack
from services.inference.engine.step import Probe, Row
from tests.inference.engine import tiny
from tests.inference.engine.tiny import FAMILIES, GREEDY, Walk, drive, prompts, tables

LENGTHS = (50, 1, 7, 33, 16)
COUNT = 24


@pytest.fixture(scope="module", params=FAMILIES)
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[TorchRunner, list[list[int]], Path]:
    directory = tiny.save(request.param, tmp_path_factory.mktemp(request.param))
    model = tiny.reference(directory)
    expected = [tiny.generate(model, prompt, COUNT) for prompt in prompts(LENGTHS)]
    return tiny.runner(directory), expected, directory


def test_alone(golden: tuple[TorchRunner, list[list[int]], Path]) -> None:
    runner, expected, _ = golden
    for key, prompt in enumerate(prompts(LENGTHS)):
        assert drive(runner, [Walk(key, prompt, tables(1, 80)[0])], COUNT) == [expected[key]]


@pytest.mark.parametrize("budget", [10_000, 17, 3])
def test_batched_with_chunks_of(golden: tuple[TorchRunner, list[list[int]], Path], budget: int) -> None:
    runner, expected, _ = golden
    sequences = [Walk(k, p, t) for k, (p, t) in enumerate(zip(prompts(LENGTHS), tables(len(LENGTHS), 80), strict=True))]
    assert drive(runner, sequences, COUNT, budget) == expected


def test_preempted_and_computed_again_elsewhere(golden: tuple[TorchRunner, list[list[int]], Path]) -> None:
    runner, expected, _ = golden
    sequences = [Walk(k, p, t) for k, (p, t) in enumerate(zip(prompts(LENGTHS), tables(len(LENGTHS), 80), strict=True))]
    drive(runner, sequences, 9)
    sequences[0].computed, sequences[0].blocks = 0, list(range(100, 106))
    sequences[3].computed, sequences[3].blocks = 0, list(range(110, 116))
    assert drive(runner, sequences, COUNT, budget=20) == expected


def test_prefix_blocks_are_shared(golden: tuple[TorchRunner, list[list[int]], Path]) -> None:
    runner, expected, _ = golden
    prompt = prompts(LENGTHS)[0]
    first = Walk(0, prompt, range(10, 15))
    drive(runner, [first], 1)
    second = Walk(1, prompt, [10, 11, 12, 20, 21])
    second.computed = 48  # three whole blocks are the other's
    assert drive(runner, [second, first], COUNT) == [expected[0], expected[0]]


def test_a_newcomer_prefills_beside_decodes(golden: tuple[TorchRunner, list[list[int]], Path]) -> None:
    runner, expected, _ = golden
    early, late = (Walk(k, prompts(LENGTHS)[k], tables(2, 80)[k]) for k in (0, 1))
    drive(runner, [early], 5)
    assert drive(runner, [early, late], COUNT) == [expected[0], expected[1]]


def test_built_by_settings(golden: tuple[TorchRunner, list[list[int]], Path]) -> None:
    _, expected, directory = golden
    runner, hello = build(tiny.settings(directory))
    assert (hello.vocabulary, hello.context, hello.width, hello.blocks) == (tiny.VOCABULARY, 512, 24, 128)
    assert hello.backend == "eager" and hello.dtype == "float32" and hello.end_token_ids == (1,)
    assert drive(runner, [Walk(0, prompts(LENGTHS)[0], range(8))], COUNT) == [expected[0]]


def test_logits_of_the_head_alone_equal_the_model(golden: tuple[TorchRunner, list[list[int]], Path]) -> None:
    runner, _, directory = golden
    prompt = prompts(LENGTHS)[0]
    row = Row(key=0, tokens=prompt, start=0, blocks=[0, 1, 2, 3], probe=Probe([(n, None) for n in range(len(prompt))]))
    batch, _ = pack([row], runner.backend.device)
    found = runner.backend.logits(runner.backend.forward(batch))
    with torch.inference_mode():
        wanted: Any = tiny.reference(directory)(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def through(engine: Engine, calls: list[Generate]) -> dict[tuple[str, int], list[int]]:
    for call in calls:
        engine.take(call)
    said: dict[tuple[str, int], list[int]] = {}
    while not engine.idle:
        for event in engine.step():
            if isinstance(event, Token):
                said.setdefault((event.id, event.index), []).append(event.token_id)
            assert not isinstance(event, Done) or event.error is None
    assert engine.blocks.held == 0
    return said


def asked(id: str, prompt: list[int], sampling: Sampling = GREEDY, outputs: int = 1) -> Generate:
    limits = Limits(max_output_tokens=COUNT, end_token_ids=(), ignore_end_token=True)
    return Generate(id, tuple(prompt), sampling, limits, deadline_s=600.0, tenant="t", cache_salt=b"s", outputs=outputs)


@pytest.mark.parametrize(("kv_tokens", "step_tokens"), [(2048, 512), (2048, 11), (192, 64)])
def test_through_the_engine(golden: tuple[TorchRunner, list[list[int]], Path], kv_tokens: int, step_tokens: int) -> None:
    """Chunks, prefixes seen before and, with 12 blocks for 17, preemption: the same tokens, and drawn ones the same in any company."""
    _, expected, directory = golden
    settings = tiny.settings(directory, kv_tokens=kv_tokens, max_step_tokens=step_tokens)
    runner, hello = build(settings)
    texts = prompts(LENGTHS)
    engine = Engine(runner, hello, settings)
    for _ in range(2):  # the second time from the cache
        said = through(engine, [asked(str(k), text) for k, text in enumerate(texts)])
        assert [said[str(k), 0] for k in range(len(texts))] == expected
    warm = Sampling(seed=9, temperature=1.2, top_p=0.95)
    drawn = [through(engine, [asked(str(k), text, warm, outputs=2)]) for k, text in enumerate(texts)]
    together = through(engine, [asked(str(k), text, warm, outputs=2) for k, text in enumerate(texts)])
    assert together == {key: tokens for one in drawn for key, tokens in one.items()}
    assert len({tuple(tokens) for tokens in together.values()}) == 2 * len(texts)
