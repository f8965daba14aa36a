"""How good the typed tasks are on the default model, through the whole fleet: zero-shot classification, sentiment and extractive answers.

    python -m benchmarks.tasks --headlines FILE --count 200

FILE has one headline a line, `text<TAB>class number`, in the classes below. The sentences about sentiment and the questions are our own.
"""

import argparse
import asyncio
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from argosy import AsyncClient
from benchmarks.processes import fleet
from benchmarks.record import header, table

CLASSES = ("财经", "房产", "股票", "教育", "科技", "社会", "时政", "体育", "游戏", "娱乐")
SENTIMENT = (
    ("I would stay here again tomorrow.", "positive"),
    ("The best soup in town, and friendly people.", "positive"),
    ("A delight from the first page to the last.", "positive"),
    ("It does exactly what I hoped for, and quickly.", "positive"),
    ("Our children loved the museum.", "positive"),
    ("The battery died after two days.", "negative"),
    ("Rude staff, cold food, and a wrong bill.", "negative"),
    ("I regret buying this chair; it hurts my back.", "negative"),
    ("The plot makes no sense and the acting is worse.", "negative"),
    ("They lost my parcel and never answered.", "negative"),
)
PASSAGE = (
    "The lighthouse on Skarv island was built in 1871 by the engineer Ole Brandt. Its lamp, 41 metres above the sea, was lit with paraffin"
    " until electricity came in 1938. The last keeper left in 1996, and since then a family from Bergen has run a small hotel there."
)
QUESTIONS = (
    ("When was the lighthouse built?", "1871"),
    ("Who built the lighthouse?", "Ole Brandt"),
    ("How high is the lamp above the sea?", "41 metres"),
    ("When did electricity come?", "1938"),
    ("When did the last keeper leave?", "1996"),
)


async def measure(headlines: Sequence[tuple[str, int]]) -> None:
    """Ask, and print shares of right answers with the time of a text."""
    with tempfile.TemporaryDirectory() as folder:
        async with fleet(Path(folder)) as door, AsyncClient(door.address, door.api_key, timeout_s=300) as client:
            client.model = (await anext(client.models())).name
            rows: list[Sequence[object]] = [("task", "right", "of", "share", "ms a text")]
            began = time.perf_counter()
            right = 0
            for at in range(0, len(headlines), 50):
                texts, labels = zip(*headlines[at : at + 50], strict=True)
                reply = await client.classify(texts, CLASSES, top_k=1)
                right += sum(result.labels[0].label == CLASSES[label] for result, label in zip(reply.results, labels, strict=True))
            rows.append(_row("headlines, 10 classes", right, len(headlines), began))
            began = time.perf_counter()
            reply = await client.sentiment([text for text, _ in SENTIMENT])
            right = sum(result.labels[0].label == label for result, (_, label) in zip(reply.results, SENTIMENT, strict=True))
            rows.append(_row("sentiment, 3 labels", right, len(SENTIMENT), began))
            began = time.perf_counter()
            answers = [await client.answer(question, PASSAGE, top_k=1) for question, _ in QUESTIONS]
            right = sum(
                bool(reply.answers) and expected in reply.answers[0].span.text
                for reply, (_, expected) in zip(answers, QUESTIONS, strict=True)
            )
            rows.append(_row("extractive answers", right, len(QUESTIONS), began))
    table(*rows)


def _row(task: str, right: int, count: int, began: float) -> tuple[str, int, int, str, str]:
    return task, right, count, f"{right / count:.3f}", f"{(time.perf_counter() - began) / count * 1e3:,.0f}"


def main() -> None:
    """Read the headlines, draw some by a seed, ask."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--headlines", type=Path, required=True)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=20261124)
    asked = parser.parse_args()
    lines = [line.rsplit("\t", 1) for line in asked.headlines.read_text().splitlines() if "\t" in line]
    drawn = random.Random(asked.seed).sample([(text, int(label)) for text, label in lines], asked.count)
    header()
    asyncio.run(measure(drawn))


if __name__ == "__main__":
    main()
