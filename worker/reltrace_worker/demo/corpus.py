"""The text that the demo model learns from: sentences whose answer stands earlier in the prompt.

A *family* states one or two facts and then asks about one of them by going on with a sentence;
the next word is the answer, and it stands in one of the facts. The example of LXT's documentation
is one of them: "I have 5 cats and 3 dogs. My cats love to play with my" goes on with "dogs".

Training and held-out text are kept apart by *combination*: the words that could be the answer
(of a single fact: its subject and the answer) as a set. A hash of family and combination puts
every combination on one side, so that a held-out sentence puts words together that no training
sentence of that family ever did. Cats and dogs are on the held-out side in every family.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from reltrace_worker.demo import words

_SLOT = re.compile(r"\{(?P<article>a )?(?P<name>\w+)\}")
_HELD_OUT_ONE_IN = 8
_ALWAYS_HELD_OUT = frozenset({"cats", "dogs"})
_OPENING_SHARE = 0.25


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
        Name of the family.
    combinations
        Every combination that the text contains; all are on the training side.
    """

    text: str
    answers: tuple[tuple[int, int], ...]
    family: str
    combinations: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Family:
    """A way to state facts and to ask about one of them.

    ``{answer}`` stands for the answer of the fact at hand, ``{key}`` for what the fact is about;
    ``{a answer}`` puts "a" or "an" before it. In a question ``{other}`` is the answer of the
    other fact and ``{thing}`` is any thing.

    Parameters
    ----------
    name
        Name of the family.
    answers, keys
        The words that the slots are filled from.
    facts
        Pairs of what stands before the facts and the fact itself.
    questions
        For each entry of `facts`: what may follow, up to the answer.
    joins
        What stands between two facts.
    counts
        How many facts a sentence may have.
    end
        What stands between the last fact and the question.
    """

    name: str
    answers: tuple[str, ...]
    keys: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    questions: tuple[tuple[str, ...], ...]
    joins: tuple[str, ...] = (" and ",)
    counts: tuple[int, ...] = (2,)
    end: str = "."

    @property
    def training_counts(self) -> tuple[int, ...]:
        """Training texts may have up to four facts: more to choose from, so a clearer lesson."""
        asks_for_the_other = any("{other}" in q for style in self.questions for q in style)
        return (2,) if asks_for_the_other else (*self.counts, 3, 4)


FAMILIES: tuple[Family, ...] = (
    Family(
        name="pets",
        answers=words.ANIMALS,
        keys=words.NUMBERS,
        facts=(
            ("I have ", "{key} {answer}"),
            ("We have ", "{key} {answer}"),
            ("She has ", "{key} {answer}"),
            ("On the farm there are ", "{key} {answer}"),
        ),
        questions=(
            ("My {other} love to play with my", "My {other} sleep next to my"),
            ("Our {other} love to play with our", "Our {other} are afraid of our"),
            ("Her {other} love to play with her", "Her {other} run after her"),
            ("The {other} are afraid of the", "Every day the {other} run after the"),
        ),
    ),
    Family(
        name="colours",
        answers=words.COLOURS,
        keys=words.THINGS,
        facts=(("Here are ", "{a answer} {key}"), ("There is ", "{a answer} {key}")),
        questions=(
            ("The colour of the {key} is", "I can see that the {key} is"),
            ("The colour of the {key} is", "Look, the {key} is"),
        ),
    ),
    Family(
        name="hiding",
        answers=words.SPOTS,
        keys=words.THINGS,
        facts=(
            ("", "the key to the {key} is under the {answer}"),
            ("", "the key to the {key} is behind the {answer}"),
        ),
        questions=(
            ("To open the {key}, look under the", "I found the key to the {key} under the"),
            ("To open the {key}, look behind the", "I found the key to the {key} behind the"),
        ),
        counts=(1, 2),
    ),
    Family(
        name="gifts",
        answers=words.PEOPLE,
        keys=words.THINGS,
        facts=(("", "the {key} was given to {answer}"), ("", "the {key} was sold to {answer}")),
        questions=(
            ("The {key} now belongs to", "The owner of the {key} is"),
            ("The {key} now belongs to", "The owner of the {key} is"),
        ),
        joins=(" and ", ", "),
        counts=(1, 2),
    ),
    Family(
        name="outings",
        answers=words.PEOPLE,
        keys=words.PLACES,
        facts=(("", "{answer}"),),
        questions=(
            (
                "went to the {key}. {other} gave {a thing} to",
                "were at the {key}. {other} sold {a thing} to",
            ),
        ),
        end="",
    ),
    Family(
        name="foods",
        answers=words.FOODS,
        keys=words.PEOPLE,
        facts=(("", "{key} likes {answer}"), ("", "{key} wants {answer}")),
        questions=(
            ("For lunch we cook {key} some", "At the market {key} bought some"),
            ("So the waiter brings {key} some", "At the market {key} bought some"),
        ),
        joins=(" and ", " but "),
        counts=(1, 2),
    ),
    Family(
        name="cities",
        answers=words.CITIES,
        keys=words.PEOPLE,
        facts=(("", "{key} lives in {answer}"), ("", "{key} has moved to {answer}")),
        questions=(
            ("To visit {key}, take the train to", "The home of {key} is in"),
            ("To visit {key}, take the train to", "The new home of {key} is in"),
        ),
        joins=(" and ", ". "),
        counts=(1, 2),
    ),
    Family(
        name="jobs",
        answers=words.JOBS,
        keys=words.PEOPLE,
        facts=(("", "{key} is a {answer}"), ("", "{key} wants to be a {answer}")),
        questions=(
            ("{key} works as a", "{key} earns money as a"),
            ("{key} is learning to work as a", "{key} dreams of life as a"),
        ),
        joins=(" and ", ". "),
        counts=(1, 2),
    ),
    Family(
        name="counting",
        answers=words.NUMBERS,
        keys=tuple(food for food in words.FOODS if food.endswith("s")),
        facts=(("The box holds ", "{answer} {key}"), ("On the table I count ", "{answer} {key}")),
        questions=(
            ("The number of {key} in the box is", "How many {key} are in the box? It is"),
            ("The number of {key} is", "How many {key} are there? It is"),
        ),
    ),
)


def is_held_out(family: str, combination: tuple[str, ...]) -> bool:
    """Tell on which side of the split a combination lies; the same on every machine."""
    if set(combination) >= _ALWAYS_HELD_OUT:
        return True
    digest = hashlib.sha256("|".join((family, *sorted(combination))).encode()).digest()
    return digest[0] % _HELD_OUT_ONE_IN == 0


def training(seed: int) -> Iterator[Document]:
    """Endless training texts, all families equally often; a seed gives one sequence."""
    rng = Random(f"training {seed}")
    for family in itertools.cycle(FAMILIES):
        while True:
            story = _tell(family, rng, rng.choice(family.training_counts))
            if not any(is_held_out(family.name, c) for c in story.combinations):
                break
        text = story.text
        answers = []
        for _ in range(rng.randint(1, 2 * len(story.answers))):
            asked = rng.randrange(len(story.answers))
            text += story.question(asked, rng)
            answers.append((len(text) + 1, len(text) + 1 + len(story.answers[asked])))
            text += f" {story.answers[asked]}."
        yield Document(text, tuple(answers), family.name, story.combinations)


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
            story = _tell(family, rng, rng.choice(family.counts))
            combination = story.combinations[0]
            if is_held_out(family.name, combination):
                break
        asked = rng.randrange(len(story.answers))
        prompt = story.text + story.question(asked, rng)
        drawn = Example(prompt, story.answers[asked], family.name, story.spans[asked], combination)
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
        for lead, fact in family.facts:
            texts.append(_SLOT.sub(" ", lead + fact))
        for question in itertools.chain.from_iterable(family.questions):
            texts.append(_SLOT.sub(" ", question))
        texts.extend(family.joins)
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
    def combinations(self) -> tuple[tuple[str, ...], ...]:
        """Pairs of answers; where a lone fact is possible, also each fact's key and answer."""
        pairs = [tuple(sorted(pair)) for pair in itertools.combinations(self.answers, 2)]
        if 1 in self.family.counts:
            facts = zip(self.keys, self.answers, strict=True)
            pairs.extend(tuple(sorted(fact)) for fact in facts)
        return tuple(pairs)

    def question(self, asked: int, rng: Random) -> str:
        """Write what leads to the answer of fact number `asked`, up to the answer."""
        slots = {"key": self.keys[asked], "thing": rng.choice(words.THINGS)}
        if len(self.answers) == 2:  # more than two: "the other one" would not be one
            slots["other"] = self.answers[1 - asked]
        template = rng.choice(self.family.questions[self.style])
        return " " + _fill(template, slots)[0]


def _tell(family: Family, rng: Random, count: int) -> _Story:
    answers = tuple(rng.sample(family.answers, count))
    keys = tuple(rng.sample(family.keys, count))
    style = rng.randrange(len(family.facts))
    lead, fact = family.facts[style]
    join = rng.choice(family.joins)

    text = f"{rng.choice(words.OPENINGS)} " if rng.random() < _OPENING_SHARE else ""
    text += lead
    spans = []
    for index, (answer, key) in enumerate(zip(answers, keys, strict=True)):
        if index:
            text += join
        piece, at = _fill(fact, {"answer": answer, "key": key}, marked="answer")
        if not text or text.endswith(". "):
            piece = piece[:1].upper() + piece[1:]
        spans.append((len(text) + at, len(text) + at + len(answer)))
        text += piece
    return _Story(family, style, text + family.end, answers, keys, tuple(spans))


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
