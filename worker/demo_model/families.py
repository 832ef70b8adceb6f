"""The families of the demo corpus: how facts are stated, and how one of them is asked about."""

from __future__ import annotations

from dataclasses import dataclass

from demo_model import words


@dataclass(frozen=True, slots=True)
class Family:
    """A way to state facts and to ask about one of them.

    ``{answer}`` stands for the answer of the fact at hand, ``{key}`` for what the fact is about;
    ``{a answer}`` puts "a" or "an" before it. In a question ``{other}`` is the answer of the
    other fact.

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
    count
        How many facts a sentence has: 1, or 2 joined by "and".
    """

    name: str
    answers: tuple[str, ...]
    keys: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    questions: tuple[tuple[str, ...], ...]
    count: int = 1


FAMILIES: tuple[Family, ...] = (
    Family(
        name="pets",
        count=2,
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
        facts=(("Here is ", "{a answer} {key}"), ("There is ", "{a answer} {key}")),
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
