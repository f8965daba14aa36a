"""What explanations cost, and whether they are faithful: occlusion, gradient × input and random weights on the default model.

    python -m benchmarks.explain

One process, one thread, the engine inline: what is counted is CPU time. A forward is one pass over the whole prompt of a title, alone. The
texts are our own; a deletion test judges all three kinds of weights by the same formula (`services/inference/attributions.py`), and so
does a longer one, whose random order is the mean of many.
"""

import argparse
import asyncio
import itertools
import math
import random
import statistics
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from argosy.v1 import content_pb2, explanation_pb2, language_pb2, usage_pb2
from benchmarks.record import header, spread, table
from services.chassis.telemetry import Telemetry
from services.inference import attributions, units
from services.inference.engine.calls import WorkClass
from services.inference.engine.host import InlineHost
from services.inference.engine.settings import EngineSettings
from services.inference.servicers.encoding import Encoder, Spending
from services.inference.servicers.explaining import Explainer
from services.inference.servicers.generating import Who
from services.inference.servicers.measured import Work
from services.inference.servicers.plans import Planner
from services.inference.servicers.subjects import Subject, Subjects
from services.pretrained import weights
from services.pretrained.templates import load_template
from services.pretrained.tokenizer import Tokenizer

TITLES = (
    ("sport", "Late goal sends the home side into the cup final"),
    ("sport", "Sprinter breaks the national record in heavy evening rain"),
    ("sport", "Coach drops two strikers before the decisive league match"),
    ("finance", "Central bank raises its key rate for the third time"),
    ("finance", "Shares of the chip maker fall after weak earnings"),
    ("finance", "Investors move their savings from bonds into gold again"),
    ("science", "Astronomers find water vapour around a small distant planet"),
    ("science", "New vaccine protects mice against three strains of flu"),
    ("science", "Deep sea robot films a fish nobody had described"),
    ("politics", "Parliament rejects the bill after a debate until midnight"),
    ("politics", "Minister resigns over secret meetings with the arms lobby"),
    ("politics", "Voters in the capital elect their youngest mayor ever"),
)
LABELS = tuple(dict.fromkeys(label for label, _ in TITLES))
PROMPTS = (
    ("The capital of France is the city of", " Paris"),
    ("She opened her umbrella because it had started to", " rain"),
    ("He was so hungry that he ate the whole", " pizza"),
    ("To cut the bread, she took a sharp", " knife"),
    ("In winter the lake is covered with thick", " ice"),
    ("The opposite of hot is", " cold"),
    ("Bees fly from flower to flower and make", " honey"),
    ("The doctor told the patient to take the", " medicine"),
)
MANY = 24  # random orders of the longer test
METHODS = (explanation_pb2.ATTRIBUTION_METHOD_OCCLUSION, explanation_pb2.ATTRIBUTION_METHOD_GRADIENT_X_INPUT)


class Bench:
    """A replica's explaining, without its wire."""

    def __init__(self, host: InlineHost, planner: Planner) -> None:
        encoder = Encoder(host, planner)
        self.explainer, self._subjects = Explainer(host, planner, encoder), Subjects(planner, encoder)
        self._work = Work(Telemetry.off(), host, "explain", "models/default")

    async def explain(self, asked: explanation_pb2.ExplainRequest) -> explanation_pb2.ExplainResponse:
        """A fresh prefix cache for each: nobody pays for what another has read."""
        who = Who(str(uuid.uuid4()), "bench", uuid.uuid4().bytes, WorkClass.EXPLAIN)
        return await self.explainer.explain(asked, who, self._work, content_pb2.ServedModel(), usage_pb2.Usage(), lambda: 300.0)

    async def subject(self, asked: explanation_pb2.ExplainRequest) -> tuple[Subject, Spending]:
        who = Who(str(uuid.uuid4()), "bench", uuid.uuid4().bytes, WorkClass.EXPLAIN)
        spending = Spending(who, self._work, usage_pb2.Usage(), lambda: 300.0, passes=True)
        return await self._subjects.of(asked, spending), spending


async def cpu_s(work: Callable[[], Awaitable[object]]) -> float:
    """CPU seconds of the whole process."""
    before = time.process_time()
    await work()
    return time.process_time() - before


async def judged(
    bench: Bench, asked: explanation_pb2.ExplainRequest, found: dict[str, Sequence[float]], target: int
) -> dict[str, tuple[float, float]]:
    """For each kind of weights: the service's faithfulness, and that of the longer test: every count of units, many random orders."""
    subject, spending = await bench.subject(asked)
    (text,) = subject.texts
    ranges = units.words(text)
    count = len(ranges)
    known: dict[frozenset[int], float] = {}

    async def learn(sets: Sequence[frozenset[int]]) -> list[float]:
        async def score(gone: frozenset[int]) -> float:
            return (await subject.scores([units.kept(text, ranges, [place not in gone for place in range(count)])]))[target]

        fresh = [one for one in dict.fromkeys(sets) if one not in known]
        known.update(zip(fresh, await spending.each([partial(score, one) for one in fresh]), strict=True))
        return [known[one] for one in sets]

    await subject.candidates()
    whole, nothing, *single = await learn([frozenset(), frozenset(range(count)), *(frozenset({place}) for place in range(count))])
    chance = random.Random(5)
    shuffled = [chance.sample(range(count), count) for _ in range(MANY)]
    orders = {name: sorted(range(count), key=lambda place: -values[place]) for name, values in found.items()}
    prefixes = [[frozenset(order[:k]) for k in range(count + 1)] for order in (*orders.values(), *shuffled)]
    await learn(list(itertools.chain.from_iterable(prefixes)))
    areas = [statistics.fmean(map(_likely, map(known.__getitem__, sets))) for sets in prefixes]
    lowest = min(map(_likely, known.values()))
    usual = statistics.fmean(areas[len(orders) :]) - lowest
    result = {}
    for name, area in zip(orders, areas, strict=False):
        points = attributions.curves(found[name])
        assert points is not None  # titles have more than two words
        scores = await learn(points.deletions)
        short = attributions.faithfulness(whole, nothing, single, found[name], points, scores)
        result[name] = (short, max(0.0, 1 - (area - lowest) / usual) if usual > 1e-9 else 0.0)
    return result


def _likely(score: float) -> float:
    return math.exp(score)


def asked_for() -> list[explanation_pb2.ExplainRequest]:
    """Labels of titles, and continuations of prompts."""
    source = language_pb2.ZeroShotLabels(labels=LABELS)
    requests = [
        explanation_pb2.ExplainRequest(classify=explanation_pb2.ClassifyTarget(text=title, zero_shot=source, label=label))
        for label, title in TITLES
    ]
    for prompt, continuation in PROMPTS:
        target = explanation_pb2.GenerationTarget(prompt=prompt, continuation=continuation)
        requests.append(explanation_pb2.ExplainRequest(generation=target))
    return requests


async def measure(repeats: int) -> None:
    """Faithfulness, then cost."""
    directory = weights.prepare("default", weights.cache_directory(None))
    tokenizer = Tokenizer.from_directory(directory)
    host = InlineHost(EngineSettings(threads=1))
    await host.start()
    try:
        planner = Planner(tokenizer, load_template(directory, tokenizer, tokenizer.prefix, None), host.hello)
        bench = Bench(host, planner)
        requests = asked_for()
        kinds = {"label of a title": requests[: len(TITLES)], "next word": requests[len(TITLES) :]}
        for each in (requests[0], requests[-1]):  # the labels' bias, and the second model, are there from now on
            for method in METHODS:
                await bench.explain(_by(each, method))
        rows: list[Sequence[object]] = [("what", "weights", "texts", "faithfulness, as answered", "the longer test")]
        for kind, those in kinds.items():
            found: dict[str, list[tuple[float, float]]] = {"occlusion": [], "gradient × input": [], "random": []}
            for number, each in enumerate(those):
                occlusion, gradient = [await bench.explain(_by(each, method)) for method in METHODS]
                chance = random.Random(number)
                said = {
                    "occlusion": [one.weight for one in occlusion.attributions],
                    "gradient × input": [one.weight for one in gradient.attributions],
                    "random": [chance.random() for _ in occlusion.attributions],
                }
                target = LABELS.index(each.classify.label) if each.classify.label else 0
                for name, both in (await judged(bench, each, said, target)).items():
                    found[name].append(both)
            rows += [
                (kind, name, len(both), spread([short for short, _ in both]), f"{statistics.fmean(long for _, long in both):.2f} mean")
                for name, both in found.items()
            ]
        print()
        table(*rows)
        await costs(bench, kinds, repeats)
    finally:
        await host.close()


async def costs(bench: Bench, kinds: dict[str, list[explanation_pb2.ExplainRequest]], repeats: int) -> None:
    """CPU seconds against a forward."""
    rows: list[Sequence[object]] = [("what", "passes", "input tokens", "CPU-s", "of a forward")]
    for kind, those in kinds.items():
        one = those[0]
        forwards = []
        for _ in range(repeats):
            subject, spending = await bench.subject(one)
            await subject.candidates()
            forwards.append(await cpu_s(partial(subject.scores, subject.texts)))
        forward = statistics.median(forwards)
        rows.append((f"{kind}: a forward", 1, "", spread(forwards, ".3f"), "1.0"))
        text = one.classify.text or one.generation.prompt
        bare = []
        for _ in range(repeats):
            subject, spending = await bench.subject(one)
            await subject.candidates()
            ranges = units.words(text)
            variants = [[units.kept(text, ranges, [n != gone for n in range(len(ranges))])] for gone in range(len(ranges))]
            bare.append(await cpu_s(partial(_passes, subject, spending, [[text], *variants, [""]])))
        rows.append((f"{kind}: occlusion, untested", len(ranges) + 2, "", spread(bare, ".3f"), f"{statistics.median(bare) / forward:.1f}"))
        for method, name in zip(METHODS, ("occlusion", "gradient × input"), strict=True):
            spent, usage = [], usage_pb2.Usage()
            for _ in range(repeats):
                before = time.process_time()
                usage = (await bench.explain(_by(one, method))).usage
                spent.append(time.process_time() - before)
            ratio = statistics.median(spent) / forward
            rows.append((f"{kind}: {name}", usage.passes, usage.input_tokens, spread(spent, ".3f"), f"{ratio:.1f}"))
    print()
    table(*rows)


async def _passes(subject: Subject, spending: Spending, variants: Sequence[Sequence[str]]) -> None:
    await spending.each([partial(subject.scores, texts) for texts in variants])


def _by(asked: explanation_pb2.ExplainRequest, method: explanation_pb2.AttributionMethod.ValueType) -> explanation_pb2.ExplainRequest:
    made = explanation_pb2.ExplainRequest()
    made.CopyFrom(asked)
    made.method = method
    return made


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="of each cost")
    asked = parser.parse_args()
    header()
    asyncio.run(measure(asked.repeats))


if __name__ == "__main__":
    main()
