"""The fused kernels against transformers in float32, and against themselves in every batch, chunk and thread count."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from services.inference.engine import fused, kernels
from services.inference.engine.backend import Batch
from services.inference.engine.build import build
from services.inference.engine.fused import VNNI, FusedBackend, Unsupported
from services.inference.engine.settings import EngineSettings
from services.inference.engine.step import BLOCK_SIZE
from tests.inference.engine import tuned

needs_vnni = pytest.mark.skipif(VNNI not in kernels.cpu_flags(), reason="int8 layers need AVX512-VNNI")
if kernels.NEEDED - kernels.cpu_flags():
    pytest.skip("the fused kernels need AVX-512", allow_module_level=True)

SIZES: dict[str, Any] = {
    "vocab_size": 331,
    "hidden_size": 64,
    "intermediate_size": 144,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # large, so that a wrong rotation or window changes the chosen token
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Gemma3TextConfig": {
        "head_dim": 32,
        "query_pre_attn_scalar": 24,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        "final_logit_softcapping": 20.0,
    },
    "LlamaConfig": {
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "Qwen2Config": {"tie_word_embeddings": True},
    "Qwen3Config": {"head_dim": 16, "tie_word_embeddings": False},
    "MistralConfig": {"head_dim": 32, "sliding_window": 20},
}
PROMPT = [int(7 + 13 * i * i % 300) for i in range(45)]  # longer than every window


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    return tiny(request.param, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("Gemma3TextConfig", tmp_path_factory.mktemp("gemma"))[0]


def tiny(name: str, directory: Path, **changes: Any) -> tuple[Path, Any]:
    import transformers

    torch.manual_seed(5)
    config = getattr(transformers, name)(**{**SIZES, **FAMILIES[name], **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():  # biases and norms start as constants, which would hide a forgotten one
        for key, parameter in model.named_parameters():
            if key.endswith(".bias") or "norm" in key:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(directory)
    return directory, model


def load(directory: Path, cache: str, dtype: str = "float32", threads: int = 2, int8: bool = False) -> FusedBackend:
    settings = EngineSettings(cache_dir=cache, dtype=dtype, threads=threads, kv_tokens=1024, int8=int8, adapter_slots=3)  # type: ignore[arg-type]
    return FusedBackend.load(directory, settings)


def batch(rows: Sequence[tuple[Sequence[int], int, Sequence[int]]]) -> Batch:
    """Rows are (tokens, start, blocks); every token is selected."""
    edges, positions, slots, width = [0], [], [], max(len(blocks) for _, _, blocks in rows)
    for tokens, start, blocks in rows:
        edges.append(edges[-1] + len(tokens))
        positions += range(start, start + len(tokens))
        slots += [blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(start, start + len(tokens))]
    return Batch(
        tokens=torch.tensor([token for tokens, _, _ in rows for token in tokens]),
        positions=torch.tensor(positions),
        rows=torch.tensor(edges, dtype=torch.int32),
        lengths=torch.tensor([start + len(tokens) for tokens, start, _ in rows], dtype=torch.int32),
        tables=torch.tensor([[*blocks, *[0] * (width - len(blocks))] for _, _, blocks in rows], dtype=torch.int32),
        slots=torch.tensor(slots),
        select=torch.arange(edges[-1]),
    )


def greedy(backend: FusedBackend, prompt: Sequence[int], count: int, blocks: Sequence[int]) -> list[int]:
    out: list[int] = []
    tokens, start = list(prompt), 0
    for _ in range(count):
        hidden = backend.forward(batch([(tokens, start, blocks)]))
        start += len(tokens)
        tokens = [int(backend.logits(hidden[-1:]).argmax())]
        out += tokens
    return out


def test_float32_greedy_tokens_equal_transformers(family: tuple[Path, Any], cache: str) -> None:
    directory, model = family
    backend = load(directory, cache)
    wanted = model.generate(torch.tensor([PROMPT]), max_new_tokens=40, min_new_tokens=40, do_sample=False)[0, len(PROMPT) :].tolist()
    assert greedy(backend, PROMPT, 40, [9, 3, 5, 2, 7, 30]) == wanted


def test_float32_hidden_states_and_logits_are_close_to_transformers(family: tuple[Path, Any], cache: str) -> None:
    directory, model = family
    backend = load(directory, cache)
    with torch.inference_mode():
        wanted = model(torch.tensor([PROMPT])).logits[0]
    hidden = backend.forward(batch([(PROMPT, 0, [4, 1, 8])]))
    torch.testing.assert_close(backend.logits(hidden), wanted, rtol=1e-4, atol=1e-3)


def test_bfloat16_stays_near_float32(family: tuple[Path, Any], cache: str) -> None:
    directory, model = family
    with torch.inference_mode():
        wanted = torch.log_softmax(model(torch.tensor([PROMPT])).logits[0], -1)
        plain = copy.deepcopy(model).bfloat16()(torch.tensor([PROMPT])).logits[0].float()
    backend = load(directory, cache, "bfloat16")
    found = torch.log_softmax(backend.logits(backend.forward(batch([(PROMPT, 0, [4, 1, 8])]))), -1)
    ours = (wanted.exp() * (wanted - found)).sum(-1).mean()
    theirs = (wanted.exp() * (wanted - torch.log_softmax(plain, -1))).sum(-1).mean()
    assert ours < 1.5 * theirs + 1e-4


@needs_vnni
def test_int8_layers_are_the_products_of_rounded_weights(family: tuple[Path, Any], cache: str) -> None:
    """The reference rounds the same rows of weights to their own 255 steps; what is left to differ is the rounding of activations."""
    directory, model = family
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in rounded.named_parameters():
            if "_proj.weight" in name:
                scale = weight.abs().amax(1, keepdim=True) / 127
                weight.copy_((weight / scale).round() * scale)
        wanted = torch.log_softmax(rounded(torch.tensor([PROMPT])).logits[0], -1)
        exact = torch.log_softmax(model(torch.tensor([PROMPT])).logits[0], -1)
    backend = load(directory, cache, int8=True)
    found = torch.log_softmax(backend.logits(backend.forward(batch([(PROMPT, 0, [4, 1, 8])]))), -1)
    from_rounded, from_exact = ((each.exp() * (each - found)).sum(-1).mean() for each in (wanted, exact))
    assert from_rounded < 0.8 * from_exact
    assert from_exact < 0.1


@pytest.mark.parametrize("form", ["float32", "bfloat16", pytest.param("int8", marks=needs_vnni)])
def test_bits_do_not_depend_on_batch_chunks_or_threads(family: tuple[Path, Any], cache: str, form: str) -> None:
    directory, _ = family
    dtype, int8 = ("bfloat16", True) if form == "int8" else (form, False)
    alone = load(directory, cache, dtype, threads=1, int8=int8)
    wanted = alone.forward(batch([(PROMPT, 0, [4, 1, 8])]))
    backend = load(directory, cache, dtype, threads=2, int8=int8)
    others = [(PROMPT[i : i + 19 + i], 0, [20 + 4 * i, 21 + 4 * i, 22 + 4 * i]) for i in range(5)]
    assert torch.equal(backend.forward(batch([*others, (PROMPT, 0, [40, 50, 60])]))[-len(PROMPT) :], wanted)
    pieces, start = [], 0
    for size in (1, 7, 16, 2, 11, 8):
        rows = [others[size % 5], (PROMPT[start : start + size], start, [9, 3, 5]), others[(size + 1) % 5]]
        first = len(rows[0][0])
        pieces.append(backend.forward(batch(rows))[first : first + size])
        start += size
    assert start == len(PROMPT)
    assert torch.equal(torch.cat(pieces), wanted)
    assert torch.equal(backend.logits(torch.cat(pieces)), torch.cat([alone.logits(row[None]) for row in wanted]))


ADAPTERS: list[dict[str, Any]] = [
    {},
    {"targets": ("k_proj", "up_proj"), "rank": 20, "rslora": True},
    {"targets": ("q_proj", "o_proj", "gate_proj"), "dora": True},
]


def adapted(backend: FusedBackend, model: Any) -> list[Any]:
    """PEFT's models of what is put into slots 1, 2 and 3."""
    found = [tuned.peft(model, seed, **form) for seed, form in enumerate(ADAPTERS, 1)]
    for slot, each in enumerate(found, 1):
        backend.install(slot, backend.prepare(tuned.weights(each)))
    return found


def mixed(slots: Sequence[int]) -> Batch:
    """The prompt once for each slot; 0 is the base alone."""
    own = batch([(PROMPT, 0, [4 * n, 4 * n + 1, 4 * n + 2]) for n in range(len(slots))])
    own.adapters = torch.tensor(slots, dtype=torch.int32).repeat_interleave(len(PROMPT))
    return own


def test_float32_logits_of_mixed_adapters_are_pefts(family: tuple[Path, Any], cache: str) -> None:
    directory, model = family
    backend = load(directory, cache)
    references = [model, *adapted(backend, model)]
    found = backend.logits(backend.forward(mixed([2, 0, 1, 3, 1]))).split(len(PROMPT))
    with torch.inference_mode():
        for slot, logits in zip([2, 0, 1, 3, 1], found, strict=True):
            torch.testing.assert_close(logits, references[slot](torch.tensor([PROMPT])).logits[0], rtol=1e-3, atol=2e-3)


def test_bfloat16_adapters_stay_near_float32(gemma: Path, cache: str) -> None:
    """As near as the base's own: KL in nats, mean over the prompt."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(gemma, dtype=torch.float32).eval()
    backend = load(gemma, cache, "bfloat16")
    references = [model, *adapted(backend, model)]
    found = backend.logits(backend.forward(mixed([0, 1, 2, 3]))).split(len(PROMPT))
    apart = []
    with torch.inference_mode():
        for reference, logits in zip(references, found, strict=True):
            wanted = torch.log_softmax(reference(torch.tensor([PROMPT])).logits[0], -1)
            apart.append(float((wanted.exp() * (wanted - torch.log_softmax(logits, -1))).sum(-1).mean()))
    assert max(apart[1:]) < 4 * apart[0] + 1e-4


@pytest.mark.parametrize("form", ["float32", "bfloat16", pytest.param("int8", marks=needs_vnni)])
def test_T10_bits_of_an_adapter_do_not_depend_on_company_and_the_bases_on_no_adapter(
    family: tuple[Path, Any], cache: str, form: str
) -> None:
    directory, model = family
    dtype, int8 = ("bfloat16", True) if form == "int8" else (form, False)
    alone = load(directory, cache, dtype, threads=1, int8=int8)
    base = alone.forward(mixed([0]))
    adapted(alone, model)
    wanted = [base, *(alone.forward(mixed([slot])) for slot in (1, 2, 3))]
    assert torch.equal(alone.forward(batch([(PROMPT, 0, [0, 1, 2])])), base)
    assert not torch.equal(wanted[1], base)
    backend = load(directory, cache, dtype, threads=2, int8=int8)
    adapted(backend, model)
    for slots in ([0, 1, 2, 3], [3, 3, 0, 1, 2, 1], [2, 0]):
        found = backend.forward(mixed(slots)).split(len(PROMPT))
        assert all(torch.equal(states, wanted[slot]) for slot, states in zip(slots, found, strict=True))
    single = [([token], place, [30, 31, 32]) for place, token in enumerate(PROMPT)]
    pieces = []
    for row in single:  # token by token, beside others
        own = batch([(PROMPT[:5], 0, [40]), row, (PROMPT[:7], 0, [44])])
        own.adapters = torch.tensor([2] * 5 + [1] + [0] * 7, dtype=torch.int32)
        pieces.append(backend.forward(own)[5:6])
    assert torch.equal(torch.cat(pieces), wanted[1])


def test_A20_an_adapter_of_nan_hurts_no_neighbour(gemma: Path, cache: str) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(gemma, dtype=torch.float32).eval()
    backend = load(gemma, cache)
    adapted(backend, model)
    wanted = backend.forward(mixed([1]))
    broken = tuned.peft(model, 7)
    for parameter in broken.parameters():
        parameter.data.fill_(torch.nan)
    backend.install(2, backend.prepare(tuned.weights(broken)))
    found = backend.forward(mixed([2, 1])).split(len(PROMPT))
    assert found[0].isnan().all() and torch.equal(found[1], wanted)


@pytest.mark.parametrize("count", [1, 5, 64])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_candidates_are_the_largest_exact_logits(gemma: Path, cache: str, dtype: str, count: int) -> None:
    backend = load(gemma, cache, dtype)
    hidden = backend.forward(batch([(PROMPT, 0, [4, 1, 8])]))
    found = backend.candidates(hidden, count)
    if found is None:
        pytest.skip("no AVX512-VNNI")
    logits = backend.logits(hidden)
    order = torch.argsort(logits, dim=-1, descending=True, stable=True)[:, :count]  # stable: ties to the lower id
    assert torch.equal(found[1], order)
    assert torch.equal(found[0], logits.gather(1, order))
    one = backend.candidates(hidden[7:8], count)
    assert one is not None
    assert torch.equal(one[1][0], found[1][7])


def test_candidates_of_a_flat_matrix_fall_back_to_every_row(tmp_path: Path, cache: str) -> None:
    """No bound separates equal rows: all are computed, and the lowest id wins."""
    directory, model = tiny("Gemma3TextConfig", tmp_path, vocab_size=40_000)
    with torch.no_grad():
        model.model.embed_tokens.weight[:] = model.model.embed_tokens.weight[5]
    model.save_pretrained(directory)
    backend = load(directory, cache, threads=1)  # one list, which 40,000 candidates overflow
    found = backend.candidates(backend.forward(batch([([1, 2, 3], 0, [0])])), 3)
    if found is None:
        pytest.skip("no AVX512-VNNI")
    assert found[1].tolist() == [[0, 1, 2]] * 3
    assert backend.examined.tolist() == [40_000] * 3


def test_A20_nan_left_in_a_freed_block_does_not_reach_its_next_owner(gemma: Path, cache: str) -> None:
    backend = load(gemma, cache)
    wanted = backend.forward(batch([(PROMPT, 0, [4, 1, 8])]))
    for tensor in backend.kept:
        if tensor.dtype == torch.float32 and tensor.numel() == backend.blocks * 2 * BLOCK_SIZE * 32:
            tensor.fill_(torch.nan)
    found = torch.cat([backend.forward(batch([(PROMPT[i : i + 9], i, [4, 1, 8])])) for i in range(0, 45, 9)])
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("int8", [False, pytest.param(True, marks=needs_vnni)])
def test_A20_a_row_of_nan_hurts_no_neighbour(gemma: Path, cache: str, int8: bool) -> None:
    backend = load(gemma, cache, int8=int8)
    wanted = backend.forward(batch([(PROMPT, 0, [4, 1, 8])]))
    embedding = next(each for each in backend.kept if each.numel() == SIZES["vocab_size"] * SIZES["hidden_size"])
    embedding.view(-1, SIZES["hidden_size"])[330] = torch.nan
    both = backend.forward(batch([([330, 5], 0, [12]), (PROMPT, 0, [4, 1, 8])]))
    assert both[:2].isnan().all()
    assert torch.equal(both[2:], wanted)


def test_the_library_is_compiled_once_and_appears_whole(tmp_path: Path) -> None:
    kernels.load(tmp_path)
    (made,) = (tmp_path / "kernels").iterdir()
    before = made.stat()
    kernels.load(tmp_path)
    assert [path.name for path in (tmp_path / "kernels").iterdir()] == [made.name]
    assert made.stat().st_mtime_ns == before.st_mtime_ns


def test_every_compiler_gives_the_same_bits(gemma: Path, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ziglang")
    import sys

    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(gemma, dtype=torch.float32).eval()

    def states(int8: bool, cache: str) -> torch.Tensor:
        backend = load(gemma, cache, "bfloat16", int8=int8)
        adapted(backend, model)
        return backend.forward(mixed([0, 1, 2, 3]))

    forms = (False, True) if VNNI in kernels.cpu_flags() else (False,)
    wanted = [states(int8, cache) for int8 in forms]
    monkeypatch.setenv("ARGOSY_CC", f"{sys.executable} -m ziglang cc")
    assert all(torch.equal(states(int8, str(tmp_path)), each) for int8, each in zip(forms, wanted, strict=True))


def test_a_broken_compiler_is_unsupported_with_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARGOSY_CC", "false")
    with pytest.raises(Unsupported, match="false failed"):
        kernels.load(tmp_path)
    monkeypatch.setenv("ARGOSY_CC", "")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unsupported, match="need a C compiler"):
        kernels.load(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mixtral"},
        {"hidden_act": "relu"},
        {"hidden_size": 72},
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
        {"layer_types": ["chunked_attention"] * 3},
        {"mlp_bias": True},
    ],
)
def test_what_the_kernels_do_not_compute_is_refused(family: tuple[Path, Any], changes: dict[str, Any]) -> None:
    config = json.loads((family[0] / "config.json").read_text())
    config.pop("hidden_activation", None)
    with pytest.raises(Unsupported, match=r"\.$"):
        fused.plan({**config, **changes})


def test_int8_layers_need_vnni(gemma: Path, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "cpu_flags", lambda: kernels.NEEDED)
    with pytest.raises(Unsupported, match=r"int8 need avx512_vnni, .*\.$"):
        FusedBackend.load(gemma, EngineSettings(cache_dir=cache, int8=True))


@pytest.mark.parametrize(("device", "choice"), [("cpu", "eager"), ("cuda", "auto"), ("cpu", "auto"), ("cpu", "fused")])
def test_int8_is_refused_and_not_ignored_where_the_kernels_do_not_run(
    gemma: Path, cache: str, monkeypatch: pytest.MonkeyPatch, device: str, choice: str
) -> None:
    """Without int8 the eager backend takes over from kernels that cannot run; with it that would be another model."""
    (gemma / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(kernels, "cpu_flags", frozenset)
    settings = EngineSettings(model=str(gemma), cache_dir=cache, device=device, backend=choice, int8=True)  # type: ignore[arg-type]
    with pytest.raises(Unsupported, match=r"^Layers in int8 .*\.$"):
        build(settings)


@needs_vnni
def test_int8_is_computed_where_it_is_asked_for(gemma: Path, cache: str) -> None:
    (gemma / "tokenizer.json").write_text("{}")
    runner, hello = build(EngineSettings(model=str(gemma), cache_dir=cache, device="cpu", kv_tokens=1024, max_step_tokens=64, int8=True))
    assert hello.backend == "fused"
    assert isinstance(runner.backend, FusedBackend)
    assert runner.backend.int8
