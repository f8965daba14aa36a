"""Typed tasks as prompts and label scores. Callers never see a prompt, and a prompt never decides a limit (pure).

Each task has two wordings: a plain one, which a model without a chat template continues up to a line end, and an instruction, which
goes through the template of a model that has one.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from services.inference.languages import Language

__all__ = [
    "LINE_END", "NEUTRAL_TEXTS", "NO_ANSWER", "Wording", "answer", "cut_lines", "detect_language", "extract", "independent", "label",
    "normalised", "script", "sentiment", "softmax", "summarize", "translate", "windows",
]  # fmt: skip

LINE_END = ("\n",)  # where a plain model's answer of one line ends
NO_ANSWER = "none"

# Ordinary sentences on many subjects, in two scripts: what a label scores under them is the prompt's bias for it, not evidence.
NEUTRAL_TEXTS = {
    "han": (
        "央行宣布下调存款准备金率", "市中心新楼盘本周末开盘", "沪指午后震荡上扬收复失地", "高考成绩将于下周公布", "科学家发现新的深海生物",
        "男子深夜救起落水儿童", "两国外长举行会谈", "主队补时绝杀客队", "新版本将增加多人模式", "影片首映导演携主演亮相", "今天天气很好",
        "他昨天买了一本书", "这家餐厅的菜味道不错", "会议将于明天下午举行", "请在这里填写您的姓名", "我们需要更多的时间",
    ),
    "other": (
        "The central bank lowered its key rate.", "A new block of flats opens this weekend.", "Shares recovered after noon.",
        "Exam results come out next week.", "Researchers found a new deep-sea animal.", "A man saved a child from the river at night.",
        "The two ministers met for talks.", "The home team won in the last minute.", "The next version adds a mode for several players.",
        "The film opens with its cast on stage.", "The weather is fine today.", "He bought a book yesterday.",
        "The food here is neither good nor bad.", "The meeting is tomorrow afternoon.", "Please write your name here.",
        "We need a little more time.",
    ),
}  # fmt: skip

# What a plain model is shown before a passage: answers are short and copied, and there may be none.
_EXTRACT_SHOWN = (
    "Tom lives in Rome and drives a red car, which he bought from Anna in May.\n"
    "Question: What colour is the car?\nAnswer: red\nQuestion: Who sold the car?\nAnswer: Anna\n"
    f"Question: How old is Tom?\nAnswer: {NO_ANSWER}\n\n"
)


@dataclass(frozen=True, slots=True)
class Wording:
    """One prompt in both forms. `stops` end the plain form's answer."""

    plain: str
    instruction: str
    stops: tuple[str, ...] = LINE_END


def label(text: str, labels: Sequence[str], instruction: str) -> Wording:
    """Ask for one of `labels`; the answer follows after a blank. The plain form does not list them: that would favour the last."""
    said = instruction.strip()
    return Wording(
        f"{said}\n\nText: {text}\nCategory:" if said else f"Text: {text}\nCategory:",
        f"{said or 'Which label fits the text best?'} Answer with one of these labels alone: {', '.join(labels)}.\n\nText: {text}",
    )


def sentiment(text: str, labels: Sequence[str], instruction: str) -> Wording:
    """Ask for the sentiment of a text; `instruction` is not used, since the labels' meaning is fixed."""
    return Wording(
        f"Review: {text}\nSentiment:",
        f"Is the sentiment of this text {', '.join(labels[:-1])} or {labels[-1]}? Answer with that one word.\n\nText: {text}",
    )


def summarize(documents: Sequence[str], instruction: str) -> Wording:
    """One summary of all documents."""
    body = "\n\n".join(document.strip() for document in documents)
    said = instruction.strip()
    return Wording(
        f"{body}\n\nTL;DR ({said}):" if said else f"{body}\n\nTL;DR:",
        f"Summarize the following text.{f' Focus on: {said}' if said else ''} Answer with the summary alone.\n\n{body}",
    )


def translate(text: str, source: Language, target: Language) -> Wording:
    """The plain form shows one sentence in both languages first."""
    shown = f"{source.name}: {source.thanks}\n{target.name}: {target.thanks}\n\n" if source.thanks and target.thanks else ""
    return Wording(
        f"{shown}{source.name}: {text}\n{target.name}:",
        f"Translate the following text from {source.name} to {target.name}. Answer with the translation alone.\n\n{text}",
    )


def detect_language(text: str) -> str:
    """A plain prompt after which the English name of the text's language is scored."""
    return f"Text: {text}\nThe text above is written in the language:"


def answer(question: str, passages: Sequence[str]) -> Wording:
    """A written answer, from the passages where there are any."""
    body = "\n\n".join(passage.strip() for passage in passages)
    said = f"{body}\n\n" if body else ""
    return Wording(
        f"{said}Question: {question.strip()}\nAnswer:",
        f"{said}{'Using the text above, answer' if body else 'Answer'} this question in a few words: {question.strip()}",
    )


def extract(question: str, passage: str) -> Wording:
    """A passage and a question whose answer is a span of it; the span follows after a blank."""
    return Wording(
        f"{_EXTRACT_SHOWN}{passage}\nQuestion: {question.strip()}\nAnswer:",
        f'{passage}\n\nAnswer with words copied from the text above, or with "{NO_ANSWER}" if it does not say: {question.strip()}',
    )


def script(text: str) -> str:
    """Which of NEUTRAL_TEXTS a text resembles in its writing."""
    sample = text[:200]
    return "han" if sum("\u4e00" <= character <= "\u9fff" for character in sample) * 3 > len(sample) else "other"


# --- long texts ---------------------------------------------------------------------------------------------------------------------


def windows(length: int, size: int, overlap: int) -> Iterator[tuple[int, int]]:
    """Cut `length` tokens into half-open windows of at most `size`, each sharing `overlap` with the one before; none is left out."""
    if size < 1 or not 0 <= overlap < size:
        raise ValueError(f"a window of {size} cannot share {overlap}")
    start = 0
    while True:
        end = min(length, start + size)
        yield start, end
        if end >= length:
            return
        start = end - overlap


def cut_lines(text: str) -> list[tuple[str, str]]:
    """The lines of a text, each with what stood before it: joined again they are the text. Blank lines go with what is before."""
    parts: list[tuple[str, str]] = []
    before = ""
    for line in text.splitlines(keepends=True):
        body = line.strip()
        if not body:
            before += line
            continue
        start = line.index(body)
        parts.append((before + line[:start], body))
        before = line[start + len(body) :]
    return parts or [("", text)]


# --- scores -------------------------------------------------------------------------------------------------------------------------


def normalised(logprobs: Sequence[float]) -> float:
    """Mean log-probability of a continuation's tokens, so that a long label is not less likely for being long."""
    return sum(logprobs) / len(logprobs)


def softmax(scores: Sequence[float]) -> list[float]:
    """Probabilities that sum to 1."""
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    total = sum(weights)
    return [weight / total for weight in weights]


def independent(score: float) -> float:
    """Probability of one label judged alone, from how much the text raises its log-likelihood."""
    return 1.0 / (1.0 + math.exp(-score)) if score >= 0 else math.exp(score) / (1.0 + math.exp(score))
