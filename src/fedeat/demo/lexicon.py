"""The words of the demo's small English world.

A concept is one line of a table: its common word first, then the rare words that mean the same. No word stands for two
concepts, so a text tells its concepts, and replacing a word by another of its line never changes what a text says.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Concept:
    """One meaning and the words for it.

    Attributes:
        kind: the table it stands in, such as "person", "verb", "place" or "praise".
        words: the common word first, the rare ones after it; a word is a tuple of its forms (a verb has its base
            form and its past, everything else one form).
    """

    kind: str
    words: tuple[tuple[str, ...], ...]

    @property
    def name(self) -> str:
        """The common word: the name by which the world knows this concept."""
        return self.words[0][0]


def _table(kind: str, text: str) -> tuple[Concept, ...]:
    lines = [line.split() for line in text.strip().splitlines()]
    return tuple(
        Concept(kind, tuple(tuple(w.replace("_", " ") for w in word.split("/")) for word in line)) for line in lines
    )


def _names(kind: str, text: str) -> tuple[Concept, ...]:
    return tuple(Concept(kind, ((name.replace("_", " "),),)) for name in text.split())


PEOPLE = _names(
    "person",
    """Anna Ben Carla David Emma Frank Grace Henry Irene Jacob Karen Leo Maria Nathan Olga Peter Rosa Simon Tina Victor
    Alice Bruno Clara Daniel Elena Felix Hanna Ivan Julia Kevin Laura Martin Nina Oscar Paula Robert Sara Thomas
    Vera Walter""",
)

VERBS = _table(
    "verb",
    """
buy/bought purchase/purchased acquire/acquired
sell/sold vend/vended hawk/hawked
repair/repaired mend/mended fix/fixed
break/broke smash/smashed wreck/wrecked
find/found discover/discovered locate/located
lose/lost misplace/misplaced mislay/mislaid
wash/washed scrub/scrubbed rinse/rinsed
hide/hid conceal/concealed stash/stashed
show/showed display/displayed exhibit/exhibited
build/built construct/constructed assemble/assembled
steal/stole swipe/swiped nick/nicked
carry/carried haul/hauled lug/lugged
draw/drew sketch/sketched depict/depicted
watch/watched observe/observed eye/eyed
choose/chose select/selected pick/picked
bring/brought deliver/delivered fetch/fetched
burn/burned torch/torched scorch/scorched
cover/covered wrap/wrapped shroud/shrouded
lift/lifted hoist/hoisted raise/raised
admire/admired adore/adored revere/revered
touch/touched handle/handled stroke/stroked
weigh/weighed gauge/gauged measure/measured
praise/praised laud/lauded extol/extolled
describe/described portray/portrayed outline/outlined
""",
)

OBJECTS = _table(
    "object",
    """
bicycle bike cycle
car automobile motorcar
sofa couch settee
coat overcoat parka
lamp lantern lampion
boat vessel dinghy
hat cap bonnet
rug carpet mat
picture painting portrait
ring band hoop
cup mug beaker
knife blade dagger
phone telephone handset
bag sack pouch
stone rock pebble
box crate carton
clock timepiece chronometer
basket hamper pannier
flower blossom bloom
coin token penny
table desk bench
dress gown frock
bottle flask vial
letter note missive
drum bongo tabor
ladder steps stepladder
mirror looking-glass reflector
blanket quilt duvet
pillow cushion bolster
wagon cart carriage
rope cord cable
statue sculpture figurine
vase urn jar
whistle flute piper
shovel spade scoop
trophy medal award
""",
)

PLACES = _table(
    "place",
    """
market bazaar fair
school academy college
church chapel cathedral
forest woods woodland
harbour port marina
garden yard lawn
hotel inn hostel
museum gallery exhibition
street road avenue
station depot terminal
farm ranch homestead
beach shore seaside
bridge overpass viaduct
hospital clinic infirmary
castle fortress citadel
library archive athenaeum
factory plant mill
tower spire turret
kitchen pantry galley
river stream creek
""",
)

TIMES = _names(
    "time",
    """on_Monday on_Tuesday on_Wednesday on_Thursday on_Friday on_Saturday on_Sunday in_January in_March in_April
    in_June in_July in_August in_October in_December at_noon at_midnight at_dawn at_dusk""",
)

COLOURS = _table(
    "colour",
    """
red crimson scarlet
blue azure navy
green emerald jade
yellow golden amber
white ivory snowy
black ebony inky
brown chestnut tan
purple violet mauve
pink rosy salmon
grey ashen slate
""",
)

REASONS = _table(
    "reason",
    """
for_money for_cash for_profit
out_of_love out_of_affection out_of_fondness
out_of_anger out_of_rage out_of_fury
for_fun for_amusement for_sport
by_mistake by_accident by_error
out_of_fear out_of_fright out_of_dread
for_a_friend for_a_companion for_a_comrade
out_of_boredom out_of_tedium out_of_idleness
""",
)

MANNERS = _table(
    "manner",
    """
quickly swiftly hastily
slowly gradually sluggishly
carefully cautiously gingerly
secretly covertly furtively
loudly noisily rowdily
quietly silently mutely
happily gladly cheerfully
sadly gloomily mournfully
""",
)

QUESTIONS = _table(
    "question",
    """
where in_which_place at_what_spot
when on_what_date at_what_hour
why for_what_reason on_what_grounds
how in_what_way by_what_means
how_often how_many_times how_frequently
what_colour which_shade what_hue
""",
)

STATES = _table(
    "state",
    """
big large huge
small little tiny
old ancient aged
new modern recent
clean spotless immaculate
dirty filthy grimy
heavy weighty ponderous
light weightless feathery
full crammed packed
bare vacant unfilled
wet soaked damp
dry parched arid
hot boiling sizzling
icy freezing frosty
strong sturdy robust
fragile brittle delicate
""",
)
"""Opposites stand one below the other: the state at an even place, its opposite at the odd place after it."""

THINGS = _table(
    "thing",
    """
film movie flick
book novel volume
play drama theatrical
song tune ditty
meal dinner supper
party gala soiree
game match contest
course lecture seminar
tour trip excursion
album record disc
series serial programme
concert recital gig
story tale yarn
comedy farce sitcom
""",
)

PARTS = _table(
    "part",
    """
plot storyline narrative
cast ensemble troupe
ending finale conclusion
music score soundtrack
pace tempo rhythm
humour wit banter
style manner flair
opening beginning prologue
mood atmosphere ambience
idea premise notion
text script screenplay
voice vocals singing
setting backdrop locale
detail particulars minutiae
""",
)

PRAISE = _table(
    "praise",
    """
good fine decent
great terrific tremendous
brilliant dazzling scintillating
funny amusing hilarious
charming enchanting delightful
clever ingenious astute
moving affecting poignant
fresh inventive original
exciting thrilling gripping
beautiful gorgeous exquisite
perfect flawless impeccable
warm tender heartfelt
wonderful marvellous splendid
enjoyable pleasant agreeable
elegant graceful polished
powerful compelling forceful
superb outstanding exceptional
memorable unforgettable indelible
playful droll jocular
lively vibrant spirited
""",
)

BLAME = _table(
    "blame",
    """
bad poor lousy
terrible dreadful abysmal
boring tedious monotonous
stupid idiotic moronic
ugly hideous unsightly
dull drab lifeless
weak feeble flimsy
awful horrible atrocious
silly foolish asinine
slow sluggish plodding
messy chaotic muddled
cold frigid soulless
empty hollow vacuous
annoying irritating grating
clumsy awkward inept
stale hackneyed trite
cheap shoddy tacky
confusing baffling bewildering
bland insipid vapid
pointless futile meaningless
""",
)

TABLES: tuple[tuple[Concept, ...], ...] = (
    PEOPLE, VERBS, OBJECTS, PLACES, TIMES, COLOURS, REASONS, MANNERS, QUESTIONS, STATES, THINGS, PARTS, PRAISE, BLAME,
)  # fmt: skip
