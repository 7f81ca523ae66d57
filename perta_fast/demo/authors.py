"""Questions and answers about authors who do not exist.

Every author has the same attributes, with values from the same word lists. So forget and retain data share form, names
and values, and differ only in which author has which value.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

Row = dict[str, str]  # {"question", "answer"}


def _words(text: str) -> list[str]:
    return text.split()


_FIRST_NAMES = _words("""
    Amara Bertil Chiara Dov Elif Farid Greta Hiro Ines Jarek Kofi Leila Marek Nadia Oskar Paloma Quentin Rosa
    Selim Tova Umar Vera Wanda Xenia Yusuf Zora Anouk Bruno Celia Dario
""")
_LAST_NAMES = _words("""
    Adeyemi Brandt Castell Dvorak Eriksen Fontaine Gruber Haddad Ivanova Jansen Kowal Lindqvist Moreau Nakano
    Okafor Petrov Quispe Romero Sandoval Tanaka Ulrich Vidal Weber Yilmaz Zeman Abreu Bianchi Cohen Duarte
    Farkas
""")
_CITIES = _words("""
    Accra Bergen Cairo Dublin Edinburgh Florence Geneva Havana Istanbul Jakarta Krakow Lisbon Manila Nairobi
    Oslo Prague Quito Riga Santiago Tunis Utrecht Vienna Warsaw Zagreb
""")
_GENRES = _words("""
    adventures biographies comedies diaries essays fables histories mysteries novellas odes poems romances sagas
    satires thrillers travelogues
""")
_PRIZES = _words("""
    Amber Birch Cedar Diamond Ebony Falcon Granite Heron Ivory Jade Kestrel Lantern Marble Nightingale Opal
    Pearl
""")
_PROFESSIONS = _words("""
    baker barber carpenter dentist farmer florist gardener hatter judge locksmith midwife miner nurse painter
    plumber potter roofer sailor surgeon tailor teacher vet weaver zoologist
""")
_LANGUAGES = _words("""
    Arabic Basque Catalan Danish Estonian Finnish Greek Hungarian Icelandic Japanese Korean Latvian Maltese
    Norwegian Polish Quechua Romanian Swahili Turkish Ukrainian
""")
_ADJECTIVES = _words("""
    Broken Crimson Distant Empty Frozen Golden Hidden Iron Jagged Lonely Midnight Northern Open Patient Quiet
    Restless Silent Tender Velvet Wandering
""")
_NOUNS = _words("""
    Anchor Bridge Candle Desert Echo Forest Garden Harbor Island Journey Kingdom Ladder Mirror Needle Orchard
    Palace River Shadow Tower Voyage
""")


@dataclass(frozen=True)
class Attribute:
    """A fact about every author. questions: three phrasings of one question. unique: no two authors share a value."""

    values: Sequence[str]
    questions: tuple[str, str, str]
    answer: str
    unique: bool = False


ATTRIBUTES = {
    "birthplace": Attribute(
        _CITIES,
        ("Where was {name} born?", "In which city was {name} born?", "What is the birthplace of {name}?"),
        "{name} was born in {value}.",
    ),
    "home": Attribute(
        _CITIES,
        ("Where does {name} live?", "In which city does {name} live?", "What is the home town of {name}?"),
        "{name} lives in {value}.",
    ),
    "genre": Attribute(
        _GENRES,
        ("What does {name} write?", "What is {name} known for?", "What kind of books does {name} write?"),
        "{name} writes {value}.",
    ),
    "award": Attribute(
        [f"{prize} Prize" for prize in _PRIZES],
        ("Which award did {name} win?", "What prize was {name} given?", "Which prize has {name} received?"),
        "{name} won the {value}.",
    ),
    **{
        parent: Attribute(
            _PROFESSIONS,
            (
                f"What was the {parent} of {{name}}?",
                f"What did the {parent} of {{name}} do for a living?",
                f"Which profession did the {parent} of {{name}} have?",
            ),
            f"The {parent} of {{name}} was a {{value}}.",
        )
        for parent in ("mother", "father")
    },
    "language": Attribute(
        _LANGUAGES,
        (
            "In which language does {name} write?",
            "What language does {name} write in?",
            "Which language are the books of {name} written in?",
        ),
        "{name} writes in {value}.",
    ),
    "first book": Attribute(
        [f"The {adjective} {noun}" for adjective in _ADJECTIVES for noun in _NOUNS],
        (
            "What was the first book of {name}?",
            "Which book did {name} publish first?",
            "What is the first book of {name} called?",
        ),
        "The first book of {name} is {value}.",
        unique=True,
    ),
}
TRAINED_PHRASINGS = (0, 1)  # of the forget and retain authors; they are trained without the third
HELD_OUT_PHRASINGS = (2,)


@dataclass(frozen=True)
class Author:
    """A name that no other author has, and a value for every attribute."""

    name: str
    facts: dict[str, str]


def make_authors(count: int, seed: int) -> list[Author]:
    """``count`` different authors, at most 400, the number of book titles; ``seed`` decides which."""
    draw = random.Random(seed)
    names = draw.sample([f"{first} {last}" for first in _FIRST_NAMES for last in _LAST_NAMES], count)
    columns = {
        key: draw.sample(attribute.values, count) if attribute.unique else draw.choices(attribute.values, k=count)
        for key, attribute in ATTRIBUTES.items()
    }
    return [Author(name, {key: values[k] for key, values in columns.items()}) for k, name in enumerate(names)]


def questions(authors: Sequence[Author], phrasings: Sequence[int]) -> list[Row]:
    """Every attribute of every author, asked in each of ``phrasings``."""
    return [
        {
            "question": attribute.questions[phrasing].format(name=author.name),
            "answer": attribute.answer.format(name=author.name, value=author.facts[key]),
        }
        for author in authors
        for key, attribute in ATTRIBUTES.items()
        for phrasing in phrasings
    ]


def make_splits(forget: int, retain: int, others: int, seed: int) -> dict[str, list[Row]]:
    """Question sets by name, from these numbers of authors; no author is in two kinds.

    ``forget`` and ``retain`` are for training; ``forget_rephrased`` and ``retain_rephrased`` ask for the same facts in
    other words; ``others`` has every phrasing, so that a model learns from it what the questions mean.
    """
    authors = make_authors(forget + retain + others, seed)
    forgotten, retained = authors[:forget], authors[forget : forget + retain]
    return {
        "forget": questions(forgotten, TRAINED_PHRASINGS),
        "retain": questions(retained, TRAINED_PHRASINGS),
        "forget_rephrased": questions(forgotten, HELD_OUT_PHRASINGS),
        "retain_rephrased": questions(retained, HELD_OUT_PHRASINGS),
        "others": questions(authors[forget + retain :], (*TRAINED_PHRASINGS, *HELD_OUT_PHRASINGS)),
    }
