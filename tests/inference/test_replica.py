"""A replica as a process sees it: health, the golden prompt, load, and the methods that generate nothing."""

import asyncio
import subprocess
import sys

import grpc
import pytest
from grpc_health.v1 import health_pb2

from argosy.v1 import content_pb2, generation_pb2, language_pb2, model_pb2
from argosy_internal.engine.v1 import engine_pb2
from services.chassis.telemetry import Telemetry
from services.inference.engine.calls import Load
from services.pretrained.templates import JinjaTemplate
from tests.fakes.host import FakeHost
from tests.inference.replicas import TOKENIZER, client, ids, kinds, reason, request, said, signed, text

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


async def test_health_before_load():
    host = FakeHost(says=ids("yes"), warm=asyncio.Event())
    async with client(host, ready=False) as replica:
        for name, state in (("live", SERVING), ("ready", NOT_SERVING), ("startup", NOT_SERVING), ("", NOT_SERVING)):
            found = await replica.health.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
            assert (name, found.status) == (name, state)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await replica.generate(text("the"))
        assert reason(caught.value)[0] == "NOT_STARTED"
        host.release(host.warm)
        for name in ("ready", "startup", "", "argosy.internal.engine.v1.EngineService"):
            await replica.until(SERVING, name)
        assert said(await replica.generate(text("the"))) == "yes"
    assert host.closed


@pytest.mark.parametrize("wrong", [tuple(range(20, 28)), "not_finite"], ids=["changed", "NaN"])
async def test_F10_a_wrong_golden_answer_makes_the_replica_unready(wrong):
    host = FakeHost()
    right = host.golden
    async with client(host, canary_seconds=0.01) as replica:
        if isinstance(wrong, str):
            host.golden_error = wrong
        else:
            host.golden = wrong
        await replica.until(NOT_SERVING)
        assert (await replica.health.Check(health_pb2.HealthCheckRequest(service="live"), timeout=5)).status == SERVING
        host.golden, host.golden_error = right, None
        await replica.until(SERVING)


async def test_engine_info_says_what_it_can_do():
    async with client() as replica:
        info = await replica.stub.GetEngineInfo(engine_pb2.GetEngineInfoRequest(), metadata=signed(), timeout=5)
    assert (info.model, info.base_digest, info.context_tokens, info.embedding_dimensions) == ("models/tiny", "ab" * 32, 512, 8)
    assert info.default_config.sampling.top_k == 64
    assert model_pb2.MODEL_CAPABILITY_CHAT_PLAIN in info.capabilities
    assert model_pb2.MODEL_CAPABILITY_TOOLS not in info.capabilities
    assert list(info.end_token_ids) == [2]


async def test_load_is_pushed_on_change():
    host = FakeHost()
    async with client(host) as replica:
        loads = replica.stub.WatchLoad(engine_pb2.WatchLoadRequest(), metadata=signed(), timeout=10)
        assert (await loads.read()).free_blocks == 1_000
        host.set_load(Load(3, 2, 40, 50, 10.0, 20.0, 7, 9, 11, 13, 0.25, 2))
        load = await loads.read()
        loads.cancel()
    assert (load.waiting_sequences, load.running_sequences, load.queued_tokens, load.running_tokens) == (3, 2, 40, 50)
    assert (load.prefill_tokens_per_second, load.decode_tokens_per_second, load.free_blocks, load.total_blocks) == (10, 20, 7, 9)
    assert (load.cached_tokens, load.steps, load.step_time.ToNanoseconds(), load.batch) == (11, 13, 250_000_000, 2)
    assert not load.draining


async def test_count_tokens_of_text_and_chat():
    async with client() as replica:
        counted = await replica.stub.CountTokens(
            generation_pb2.CountTokensRequest(model="models/tiny", prompt="hello world"), metadata=signed(), timeout=5
        )
        turn = content_pb2.ChatMessage(role=content_pb2.ROLE_USER, parts=[content_pb2.ContentPart(text="hello")])
        chat = generation_pb2.CountTokensRequest(model="models/tiny", chat=content_pb2.ChatPrompt(messages=[turn]))
        rendered = await replica.stub.CountTokens(chat, metadata=signed(), timeout=5)
    assert counted.tokens == len(TOKENIZER.encode("hello world")) + 1
    assert counted.room == 512 - counted.tokens
    assert rendered.tokens == len(TOKENIZER.encode("User: hello\nAssistant:")) + 1


async def test_tokenize_gives_spans_that_cover_the_text():
    source = "hello 世𓀀\n<eos>"
    async with client() as replica:
        found = await replica.stub.Tokenize(generation_pb2.TokenizeRequest(model="models/tiny", text=source), metadata=signed(), timeout=5)
    assert b"".join(token.token for token in found.tokens) == source.encode()
    assert (found.tokens[0].start_byte, found.tokens[-1].end_byte) == (0, len(source.encode()))
    assert not {token.token_id for token in found.tokens} & set(TOKENIZER.control.values())


async def test_the_engine_is_closed_after_the_server():
    host = FakeHost(says=ids("yes"))
    async with client(host) as replica:
        assert kinds(await replica.generate(text("the")))[-1] == "completed"
        assert not host.closed
    assert host.closed


def test_wire_process_has_no_torch():
    """Everything the process on the wire imports; in a process of its own, since tests beside this one may load torch."""
    script = """
import sys
import services.inference.__main__, services.inference.server
bad = {"torch", "transformers"} & set(sys.modules)
sys.exit(f"imported {bad}" if bad else 0)
"""
    path = ":".join(entry for entry in sys.path if entry)
    done = subprocess.run([sys.executable, "-c", script], env={"PYTHONPATH": path}, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


async def test_load_reports_become_metrics():
    host = FakeHost()
    telemetry = Telemetry.start("argosy-inference", {})
    async with client(host, telemetry=telemetry):
        host.set_load(Load(0, 1, 0, 5, 10.0, 20.0, 7, 9, 0, 4, 0.25, 3))
        host.set_load(Load(0, 1, 0, 5, 10.0, 20.0, 7, 9, 32, 5, 0.25, 3))
        async with asyncio.timeout(10):
            while b"argosy_kv_tokens_free" not in (shown := telemetry.exposition()):
                await asyncio.sleep(0)
    await telemetry.close()
    values = dict(line.rsplit(b" ", 1) for line in shown.splitlines() if line.startswith(b"argosy_kv_tokens"))
    assert {float(value) for name, value in values.items() if name.startswith(b"argosy_kv_tokens_free")} <= {7 * 16.0, 1_000 * 16.0}


async def test_a_models_own_template_carries_chat_and_tasks():
    source = "{{ bos_token }}{% for m in messages %}<turn>{{ m.role }}: {{ m.content }}</turn>{% endfor %}<turn>"
    template = JinjaTemplate(source, TOKENIZER, (("bos_token", "<bos>"),))
    host = FakeHost(says=[*ids("yes", "\n", "no"), 2])
    control = TOKENIZER.control
    async with client(host, template=template) as replica:
        info = await replica.stub.GetEngineInfo(engine_pb2.GetEngineInfoRequest(), metadata=signed(), timeout=5)
        turn = content_pb2.ChatMessage(role=content_pb2.ROLE_USER, parts=[content_pb2.ContentPart(text="hello <turn>")])
        answer = await replica.generate(request(chat=generation_pb2.ChatRequest(model="models/tiny", messages=[turn])))
        asked = language_pb2.SummarizeTextRequest(model="models/tiny", documents=["the world"], max_length=9)
        summary = await replica.generate(request(summarize=asked))
    assert model_pb2.MODEL_CAPABILITY_CHAT_TEMPLATE in info.capabilities
    assert said(answer) == said(summary) == "yes\nno"  # a model with turns ends its own: a line's end means nothing
    for call in host.calls:
        spelled = [token for token in call.prompt if token in control.values()]
        assert spelled == [control[name] for name in ("<bos>", "<turn>", "</turn>", "<turn>")]
