"""What tuned versions and their base do on held-out rows, row by row: `python -m services.finetune.trainer.evaluate`.

A task comes as one line of JSON on the standard input. Lines of JSON go out: `{"rows": n}` as rows are measured, and at the end
`{"outcomes": {name: {"values": […], "weights": […]}}}`, or `{"failed": rule}` for what cannot be measured. Rows and order are the same
for all. A classifier is right or wrong, and so is a preference: is the chosen answer the likelier one? A chat has nats and supervised
tokens.
"""

import hashlib
import json
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import load as tensors_of

from services.chassis.objects import ObjectMissing, SyncObjects, open_objects_sync
from services.finetune.examining import Examinee, Task
from services.finetune.rows import Row, RowError, Turn, read_rows
from services.finetune.trainer.batches import Batch, Example, layout
from services.finetune.trainer.lora import LoraLinear
from services.finetune.trainer.model import Base, BaseUnsupported, load
from services.finetune.trainer.rendering import Renderer
from services.finetune.trainer.spec import Lora
from services.pretrained.templates import TemplateRefused, load_template
from services.pretrained.tokenizer import Tokenizer

__all__ = ["Measured", "Unmeasurable", "measure"]

STEP_TOKENS = 2_048  # computed at once
ROW_TOKENS = 4_096  # a longer chat is left out, for every model alike
LOGIT_ROWS = 128  # of the vocabulary's width at once
ROWS_TOLD = 32  # between two words of progress
ZERO_SHOT_CHARACTERS = 8_000  # of a text shown to the base
PREFIX = "base_model.model."


class Unmeasurable(Exception):
    """The task cannot be done; `rule` says why."""

    def __init__(self, rule: str) -> None:
        super().__init__(rule)
        self.rule = rule


@dataclass(frozen=True, slots=True)
class Measured:
    """One value a row; `weights` are supervised tokens, empty for a classifier."""

    values: list[float]
    weights: list[float]


def measure(task: Task, objects: SyncObjects, progress: Callable[[int], None] = lambda rows: None) -> dict[str, Measured]:
    """Outcomes by examinee. `progress` hears of the rows that all have been measured on.

    Raises:
        Unmeasurable: bytes that are not those of the task, rows of no use, or an adapter that does not fit.
    """
    directory = Path(task.base_directory)
    tokenizer = Tokenizer.from_directory(directory)
    base = load(directory, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    base.model.eval()
    renderer = Renderer.of(tokenizer, load_template(directory, tokenizer, tokenizer.prefix), base.end_ids)
    rows = _drawn(_rows(objects, task), task)
    chats = _chats(renderer, rows, task.layout.format, min(base.context, ROW_TOKENS))
    count = len(rows) if task.layout.format == "classify" else len(chats)
    if count == 0:
        raise Unmeasurable("no_rows")
    known = _labels(task.examinees)
    measured: dict[str, Measured] = {}
    for place, examinee in enumerate(task.examinees):
        done = 0

        def tell(more: int, place: int = place) -> None:
            nonlocal done
            done += more
            progress((place * count + done) // len(task.examinees))

        with torch.no_grad(), _tuned(base, examinee, objects) as head:
            if task.layout.format == "chat":
                measured[examinee.name] = Measured(*_chat(base, chats, tell))
            elif task.layout.format == "preference":
                measured[examinee.name] = Measured(_preferred(base, chats, tell), [])
            elif head is not None:
                measured[examinee.name] = Measured(_classified(base, renderer, rows, examinee, head, tell), [])
            else:
                measured[examinee.name] = Measured(_zero_shot(base, renderer, rows, known, tell), [])
    return measured


# --- rows -------------------------------------------------------------------------------------------------------------------------------


def _rows(objects: SyncObjects, task: Task) -> list[Row]:
    digest = hashlib.sha256()

    def pieces() -> Iterator[bytes]:
        for piece in objects.stream(task.data):
            digest.update(piece)
            yield piece

    found = [row for row in read_rows(pieces(), task.layout) if not isinstance(row, RowError)]
    if digest.hexdigest() != task.sha256:
        raise Unmeasurable("dataset_digest")
    return found


def _drawn(rows: list[Row], task: Task) -> list[Row]:
    if task.max_rows is None or task.max_rows >= len(rows):
        return rows
    return [rows[at] for at in sorted(random.Random(task.seed).sample(range(len(rows)), task.max_rows))]


def _chats(renderer: Renderer, rows: Sequence[Row], form: str, room: int) -> list[list[Example]]:
    """Each row's examples, a preference's chosen answer before the rejected one; rows with one longer than `room` are left out."""
    found: list[list[Example]] = []
    try:
        for row in rows:
            if form == "chat":
                found.append(renderer.chat(row.messages))
            elif form == "preference":
                answers = (renderer.chat([Turn("user", row.prompt), Turn("assistant", said)]) for said in (row.chosen, row.rejected))
                found.append([answer[-1] for answer in answers])
    except TemplateRefused:
        raise Unmeasurable("template") from None
    return [chat for chat in found if max(len(example.ids) for example in chat) <= room]


def _labels(examinees: Sequence[Examinee]) -> tuple[str, ...]:
    """What the base chooses from: every label that a version knows."""
    return tuple(dict.fromkeys(label for examinee in examinees for label in examinee.labels))


# --- models -----------------------------------------------------------------------------------------------------------------------------


@contextmanager
def _tuned(base: Base, examinee: Examinee, objects: SyncObjects) -> Iterator[tuple[torch.Tensor, torch.Tensor] | None]:
    """Inside the block the base carries an examinee's adapter; yields its head (weight, bias), if it has one."""
    before: dict[str, torch.nn.Module] = {}
    head: tuple[torch.Tensor, torch.Tensor] | None = None
    try:
        if examinee.place:
            adapter = _part(objects, examinee, "adapter.safetensors")
            for path in sorted({name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in adapter}):
                before[path] = _replace(base, path, examinee, adapter)
            if "head.safetensors" in examinee.parts:
                tensors = _part(objects, examinee, "head.safetensors")
                head = tensors["weight"].to(base.device), tensors["bias"].to(base.device)
        yield head
    finally:
        for path, module in before.items():
            parent, _, leaf = path.rpartition(".")
            setattr(base.model.get_submodule(parent), leaf, module)


def _part(objects: SyncObjects, examinee: Examinee, name: str) -> dict[str, torch.Tensor]:
    data = objects.get(f"{examinee.place}/{name}")
    if hashlib.sha256(data).hexdigest() != examinee.parts.get(name):
        raise Unmeasurable("adapter_digest")
    return {key: value.float() for key, value in tensors_of(data).items()}


def _replace(base: Base, path: str, examinee: Examinee, adapter: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """Put the adapter beside one linear layer; returns what was there."""
    parent, _, leaf = path.rpartition(".")
    lora = Lora(rank=examinee.rank, alpha=examinee.alpha, rslora=examinee.rslora, dora=examinee.dora)
    try:
        above = base.model.get_submodule(parent)
        linear: torch.nn.Linear = getattr(above, leaf)
        layer = LoraLinear(linear, lora, torch.Generator().manual_seed(0))
        layer.lora_A.copy_(adapter[f"{PREFIX}{path}.lora_A.weight"])
        layer.lora_B.copy_(adapter[f"{PREFIX}{path}.lora_B.weight"])
        if layer.lora_magnitude_vector is not None:
            layer.lora_magnitude_vector.copy_(adapter[f"{PREFIX}{path}.lora_magnitude_vector.weight"].reshape(-1))
    except (AttributeError, KeyError, RuntimeError) as error:
        raise Unmeasurable("adapter_fit") from error
    setattr(above, leaf, layer.eval())
    return linear


def _packed(examples: Sequence[Example], device: torch.device) -> Iterator[tuple[list[int], Batch]]:
    """Forward passes over neighbours of like length: the examples' places, and the batch."""
    ranked = sorted(range(len(examples)), key=lambda at: len(examples[at].ids))
    start = 0
    while start < len(ranked):
        stop, tokens = start, 0
        while stop < len(ranked) and (stop == start or tokens + len(examples[ranked[stop]].ids) <= STEP_TOKENS):
            tokens += len(examples[ranked[stop]].ids)
            stop += 1
        members = ranked[start:stop]
        (batch,) = layout([examples[at] for at in members], 2**31, True, device)
        # With a bin of any size the layout keeps the examples' order.
        yield members, batch
        start = stop


# --- what they do -----------------------------------------------------------------------------------------------------------------------


def _nats(base: Base, examples: Sequence[Example], tell: Callable[[int], None] = lambda more: None) -> list[float]:
    """Each example's negative log-likelihood over its supervised tokens."""
    found = [0.0] * len(examples)
    for members, batch in _packed(examples, base.device):
        states = base.states(batch)
        losses = torch.cat([_cross_entropy(base, states[at : at + LOGIT_ROWS], batch.targets[at : at + LOGIT_ROWS])
                            for at in range(0, len(states), LOGIT_ROWS)])  # fmt: skip
        counts = [examples[at].supervised for at in members]
        for at, part in zip(members, torch.split(losses.double().cpu(), counts), strict=True):
            found[at] = float(part.sum())
        tell(len(members))
    return found


def _cross_entropy(base: Base, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = torch.nn.functional.linear(states, base.output).float()
    if base.softcap:
        logits = base.softcap * torch.tanh(logits / base.softcap)
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def _chat(base: Base, chats: Sequence[Sequence[Example]], tell: Callable[[int], None]) -> tuple[list[float], list[float]]:
    flat = [example for chat in chats for example in chat]
    found = iter(_nats(base, flat, lambda more: tell(more * len(chats) // len(flat))))
    values = [sum(next(found) for _ in chat) for chat in chats]
    return values, [float(sum(example.supervised for example in chat)) for chat in chats]


def _preferred(base: Base, pairs: Sequence[Sequence[Example]], tell: Callable[[int], None]) -> list[float]:
    """1 where the chosen answer is the likelier one."""
    found = iter(_nats(base, [example for pair in pairs for example in pair], lambda more: tell(more // 2)))
    return [float(next(found) < next(found)) for _ in pairs]


def _classified(
    base: Base, renderer: Renderer, rows: Sequence[Row], examinee: Examinee, head: tuple[torch.Tensor, torch.Tensor],
    tell: Callable[[int], None],
) -> list[float]:  # fmt: skip
    """1 where the likeliest label is the row's: probabilities are averaged over windows, as a replica does."""
    windows: list[Example] = []
    owners: list[int] = []
    for at, row in enumerate(rows):
        for window in _windows(renderer, row.text, examinee.max_tokens or STEP_TOKENS):
            windows.append(window)
            owners.append(at)
    total = torch.zeros(len(rows), len(examinee.labels), dtype=torch.float64)
    for members, batch in _packed(windows, base.device):
        logits = torch.nn.functional.linear(base.states(batch), head[0], head[1])
        total.index_add_(0, torch.tensor([owners[at] for at in members]), torch.softmax(logits.double() / examinee.temperature, 1).cpu())
        tell(0)
    tell(len(rows))
    # The mean has the same largest label as the sum.
    return [float(examinee.labels[int(guess)] == row.label) for guess, row in zip(total.argmax(1), rows, strict=True)]


def _windows(renderer: Renderer, text: str, max_tokens: int) -> Iterator[Example]:
    whole = renderer.labelled(text, 0).ids
    prefix = tuple(renderer.tokenizer.prefix)
    body, room = whole[len(prefix) :], max_tokens - len(prefix)
    for at in range(0, max(1, len(body)), room):
        yield Example((*prefix, *body[at : at + room]), label=0)


def _zero_shot(base: Base, renderer: Renderer, rows: Sequence[Row], labels: Sequence[str], tell: Callable[[int], None]) -> list[float]:
    """1 where the label that the base finds likeliest as an answer is the row's.

    Labels that differ in one token, behind what all begin with, are told apart by it in one pass over the question; others by nats a token.
    """
    spelled = [example.ids[slice(*example.spans[0])] for example in (_answered(renderer, "", labels, label) for label in labels)]
    alike = next((at for at, column in enumerate(zip(*spelled, strict=False)) if len(set(column)) > 1), 0)
    apart = [label[alike] for label in spelled]
    right: list[float] = []
    for at in range(0, len(rows), ROWS_TOLD):
        some = rows[at : at + ROWS_TOLD]
        if len(set(apart)) == len(apart):
            guesses = _by_one(base, [_answered(renderer, row.text, labels, labels[0]) for row in some], alike, apart)
        else:
            guesses = _by_nats(base, renderer, some, labels)
        right += [float(labels[guess] == row.label) for guess, row in zip(guesses, some, strict=True)]
        tell(len(some))
    return right


def _by_one(base: Base, answered: Sequence[Example], alike: int, apart: Sequence[int]) -> list[int]:
    """The likeliest of the tokens `apart` behind each question and the `alike` first tokens of its answer."""
    asked = [Example(example.ids[: example.spans[0][0] + alike], label=0) for example in answered]
    rows_of_output = base.output[torch.tensor(apart, device=base.device)]
    guesses = [0] * len(asked)
    for members, batch in _packed(asked, base.device):
        likeliest = torch.nn.functional.linear(base.states(batch), rows_of_output).argmax(1)  # a soft cap changes no order
        for place, guess in zip(members, likeliest.tolist(), strict=True):
            guesses[place] = guess
    return guesses


def _by_nats(base: Base, renderer: Renderer, rows: Sequence[Row], labels: Sequence[str]) -> list[int]:
    examples = [_answered(renderer, row.text, labels, label) for row in rows for label in labels]
    nats = [value / example.supervised for value, example in zip(_nats(base, examples), examples, strict=True)]
    of_rows = [nats[at : at + len(labels)] for at in range(0, len(nats), len(labels))]
    return [mine.index(min(mine)) for mine in of_rows]


def _answered(renderer: Renderer, text: str, labels: Sequence[str], label: str) -> Example:
    """The label as the answer to a question that names all of them."""
    asked = f"Which of these labels fits the text best: {', '.join(labels)}?\n\n{text[:ZERO_SHOT_CHARACTERS]}"
    (example,) = renderer.chat([Turn("user", asked), Turn("assistant", label)])
    return example


# --- the process ------------------------------------------------------------------------------------------------------------------------


def main() -> int:
    """Read a task, measure, exit with 0 if something was said about it."""

    def say(**said: Any) -> None:
        print(json.dumps(said), flush=True)

    task = msgspec.json.decode(sys.stdin.buffer.readline(), type=Task)
    torch.set_num_threads(task.threads or len(os.sched_getaffinity(0)))
    told = 0

    def progress(rows: int) -> None:
        nonlocal told
        if rows >= told + ROWS_TOLD or rows == 0:
            told = rows
            say(rows=rows)

    say(rows=0)
    try:
        found = measure(task, open_objects_sync(task.store_url), progress)
    except Unmeasurable as error:
        say(failed=error.rule)
        return 0
    except ObjectMissing:
        say(failed="object_missing")
        return 0
    except BaseUnsupported:
        say(failed="base_unsupported")
        return 0
    say(outcomes={name: {"values": each.values, "weights": each.weights} for name, each in found.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
