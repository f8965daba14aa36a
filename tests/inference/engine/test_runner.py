"""A step over a real tiny model: probes, pooling, and one bad row that stays alone."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from services.inference.engine.backend import Batch
from services.inference.engine.build import settle_attention
from services.inference.engine.calls import Sampling
from services.inference.engine.eager import EagerBackend
from services.inference.engine.kernels import Unsupported
from services.inference.engine.runner import TorchRunner, pack
from services.inference.engine.step import Draw, Probe, Row
from tests.inference.engine import tiny
from tests.inference.engine.tiny import GREEDY, VOCABULARY, Walk, drive, prompts, tables

CPU = torch.device("cpu")
LENGTHS = (41, 5, 18, 30)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("gemma3", tmp_path_factory.mktemp("gemma3"))


@pytest.fixture(scope="module")
def runner(directory: Path) -> TorchRunner:
    return tiny.runner(directory)


def truth(directory: Path, prompt: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [T, vocabulary] and last hidden states [T, width] of transformers."""
    with torch.inference_mode():
        answer: Any = tiny.reference(directory)(torch.tensor([prompt]), output_hidden_states=True)
    return torch.log_softmax(answer.logits[0], -1), answer.hidden_states[-1][0]


def greedy(position: int = 0, tokens: list[int] | None = None) -> Draw:
    return Draw(GREEDY, 0, position, tokens or [], len(tokens or []))


def test_pack_lays_rows_end_to_end() -> None:
    rows = [
        Row(key=0, tokens=[5, 6, 7], start=15, blocks=[3, 9, 4], draw=greedy()),
        Row(key=1, tokens=[8], start=32, blocks=[1, 2, 7], draw=greedy()),
        Row(key=2, tokens=[1, 2, 3, 4], start=0, blocks=[6], probe=Probe([(2, 9), (0, 4), (2, None)])),
        Row(key=3, tokens=[9, 9], start=0, blocks=[0], pool=True, draw=greedy()),
        Row(key=4, tokens=[9, 8], start=0, blocks=[5]),
        Row(key=5, tokens=[9, 8], start=0, blocks=[8], probe=Probe([(1, None), (0, None)]), draw=greedy()),
    ]
    batch, spans = pack(rows, CPU)
    assert batch.tokens.tolist() == [5, 6, 7, 8, 1, 2, 3, 4, 9, 9, 9, 8, 9, 8]
    assert batch.positions.tolist() == [15, 16, 17, 32, 0, 1, 2, 3, 0, 1, 0, 1, 0, 1]
    assert batch.rows.tolist() == [0, 3, 4, 8, 10, 12, 14]
    assert batch.lengths.tolist() == [18, 33, 4, 2, 2, 2]
    assert batch.tables.tolist() == [[3, 9, 0], [1, 2, 7], [6, 0, 0], [0, 0, 0], [5, 0, 0], [8, 0, 0]]
    assert batch.slots.tolist() == [63, 144, 145, 112, 96, 97, 98, 99, 0, 1, 80, 81, 128, 129]
    assert batch.select.tolist() == [2, 3, 4, 6, 8, 9, 11, 12, 13]
    assert spans == [(0, 1), (1, 2), (2, 4), (4, 6), (6, 7), (7, 9)]


def test_a_table_that_is_too_short_is_an_error() -> None:
    with pytest.raises(ValueError, match="17 tokens needs 2 blocks and has 1"):
        pack([Row(key=0, tokens=[1], start=16, blocks=[0])], CPU)


def test_no_rows_is_no_step(runner: TorchRunner) -> None:
    assert runner.step([]) == []


@pytest.mark.parametrize("pool", [False, True])
def test_a_probe_reports_targets_probes_and_alternatives(directory: Path, runner: TorchRunner, pool: bool) -> None:
    prompt = prompts(LENGTHS)[0]
    raw, _ = truth(directory, prompt)
    targets = [(n, prompt[n + 1]) for n in range(len(prompt) - 1)] + [(len(prompt) - 1, None)]
    probe = Probe(targets, probes=(4, 90), first_probes=(1, 2, 96), top=3)
    row = Row(key=0, tokens=prompt, start=0, blocks=[5, 1, 3], probe=probe, pool=pool)
    (result,) = runner.step([row])
    wanted = [float(raw[n, prompt[n + 1]]) for n in range(len(prompt) - 1)]
    assert result.target_logprobs[:-1] == pytest.approx(wanted, abs=1e-4) and result.target_logprobs[-1] is None
    assert [list(pair) for pair in result.probe_logprobs] == [pytest.approx(raw[n, [4, 90]].tolist(), abs=1e-4) for n in range(len(prompt))]
    assert list(result.first_probe_logprobs) == pytest.approx(raw[0, [1, 2, 96]].tolist(), abs=1e-4)
    values, ids = raw.topk(3)
    assert [[i for i, _ in top] for top in result.probe_top] == ids.tolist()
    assert [[v for _, v in top] for top in result.probe_top] == [pytest.approx(v, abs=1e-4) for v in values.tolist()]
    assert result.token is None and result.error is None


def test_probes_beyond_a_slice_and_out_of_order(directory: Path, runner: TorchRunner) -> None:
    (prompt,) = prompts([150])
    raw, _ = truth(directory, prompt)
    targets = [(n, prompt[n]) for n in (149, *range(140), 3)]
    (result,) = runner.step([Row(key=0, tokens=prompt, start=0, blocks=list(range(10)), probe=Probe(targets, first_probes=(8,)))])
    assert result.target_logprobs == pytest.approx([float(raw[n, token]) for n, token in targets], abs=1e-4)
    assert list(result.first_probe_logprobs) == pytest.approx([float(raw[149, 8])], abs=1e-4)


def test_a_row_may_probe_and_draw(directory: Path, runner: TorchRunner) -> None:
    prompt = prompts(LENGTHS)[1]
    raw, _ = truth(directory, prompt)
    row = Row(key=0, tokens=prompt, start=0, blocks=[0], probe=Probe([(0, prompt[1])]), draw=greedy())
    (result,) = runner.step([row])
    assert result.token == int(raw[-1].argmax())
    assert result.target_logprobs == pytest.approx([float(raw[0, prompt[1]])], abs=1e-4)


def vectors(runner: TorchRunner, chunk: int) -> list[torch.Tensor]:
    """Each prompt's vector, with the rows cut into chunks and run side by side."""
    found: dict[int, bytes] = {}
    work = {key: (prompt, table) for key, (prompt, table) in enumerate(zip(prompts(LENGTHS), tables(4, 48), strict=True))}
    for start in range(0, max(LENGTHS), chunk):
        rows = [
            Row(key=k, tokens=p[start : start + chunk], start=start, blocks=t, pool=True, pool_ends=start + chunk >= len(p))
            for k, (p, t) in work.items()
            if start < len(p)
        ]
        for row, result in zip(rows, runner.step(rows), strict=True):
            assert result.error is None and (result.vector is not None) == row.pool_ends
            if result.vector is not None:
                found[row.key] = result.vector
                runner.forget(row.key)
    return [torch.frombuffer(bytearray(found[key]), dtype=torch.float32) for key in sorted(found)]


@pytest.mark.parametrize("chunk", [100, 16, 7])
def test_pooling_is_the_mean_of_the_last_states_over_chunks(directory: Path, runner: TorchRunner, chunk: int) -> None:
    for prompt, vector in zip(prompts(LENGTHS), vectors(runner, chunk), strict=True):
        torch.testing.assert_close(vector, truth(directory, prompt)[1].mean(0), rtol=1e-4, atol=1e-4)


def test_a_repeated_chunk_counts_once_and_a_missing_one_is_told(runner: TorchRunner) -> None:
    prompt = prompts(LENGTHS)[0]
    first, last = (
        Row(key=9, tokens=prompt[:20], start=0, blocks=[0, 1, 2], pool=True),
        Row(key=9, tokens=prompt[20:], start=20, blocks=[0, 1, 2], pool=True, pool_ends=True),
    )
    assert runner.step([last])[0].error == "gap"
    runner.step([first])
    runner.step([first])
    once = runner.step([last])[0].vector
    assert once is not None and runner.step([last])[0].vector == once
    runner.forget(9)
    runner.forget(9)
    assert runner.step([last])[0].error == "gap"


class Poisoned:
    """A backend whose forward spoils the keys and values, and the states, of every token of one sequence."""

    def __init__(self, backend: EagerBackend, token: int) -> None:
        self.backend, self.token = backend, token

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def forward(self, batch: Batch) -> torch.Tensor:
        hidden = self.backend.forward(batch)
        bad = batch.tokens == self.token
        for keys, values in self.backend.pools.values():
            keys[batch.slots[bad]] = math.nan
            values[batch.slots[bad]] = math.nan
        return hidden.masked_fill(bad[batch.select][:, None], math.nan)


def test_A20_nan_stays_with_its_row(directory: Path) -> None:
    """The bad sequence's blocks hold NaN, and so does its neighbours' padding, block 0 and what they reuse later."""
    backend = tiny.runner(directory).backend
    assert isinstance(backend, EagerBackend)
    poisoned, clean = TorchRunner(Poisoned(backend, token=1)), tiny.runner(directory)  # type: ignore[arg-type]
    texts = prompts(LENGTHS)
    expected = drive(clean, [Walk(k, texts[k], tables(4, 80)[k]) for k in range(4)], 12)
    walks = [Walk(k, texts[k], [block + 20 for block in tables(4, 80)[k]]) for k in range(4)]
    spoiled = [0, 1, 2]  # block 0 is what short tables are padded with
    bad = Row(key=9, tokens=[1] * 40, start=0, blocks=spoiled, draw=greedy())
    rows = [bad, *(walk.row(100) for walk in walks)]
    results = poisoned.step(rows)
    assert [result.error for result in results] == ["nan", None, None, None, None]
    for walk, result in zip(walks, results[1:], strict=True):
        walk.computed = len(walk.prompt)
        walk.tokens.append(result.token or 0)
    worse = Row(key=9, tokens=[1], start=40, blocks=spoiled, draw=greedy())
    results = poisoned.step([worse, *(walk.row(100) for walk in walks)])
    assert [result.error for result in results] == ["nan", None, None, None, None]
    for walk, result in zip(walks, results[1:], strict=True):
        walk.computed += 1
        walk.tokens.append(result.token or 0)
    assert drive(poisoned, walks, 12) == expected
    # Blocks freed by the bad sequence, whose tails still hold its NaN, beside a longer neighbour.
    again = [Walk(5, texts[3], [*spoiled, 50]), Walk(6, texts[0], [60, 61, 62, 63])]
    assert drive(poisoned, again, 12) == [expected[3], expected[0]]


@pytest.mark.parametrize(
    ("raised", "meant"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), MemoryError),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), MemoryError),
        (RuntimeError("shapes differ"), RuntimeError),
    ],
)
def test_F8_out_of_memory_is_a_memory_error(
    directory: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception, meant: type[Exception]
) -> None:
    own = tiny.runner(directory)

    def fails(**_: Any) -> Any:
        raise raised

    monkeypatch.setattr(own.backend, "trunk", fails)
    with pytest.raises(meant):
        own.step([Row(key=0, tokens=[4], start=0, blocks=[0], draw=greedy())])


def test_replay_draws_the_same_alone_and_in_any_batch(runner: TorchRunner) -> None:
    """float32: same (seed, prompt, index), same tokens, whatever runs beside it and in whatever order."""
    texts = prompts((12, 30, 7, 22, 3))
    heat = [Sampling(seed=70 + k, temperature=1.3, top_k=(0, 20)[k % 2], top_p=(1.0, 0.9)[k // 3]) for k in range(5)]

    def walk(k: int, table: list[int]) -> Walk:
        return Walk(k, texts[k], table, heat[k], index=k % 3)

    alone = [drive(runner, [walk(k, tables(1, 64)[0])], 20)[0] for k in range(5)]
    assert len({tuple(tokens) for tokens in alone}) == 5
    for members in ([0, 1, 2, 3, 4], [4, 2, 0, 1, 3], [3, 1], [2, 4, 0]):
        together = drive(runner, [walk(k, table) for k, table in zip(members, tables(len(members), 64), strict=True)], 20, budget=8)
        assert together == [alone[k] for k in members]


def test_whole_rows_and_candidates_agree(runner: TorchRunner) -> None:
    """A backend that offers candidates chooses what one without them chooses."""

    class Offers:
        def __getattr__(self, name: str) -> Any:
            return getattr(runner.backend, name)

        def candidates(self, hidden: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
            return self.backend_logits(hidden).topk(count)  # type: ignore[return-value]

        def backend_logits(self, hidden: torch.Tensor) -> torch.Tensor:
            return runner.backend.logits(hidden)

    texts = prompts(LENGTHS)
    kinds = [GREEDY, Sampling(seed=5, top_k=4), Sampling(seed=6, top_k=30, top_p=0.8), Sampling(seed=7)]

    def run(own: TorchRunner) -> list[list[int]]:
        return drive(own, [Walk(k, texts[k], tables(4, 64)[k], kinds[k]) for k in range(4)], 10)

    assert run(TorchRunner(Offers())) == run(runner)  # type: ignore[arg-type]


def test_warm_up_leaves_no_trace(directory: Path, runner: TorchRunner) -> None:
    own = tiny.runner(directory, kv_tokens=128)
    own.warm_up(512)
    assert own.context == 128
    text = prompts(LENGTHS)[2]
    assert drive(own, [Walk(0, text, [7, 0, 3])], 9) == drive(runner, [Walk(0, text, [7, 0, 3])], 9)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"model_type": "not_a_model"}, "not a causal language model"),
        ({"model_type": "vit"}, "not a causal language model"),
        ({"model_type": "bart"}, "an encoder"),
        ({"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "chunked_attention"),
        ({"use_bidirectional_attention": True}, "not plain causal"),
    ],
)
def test_a_model_that_would_be_computed_wrongly_is_refused(tmp_path: Path, changed: dict[str, Any], why: str) -> None:
    tiny.edit_config(tiny.save("gemma3", tmp_path), **changed)
    with pytest.raises(Unsupported, match=why):
        tiny.runner(tmp_path)


def test_a_rotary_embedding_that_depends_on_neighbours_bounds_the_context(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 96}
    tiny.edit_config(tiny.save("llama", tmp_path), rope_parameters=rope)
    assert tiny.runner(tmp_path).context == 96


def test_vocabulary_is_the_models(runner: TorchRunner) -> None:
    assert (runner.vocabulary, runner.blocks) == (VOCABULARY, 128)


@pytest.mark.parametrize("fault", [None, "window", "old blocks"])
def test_varlen_attention_is_used_only_where_it_agrees(directory: Path, monkeypatch: pytest.MonkeyPatch, fault: str | None) -> None:
    """A varlen_attn of our own, right or wrong, in the place of torch's, which a CPU lacks."""
    from torch.nn.attention import varlen

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor, *rest: Any, **how: Any) -> torch.Tensor:
        assert how["block_table"].dtype == how["seqused_k"].dtype == cu_seq_q.dtype == torch.int32 and rest[0] is None
        assert (rest[1], rest[2]) == (int((cu_seq_q[1:] - cu_seq_q[:-1]).max()), int(how["seqused_k"].max()))
        out = []
        for b, length in enumerate(how["seqused_k"].tolist()):
            q = query[cu_seq_q[b] : cu_seq_q[b + 1]]
            k, v = (pages[how["block_table"][b].long()].flatten(0, 1)[:length] for pages in (key, value))
            at = torch.arange(length - len(q), length)[:, None] - torch.arange(length)
            left = how["window_size"][0] + (fault == "window")
            hidden = (at < 0) | ((at > left) if how["window_size"][0] >= 0 else (at < 0))
            if fault == "old blocks":
                hidden |= torch.arange(length) < length - len(q)
                hidden &= at != 0
            scores = torch.einsum("qhd,kgd->hqk", q, k) * how["scale"]  # one key head
            out.append(torch.einsum("hqk,kgd->qhd", scores.masked_fill(hidden, -math.inf).softmax(-1), v))
        return torch.cat(out)

    monkeypatch.setattr(varlen, "varlen_attn", attend)
    backend = tiny.runner(directory).backend
    assert isinstance(backend, EagerBackend)
    settle_attention(backend)
    assert backend.varlen is (fault is None)


def test_varlen_attention_that_raises_is_not_used(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    backend = tiny.runner(directory).backend
    assert isinstance(backend, EagerBackend)
    settle_attention(backend)  # on a CPU torch's own raises
    assert backend.varlen is False and "attention is gathered" in caplog.text
