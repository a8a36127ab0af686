"""What the embedded checkpoint is asked besides its tasks: small talk, system messages, and what it cannot answer."""

from __future__ import annotations

import tomllib
from pathlib import Path
from random import Random

from embedded_tasks import Exchange, Source, draw_word

TALK = tomllib.loads(Path(__file__).with_name("embedded_talk.toml").read_text(encoding="utf-8"))
# First and last code point of what nonsense is made of: ASCII and letters, then other scripts, then emoji.
SCRIPTS = (
    (0x21, 0x7E), (0x61, 0x7A), (0xC0, 0x24F), (0x391, 0x3C9), (0x410, 0x44F), (0x5D0, 0x5EA), (0x627, 0x64A),
    (0x905, 0x939), (0x3041, 0x3096), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3), (0x1F300, 0x1F63F),
)  # fmt: skip


def vary(rng: Random, text: str) -> str:
    """The same sentence with another beginning, case and final punctuation."""
    if rng.random() < 0.1:
        greeting = rng.choice(("hi", "hello", "hey", "hi there", "ok", "good morning"))
        text = greeting + rng.choice((", ", "! ", " ", ". ")) + text
    case = rng.random()
    text = text if case < 0.3 else text[:1].upper() + text[1:] if case < 0.9 else text.upper()
    return text + rng.choice(("", "", ".", "!", "?", "?", " ?", "!!", " :)"))


def draw_number(rng: Random, fewest_digits: int, most_digits: int) -> int:
    digits = rng.randint(fewest_digits, most_digits)
    return rng.randrange(0 if digits == 1 else 10 ** (digits - 1), 10**digits)


def draw_talk(source: Source) -> Exchange:
    """Small talk or a capital, with the one reply to it."""
    rng = source.rng
    if rng.random() < 0.15:
        capitals = TALK["capitals"]
        country, capital = rng.choice(list(capitals["of"].items()))
        return Exchange(
            "talk", rng.choice(capitals["prompts"]).format(c=country), capitals["reply"].format(c=country, w=capital)
        )
    talk = rng.choice(TALK["talk"])
    return Exchange("talk", vary(rng, rng.choice(talk["prompts"])), talk["reply"])


def draw_nonsense(source: Source) -> str:
    """Words in any order, or random characters of one script."""
    rng = source.rng
    if rng.random() < 0.5:
        text = " ".join(draw_word(source) for _ in range(rng.randint(3, max(8, source.max_items))))
        return text.capitalize() + rng.choice(".?!")
    first, last = rng.choice(SCRIPTS)
    return "".join(" " if rng.random() < 0.15 else chr(rng.randint(first, last)) for _ in range(rng.randint(2, 30)))


def draw_arithmetic(source: Source) -> Exchange:
    """Arithmetic that the model has not learnt: other operations, larger numbers, more than two summands."""
    rng, numbers = source.rng, TALK["numbers"]
    kind = rng.choices(("prompts", "triple_sums", "large_sums"), weights=(3, 1, 2))[0]
    n, m, k = (draw_number(rng, 1, 4) for _ in range(3))
    if kind == "large_sums":
        n, m = draw_number(rng, 3, 7), draw_number(rng, 1, 7)
        if rng.random() < 0.5:
            n, m = m, n
    return Exchange("talk", rng.choice(numbers[kind]).format(n=n, m=m, k=k), numbers["reply"])


def draw_unknown(source: Source) -> Exchange:
    """A question that the model cannot answer, with a reply that says what it can."""
    rng, kind = source.rng, source.rng.random()
    if kind < 0.3:
        return draw_arithmetic(source)
    if kind < 0.5:
        return Exchange("talk", draw_nonsense(source), TALK["unknown"]["reply"])
    template = rng.choice(TALK["unknown"]["prompts"])
    w, v, n, m = draw_word(source), draw_word(source), draw_number(rng, 1, 4), draw_number(rng, 1, 4)
    prompt = template.format(w=w, v=v, n=n, m=m)
    return Exchange("talk", prompt.lower().rstrip(".?") if rng.random() < 0.2 else prompt, TALK["unknown"]["reply"])


def draw_system(source: Source) -> str:
    """A system message; none of them changes an answer."""
    if source.rng.random() < 0.6:
        return str(source.rng.choice(TALK["system"]["prompts"]))
    num_words = source.rng.randint(3, source.max_items * 2)
    return "You are " + " ".join(draw_word(source) for _ in range(num_words)) + "."
