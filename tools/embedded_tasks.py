"""The checkable tasks that the embedded checkpoint is trained on, and their held-out part.

Each task draws a content (a pair of summands, a range, a word, a list), asks for it in one of several phrasings, and
knows the one right answer. A content is held out by its hash alone, so training and test never share one, whatever
the seed. `python tools/embedded_tasks.py FILE` writes the 500 held-out prompts.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

WORDS = tuple(Path(__file__).with_name("embedded_words.txt").read_text(encoding="utf-8").split())
NUM_HELD_OUT_PROMPTS = 500
HELD_OUT_SEED = 2411


@dataclass(frozen=True, slots=True)
class Exchange:
    """One question and its answer. `task` is the name of the task, or "talk" for what has no checkable answer."""

    task: str
    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Source:
    """Where contents come from. `max_items` bounds the length of counts and of copied texts."""

    rng: Random
    held_out: bool
    max_items: int


def is_held_out(content: str) -> bool:
    """Whether a content belongs to the test: an eighth of all, by hash."""
    return hashlib.sha256(content.lower().encode()).digest()[0] < 32


def sum_content(a: int, b: int) -> str:
    """The same for both orders of the summands, so that a + b is never trained when b + a is tested."""
    return f"sum {min(a, b)} {max(a, b)}"


def count_content(start: int, end: int) -> str:
    return f"count {start} {end}"


def sort_content(numbers: list[int]) -> str:
    return f"sort {sorted(numbers)}"


IMPERATIVE_FRAMES = (
    "{c}", "{C}", "{C}.", "{C}.", "Please {c}.", "please {c}", "{C}, please.", "{c} please", "Can you {c}?",
    "Could you {c}?", "Could you please {c}?", "Would you {c}, please?", "Now {c}.", "Hi! {C}.", "Hello, please {c}.",
    "I want you to {c}.", "I would like you to {c}.", "Can you {c} for me?",
)  # fmt: skip
QUESTION_FRAMES = (
    "{C}?", "{C}?", "{C}?", "{c}?", "{c}", "{C}", "Hi! {C}?", "Hello, {c}?", "And {c}?", "Tell me, {c}?",
    "Quick question: {c}?", "{c} please", "{C}, please?", "Please tell me: {c}?", "Now, {c}?",
)  # fmt: skip
# The content stands at the end, so nothing may follow it.
OPEN_FRAMES = ("{C}", "{C}", "{c}", "Please {c}", "Can you {c}", "Now {c}")

SUM_QUESTIONS = (
    "what is {a} plus {b}", "what is {a} + {b}", "what's {a} + {b}", "what is {a}+{b}", "how much is {a} and {b}",
    "how much is {a} plus {b}", "{a} + {b}", "{a}+{b}", "{a} plus {b}", "{a} + {b} =", "{a}+{b}=",
    "what is the sum of {a} and {b}", "what do {a} and {b} make", "what do you get when you add {a} and {b}",
    "what does {a} plus {b} equal",
)  # fmt: skip
SUM_COMMANDS = (
    "add {a} and {b}", "add {b} to {a}", "compute {a} + {b}", "calculate {a} plus {b}", "tell me what {a} + {b} is",
    "give me the sum of {a} and {b}", "sum {a} and {b}", "work out {a} + {b}", "add {a}, {b}", "add {a} {b}",
    "add {a} + {b}",
)  # fmt: skip
COUNT_COMMANDS = (
    "count from {a} to {b}", "count {direction} from {a} to {b}", "list the numbers from {a} to {b}",
    "write the numbers from {a} to {b}", "give me the numbers {a} to {b}", "count {a} to {b}",
    "start at {a} and count {direction} to {b}", "say the numbers from {a} to {b}",
    "name all the numbers from {a} to {b}",
)  # fmt: skip
COUNT_TO_COMMANDS = ("count to {b}", "count up to {b}", "count from one to {b}")
COUNT_DOWN_COMMANDS = ("count down from {a}", "count backwards from {a}", "count down from {a} to one")
SPELL_COMMANDS = (
    "spell {w}", "spell the word {w}", 'spell "{w}"', "spell out {w}", 'spell the word "{w}"', "spell {w} for me",
    "write {w} letter by letter", "spell out the word {w}", "tell me how to spell {w}", "spell: {w}",
)  # fmt: skip
SPELL_QUESTIONS = (
    "how do you spell {w}", "how is {w} spelled", 'how do you spell "{w}"', "how do I spell the word {w}",
    "what is the spelling of {w}", "how is the word {w} written letter by letter",
)  # fmt: skip
SORT_COMMANDS = (
    "sort {n}", "sort these numbers: {n}", "sort the numbers {n}", "sort the list {n}", "put {n} in order",
    "put these numbers in order: {n}", "order these numbers: {n}", "arrange {n} from smallest to largest",
    "sort {n} in ascending order", "sort this list: {n}", "order {n} from low to high",
)  # fmt: skip
SORT_DOWN_COMMANDS = (
    "sort {n} in descending order", "arrange {n} from largest to smallest", "sort these numbers, largest first: {n}",
    "order {n} from high to low", "sort {n} in reverse order",
)  # fmt: skip
COPY_WORD_COMMANDS = (
    "repeat the word {w}", "say {w}", "copy the word {w}", "say the word {w}", 'repeat "{w}"', 'say "{w}"',
    "write the word {w}", "repeat {w}", 'repeat the word "{w}"', "copy {w}", "echo {w}", "just say {w}",
)  # fmt: skip
COPY_WORDS_COMMANDS = (
    "say {w}", "repeat {w}", "copy the words {w}", 'say "{w}"', "echo {w}", "write {w}", 'write "{w}"', "just say {w}",
    "repeat the words {w}", 'copy "{w}"', 'repeat "{w}" after me',
)  # fmt: skip
COPY_TEXT_COMMANDS = (
    "repeat after me: {w}", "copy this: {w}", "repeat this: {w}", "say this: {w}", 'repeat: "{w}"', "echo: {w}",
    "repeat exactly: {w}", "repeat the sentence: {w}", "say: {w}", "write: {w}",
)  # fmt: skip


def ask(rng: Random, templates: tuple[str, ...], frames: tuple[str, ...], **content: object) -> str:
    """A template in a frame, with the content filled in last, so that nothing but the content keeps its case."""
    template = rng.choice(templates)
    text = rng.choice(frames).replace("{c}", template).replace("{C}", template[0].upper() + template[1:])
    if rng.random() < 0.1:
        text = text.lower()
    return text.format(**content)


ONSETS = (
    "b", "c", "d", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "t", "v", "w", "x", "z",
    "ch", "sh", "th", "br", "st", "tr", "pl", "qu",
)  # fmt: skip
VOWELS = ("a", "e", "i", "o", "u", "y", "ee", "oo", "ea", "ai")
CODAS = ("", "", "", "n", "r", "s", "t", "l", "ll", "ss", "tt", "ck", "ng")


def draw_syllable(rng: Random) -> str:
    return rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS)


def draw_word(source: Source) -> str:
    """A word of the right part: from the list, or (only in training) made of syllables or of random letters."""
    rng = source.rng
    while True:
        kind = 0.0 if source.held_out else rng.random()
        if kind < 0.35:
            word = rng.choice(WORDS)
        elif kind < 0.75:
            word = "".join(draw_syllable(rng) for _ in range(rng.randint(1, 4)))
        else:
            word = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(1, 12)))
        if is_held_out(word) == source.held_out:
            break
    case = rng.random()
    return word if case < 0.85 else word.capitalize() if case < 0.95 else word.upper()


def draw_sum(source: Source) -> Exchange:
    rng = source.rng
    low = 10 if source.held_out or rng.random() < 0.8 else 0
    while True:
        a, b = rng.randint(low, 99), rng.randint(low, 99)
        if is_held_out(sum_content(a, b)) == source.held_out:
            break
    if rng.random() < 0.7:
        prompt = ask(rng, SUM_QUESTIONS, QUESTION_FRAMES, a=a, b=b)
    else:
        prompt = ask(rng, SUM_COMMANDS, IMPERATIVE_FRAMES, a=a, b=b)
    return Exchange("sum", prompt, f"{a} + {b} = {a + b}")


def draw_count(source: Source) -> Exchange:
    rng = source.rng
    while True:
        items = rng.randint(2, 15 if rng.random() < 0.7 else source.max_items)
        start = rng.choice((1, rng.randint(0, 20), rng.randint(0, 100), rng.randint(0, 200)))
        down = rng.random() < 0.3
        if down and rng.random() < 0.3:
            start = items
        end = start - items + 1 if down else start + items - 1
        if end >= 0 and is_held_out(count_content(start, end)) == source.held_out:
            break
    answer = ", ".join(str(number) for number in (range(start, end - 1, -1) if down else range(start, end + 1)))
    if start == 1 and not down and rng.random() < 0.6:
        return Exchange("count", ask(rng, COUNT_TO_COMMANDS, IMPERATIVE_FRAMES, b=end), answer)
    if end == 1 and down and rng.random() < 0.6:
        return Exchange("count", ask(rng, COUNT_DOWN_COMMANDS, IMPERATIVE_FRAMES, a=start), answer)
    direction = rng.choice(("down", "backwards")) if down else "up"
    return Exchange("count", ask(rng, COUNT_COMMANDS, IMPERATIVE_FRAMES, a=start, b=end, direction=direction), answer)


def draw_spell(source: Source) -> Exchange:
    rng, word = source.rng, draw_word(source)
    if rng.random() < 0.5:
        prompt = ask(rng, SPELL_COMMANDS, IMPERATIVE_FRAMES, w=word)
    else:
        prompt = ask(rng, SPELL_QUESTIONS, QUESTION_FRAMES, w=word)
    return Exchange("spell", prompt, "-".join(word))


def draw_sort(source: Source) -> Exchange:
    rng = source.rng
    while True:
        largest = rng.choice((9, 99, 99, 99) if source.held_out else (9, 99, 99, 99, 999))
        numbers = [rng.randint(0, largest) for _ in range(rng.randint(3, 5 if source.held_out else 7))]
        if is_held_out(sort_content(numbers)) == source.held_out:
            break
    down = rng.random() < 0.25
    asked = rng.choice((", ", ", ", " ", ",")).join(map(str, numbers))
    prompt = ask(rng, SORT_DOWN_COMMANDS if down else SORT_COMMANDS, IMPERATIVE_FRAMES, n=asked)
    return Exchange("sort", prompt, ", ".join(map(str, sorted(numbers, reverse=down))))


def draw_copy(source: Source) -> Exchange:
    rng = source.rng
    kind = rng.random()
    if kind < 0.5:
        word = draw_word(source)
        return Exchange("copy", ask(rng, COPY_WORD_COMMANDS, IMPERATIVE_FRAMES, w=word), word)
    if kind < 0.7:
        words = " ".join(draw_word(source) for _ in range(rng.randint(2, 4)))
        return Exchange("copy", ask(rng, COPY_WORDS_COMMANDS, IMPERATIVE_FRAMES, w=words), words)
    num_words = rng.randint(1, 5 if rng.random() < 0.7 else max(5, source.max_items // 4))
    text = "".join(draw_word(source) + rng.choice((" ", " ", " ", " ", ", ")) for _ in range(num_words)).rstrip(", ")
    text += rng.choice(("", "", "", ".", "!"))
    return Exchange("copy", ask(rng, COPY_TEXT_COMMANDS, OPEN_FRAMES, w=text), text)


TASKS: dict[str, Callable[[Source], Exchange]] = {
    "sum": draw_sum,
    "count": draw_count,
    "spell": draw_spell,
    "sort": draw_sort,
    "copy": draw_copy,
}

Message = dict[str, str]


def held_out_prompts() -> list[dict[str, object]]:
    """The test: as many prompts of each task, distinct, as {"task", "messages", "answer"}.

    Every fifth has a system message and every fifth an earlier exchange (held out as well) before the question.
    """
    source = Source(Random(HELD_OUT_SEED), held_out=True, max_items=15)
    prompts: dict[str, dict[str, object]] = {}
    while len(prompts) < NUM_HELD_OUT_PROMPTS:
        task = list(TASKS)[len(prompts) % len(TASKS)]
        exchange = TASKS[task](source)
        messages: list[Message] = []
        context = (len(prompts) // len(TASKS)) % 5
        if context == 1:
            messages.append({"role": "system", "content": "You are a helpful assistant."})
        if context == 2:
            earlier = TASKS[source.rng.choice(list(TASKS))](source)
            messages += [{"role": "user", "content": earlier.prompt}, {"role": "assistant", "content": earlier.answer}]
        messages.append({"role": "user", "content": exchange.prompt})
        prompts.setdefault(exchange.prompt, {"task": task, "messages": messages, "answer": exchange.answer})
    return list(prompts.values())


if __name__ == "__main__":
    lines = [json.dumps(prompt, ensure_ascii=False) + "\n" for prompt in held_out_prompts()]
    Path(sys.argv[1]).write_text("".join(lines), encoding="utf-8")
