"""A tiny base with a real tokenizer, rows in a store, and a control plane in memory."""

import hashlib
import json
import random
from dataclasses import dataclass, field, replace

from services.chassis.objects import open_objects_sync
from services.finetune.rows import Layout
from services.finetune.trainer.control import Action, Claim, Fenced, Grant, ResumePoint
from services.finetune.trainer.spec import EarlyStopping, Hyperparameters, Lora, Method, Spec
from tests.inference.engine import tiny
from tests.inference.vocabularies import byte_fallback

JOB, PROJECT = "11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222"
VOCABULARY = 512


def base(directory, family="gemma3"):
    import torch
    import transformers as t

    directory.mkdir(exist_ok=True)
    config = tiny.config(family)
    config.vocab_size = VOCABULARY
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = t.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(directory)
    (directory / "tokenizer.json").write_text(byte_fallback())
    return directory


def classify_rows(count=40, seed=1):
    source = random.Random(seed)
    words = {"tech": ["hello", "world", "tech"], "sport": ["yes", "no", "sport"]}
    rows = []
    for at in range(count):
        label = ("tech", "sport")[at % 2]
        rows.append({"text": " ".join(source.choice(words[label]) for _ in range(source.randint(1, 6))) + f" {at}", "label": label})
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def chat_rows(count=24, seed=1):
    source = random.Random(seed)
    rows = []
    for at in range(count):
        asked = " ".join(source.choice(["hello", "the", "world"]) for _ in range(source.randint(1, 8)))
        turns = [{"role": "user", "content": f"{asked} {at}"}, {"role": "assistant", "content": "yes the tech" if at % 2 else "no"}]
        rows.append({"messages": turns})
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def spec(method=Method.CLASSIFY, **others):
    own = {
        "lora": Lora(rank=4, alpha=8.0, dropout=0.1),
        "hyperparameters": Hyperparameters(learning_rate=5e-3, epochs=2, batch_size=8, warmup_ratio=0.1),
        "seq_len": 96,
        "seed": 3,
        "early_stopping": EarlyStopping(patience=50),
        "checkpoint_interval_steps": 2,
        "validation_fraction": 0.2,
        "step_tokens": 64,
    }
    return Spec(method, **own | others)


@dataclass
class Plane:
    """Implements Control. What was committed is what resumes."""

    objects: object
    spec: Spec
    data: bytes = field(default_factory=classify_rows)
    validation: bytes | None = None
    base_digest: str = ""
    fence: int = 0
    action: Action = Action.CONTINUE
    reports: list = field(default_factory=list)
    commits: list = field(default_factory=list)
    ends: list = field(default_factory=list)
    fenced_at: int | None = None  # commits taken before this process is fenced

    def _grant(self, name, data):
        path = f"datasets/{PROJECT}/{name}/data"
        self.objects.put(path, data)
        formats = {method: method.value for method in Method}
        return Grant(name, path, hashlib.sha256(data).hexdigest(), len(data), Layout(formats[self.spec.method]))

    def claim(self):
        self.fence += 1
        resume = tuple(ResumePoint(*point) for point in reversed(self.commits))
        return Claim(
            job=JOB,
            attempt=self.fence,
            fence=self.fence,
            project_uid=PROJECT,
            model="projects/p/models/m",
            base_model="models/tiny",
            base_digest=self.base_digest,
            spec=self.spec,
            spec_digest="5" * 64,
            train=self._grant("train", self.data),
            validation=None if self.validation is None else self._grant("validation", self.validation),
            resume=resume,
            prefix=f"jobs/{PROJECT}/{JOB}/f{self.fence}/",
            target_step=0,
        )

    def report(self, report):
        self.reports.append(report)
        return self.action

    def commit(self, manifest):
        if self.fenced_at is not None and len(self.commits) >= self.fenced_at:
            raise Fenced
        body = json.loads(manifest)
        prefix = f"jobs/{PROJECT}/{JOB}/f{body['fence']}/step-{body['step']}/"
        assert self.objects.get(f"{prefix}manifest.json") == manifest
        self.commits.append((int(body["step"]), prefix, hashlib.sha256(manifest).hexdigest()))
        return self.action

    def succeed(self, outcome):
        self.ends.append(outcome)

    def fail(self, failure):
        self.ends.append(failure)

    def stopped(self, step):
        self.ends.append(("stopped", step))


def plane(method=Method.CLASSIFY, store="memory://", **others):
    own = {"data": classify_rows() if method is Method.CLASSIFY else chat_rows()}
    changed = {key: others.pop(key) for key in list(others) if key in Spec.__dataclass_fields__}
    return Plane(open_objects_sync(store), replace(spec(method), **changed), **own | others)
