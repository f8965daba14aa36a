"""Preparing a model: GGUF once, whole or not at all; only data is ever loaded; the digest is the files'."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from services.inference.engine.build import build
from services.pretrained import weights
from services.pretrained.weights import ModelRefused, ModelUnavailable, digest, prepare
from tests.inference.engine import tiny
from tests.inference.engine.tiny import Walk, drive

LETTERS = ["▁", "h", "e", "l", "o", "w", "r", "d", "he", "ll", "hell", "hello", "▁w", "  ", "\n"]
TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{n:02X}>" for n in range(256)), *LETTERS, "<turn>", "<end>"]


def write_gguf(path: Path, end_of_turn: bool = True) -> Any:
    """A tiny Gemma 3 as llama.cpp would write it, and transformers' own model of the same weights."""
    import transformers as t
    from gguf import GGUFWriter, get_tensor_name_map
    from gguf.constants import MODEL_ARCH

    config = tiny.config("gemma3")
    config.vocab_size = len(TOKENS)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = t.Gemma3ForCausalLM(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
            parameter.data = parameter.data.to(torch.bfloat16).float()
    writer = GGUFWriter(path, "gemma3")
    writer.add_context_length(512)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1_000_000.0)
    writer.add_sliding_window(tiny.WINDOW)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([-float(n) for n in range(len(TOKENS))])
    writer.add_token_types([3, 3, 3, 2, *[6] * 256, *[1] * len(LETTERS), 3, 3])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    if end_of_turn:
        writer.add_eot_token_id(len(TOKENS) - 1)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    names = get_tensor_name_map(MODEL_ARCH.GEMMA3, config.num_hidden_layers)
    for name, parameter in model.model.named_parameters():
        written = names.get_name(f"model.{name}", try_suffixes=(".weight",))
        assert written is not None
        norm = name.endswith("norm.weight")
        writer.add_tensor(written, parameter.detach().numpy().astype(np.float32) + np.float32(norm))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Path, list[tuple[int, int, str]]]:
    home = tmp_path_factory.mktemp("gguf")
    model = write_gguf(home / "tiny.gguf")
    seen: list[tuple[int, int, str]] = []
    directory = prepare(str(home / "tiny.gguf"), home / "cache", lambda *told: seen.append(told))
    return model, directory, home, seen


Converted = tuple[Any, Path, Path, list[tuple[int, int, str]]]


def test_a_gguf_file_becomes_the_same_weights(converted: Converted) -> None:
    model, directory, _, seen = converted
    stored = load_file(directory / "model.safetensors")
    expected = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    assert stored.keys() == expected.keys()  # the head is tied, so it is stored once
    for name, value in expected.items():
        # A norm's weight went through value + 1 in float32, whose last bits are gone.
        torch.testing.assert_close(stored[name].float(), value, rtol=2**-8, atol=1e-6)
        assert stored[name].dtype == torch.bfloat16
    assert seen[-1][0] == seen[-1][1] > 0 and {what for _, _, what in seen} == {"convert"}
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)


def test_its_config_says_what_the_file_said(converted: Converted) -> None:
    _, directory, _, _ = converted
    config = json.loads((directory / "config.json").read_text())
    assert (config["vocab_size"], config["bos_token_id"], config["eos_token_id"]) == (len(TOKENS), 2, [1, len(TOKENS) - 1])
    assert config["tie_word_embeddings"] and config["sliding_window"] == tiny.WINDOW
    generation = json.loads((directory / "generation_config.json").read_text())
    assert (generation["top_k"], generation["top_p"]) == (64, 0.95)
    assert str(directory.parent) not in json.dumps(config)


def test_it_runs_and_says_what_transformers_says(converted: Converted) -> None:
    _, directory, home, _ = converted
    runner, hello = build(tiny.settings(home / "tiny.gguf", cache_dir=str(home / "cache")))
    assert hello.architecture == "Gemma3ForCausalLM" and hello.end_token_ids == (1, len(TOKENS) - 1)
    assert hello.default_sampling.top_k == 64 and hello.digest == digest(directory, home / "cache")
    prompt = list(range(4, 44))
    assert drive(runner, [Walk(0, prompt, range(4))], 12) == [tiny.generate(tiny.reference(directory), prompt, 12)]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("hello world", ["<bos>", "hello", "▁w", "o", "r", "l", "d"]),
        ("  w", ["<bos>", "▁", "▁w"]),
        ("é", ["<bos>", "<0xC3>", "<0xA9>"]),
        ("\nhe<turn>", ["<bos>", "\n", "he", "<turn>"]),
        ("", ["<bos>"]),
    ],
)
def test_its_tokenizer_splits_falls_back_and_begins(converted: Converted, text: str, pieces: list[str]) -> None:
    tokenizer = Tokenizer.from_file(str(converted[1] / "tokenizer.json"))
    encoded = tokenizer.encode(text)
    assert encoded.tokens == pieces
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == "<bos>" + text


def test_the_second_time_is_the_same_directory_untouched(converted: Converted) -> None:
    _, directory, home, _ = converted
    before = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
    told: list[object] = []
    assert prepare(str(home / "tiny.gguf"), home / "cache", lambda *values: told.append(values)) == directory
    assert not told and {path.name: path.stat().st_mtime_ns for path in directory.iterdir()} == before
    assert prepare(str(home), home / "cache") == directory  # a directory that holds one .gguf file


def test_two_at_once_convert_once(converted: Converted, tmp_path: Path) -> None:
    _, _, home, _ = converted
    code = (
        "from pathlib import Path; from services.pretrained.weights import prepare;"
        f"print(prepare({str(home / 'tiny.gguf')!r}, Path({str(tmp_path)!r})))"
    )
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = {process.communicate(timeout=100)[0] for process in both}
    assert [process.returncode for process in both] == [0, 0] and len(said) == 1
    assert len([path for path in (tmp_path / "converted").iterdir() if path.is_dir()]) == 1


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(200))
    with pytest.raises(ModelRefused, match=r"broken\.gguf could not be converted: ValueError"):
        prepare(str(broken), tmp_path / "cache")
    assert [path for path in (tmp_path / "cache" / "converted").iterdir() if path.is_dir()] == []


class _Canary:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def test_A16_pickled_weights_are_never_opened(tmp_path: Path) -> None:
    model, canary = tiny.save("llama", tmp_path / "model"), tmp_path / "canary"
    pickled = pickle.dumps(_Canary(canary))
    for name in ("pytorch_model.bin", "training_args.bin", "model.pt"):
        (model / name).write_bytes(pickled)
    build(tiny.settings(model, cache_dir=str(tmp_path / "cache")))
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelRefused, match="pickled weights are not read"):
        build(tiny.settings(model, cache_dir=str(tmp_path / "cache")))
    assert not canary.exists()


def test_A16_L6_code_beside_the_weights_is_refused_and_does_not_run(tmp_path: Path) -> None:
    model, canary = tiny.save("llama", tmp_path / "model"), tmp_path / "canary"
    (model / "modeling_own.py").write_text(f"import os\nos.mkdir({str(canary)!r})\nclass Own: pass\n")
    tiny.edit_config(model, auto_map={"AutoModelForCausalLM": "modeling_own.Own", "AutoConfig": "modeling_own.Own"})
    with pytest.raises(ModelRefused, match="auto_map"):
        prepare(str(model), tmp_path / "cache")
    assert not canary.exists()


def test_A17_a_template_of_the_model_is_neither_read_nor_taken_over(converted: Converted, tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    (model / "tokenizer_config.json").write_text('{"chat_template": "{{ 1 / 0 }}", "tokenizer_class": "Own", "auto_map": {}}')
    (model / "chat_template.jinja").write_text("{% for x in y %}")
    build(tiny.settings(model, cache_dir=str(tmp_path / "cache")))
    assert sorted(path.name for path in converted[1].iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


@pytest.mark.parametrize("length", [2**40, 0, weights.HEADER_BYTES + 1])
def test_A16_a_huge_or_empty_header_is_refused_before_it_is_read(tmp_path: Path, length: int) -> None:
    model = tiny.save("llama", tmp_path)
    file = model / "model.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])
    with pytest.raises(ModelRefused, match="header"):
        prepare(str(model), tmp_path)


def test_A16_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path)
    tiny.edit_config(model, intermediate_size=48)
    with pytest.raises(ModelRefused, match=r"lacks 9 tensors or has them in another shape, model\.layers\.0\.mlp\.down_proj\.weight first"):
        build(tiny.settings(model))


def test_a_missing_tensor_is_refused_and_not_made_up(tmp_path: Path) -> None:
    model = tiny.save("qwen3", tmp_path)
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.self_attn.o_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelRefused, match=r"lacks 1 tensors .* model\.layers\.1\.self_attn\.o_proj\.weight first"):
        build(tiny.settings(model))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    model = tiny.save("llama", tmp_path)
    (model / name).unlink()
    with pytest.raises(ModelRefused, match=f"has no {name}"):
        prepare(str(model), tmp_path)


def test_a_config_that_is_not_json_is_refused(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path)
    (model / "config.json").write_text("{")
    with pytest.raises(ModelRefused, match="not JSON"):
        prepare(str(model), tmp_path)


@pytest.mark.parametrize("model", ["no/such/place", "./nowhere", "word", ""])
def test_what_is_nothing_is_said_to_be_nothing(tmp_path: Path, model: str) -> None:
    with pytest.raises(ModelUnavailable, match=r"no directory, no \.gguf file and no hub id"):
        prepare(model, tmp_path)


def test_a_hub_id_that_is_cached_needs_no_network_and_one_that_is_not_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    model = tiny.save("llama", tmp_path / "snapshot")
    asked: list[dict[str, Any]] = []

    def snapshot(repo: str, **how: Any) -> str:
        asked.append(how)
        if repo == "known/model":
            return str(model)
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network at https://an.address")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert prepare("known/model", tmp_path) == model
    assert [how["local_files_only"] for how in asked] == [True]
    with pytest.raises(ModelUnavailable, match=r"other/model is not in the local cache.*\(LocalEntryNotFoundError\)\.$"):
        prepare("other/model", tmp_path)
    assert all(not set(how["allow_patterns"]) & {"*.bin", "*.py", "*.pt", "*"} for how in asked)


def test_the_digest_follows_the_files_and_hashes_them_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.save("llama", tmp_path / "a")
    first = digest(model, tmp_path / "cache")
    copy = tmp_path / "b"
    copy.mkdir()
    for path in model.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "README.md").write_text("no part of the model")
    assert digest(copy, tmp_path / "cache") == first
    with monkeypatch.context() as patched:
        patched.setattr(weights, "_sha256", lambda path: pytest.fail(f"{path} was hashed again"))
        assert digest(model, tmp_path / "cache") == first
    tiny.edit_config(model, rope_theta=1.0)
    assert digest(model, tmp_path / "cache") != first


def test_the_process_on_the_wire_prepares_without_torch(converted: Converted) -> None:
    _, directory, home, _ = converted
    code = (
        "import sys; from pathlib import Path; from services.pretrained.weights import prepare, digest;"
        f"d = prepare({str(home / 'tiny.gguf')!r}, Path({str(home / 'cache')!r})); digest(d, Path({str(home / 'cache')!r}));"
        "print(d, 'torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert said.split() == [str(directory), "False"]
