"""The text that the demo model learns from: sentences whose answer stands earlier in the prompt.

A *family* states a fact, or two, and then asks about it by going on with a sentence; the next
word is the answer, and it stands in the fact. With one fact the answer is the only word of its
kind in the prompt; in the family "pets" there are two and the question decides between them. The
example of LXT's documentation is one of them: "I have 5 cats and 3 dogs. My cats love to play
with my" goes on with "dogs".

Training and held-out text are kept apart by *combination*: the words that could be the answer
(of a single fact: its subject and the answer) as a set. A hash of family and combination puts
every combination on one side, so that a held-out sentence puts words together that no training
sentence of that family ever did. No training text at all has both cats and dogs.

Training also has *rehearsals*: pairs of words without a sentence around them, each pair then
repeated ("oats red. Rome 6. Rome 6. oats red."). They teach to look up what followed a word
before, several times per text and with nothing else to learn. Any two words may form a pair, but
for cats and dogs; that a combination is held out is said of its family.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from demo_model import words
from demo_model.families import FAMILIES, Family

_SLOT = re.compile(r"\{(?P<article>a )?(?P<name>\w+)\}")
_HELD_OUT_ONE_IN = 8
_ALWAYS_HELD_OUT = frozenset({"cats", "dogs"})
_OPENING_SHARE = 0.25
_REHEARSAL_SHARE = 0.25
_REHEARSAL_PAIRS = (3, 6)
_REHEARSAL_ROUNDS = 2
# A set has no fixed order; sorted, the same seed gives the same text in every process.
_REHEARSAL_WORDS = sorted({word for f in FAMILIES for word in (*f.answers, *f.keys)})


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt with the word that follows it.

    Parameters
    ----------
    prompt
        Text up to, and without, the answer; no space at its end.
    answer
        The one word that comes next.
    family
        Name of the family that the sentence belongs to.
    deciding
        Character span ``(start, end)`` of the earlier occurrence of the answer in the prompt.
    combination
        The words, sorted, that decide whether the sentence is training or held-out text.
    """

    prompt: str
    answer: str
    family: str
    deciding: tuple[int, int]
    combination: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Document:
    """One text to train on: facts, then one or more questions with their answers.

    Parameters
    ----------
    text
        The whole text.
    answers
        Character spans ``(start, end)`` of the words that a reader of the text can foretell.
    family
        Name of the family, or "rehearsal".
    combination
        The text's combination, on the training side; empty for a rehearsal.
    """

    text: str
    answers: tuple[tuple[int, int], ...]
    family: str
    combination: tuple[str, ...]


def is_held_out(family: str, combination: tuple[str, ...]) -> bool:
    """Tell on which side of the split a combination lies; the same on every machine."""
    if set(combination) >= _ALWAYS_HELD_OUT:
        return True
    digest = hashlib.sha256("|".join((family, *sorted(combination))).encode()).digest()
    return digest[0] % _HELD_OUT_ONE_IN == 0


def training(seed: int, *, rehearsals_first: int = 0) -> Iterator[Document]:
    """Endless training texts; a seed gives one sequence.

    Parameters
    ----------
    seed
        Any whole number.
    rehearsals_first
        That many texts are rehearsals; after them one in four is, and the families take turns.
    """
    rng = Random(f"training {seed}")
    families = itertools.cycle(FAMILIES)
    for number in itertools.count():
        if number < rehearsals_first or rng.random() < _REHEARSAL_SHARE:
            yield _rehearse(rng)
        else:
            yield _teach(next(families), rng)


def held_out(n: int, seed: int) -> list[Example]:
    """Draw `n` different held-out sentences, the families in turn.

    None of their combinations is in :func:`training`, whatever the seed.
    """
    if n < 0:
        raise ValueError(f"n must not be negative, but is {n}")
    rng = Random(f"held out {seed}")
    unique: dict[str, Example] = {}
    for family in itertools.cycle(FAMILIES):
        if len(unique) >= n:
            break
        while True:
            story = _tell(family, rng)
            if is_held_out(family.name, story.combination):
                break
        asked = rng.randrange(len(story.answers))
        prompt = story.text + story.question(asked, rng)
        drawn = Example(
            prompt, story.answers[asked], family.name, story.spans[asked], story.combination
        )
        unique.setdefault(prompt, drawn)
    return list(unique.values())


def example() -> Example:
    """Give the sentence of LXT's example, which is on the held-out side."""
    prompt = "I have 5 cats and 3 dogs. My cats love to play with my"
    start = prompt.index("dogs")
    return Example(prompt, "dogs", "pets", (start, start + len("dogs")), ("cats", "dogs"))


def vocabulary() -> tuple[str, ...]:
    """Every word and sign of the corpus, sorted: each is one token of the demo tokenizer."""
    texts: list[str] = [*words.OPENINGS, example().prompt, "a an the The"]
    for family in FAMILIES:
        texts.extend(_SLOT.sub(" ", lead + fact) for lead, fact in family.facts)
        questions = itertools.chain.from_iterable(family.questions)
        texts.extend(_SLOT.sub(" ", question) for question in questions)
        texts.extend((*family.answers, *family.keys))
    return tuple(sorted({piece for text in texts for piece in re.findall(r"\w+|[^\w\s]", text)}))


@dataclass(frozen=True, slots=True)
class _Story:
    """Facts that were drawn and written down, not yet asked about."""

    family: Family
    style: int
    text: str
    answers: tuple[str, ...]
    keys: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]

    @property
    def combination(self) -> tuple[str, ...]:
        """The two possible answers; of a lone fact, its key and its answer."""
        words_of_it = self.answers if len(self.answers) > 1 else (*self.keys, *self.answers)
        return tuple(sorted(words_of_it))

    def question(self, asked: int, rng: Random) -> str:
        """Write what leads to the answer of fact number `asked`, up to the answer."""
        slots = {"key": self.keys[asked]}
        if len(self.answers) == 2:
            slots["other"] = self.answers[1 - asked]
        template = rng.choice(self.family.questions[self.style])
        return " " + _fill(template, slots)[0]


def _teach(family: Family, rng: Random) -> Document:
    while True:
        story = _tell(family, rng)
        if not is_held_out(family.name, story.combination):
            break
    text = story.text
    spans = []
    for _ in range(rng.randint(1, 2 * len(story.answers))):
        asked = rng.randrange(len(story.answers))
        text += story.question(asked, rng)
        spans.append((len(text) + 1, len(text) + 1 + len(story.answers[asked])))
        text += f" {story.answers[asked]}."
    return Document(text, tuple(spans), family.name, story.combination)


def _rehearse(rng: Random) -> Document:
    count = rng.randint(*_REHEARSAL_PAIRS)
    while True:
        drawn = rng.sample(_REHEARSAL_WORDS, 2 * count)
        if not set(drawn) >= _ALWAYS_HELD_OUT:
            break
    pairs = list(zip(drawn[::2], drawn[1::2], strict=True))
    text = " ".join(f"{first} {second}." for first, second in pairs)
    spans = []
    for _ in range(_REHEARSAL_ROUNDS):
        rng.shuffle(pairs)
        for first, second in pairs:
            text += f" {first} "
            spans.append((len(text), len(text) + len(second)))
            text += f"{second}."
    return Document(text, tuple(spans), "rehearsal", ())


def _tell(family: Family, rng: Random) -> _Story:
    answers = tuple(rng.sample(family.answers, family.count))
    keys = tuple(rng.sample(family.keys, family.count))
    style = rng.randrange(len(family.facts))
    lead, fact = family.facts[style]

    text = f"{rng.choice(words.OPENINGS)} " if rng.random() < _OPENING_SHARE else ""
    text += lead
    spans = []
    for index, (answer, key) in enumerate(zip(answers, keys, strict=True)):
        if index:
            text += " and "
        piece, at = _fill(fact, {"answer": answer, "key": key}, marked="answer")
        if not text or text.endswith(". "):
            piece = piece[:1].upper() + piece[1:]
        spans.append((len(text) + at, len(text) + at + len(answer)))
        text += piece
    return _Story(family, style, text + ".", answers, keys, tuple(spans))


def _fill(template: str, slots: dict[str, str], marked: str = "") -> tuple[str, int]:
    """Fill the slots of a template; also tell where the word of slot `marked` begins (or -1)."""
    text, end, at = "", 0, -1
    for match in _SLOT.finditer(template):
        word = slots[match["name"]]
        text += template[end : match.start()]
        if match["article"]:
            text += "an " if word[0] in "aeiou" else "a "
        if match["name"] == marked:
            at = len(text)
        text += word
        end = match.end()
    return text + template[end:], at
