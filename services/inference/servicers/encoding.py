"""Tasks that read and generate nothing: labels by likelihood, vectors, and spans of passages."""

import array
import asyncio
import hashlib
import itertools
import math
import sys
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from functools import partial
from typing import TypeVar

from argosy.v1 import content_pb2, embedding_pb2, language_pb2, usage_pb2
from argosy_internal.engine.v1 import engine_pb2
from services.chassis.errors import FieldOutOfRange, ModelCapability, NotStarted, PromptTooLong, StreamLost, UnsupportedLanguage
from services.inference import languages, spans, tasks
from services.inference.engine.calls import Done, Embed, Embedded, Label, Labelled, Score, Scored, Token, Weigh, Weighed
from services.inference.engine.host import EngineLost, EngineNotReady, Host
from services.inference.languages import Language
from services.inference.servicers.generating import DEADLINE_MARGIN_S, Who, refusal
from services.inference.servicers.measured import Work
from services.inference.servicers.plans import Planner

__all__ = ["Encoder"]

PARALLEL_CALLS = 16  # of one request; the rest wait here rather than in the engine's queue
EMBED_BATCH = 32  # inputs of one engine call
WINDOW_TOKENS = 8_192  # a text longer than this, or than the context, is read in windows
OVERLAP = 8  # windows share one part in this many
BASELINES = 1_024  # label sets whose bias is remembered
SENTIMENT = ("positive", "neutral", "negative")
HEAD_TOKENS, HEAD_CHARACTERS = 3, 24  # a start is judged by its first tokens
HEAD_BEAM = 24  # different starts that are judged
START_BEAM = 8  # and of these, followed to their end
SAME_HEAD = 2  # places followed for each
SPAN_TOKENS, SHORT_SPAN_TOKENS = 32, 10  # longest answer, and how far every start is followed
NO_ANSWER_NATS = 1.5  # what a base model says "none" too seldom by: found with 20 questions, half of them without an answer
HOPELESS_NATS = 6.0  # a span this far below the best so far has no more than 1/400 of its probability
VECTOR_VALUES = 786_432  # texts × dimensions: the reply stays under 3 MiB

T = TypeVar("T")
Left = Callable[[], float]


class Spending:
    """The engine's counts of one request, kept where the door can read them whatever happens."""

    def __init__(self, who: Who, work: Work, usage: usage_pb2.Usage, left_s: Left, *, passes: bool = False) -> None:
        """`passes`: the request is billed by passes."""
        self.who = who
        self.work = work
        self.left_s = left_s
        self._usage = usage
        self._passes = passes
        self._number = itertools.count(1)

    def id(self) -> str:
        """Of the next engine call."""
        return f"{self.who.id}:{next(self._number)}"

    def deadline_s(self) -> float:
        """For the engine: a little before the wire's."""
        left = self.left_s()
        return max(0.0, left - min(DEADLINE_MARGIN_S, left / 2))

    def add(self, done: Done, passes: int = 1) -> None:
        """One call's counts, and its passes if it read anything; raises what its error means."""
        self._usage.input_tokens += done.usage.input_tokens
        self._usage.cached_input_tokens += done.usage.cached_input_tokens
        self._usage.output_tokens += done.usage.output_tokens
        if self._passes and done.usage.input_tokens:
            self._usage.passes += passes
        if done.error is not None:
            raise refusal(done.error)

    async def each(self, work: Iterable[Callable[[], Awaitable[T]]]) -> list[T]:
        """Run all, a bounded number at a time; the first that fails ends the others."""

        gate = asyncio.Semaphore(PARALLEL_CALLS)

        async def one(run: Callable[[], Awaitable[T]]) -> T:
            async with gate:
                return await run()

        running: list[asyncio.Task[T]] = []
        try:
            async with asyncio.TaskGroup() as group:
                running = [group.create_task(one(run)) for run in work]
        except BaseExceptionGroup as group:
            error: BaseException = group
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            raise error from None
        return [task.result() for task in running]


class Encoder:
    """Answers `Encode` with the engine's scores and vectors."""

    def __init__(self, host: Host, planner: Planner) -> None:
        self._host = host
        self._planner = planner
        self._baselines: OrderedDict[bytes, list[float]] = OrderedDict()

    async def encode(
        self, request: engine_pb2.EncodeRequest, who: Who, work: Work, model: content_pb2.ServedModel, usage: usage_pb2.Usage, left_s: Left
    ) -> engine_pb2.EncodeResponse:
        """The caller's reply, whole. `usage` grows as calls end."""
        usage.cached_input_tokens = 0  # known, even where nothing was cached
        spending = Spending(who, work, usage, left_s)
        match request.WhichOneof("task"):
            case "classify":
                labels = await self.classify(request.classify, spending)
                labels.model.CopyFrom(model)
                labels.usage.CopyFrom(usage)
                return engine_pb2.EncodeResponse(classify=labels)
            case "embed":
                vectors = await self.embed(request.embed, spending)
                vectors.model.CopyFrom(model)
                vectors.usage.CopyFrom(usage)
                return engine_pb2.EncodeResponse(embed=vectors)
            case _:
                answers = await self.answer(request.answer, spending)
                answers.model.CopyFrom(model)
                answers.usage.CopyFrom(usage)
                return engine_pb2.EncodeResponse(answer=answers)

    # --- the engine -----------------------------------------------------------------------------------------------------------------

    async def ask(self, call: Score | Embed | Label | Weigh, spending: Spending) -> Scored | Embedded | Labelled | Weighed:
        """The engine's answer to one call, at `spending`."""
        reply: Scored | Embedded | Labelled | Weighed | None = None
        # A prompt is read once for all of its continuations; forward and backward are two.
        passes = 1 if isinstance(call, Score) else 2 if isinstance(call, Weigh) else len(call.inputs)
        try:
            # Leaving it early ends the call.
            with spending.work.call(call) as told:
                async with aclosing(self._host.submit(call)) as messages:
                    async for message in messages:
                        match message:
                            case Scored() | Embedded() | Labelled() | Weighed():
                                reply = message
                            case Done():
                                told.done = message
                                spending.add(message, passes)
                            case _:
                                assert not isinstance(message, Token)  # nothing generates here
        except EngineNotReady:
            raise NotStarted from None
        except EngineLost:
            raise StreamLost from None
        assert reply is not None  # a Done without error follows an answer
        return reply

    async def score(
        self,
        prefix: Sequence[int],
        continuations: Sequence[Sequence[int]],
        spending: Spending,
        probes: Sequence[int] = (),
        first_probes: Sequence[int] = (),
    ) -> Scored:
        """Continuations of a prompt, in the order asked."""
        who = spending.who
        call = Score(
            id=spending.id(),
            prefix=tuple(prefix),
            continuations=tuple(map(tuple, continuations)),
            deadline_s=spending.deadline_s(),
            tenant=who.tenant,
            cache_salt=who.cache_salt,
            probes=tuple(probes),
            first_probes=tuple(first_probes),
            work_class=who.work_class,
            adapter=who.adapter,
            owner=who.tenant,
        )
        reply = await self.ask(call, spending)
        assert isinstance(reply, Scored)  # what a Score is answered with
        return reply

    # --- labels -----------------------------------------------------------------------------------------------------------------------

    async def classify(self, asked: language_pb2.ClassifyTextRequest, spending: Spending) -> language_pb2.ClassifyTextResponse:
        """Probabilities over labels for each text: of the tuned head, or by how much the text raises each label's likelihood."""
        source = asked.WhichOneof("label_source")
        if source is None:
            return await self._classify_tuned(asked, spending)
        labels = list(asked.zero_shot.labels) if source == "zero_shot" else list(SENTIMENT)
        word = tasks.label if source == "zero_shot" else tasks.sentiment
        instruction = asked.zero_shot.instruction

        def wording(text: str) -> tasks.Wording:
            return word(text, labels, instruction)

        baseline_work: dict[str, asyncio.Future[list[float]]] = {}

        async def one(text: str) -> language_pb2.Classification:
            script = tasks.script(text)
            if script not in baseline_work:
                baseline_work[script] = asyncio.ensure_future(self.bias(script, labels, instruction, wording, spending))
            scores, count = await self.label_scores(text, labels, wording, spending)
            contrast = [score - bias for score, bias in zip(scores, await baseline_work[script], strict=True)]
            chances = [tasks.independent(one) for one in contrast] if asked.multi_label else tasks.softmax(contrast)
            ranked = sorted(zip(labels, chances, strict=True), key=lambda pair: -pair[1])[: asked.top_k or len(labels)]
            scored = [content_pb2.LabelScore(label=label, probability=chance) for label, chance in ranked]
            return language_pb2.Classification(labels=scored, windows=count)

        try:
            results = await spending.each([partial(one, text) for text in asked.texts])
        finally:
            for work in baseline_work.values():
                work.cancel()
        return language_pb2.ClassifyTextResponse(results=results, calibration=language_pb2.CALIBRATION_NONE)

    async def _classify_tuned(self, asked: language_pb2.ClassifyTextRequest, spending: Spending) -> language_pb2.ClassifyTextResponse:
        labels = self.tuned_labels(spending)
        if asked.multi_label:
            raise ModelCapability("multi_label", "classify_multi_label")  # its head was fitted to exactly one right label
        if asked.top_k > len(labels):
            raise FieldOutOfRange("top_k", asked.top_k, len(labels), "labels")
        results = []
        for chances, count in await self.tuned_chances(asked.texts, spending):
            ranked = sorted(zip(labels, chances, strict=True), key=lambda pair: -pair[1])[: asked.top_k or len(labels)]
            scored = [content_pb2.LabelScore(label=label, probability=chance) for label, chance in ranked]
            results.append(language_pb2.Classification(labels=scored, windows=count))
        return language_pb2.ClassifyTextResponse(results=results, calibration=language_pb2.CALIBRATION_TEMPERATURE)

    @staticmethod
    def tuned_labels(spending: Spending, field: str = "label_source") -> tuple[str, ...]:
        """Labels of the caller's adapter. Raises ModelCapability where there is none, or it has no head."""
        tuned = spending.who.tuned
        if tuned is None or not tuned.labels:
            raise ModelCapability(field, "classify_tuned")
        return tuned.labels

    async def tuned_chances(self, texts: Sequence[str], spending: Spending) -> list[tuple[list[float], int]]:
        """For each text the calibrated probabilities of `tuned_labels`, averaged over its windows, and how many windows it has.

        A text is read as it was in training: what the model expects before any text, then plain ids, without template.
        """
        tuned, prefix = spending.who.tuned, self._planner.tokenizer.prefix
        assert tuned is not None  # `tuned_labels` asked
        longest = min(tuned.max_tokens or WINDOW_TOKENS, WINDOW_TOKENS, self._planner.hello.context)
        size = max(1, longest - len(prefix))
        encoded = await self._planner.tokenizer.aencode_batch(texts)
        inputs = [(place, ids[first:last]) for place, ids in enumerate(encoded) for first, last in tasks.windows(len(ids), size, 0)]
        batches = [inputs[at : at + EMBED_BATCH] for at in range(0, len(inputs), EMBED_BATCH)]

        async def one(batch: Sequence[tuple[int, list[int]]]) -> list[bytes]:
            who = spending.who
            call = Label(
                id=spending.id(),
                inputs=tuple((*prefix, *ids) for _, ids in batch),
                adapter=who.adapter,
                owner=who.tenant,
                deadline_s=spending.deadline_s(),
                tenant=who.tenant,
                cache_salt=who.cache_salt,
                work_class=who.work_class,
            )
            reply = await self.ask(call, spending)
            assert isinstance(reply, Labelled)  # what a Label is answered with
            return list(reply.logits)

        replies = await spending.each([partial(one, batch) for batch in batches])
        rows: list[list[list[float]]] = [[] for _ in texts]
        for (place, _), raw in zip(inputs, itertools.chain.from_iterable(replies), strict=True):
            rows[place].append(tasks.softmax([logit / tuned.temperature for logit in _floats(raw)]))
        return [([sum(column) / len(each) for column in zip(*each, strict=True)], len(each)) for each in rows]

    async def label_scores(
        self, text: str, labels: Sequence[str], wording: Callable[[str], tasks.Wording], spending: Spending
    ) -> tuple[list[float], int]:
        """Length-normalised log-likelihood of each label after the text; over windows, their mean. And how many windows."""
        continuations = await self.continuations(labels)
        frame = len(await self._planner.wording(wording(""))) + max(map(len, continuations))
        size = min(WINDOW_TOKENS, self._planner.hello.context - frame)
        if size < 1:
            raise PromptTooLong("label_source", frame, self._planner.hello.context, "tokens")
        parts = await self._planner.windows(text, size, size // OVERLAP)
        rows = []
        for part in parts:
            reply = await self.score(await self._planner.wording(wording(part)), continuations, spending)
            rows.append([tasks.normalised(continuation.logprobs) for continuation in reply.continuations])
        return [sum(column) / len(rows) for column in zip(*rows, strict=True)], len(rows)

    async def continuations(self, texts: Sequence[str]) -> list[list[int]]:
        """What follows a prompt's end: after a blank where the prompt is plain."""
        blank = " " if self._planner.plain else ""
        return await self._planner.tokenizer.aencode_batch([blank + text for text in texts])

    async def bias(
        self, script: str, labels: Sequence[str], instruction: str, wording: Callable[[str], tasks.Wording], spending: Spending
    ) -> list[float]:
        """What each label scores under texts that say nothing about it: the prompt's own bias.

        Remembered for each project apart, so that nobody can time what labels another project uses.
        """
        key = hashlib.sha256(repr((spending.who.tenant, spending.who.adapter, script, tuple(labels), instruction)).encode()).digest()
        known = self._baselines.get(key)
        if known is None:
            texts = tasks.NEUTRAL_TEXTS[script]
            rows = await spending.each([partial(self.label_scores, text, labels, wording, spending) for text in texts])
            known = [sum(column) / len(rows) for column in zip(*(scores for scores, _ in rows), strict=True)]
            self._baselines[key] = known
        self._baselines.move_to_end(key)
        while len(self._baselines) > BASELINES:
            self._baselines.popitem(last=False)
        return known

    async def language(self, text: str, who: Who, work: Work, usage: usage_pb2.Usage, left_s: Left) -> Language:
        """The language of a text: by its script, then by the likelihood of its name, at `usage`. Raises UnsupportedLanguage."""
        tags = languages.tell(text)
        if not tags:
            raise UnsupportedLanguage("source_language")
        if len(tags) == 1:
            return Language(tags[0], languages.LANGUAGES[tags[0]])
        spending = Spending(who, work, usage, left_s)
        names = await self.continuations([languages.LANGUAGES[tag] for tag in tags])

        async def scores(sample: str) -> list[float]:
            prefix = await self._planner.text(tasks.detect_language(sample))
            return [tasks.normalised(one.logprobs) for one in (await self.score(prefix, names, spending)).continuations]

        said, bias = await scores(text[:500]), await scores("...")
        place = max(range(len(tags)), key=lambda at: said[at] - bias[at])
        return Language(tags[place], languages.LANGUAGES[tags[place]])

    # --- vectors ----------------------------------------------------------------------------------------------------------------------

    async def embed(self, asked: embedding_pb2.EmbedTextsRequest, spending: Spending) -> embedding_pb2.EmbedTextsResponse:
        """A vector a text: the mean over its tokens, over windows weighted by their tokens."""
        width = self._planner.hello.width
        if asked.HasField("dimensions") and asked.dimensions != width:
            if asked.dimensions > width:
                raise FieldOutOfRange("dimensions", asked.dimensions, width, "values")
            raise ModelCapability("dimensions", "embedding_truncation")  # the model was not trained for it
        if len(asked.texts) * width > VECTOR_VALUES:
            raise FieldOutOfRange("texts", len(asked.texts), VECTOR_VALUES // width, "texts")
        prefix = self._planner.tokenizer.prefix
        size = min(WINDOW_TOKENS, self._planner.hello.context) - len(prefix)
        encoded = await self._planner.tokenizer.aencode_batch(asked.texts)
        inputs = [(place, ids[first:last]) for place, ids in enumerate(encoded) for first, last in tasks.windows(len(ids), size, 0)]
        batches = [inputs[at : at + EMBED_BATCH] for at in range(0, len(inputs), EMBED_BATCH)]

        async def one(batch: Sequence[tuple[int, list[int]]]) -> list[bytes]:
            call = Embed(
                id=spending.id(),
                inputs=tuple((*prefix, *ids) for _, ids in batch),
                deadline_s=spending.deadline_s(),
                tenant=spending.who.tenant,
                cache_salt=spending.who.cache_salt,
                work_class=spending.who.work_class,
                adapter=spending.who.adapter,
                owner=spending.who.tenant,
            )
            reply = await self.ask(call, spending)
            assert isinstance(reply, Embedded)  # what an Embed is answered with
            return list(reply.vectors)

        replies = await spending.each([partial(one, batch) for batch in batches])
        sums = [[0.0] * width for _ in asked.texts]
        weights = [0] * len(asked.texts)
        for (place, ids), raw in zip(inputs, itertools.chain.from_iterable(replies), strict=True):
            weight = len(prefix) + len(ids)
            weights[place] += weight
            sums[place] = [total + weight * value for total, value in zip(sums[place], _floats(raw), strict=True)]
        normalize = not asked.HasField("normalize") or asked.normalize
        vectors = [_scaled(total, math.hypot(*total) if normalize else weight) for total, weight in zip(sums, weights, strict=True)]
        return embedding_pb2.EmbedTextsResponse(embeddings=[embedding_pb2.Embedding(values=values) for values in vectors])

    # --- spans ------------------------------------------------------------------------------------------------------------------------

    async def answer(self, asked: language_pb2.AnswerQuestionRequest, spending: Spending) -> language_pb2.AnswerQuestionResponse:
        """The most likely spans of the passages, against "no answer"."""
        frame = len(await self._planner.wording(tasks.extract(asked.question, ""))) + SPAN_TOKENS
        size = min(WINDOW_TOKENS, self._planner.hello.context - frame)
        if size < SPAN_TOKENS:
            raise PromptTooLong("question", frame, self._planner.hello.context, "tokens")
        work = []
        for place, passage in enumerate(asked.passages):
            at = 0
            for window in await self._planner.windows(passage.text, size, 2 * SPAN_TOKENS if size > 4 * SPAN_TOKENS else 0):
                at = passage.text.index(window, at)
                work.append(partial(self._spans, asked.question, passage.text, at, at + len(window), place, spending))
        found = await spending.each(work)
        answers, none = spans.best(list(itertools.chain.from_iterable(found)), asked.top_k or 1)
        response = language_pb2.AnswerQuestionResponse(no_answer_probability=none)
        for answer in answers:
            passage = asked.passages[answer.passage]
            text = passage.text[answer.start : answer.end]
            first = len(passage.text[: answer.start].encode())
            span = content_pb2.Span(start_byte=first, end_byte=first + len(text.encode()), text=text, source_id=passage.id)
            response.answers.add(span=span, probability=answer.probability)
        return response

    async def _spans(self, question: str, text: str, first: int, last: int, place: int, spending: Spending) -> list[spans.Scored]:
        """Candidates in characters `first`..`last` of a passage: the likeliest starts, and from each every end up to SPAN_TOKENS."""
        tokenizer = self._planner.tokenizer
        prefix = await self._planner.wording(tasks.extract(question, text[first:last]))
        starts = [start for start in spans.word_starts(text) if first <= start < last]  # a window may begin inside a word
        if not starts:
            return []
        blank = " " if self._planner.plain else ""
        # A token has at least one character in nearly every text, and 6 at most in most: this covers SPAN_TOKENS tokens.
        tails = [text[start : min(last, start + 8 * SPAN_TOKENS)] for start in starts]
        heads: dict[tuple[int, ...], list[int]] = {}  # the same words often start several spans: they are scored once
        for one, ids in enumerate(await tokenizer.aencode_batch([blank + tail[:HEAD_CHARACTERS] for tail in tails])):
            heads.setdefault(tuple(ids[:HEAD_TOKENS]), []).append(one)
        none = (await tokenizer.aencode_batch([blank + tasks.NO_ANSWER]))[0]
        probes = tuple(dict.fromkeys(head[0] for head in heads))
        ends = (*self._planner.hello.end_token_ids, *(tokenizer.newline_ids if self._planner.plain else ()))
        reply = await self.score(prefix, [none], spending, ends, probes)
        none_score = sum(reply.continuations[0].logprobs) + spans.logsumexp(reply.continuations[0].probes[-1])
        none_score += NO_ANSWER_NATS if self._planner.plain else 0.0
        likely = dict(zip(probes, reply.first_probes, strict=True))
        ranked = sorted(heads, key=lambda head: -likely[head[0]])[:HEAD_BEAM]
        if len(ranked) > START_BEAM:
            begun = await self.score(prefix, ranked, spending)
            totals = {head: sum(one.logprobs) for head, one in zip(ranked, begun.continuations, strict=True)}
            ranked = sorted(ranked, key=lambda head: -totals[head])[:START_BEAM]
        chosen = sorted(one for head in ranked for one in heads[head][:SAME_HEAD])
        said = [blank + tails[one] for one in chosen]
        pieces = await asyncio.to_thread(lambda: [tokenizer.pieces(tail)[:SPAN_TOKENS] for tail in said])
        borders = spans.word_ends(text)
        found: dict[tuple[int, int], float] = {}
        alive = list(range(len(chosen)))
        # Most answers are short: the rest of a long one is scored only where it can still matter.
        for reach in (SHORT_SPAN_TOKENS, SPAN_TOKENS):
            reply = await self.score(prefix, [[piece.id for piece in pieces[one][:reach]] for one in alive], spending, ends)
            totals_at: dict[int, float] = {}
            for one, continuation in zip(alive, reply.continuations, strict=True):
                total = 0.0
                for step, (piece, logprob) in enumerate(zip(pieces[one][:reach], continuation.logprobs, strict=True), 1):
                    total += logprob
                    end = starts[chosen[one]] + len(said[one].encode()[: piece.end_byte].decode()) - len(blank)
                    whole = step == len(pieces[one]) or pieces[one][step].start_byte == piece.end_byte  # no character is cut
                    if end in borders and whole:
                        found[starts[chosen[one]], end] = total + spans.logsumexp(continuation.probes[step]) - none_score
                totals_at[one] = total - none_score
            best = max(found.values(), default=-math.inf)
            alive = [one for one in alive if len(pieces[one]) > reach and totals_at[one] > best - HOPELESS_NATS]
            if not alive:
                break
        return [spans.Scored(place, start, end, log_odds) for (start, end), log_odds in found.items()]


def _floats(raw: bytes) -> Sequence[float]:
    """Little-endian float32 values."""
    values = array.array("f")
    values.frombytes(raw)
    if sys.byteorder == "big":
        values.byteswap()
    return values


def _scaled(values: Sequence[float], divisor: float) -> list[float]:
    return [value / divisor for value in values] if divisor else list(values)
