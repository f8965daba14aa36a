import hashlib
import io
import json
import subprocess
import sys

import msgspec
import pytest
import torch
from safetensors.torch import load as tensors_of
from safetensors.torch import save

from services.chassis.objects import open_objects_sync
from services.finetune.examining import Examinee, Task
from services.finetune.rows import Layout
from services.finetune.trainer import lora as adapters
from services.finetune.trainer.batches import Example, layout
from services.finetune.trainer.evaluate import Unmeasurable, main, measure
from services.finetune.trainer.model import load
from services.finetune.trainer.rendering import Renderer
from services.finetune.trainer.spec import Lora, Method
from services.finetune.trainer.train import Trainer
from services.pretrained.templates import load_template
from services.pretrained.tokenizer import Tokenizer
from tests.finetune.trainer import world

LABELS = ("tech", "sport")


@pytest.fixture
def objects(tmp_path):
    return open_objects_sync(f"file://{tmp_path}/objects")


def task(tmp_path, objects, base, data, form, *examinees, **others):
    objects.put("datasets/d/data", data)
    return Task(
        f"file://{tmp_path}/objects", str(base), "datasets/d/data", hashlib.sha256(data).hexdigest(), Layout(form), examinees, **others
    )


def stored(objects, name, files, **said):
    for file, data in files.items():
        objects.put(f"adapters/p/{name}/{file}", data)
    parts = {file: hashlib.sha256(data).hexdigest() for file, data in files.items()}
    return Examinee(name, f"adapters/p/{name}", parts, **said)


def tuned(tiny_base, objects, name, lora, steps=0, seed=3):
    """A classifier's adapter after a few steps of the trainer, and what the trainer itself says of the rows."""
    base = load(tiny_base, torch.device("cpu"))
    tokenizer = Tokenizer.from_directory(tiny_base)
    renderer = Renderer.of(tokenizer, load_template(tiny_base, tokenizer, tokenizer.prefix), base.end_ids)
    rows = [json.loads(line) for line in world.classify_rows().splitlines()]
    examples = [renderer.labelled(row["text"], LABELS.index(row["label"])) for row in rows]
    trainer = Trainer(world.spec(lora=lora, labels=LABELS, seed=seed), base, examples, examples)
    for _ in range(steps):
        trainer.step()
    with torch.no_grad():
        for tensor in trainer.parameters().values():
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)))
    logits = trainer.evaluate().logits
    right = [float(LABELS[int(guess)] == row["label"]) for guess, row in zip(logits.argmax(1), rows, strict=True)]
    snapshot = trainer.snapshot()
    files = {
        "adapter.safetensors": save({key: value for key, value in snapshot.items() if not key.startswith("head.")}),
        "head.safetensors": save({key[5:]: value for key, value in snapshot.items() if key.startswith("head.")}),
    }
    said = {"rank": lora.rank, "alpha": lora.alpha, "rslora": lora.rslora, "dora": lora.dora, "labels": LABELS, "max_tokens": 96}
    return stored(objects, name, files, **said), right


@pytest.mark.parametrize("lora", [Lora(4, 8.0), Lora(2, 4.0, rslora=True, dora=True, targets=("q_proj", "up_proj"))])
def test_a_classifier_is_measured_as_the_trainer_measures_it(tmp_path, tiny_base, objects, lora):
    candidate, right = tuned(tiny_base, objects, "candidate", lora, steps=2)
    current, other = tuned(tiny_base, objects, "current", Lora(3, 6.0), seed=9)
    told = []
    found = measure(
        task(tmp_path, objects, tiny_base, world.classify_rows(), "classify", candidate, current, Examinee("base")), objects, told.append
    )
    assert found["candidate"].values == right
    assert found["current"].values == other
    assert set(found["base"].values) <= {0.0, 1.0}
    assert len(found["base"].values) == len(right) == 40
    assert found["candidate"].weights == []
    assert told == sorted(told)
    assert told[-1] == 40


def test_one_model_after_another_leaves_the_base_as_it_was(tmp_path, tiny_base, objects):
    candidate, _ = tuned(tiny_base, objects, "candidate", Lora(4, 8.0))
    alone = measure(task(tmp_path, objects, tiny_base, world.chat_rows(), "chat", Examinee("base")), objects)
    after = measure(
        task(tmp_path, objects, tiny_base, world.chat_rows(), "chat", msgspec.structs.replace(candidate, labels=()), Examinee("base")),
        objects,
    )
    assert after["base"] == alone["base"]
    assert after["candidate"].values != alone["base"].values


def test_a_chat_costs_the_nats_of_its_supervised_tokens(tmp_path, tiny_base, objects):
    found = measure(task(tmp_path, objects, tiny_base, world.chat_rows(6), "chat", Examinee("base")), objects)["base"]
    base = load(tiny_base, torch.device("cpu"))
    tokenizer = Tokenizer.from_directory(tiny_base)
    renderer = Renderer.of(tokenizer, load_template(tiny_base, tokenizer, tokenizer.prefix), base.end_ids)
    trainer = Trainer(world.spec(Method.CHAT), base, [], [])
    turns = [json.loads(line)["messages"] for line in world.chat_rows(6).splitlines()]
    with trainer.untuned():
        for said, value, weight in zip(turns, found.values, found.weights, strict=True):
            examples = renderer.chat([msgspec.convert(turn, Said) for turn in said])
            assert weight == sum(example.supervised for example in examples)
            assert value == pytest.approx(trainer.evaluate(examples).loss * weight, rel=1e-4)


class Said(msgspec.Struct):
    role: str
    content: str


def test_a_preference_is_right_where_the_chosen_answer_is_likelier(tmp_path, tiny_base, objects):
    rows = [("hello", "yes the tech", "no"), ("hello", "no", "yes the tech"), ("the world", "no", "yes")]
    data = b"".join(json.dumps({"prompt": a, "chosen": b, "rejected": c}).encode() + b"\n" for a, b, c in rows)
    found = measure(task(tmp_path, objects, tiny_base, data, "preference", Examinee("base")), objects)["base"]
    answers = [
        json.dumps({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}).encode() + b"\n"
        for asked, *both in rows
        for said in both
    ]
    nats = measure(task(tmp_path, objects, tiny_base, b"".join(answers), "chat", Examinee("base")), objects)["base"].values
    assert found.values == [float(nats[at] < nats[at + 1]) for at in (0, 2, 4)]
    assert found.values[0] != found.values[1]


@pytest.mark.parametrize("labels", [("tech", "sport"), ("sport", "sporty", "no")], ids=["by one token", "by nats a token"])
def test_the_base_guesses_the_likeliest_label(tmp_path, tiny_base, objects, labels):
    candidate, _ = tuned(tiny_base, objects, "candidate", Lora(4, 8.0))
    rows = [("hello world", labels[0]), ("yes no", labels[1]), ("the tech sport", labels[0]), ("world", labels[-1])]
    data = b"".join(json.dumps({"text": text, "label": label}).encode() + b"\n" for text, label in rows)
    named = msgspec.structs.replace(candidate, labels=labels, parts={"adapter.safetensors": candidate.parts["adapter.safetensors"]})
    found = measure(task(tmp_path, objects, tiny_base, data, "classify", Examinee("base"), named), objects)["base"].values
    base = load(tiny_base, torch.device("cpu"))
    tokenizer = Tokenizer.from_directory(tiny_base)
    renderer = Renderer.of(tokenizer, load_template(tiny_base, tokenizer, tokenizer.prefix), base.end_ids)
    spelled = [tokenizer.encode(f" {label}") for label in labels]
    alike = next(at for at, column in enumerate(zip(*spelled, strict=False)) if len(set(column)) > 1)
    assert (len({label[alike] for label in spelled}) == len(labels)) == (len(labels) == 2)
    wanted = []
    for text, truth in rows:
        scores = []
        for label in labels:
            asked = f"Which of these labels fits the text best: {', '.join(labels)}?\n\n{text}"
            (example,) = renderer.chat([Said("user", asked), Said("assistant", label)])
            with torch.no_grad():
                logits = base.model(torch.tensor([example.ids]), use_cache=False).logits[0].log_softmax(-1)
            start, end = example.spans[0]
            upto = start + alike + 1 if len(labels) == 2 else end
            scores.append(sum(float(logits[at - 1, example.ids[at]]) for at in range(start, upto)) / (upto - start))
        wanted.append(float(labels[scores.index(max(scores))] == truth))
    assert found == wanted


def test_long_texts_are_read_in_windows_and_their_probabilities_averaged(tmp_path, tiny_base, objects):
    candidate, _ = tuned(tiny_base, objects, "candidate", Lora(4, 8.0), steps=2)
    text = "hello world tech " * 12
    data = json.dumps({"text": text, "label": "tech"}).encode() + b"\n"
    found = measure(
        task(tmp_path, objects, tiny_base, data, "classify", msgspec.structs.replace(candidate, max_tokens=16, temperature=2.0)), objects
    )
    base = load(tiny_base, torch.device("cpu"))
    tokenizer = Tokenizer.from_directory(tiny_base)
    prefix = tuple(tokenizer.prefix)
    ids = tokenizer.encode(text)
    room = 16 - len(prefix)
    assert len(ids) > 2 * room
    adapters.attach(base.model, Lora(4, 8.0), 0)
    adapters.restore(base.model, tensors_of(objects.get("adapters/p/candidate/adapter.safetensors")))
    head = tensors_of(objects.get("adapters/p/candidate/head.safetensors"))
    base.model.eval()
    mean = torch.zeros(2)
    with torch.no_grad():
        for at in range(0, len(ids), room):
            (batch,) = layout([Example((*prefix, *ids[at : at + room]), label=0)], 4_096, True, base.device)
            mean += torch.softmax((base.states(batch) @ head["weight"].T + head["bias"])[0] / 2.0, 0)
    assert found["candidate"].values == [float(LABELS[int(mean.argmax())] == "tech")]


def test_a_sample_is_drawn_by_the_seed(tmp_path, tiny_base, objects):
    draws = [
        measure(task(tmp_path, objects, tiny_base, world.chat_rows(), "chat", Examinee("base"), max_rows=5, seed=seed), objects)["base"]
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]
    assert len(draws[0].values) == 5


def test_what_is_not_what_it_should_be_is_not_measured(tmp_path, tiny_base, objects):
    candidate, _ = tuned(tiny_base, objects, "candidate", Lora(4, 8.0))
    whole = task(tmp_path, objects, tiny_base, world.classify_rows(), "classify", candidate)
    for wrong, rule in (
        ({"sha256": "0" * 64}, "dataset_digest"),
        ({"examinees": (msgspec.structs.replace(candidate, parts={}),)}, "adapter_digest"),
        ({"examinees": (msgspec.structs.replace(candidate, rank=5),)}, "adapter_fit"),
    ):
        with pytest.raises(Unmeasurable) as caught:
            measure(msgspec.structs.replace(whole, **wrong), objects)
        assert caught.value.rule == rule


def test_the_process_takes_a_task_and_tells_outcomes(tmp_path, tiny_base, objects):
    asked = task(tmp_path, objects, tiny_base, world.chat_rows(4), "chat", Examinee("base"), threads=1)
    ended = subprocess.run(
        [sys.executable, "-m", "services.finetune.trainer.evaluate"],
        input=msgspec.json.encode(asked) + b"\n",
        capture_output=True,
        check=True,
    )
    said = [json.loads(line) for line in ended.stdout.splitlines()]
    assert said[0] == {"rows": 0}
    assert len(said[-1]["outcomes"]["base"]["values"]) == 4


def test_what_is_not_there_is_told_not_died_of(tmp_path, tiny_base, objects, monkeypatch, capsys):
    asked = task(tmp_path, objects, tiny_base, world.chat_rows(4), "chat", Examinee("base"), threads=1)
    for wrong, rule in (({"data": "datasets/none"}, "object_missing"), ({"sha256": "0" * 64}, "dataset_digest")):
        data = msgspec.json.encode(msgspec.structs.replace(asked, **wrong)) + b"\n"
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert main() == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"failed": rule}
