"""Words and sentence patterns of `make_nli.py`."""

from __future__ import annotations

# fmt: off
NAMES = (
    "Ana", "Ben", "Clara", "David", "Elif", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Keiko",
    "Leo", "Maya", "Nadia", "Omar", "Petra", "Quentin", "Rosa", "Samir", "Tilda", "Uwe", "Vera",
    "Wanda", "Yusuf", "Zoe", "Amara", "Bruno", "Chidi", "Dora", "Emil", "Freya", "Goran", "Hana",
    "Igor", "Jia", "Kofi", "Lena", "Milo", "Nora", "Oskar",
)

WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
    "twenty",
)
# fmt: on

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

# --- Everyday scenes -------------------------------------------------------------------------

# Statement, its negation, then a premise and a reason for each of: true, false, open.
SCENES: tuple[tuple[str, ...], ...] = (
    (
        "{n} is playing a musical instrument",
        "{n} is not playing a musical instrument",
        "{n} is playing the cello for two guests",
        "A cello is a musical instrument",
        "{n} is sitting beside a piano that nobody is touching and has no other instrument at hand",
        "Without an instrument in use, {n} cannot be playing one",
        "{n} is waiting for two guests in the concert hall",
        "Being in a concert hall does not show whether {n} plays anything",
    ),
    (
        "{n} is eating fruit",
        "{n} is not eating fruit",
        "{n} is eating a ripe pear on the balcony",
        "A pear is a fruit",
        "{n} is fast asleep on the balcony",
        "A person who is fast asleep is not eating",
        "{n} is eating lunch on the balcony",
        "The lunch may or may not include fruit",
    ),
    (
        "{n} is looking after an animal",
        "{n} is not looking after an animal",
        "{n} is looking after a neighbour's old dog this week",
        "A dog is an animal",
        "{n} is looking after a neighbour's house plants this week and nothing else",
        "Plants are not animals, and {n} looks after nothing else",
        "{n} is staying in a neighbour's house this week",
        "The house may or may not have an animal in it",
    ),
    (
        "{n} is travelling by rail",
        "{n} is not travelling by rail",
        "{n} is on the night train to the coast",
        "A train runs on rails",
        "{n} is driving a van to the coast",
        "Somebody driving a van is on the road, not on rails",
        "{n} is on the way to the coast",
        "The means of transport is not given",
    ),
    (
        "{n} can be heard in the next room",
        "{n} cannot be heard in the next room",
        "{n} is singing, and every word is heard in the next room",
        "If every word is heard there, {n} can be heard there",
        "{n} is singing, but not a sound gets through to the next room",
        "If no sound gets through, {n} cannot be heard there",
        "{n} is singing in a room with thick walls",
        "Thick walls may or may not keep all the sound in",
    ),
    (
        "{n} owns a vehicle",
        "{n} does not own a vehicle",
        "{n} has owned the same blue lorry for six years",
        "A lorry is a vehicle",
        "{n} sold the blue lorry and now owns no vehicle of any kind",
        "The premise says that {n} owns no vehicle",
        "{n} drives a blue lorry for a bakery",
        "Driving a lorry does not show who owns it",
    ),
    (
        "{n} has at least one sister",
        "{n} does not have a sister",
        "{n}'s younger sister is a doctor",
        "A younger sister is a sister",
        "{n} is an only child",
        "An only child has no sisters",
        "{n} has two siblings",
        "The two siblings may be brothers or sisters",
    ),
    (
        "{n} finished the marathon",
        "{n} did not finish the marathon",
        "{n} crossed the finishing line of the marathon in pouring rain",
        "Crossing the line means finishing",
        "{n} gave up the marathon half-way because of the rain",
        "Giving up half-way means not finishing",
        "{n} ran the first half of the marathon in pouring rain",
        "Nothing is said about the second half",
    ),
    (
        "{n} is older than eighteen",
        "{n} is not older than eighteen",
        "{n} celebrated a fortieth birthday last spring",
        "Somebody who has turned forty is older than eighteen",
        "{n} will celebrate a tenth birthday next spring",
        "Somebody not yet ten is not older than eighteen",
        "{n} will celebrate a birthday next spring",
        "The age is not given",
    ),
    (
        "{n} is writing by hand",
        "{n} is not writing by hand",
        "{n} is writing a letter with a fountain pen",
        "A fountain pen is guided by the hand",
        "{n} is dictating a letter and holds no pen",
        "Dictating is speaking, not writing by hand",
        "{n} is working on a letter",
        "The letter could be typed, dictated or written with a pen",
    ),
    (
        "{n} speaks more than one language",
        "{n} does not speak more than one language",
        "{n} speaks fluent Turkish and fluent Danish",
        "Turkish and Danish are two languages",
        "{n} speaks Danish and no other language",
        "Danish alone is just one language",
        "{n} speaks fluent Danish",
        "Other languages are not mentioned",
    ),
    (
        "{n} is on the ground floor",
        "{n} is not on the ground floor",
        "{n} is in the bakery, which lies on the ground floor",
        "The bakery is on the ground floor, and {n} is in it",
        "{n} is in the attic above the fourth floor",
        "An attic above the fourth floor is not the ground floor",
        "{n} is somewhere in a house with four floors",
        "It could be any of the four floors",
    ),
)

# Activity, place, and whether the place is indoors.
PLACES: tuple[tuple[str, str, bool], ...] = (
    ("reading a newspaper", "in the library hall", True),
    ("repairing a bicycle", "in the cellar", True),
    ("knitting a scarf", "in the living room", True),
    ("sorting old stamps", "in the office", True),
    ("playing chess", "in the school canteen", True),
    ("writing a postcard", "in the kitchen", True),
    ("painting a picture", "on an open hillside", False),
    ("reading a newspaper", "on a bench in the meadow", False),
    ("repairing a bicycle", "at the side of a country road", False),
    ("playing chess", "under the trees in the park", False),
    ("writing a postcard", "on the beach", False),
    ("peeling potatoes", "beside the campfire", False),
)

# --- Numbers ---------------------------------------------------------------------------------

HOLDERS: tuple[tuple[str, str], ...] = (
    ("boxes", "in the van"),
    ("apples", "in the basket"),
    ("chairs", "in the hall"),
    ("boats", "in the harbour"),
    ("tickets", "in the envelope"),
    ("sheep", "in the field"),
    ("lamps", "in the cellar"),
    ("pupils", "in the bus"),
    ("jars", "on the shelf"),
    ("bottles", "in the crate"),
)

# --- Quantifiers and rules -------------------------------------------------------------------

# Group, one member of it, what several do, what one does, what one does not do.
GROUPS: tuple[tuple[str, str, str, str, str], ...] = (
    ("violinists", "a violinist", "wear black", "wears black", "does not wear black"),
    ("gardeners", "a gardener", "own a ladder", "owns a ladder", "does not own a ladder"),
    ("bakers", "a baker", "start before dawn", "starts before dawn", "does not start before dawn"),
    ("students", "a student", "cycle to town", "cycles to town", "does not cycle to town"),
    ("judges", "a judge", "know the rules", "knows the rules", "does not know the rules"),
    ("nurses", "a nurse", "carry a phone", "carries a phone", "does not carry a phone"),
    ("sailors", "a sailor", "can swim", "can swim", "cannot swim"),
    ("climbers", "a climber", "have a rope", "has a rope", "does not have a rope"),
    ("guides", "a guide", "speak Greek", "speaks Greek", "does not speak Greek"),
)
CLUBS = ("in the club", "in the village", "in the team", "on the list", "in the photograph")

QUANTIFIERS: dict[str, str] = {
    "all": "All of the {g} {p}",
    "most": "More than half of the {g} {p}",
    "half": "Exactly half of the {g} {p}",
    "some": "At least one of the {g} {q}",
    "not all": "Not all of the {g} {p}",
    "none": "None of the {g} {p}",
}

# Condition, its negation, consequence, its negation.
RULES: tuple[tuple[str, str, str, str], ...] = (
    (
        "it is raining",
        "it is not raining",
        "the match is in the hall",
        "the match is not in the hall",
    ),
    ("the boiler is on", "the boiler is not on", "the pipes are warm", "the pipes are not warm"),
    ("the flag is up", "the flag is not up", "the beach is open", "the beach is not open"),
    ("the alarm is set", "the alarm is not set", "the lamp is red", "the lamp is not red"),
    ("the river is high", "the river is not high", "the ferry is idle", "the ferry is not idle"),
    (
        "the printer is empty",
        "the printer is not empty",
        "the light is blinking",
        "the light is not blinking",
    ),
    (
        "the road is icy",
        "the road is not icy",
        "the school is closed",
        "the school is not closed",
    ),
    ("the oven is open", "the oven is not open", "the timer is paused", "the timer is not paused"),
    (
        "the duke is at home",
        "the duke is not at home",
        "the banner is flying",
        "the banner is not flying",
    ),
    (
        "the battery is low",
        "the battery is not low",
        "the screen is dim",
        "the screen is not dim",
    ),
    ("the tide is out", "the tide is not out", "the path is dry", "the path is not dry"),
)

# Past form, plain form, -ing form.
DEEDS: tuple[tuple[str, str, str], ...] = (
    ("locked the gate", "lock the gate", "locking the gate"),
    ("posted the letter", "post the letter", "posting the letter"),
    ("fed the horses", "feed the horses", "feeding the horses"),
    ("paid the bill", "pay the bill", "paying the bill"),
    ("watered the roses", "water the roses", "watering the roses"),
    ("swept the yard", "sweep the yard", "sweeping the yard"),
    ("called the plumber", "call the plumber", "calling the plumber"),
    ("returned the book", "return the book", "returning the book"),
    ("mended the fence", "mend the fence", "mending the fence"),
    ("cleaned the oven", "clean the oven", "cleaning the oven"),
    ("opened the parcel", "open the parcel", "opening the parcel"),
    ("washed the car", "wash the car", "washing the car"),
)

# --- Orders, places and times ----------------------------------------------------------------

# More, less, the two ends, and the things compared (None: people).
SCALES: tuple[tuple[str, str, str, tuple[str, ...] | None], ...] = (
    ("taller than", "shorter than", "From tall to short", None),
    ("older than", "younger than", "From old to young", None),
    ("faster than", "slower than", "From fast to slow", None),
    (
        "heavier than",
        "lighter than",
        "From heavy to light",
        ("the trunk", "the crate", "the anvil", "the bench", "the barrel"),
    ),
    (
        "north of",
        "south of",
        "From north to south",
        ("the mill", "the chapel", "the bridge", "the quarry", "the inn"),
    ),
    (
        "more expensive than",
        "cheaper than",
        "From expensive to cheap",
        ("the vase", "the clock", "the carpet", "the mirror", "the lamp"),
    ),
)

# Small thing, holder, bigger holder, another small thing.
NESTS: tuple[tuple[str, str, str, str], ...] = (
    ("the key", "the tin", "the drawer", "the whistle"),
    ("the coin", "the purse", "the suitcase", "the comb"),
    ("the ring", "the sock", "the wardrobe", "the watch"),
    ("the map", "the folder", "the cupboard", "the ticket"),
    ("the spoon", "the bowl", "the picnic basket", "the lemon"),
    ("the stamp", "the envelope", "the desk", "the photograph"),
    ("the marble", "the matchbox", "the rucksack", "the pencil"),
    ("the needle", "the jar", "the sewing box", "the button"),
)

COLOURS = ("red", "blue", "green", "yellow", "white", "black", "orange", "purple")
ARTICLES = ("scarf", "kite", "mug", "balloon", "umbrella", "hat")
TOWNS = ("Ashford", "Brackwell", "Corrin", "Dunmore", "Elmsby", "Fallow", "Glenrow", "Harwick")
SHOPS = ("museum", "library", "bakery", "post office", "swimming pool", "bicycle shop", "archive")
COURSES = ("course", "fair", "festival", "conference", "chess tournament", "flower show")
