"""The words of the demo's small English world.

A meaning is one entry: its common word first, the rare words that mean the same after it. No word stands for two
meanings, so replacing a word by another of its entry never changes what a text says.
"""

from __future__ import annotations

from typing import TypeAlias

Meaning: TypeAlias = tuple[str, ...]
"""A common word, then its rare synonyms."""


def _entries(text: str) -> tuple[Meaning, ...]:
    """One meaning a line; words are parted by commas."""
    return tuple(tuple(word.strip() for word in line.split(",")) for line in text.strip().splitlines())


def _list(text: str) -> tuple[str, ...]:
    """Words parted by white space."""
    return tuple(text.split())


PRAISE = _entries("""
    good, decent, commendable
    great, grand, stupendous
    lovely, delightful, adorable
    superb, excellent, exquisite
    wonderful, marvellous, wondrous
    charming, enchanting, winsome
    brilliant, dazzling, stellar
    moving, touching, poignant
    clever, witty, ingenious
    fresh, novel, inventive
    warm, tender, heartfelt
    funny, hilarious, amusing
""")

BLAME = _entries("""
    bad, lousy, rotten
    awful, dreadful, atrocious
    poor, feeble, paltry
    dull, dreary, drab
    terrible, horrid, abysmal
    boring, tiresome, tedious
    bland, insipid, vapid
    stupid, idiotic, inane
    silly, foolish, asinine
    stale, hackneyed, trite
    cold, frosty, aloof
    noisy, raucous, grating
""")

THINGS = _list("film story play song book show concert album series tour game meal")
PARTS = _list("plot acting music ending setting humour style voice pace design")
PEOPLE = _list("""
    Anna Ben Carla David Emma Frank Grace Henry Irene Jacob Karen Leo Maria Nathan Olga Peter Rosa Simon Tina
    Victor Alice Bruno Clara Daniel Elena Felix Hanna Ivan Julia Kevin Laura Martin Nina Oscar Paula Robert
""")
OBJECTS = _list("""
    bicycle car sofa coat lamp boat hat rug picture ring cup knife phone bag stone box clock basket flower
    coin table dress bottle letter drum ladder mirror blanket pillow wagon rope statue vase whistle shovel
    trophy
""")
PLACES = _list("""
    market school church forest harbour garden hotel museum station farm beach bridge hospital castle library
    factory tower kitchen river
""")
TIMES = (
    *("on Monday", "on Tuesday", "on Wednesday", "on Thursday", "on Friday", "on Saturday", "on Sunday"),
    *("in January", "in March", "in April", "in June", "in August", "at noon", "at dawn", "at dusk"),
)
COLOURS = _list("red blue green black white yellow brown grey pink")

VERBS = tuple(
    (base, past)
    for base, _, past in (
        pair.partition("/")
        for pair in _list(
            """
            buy/bought sell/sold repair/repaired find/found lose/lost clean/cleaned build/built
            bring/brought carry/carried watch/watched cover/covered lift/lifted admire/admired
            touch/touched weigh/weighed praise/praised describe/described paint/painted move/moved
            wash/washed rent/rented polish/polished decorate/decorated
            """
        )
    )
)
"""(base form, past) of verbs whose past is their participle."""

MEANS = _entries("""
    way, method, modus
    procedure, routine, protocol
    technique, approach, knack
    recipe, formula, blueprint
""")
"""What a question about doing something asks for."""

OTHER_MATTERS = {
    "cost": _entries("price, fee, tariff\nmoney, cash, funding\nbudget, outlay, expense"),
    "place": _entries("shop, store, boutique\nplace, spot, venue\ntown, city, district"),
    "time": _entries("season, quarter, epoch\nhour, minute, instant\nweekday, holiday, weekend"),
    "reason": _entries("reason, motive, rationale\npurpose, aim, intent\nbenefit, merit, upside"),
}
"""What a question about another matter asks for."""

DENIALS = _entries("never, not once, in no way\nhardly, scarcely, barely\nnot, nowise, noway")
GUESSES = _entries("""
    because of a bet, owing to a dare, thanks to a wager
    for a brother, for a sibling, for a kinsman
    to win a prize, to gain a reward, to earn an award
    with great joy, with much delight, with sheer glee
    to annoy a friend, to irk a pal, to vex a chum
""")
"""What a hypothesis may add that its premise does not say."""

DISTRACTIONS = ("and false is not true", "and true is true", "if true is not false")
"""Clauses that say nothing, in the manner of StressTest (Naik et al., 2018)."""
