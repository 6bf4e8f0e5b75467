"""Write the small natural-language-inference sample set, ``nli.jsonl``.

The set exists so that a classification run can be tried without downloading anything, and so
that its labels can be trusted: every row comes from a small grammar in which the label is worked
out from the facts (sets of numbers, orders, rules), never guessed from the wording. Each family
of scenes supplies all three labels in equal number, and negated hypotheses occur under every
label, so that no single surface word gives the answer away.

Run it without arguments to rewrite the file, or with ``--check`` to compare only. The same bytes
come out at every run.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

ROWS = 400
SEED = 20240229
TARGET = Path(__file__).resolve().parent / "nli.jsonl"

ENTAILMENT, NEUTRAL, CONTRADICTION = 0, 1, 2

Example = tuple[str, str, str]
"""Premise, hypothesis and the reason for the label."""
Family = Callable[[random.Random, int], Example]

INSTRUCTION = (
    "Label: 0 = entailment, 1 = neutral, 2 = contradiction. Answer only with JSON that has the"
    ' keys "thought_process" and "predicted_label".'
)

VERDICTS: dict[int, tuple[str, ...]] = {
    ENTAILMENT: (
        "So the hypothesis follows.",
        "The hypothesis must be true.",
        "The hypothesis is therefore true.",
    ),
    NEUTRAL: (
        "The hypothesis may be true or false.",
        "So the hypothesis stays open.",
        "The premise does not settle the hypothesis.",
    ),
    CONTRADICTION: (
        "The hypothesis cannot be true.",
        "So the hypothesis is ruled out.",
        "The hypothesis says otherwise.",
    ),
}

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


def cap(text: str) -> str:
    """Return the text with a capital first letter, leaving names inside it alone."""
    return text[:1].upper() + text[1:]


def polarity(rng: random.Random, label: int) -> tuple[str, bool]:
    """Choose whether to negate the hypothesis, and what must then hold for the bare statement.

    Drawing the negation first is what keeps "not" useless as a clue: a negated hypothesis is an
    entailment when the bare statement is false, and a contradiction when it is true.
    """
    positive = rng.random() < 0.5
    if label == NEUTRAL:
        return "open", positive
    return ("true" if (label == ENTAILMENT) == positive else "false"), positive


def label_of(allowed: set[int], claimed: set[int]) -> int:
    """Return the label when the premise allows one set of numbers and the hypothesis another."""
    if allowed <= claimed:
        return ENTAILMENT
    return NEUTRAL if allowed & claimed else CONTRADICTION


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


def scene(rng: random.Random, label: int) -> Example:
    """Everyday facts: a kind and its example, or what a situation implies."""
    truth, positive = polarity(rng, label)
    row = rng.choice(SCENES)
    name = rng.choice(NAMES)
    at = {"true": 2, "false": 4, "open": 6}[truth]
    hypothesis = row[0] if positive else row[1]
    premise, hypothesis, reason = (text.format(n=name) + "." for text in (row[at], hypothesis, row[at + 1]))
    return premise, hypothesis, reason


def indoors(rng: random.Random, label: int) -> Example:
    """Where an activity takes place; the activity alone never settles it."""
    truth, positive = polarity(rng, label)
    name = rng.choice(NAMES)
    ask_inside = rng.random() < 0.5
    word = "indoors" if ask_inside else "outdoors"
    hypothesis = f"{name} is {word}." if positive else f"{name} is not {word}."
    if truth == "open":
        activity = rng.choice(PLACES)[0]
        other = rng.choice([who for who in NAMES if who != name])
        extra = rng.choice(("", f" with {other}", f" while {other} watches", " before breakfast"))
        premise = f"{name} is {activity}{extra}."
        return premise, hypothesis, f"{cap(activity)} is possible both indoors and outdoors."
    inside = ask_inside == (truth == "true")
    activity, place, _ = rng.choice([entry for entry in PLACES if entry[2] == inside])
    premise = f"{name} is {activity} {place}."
    where = "indoors" if inside else "outdoors"
    return premise, hypothesis, f"Somebody {place} is {where}."


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

TOP = 40
FORMS = ("exactly", "at least", "at most", "more than", "fewer than")


def numbers(form: str, n: int) -> set[int]:
    """Return the numbers from 0 to ``TOP`` that a counting phrase allows."""
    tests: dict[str, Callable[[int], bool]] = {
        "exactly": lambda k: k == n,
        "at least": lambda k: k >= n,
        "at most": lambda k: k <= n,
        "more than": lambda k: k > n,
        "fewer than": lambda k: k < n,
    }
    return {k for k in range(TOP + 1) if tests[form](k)}


def spoken(form: str, n: int) -> str:
    """Say which numbers a counting phrase allows, in words a reader checks at a glance."""
    allowed = numbers(form, n)
    low, high = min(allowed), max(allowed)
    if low == high:
        return f"exactly {WORDS[low]}"
    return f"{WORDS[low]} or more" if high == TOP else f"{WORDS[high]} or fewer"


def counts(rng: random.Random, label: int) -> Example:
    """Set counting phrases against each other; the label is set inclusion."""
    things, where = rng.choice(HOLDERS)
    while True:
        form, n = rng.choice(FORMS), rng.randint(3, 12)
        other, m = rng.choice(FORMS), max(2, n + rng.randint(-4, 4))
        allowed, claimed = numbers(form, n), numbers(other, m)
        if (form, n) != (other, m) and label_of(allowed, claimed) == label:
            break
    premise = f"There are {form} {WORDS[n]} {things} {where}."
    hypothesis = f"There are {other} {WORDS[m]} {things} {where}."
    claim, range_ = f"{other} {WORDS[m]}", spoken(form, n)
    if label == ENTAILMENT:
        reason = f"The number is {range_}, and that is always {claim}."
    elif label == CONTRADICTION:
        reason = f"The number is {range_}, and that is never {claim}."
    else:
        near = sorted(allowed, key=lambda k: (abs(k - m), k))
        fits = next(k for k in near if k in claimed)
        fails = next(k for k in near if k not in claimed)
        reason = f"The number is {range_}: {WORDS[fits]} would be {claim}, but {WORDS[fails]} would not."
    return premise, hypothesis, reason


def take_and_add(rng: random.Random, label: int) -> Example:
    """Work with small sums over a change, known or known only to be a part."""
    truth, positive = polarity(rng, label)
    things, where = rng.choice([holder for holder in HOLDERS if holder[0] != "pupils"])
    name = rng.choice(NAMES)
    start = rng.randint(8, 14)
    form = rng.choice(("exactly", "more than", "fewer than"))
    if truth == "open" or rng.random() < 0.35:
        # "Some" leaves anything from one to all but one; only the far ends are settled then.
        if truth == "open":
            k = rng.randint(3, start - 4)
            reason = f"It is not said how many {things} were taken from the {WORDS[start]}."
        else:
            form = "fewer than" if truth == "true" else rng.choice(("exactly", "more than"))
            k = start + rng.randint(0, 2)
            reason = f"Some {things} were taken and none added, so fewer than {WORDS[start]} are left."
        change = f"{name} took some but not all of them away"
    else:
        taken, added = rng.randint(2, 5), rng.choice((0, 0, 2, 3))
        left = start - taken + added
        near = range(max(2, left - 3), left + 4)
        k = rng.choice([m for m in near if (left in numbers(form, m)) == (truth == "true")])
        change = f"{name} took {WORDS[taken]} of them away"
        total = f"{cap(WORDS[start])} minus {WORDS[taken]}"
        if added:
            change += f" and later put {WORDS[added]} more there"
            total += f" plus {WORDS[added]}"
        result = {
            ("exactly", "true"): f"exactly {WORDS[left]}",
            ("exactly", "false"): f"{WORDS[left]}, not {WORDS[k]}",
        }.get((form, truth))
        if result is None:
            result = f"{WORDS[left]}, which is {'' if truth == 'true' else 'not '}{form} {WORDS[k]}"
        reason = f"{total} makes {result}."
    premise = f"There were {WORDS[start]} {things} {where}. {change}; nothing else changed."
    claim = f"{form} {WORDS[k]} {things} {where} now"
    return premise, f"There are {claim}." if positive else f"There are not {claim}.", reason


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


def share(quantifier: str, size: int) -> set[int]:
    """Return how many members out of ``size`` may have the property under a quantifier."""
    everyone = set(range(size + 1))
    return {
        "all": {size},
        "most": {k for k in everyone if 2 * k > size},
        "half": {k for k in everyone if 2 * k == size},
        "some": everyone - {0},
        "not all": everyone - {size},
        "none": {0},
    }[quantifier]


def quantified(rng: random.Random, label: int) -> Example:
    """One quantified sentence against another, decided by the numbers they allow."""
    group, _, several, one, _ = rng.choice(GROUPS)
    club = rng.choice(CLUBS)
    size = rng.choice((6, 8, 10, 12))
    while True:
        first, second = rng.sample(sorted(QUANTIFIERS), 2)
        allowed, claimed = share(first, size), share(second, size)
        if label_of(allowed, claimed) == label:
            break
    noun = f"{WORDS[size]} {group} {club}"
    premise = QUANTIFIERS[first].format(g=noun, p=several, q=one) + "."
    hypothesis = QUANTIFIERS[second].format(g=noun, p=several, q=one) + "."
    low, high = min(allowed), max(allowed)
    if low == high:
        range_ = f"The number must be {WORDS[low]}"
    elif low == 0:
        range_ = f"The number can be anything from zero to {WORDS[high]}"
    else:
        range_ = f"The number lies between {WORDS[low]} and {WORDS[high]}"
    claim = {
        "all": f"all {WORDS[size]}",
        "most": f"more than {WORDS[size // 2]}",
        "half": f"exactly {WORDS[size // 2]}",
        "some": "one or more",
        "not all": f"fewer than {WORDS[size]}",
        "none": "none",
    }[second]
    if label == NEUTRAL:
        fits, fails = min(allowed & claimed), max(allowed - claimed)
        reason = f"{range_}; {WORDS[fits]} would fit the claim of {claim}, {WORDS[fails]} would not"
    else:
        verb = "fits" if label == ENTAILMENT else "clashes with"
        reason = f"{range_}, which {verb} the claim of {claim}"
    return premise, hypothesis, reason + "."


def member(rng: random.Random, label: int) -> Example:
    """From a group to a member; the reverse direction and mere majorities leave things open."""
    truth, positive = polarity(rng, label)
    group, single, several, does, does_not = rng.choice(GROUPS)
    club, name = rng.choice(CLUBS), rng.choice(NAMES)
    is_member = f"{name} is {single} {club}"
    hypothesis = f"{name} {does if positive else does_not}."
    if truth == "true":
        rule = rng.choice((f"All the {group} {club} {several}", f"Every one of the {group} {club} {does}"))
        reason = f"{name} is one of the {group} {club}, and all of them {several}."
    elif truth == "false":
        rule = rng.choice((f"None of the {group} {club} {several}", f"Not one of the {group} {club} {does}"))
        reason = f"{name} is one of the {group} {club}, and none of them {several}."
    else:
        trick = rng.choice(("Most", "Some", "outsider"))
        if trick == "outsider":
            rule = rng.choice(("All", "None of")) + f" the {group} {club} {several}"
            is_member = f"{name} is not {single} {club}"
            reason = f"The rule covers the {group} {club}, and {name} is not one of them."
        else:
            rule = f"{trick} of the {group} {club} {several}, but not all of them"
            reason = f"{name} may or may not be one of those who {several}."
    parts = [rule, is_member]
    if rng.random() < 0.4:
        parts.reverse()
    return ". ".join(parts) + ".", hypothesis, reason


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


def conditional(rng: random.Random, label: int) -> Example:
    """If and only-if rules, with the two classic fallacies as neutral rows."""
    truth, positive = polarity(rng, label)
    a, not_a, c, not_c = rng.choice(RULES)
    if_rule = rng.choice((f"If {a}, {c}", f"Whenever {a}, {c}"))
    only_rule = f"{cap(c)} only if {a}"
    # Rule, fact, then the statement asked about and its negation, then the reason.
    table: dict[str, tuple[tuple[str, str, str, str, str], ...]] = {
        "true": (
            (if_rule, a, c, not_c, "The condition holds, so the consequence holds"),
            (only_rule, c, a, not_a, f"The rule lets this happen only if {a}"),
        ),
        "false": (
            (if_rule, not_c, a, not_a, f"The rule says that {c} whenever {a}, but {not_c}"),
            (only_rule, not_a, c, not_c, f"The required condition is missing: {not_a}"),
        ),
        "open": (
            (if_rule, c, a, not_a, "The consequence may also have another cause"),
            (if_rule, not_a, c, not_c, "The rule is silent about what happens otherwise"),
            (only_rule, a, c, not_c, "The condition is required, but it may not be enough"),
        ),
    }
    rule, fact, statement, negation, reason = rng.choice(table[truth])
    hypothesis = cap(statement if positive else negation) + "."
    return f"{rule}. {cap(fact)}.", hypothesis, reason + "."


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


def either(rng: random.Random, label: int) -> Example:
    """Exclusive and inclusive choices between two people."""
    truth, positive = polarity(rng, label)
    past, plain, _ = rng.choice(DEEDS)
    one, two = rng.sample(NAMES, 2)
    pair = " or ".join(rng.sample((one, two), 2))
    exclusive = f"Either {pair} {past}, but not both of them"
    if truth == "true":
        rule = rng.choice((exclusive, f"At least one of the two, {pair}, {past}"))
        fact, reason = f"{two} did not {plain}", f"With {two} ruled out, it must have been {one}"
    elif truth == "false":
        rule, fact = exclusive, f"{two} {past}"
        reason = f"It was only one of them, and that was {two}"
    else:
        rule, fact, reason = rng.choice(
            (
                (exclusive, "Nobody else was there", f"It may have been {one} or {two}"),
                (
                    f"At least one of the two, {pair}, {past}",
                    f"{two} {past}",
                    f"{two} is certain, but {one} may have done it as well",
                ),
            )
        )
    hypothesis = f"{one} {past}." if positive else f"{one} did not {plain}."
    return f"{rule}. {fact}.", hypothesis, reason + "."


def implied(rng: random.Random, label: int) -> Example:
    """Verbs that settle whether a deed was done, and verbs that do not."""
    truth, positive = polarity(rng, label)
    past, plain, doing = rng.choice(DEEDS)
    name = rng.choice(NAMES)
    when = rng.choice(("this morning", "yesterday", "last night", "on Sunday"))
    verbs: dict[str, tuple[tuple[str, str], ...]] = {
        "true": (
            (f"managed to {plain}", "Managing to do something means doing it"),
            (f"remembered to {plain}", "Remembering to do something means doing it"),
            (f"did not forget to {plain}", "Not forgetting to do something means doing it"),
            (f"did not fail to {plain}", "Not failing to do something means doing it"),
            (f"was busy and still succeeded in {doing}", "Succeeding in something means doing it"),
        ),
        "false": (
            (f"forgot to {plain}", "Forgetting to do something means not doing it"),
            (f"failed to {plain}", "Failing to do something means not doing it"),
            (f"did not manage to {plain}", "Not managing to do something means not doing it"),
            (f"did not remember to {plain}", "Not remembering to do it means not doing it"),
            (f"had time and still got away without {doing}", "Doing without it means not doing it"),
        ),
        "open": (
            (f"wanted to {plain}", "Wanting something does not show that it was done"),
            (f"was asked to {plain}", "Being asked does not show that it was done"),
            (f"promised to {plain}", "A promise may be kept or broken"),
            (f"did not want to {plain}", "People also do things that they do not want to do"),
            (f"was not asked to {plain}", "People also do things without being asked"),
            (f"talked about {doing}", "Talking about it does not show whether it was done"),
        ),
    }
    verb, reason = rng.choice(verbs[truth])
    premise = f"{cap(when)}, {name} {verb}."
    statement = f"{name} {past}" if positive else f"{name} did not {plain}"
    return premise, f"{statement} {when}.", reason + "."


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


def compared(rng: random.Random, label: int) -> Example:
    """Chains of comparisons, with forks that leave two things uncompared."""
    truth, positive = polarity(rng, label)
    more, less, direction, things = rng.choice(SCALES)
    a, b, c = rng.sample(list(things or NAMES), 3)
    upper, lower = (more, less) if rng.random() < 0.5 else (less, more)

    def say(high: str, low: str) -> str:
        """Say that ``high`` stands above ``low``, from either end."""
        return rng.choice((f"{high} is {upper} {low}", f"{low} is {lower} {high}"))

    if truth == "open":
        if rng.random() < 0.5:
            facts, rest = [say(a, b), say(c, b)], upper
        else:
            facts, rest = [say(b, a), say(b, c)], lower
        reason = f"{cap(a)} and {c} are both {rest} {b}, but they are not compared with each other."
    else:
        high, low = (a, c) if truth == "true" else (c, a)
        facts = [say(high, b), say(b, low)]
        order = [high, b, low] if upper == more else [low, b, high]
        reason = f"{direction} the order is {order[0]}, {order[1]}, {order[2]}."
    rng.shuffle(facts)
    hypothesis = f"{cap(a)} is {upper} {c}." if positive else f"{cap(a)} is not {upper} {c}."
    return f"{cap(facts[0])}, and {facts[1]}.", hypothesis, reason


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


def inside(rng: random.Random, label: int) -> Example:
    """Things in things: being inside passes on, lying beside does not."""
    truth, positive = polarity(rng, label)
    a, b, c, d = rng.choice(NESTS)
    if truth == "true":
        premise, reason = rng.choice(
            (
                (f"{a} is in {b}, and {b} is in {c}", f"{cap(a)} is in {c} because {b} is"),
                (f"{b}, which holds {a}, is in {c}", f"{cap(a)} is in {c} because {b} is"),
                (
                    f"{c} contains {b}, and {a} and {d} are in {b}",
                    f"What is in {b} is also in {c}",
                ),
            )
        )
    elif truth == "false":
        premise, reason = rng.choice(
            (
                (
                    f"{a} is in {b}, and {b} is lying beside {c}",
                    f"{cap(a)} is in {b}, which is not in {c}",
                ),
                (
                    f"{a} was taken out of {c} and is now in {b} in another room",
                    f"{cap(a)} has left {c}",
                ),
                (
                    f"{d} is the only thing in {c}, and {a} is in {b}",
                    f"{cap(c)} holds nothing but {d}",
                ),
            )
        )
    else:
        premise, reason = rng.choice(
            (
                (f"{d} is in {b}, and {b} is in {c}", f"Nothing is said about where {a} is"),
                (f"{a} is either in {b} on the table or in {c}", "Both places are possible"),
                (f"{a} and {d} are in {b}", f"Nothing is said about where {b} is"),
                (f"{a} was in {c} last week", "It may have been moved since last week"),
            )
        )
    hypothesis = f"{cap(a)} is in {c}." if positive else f"{cap(a)} is not in {c}."
    return cap(premise) + ".", hypothesis, reason + "."


COLOURS = ("red", "blue", "green", "yellow", "white", "black", "orange", "purple")
ARTICLES = ("scarf", "kite", "mug", "balloon", "umbrella", "hat")


def shared_out(rng: random.Random, label: int) -> Example:
    """Three people, three colours, one each: what is left over is settled by elimination."""
    truth, positive = polarity(rng, label)
    one, two, three = rng.sample(NAMES, 3)
    first, second, third = rng.sample(COLOURS, 3)
    thing = rng.choice(ARTICLES)
    listed = rng.sample((first, second, third), 3)
    choice = f"a {listed[0]}, a {listed[1]} and a {listed[2]} {thing}".replace("a orange", "an orange")
    setting = f"{one}, {two} and {three} share out {choice}, one each."
    if truth == "open":
        fact, reason = rng.choice(
            (
                (f"{one} gets the {first} one", f"{two} and {three} could swap the other two"),
                (
                    f"{two} does not get the {first} one",
                    f"{two} still has two colours to choose from",
                ),
            )
        )
    else:
        fact = f"{one} gets the {first} one, and {three} does not get the {second} one"
        reason = f"{three} must get the {third} one, so the {second} one goes to {two}"
    asked = third if truth == "false" else second
    verb = "gets" if positive else "does not get"
    return f"{setting} {fact}.", f"{two} {verb} the {asked} {thing}.", reason + "."


def order_of_deeds(rng: random.Random, label: int) -> Example:
    """Which of two deeds came first."""
    truth, positive = polarity(rng, label)
    name = rng.choice(NAMES)
    first, second = rng.sample(DEEDS, 2)
    early, late = (first, second) if truth != "false" else (second, first)
    if truth == "open":
        early, late = rng.sample((first, second), 2)
        premise = rng.choice(
            (
                f"Yesterday {name} {early[0]} and also {late[0]}",
                f"{name} {late[0]} on the day of the storm and {early[0]} on that day too",
                f"{name} {early[0]} and {late[0]}, but nobody remembers in which order",
            )
        )
        reason = "Both things were done, but their order is not given."
    else:
        premise = rng.choice(
            (
                f"Before {late[2]}, {name} {early[0]}",
                f"After {early[2]}, {name} {late[0]}",
                f"{name} {early[0]} and only then {late[0]}",
                f"{name} {late[0]} straight after {early[2]}",
            )
        )
        reason = f"{cap(early[2])} came first, {late[2]} second."
    act = first[0] if positive else f"did not {first[1]}"
    return premise + ".", f"{name} {act} before {second[2]}.", reason


TOWNS = ("Ashford", "Brackwell", "Corrin", "Dunmore", "Elmsby", "Fallow", "Glenrow", "Harwick")


def clock(minutes: int) -> str:
    """Write minutes after midnight as a time of day."""
    return f"{minutes // 60}:{minutes % 60:02d}"


def arrival(rng: random.Random, label: int) -> Example:
    """Departure plus duration against a time; a timetable alone settles nothing."""
    truth, positive = polarity(rng, label)
    start, goal = rng.sample(TOWNS, 2)
    vehicle = rng.choice(("bus", "train", "coach", "tram"))
    leave = rng.randrange(7 * 60, 20 * 60, 5)
    takes = rng.randrange(20, 95, 5)
    arrive = leave + takes
    if truth == "open":
        limit = leave + rng.randrange(30, 75, 5)
        premise = rng.choice(
            (
                f"The {vehicle} left {start} for {goal} at {clock(leave)}",
                f"The {vehicle} to {goal} was due to leave {start} at {clock(leave)} and to take {takes} minutes",
            )
        )
        due = "was due" in premise
        reason = "A timetable is only a plan." if due else "The length of the journey is not given."
    else:
        shift = rng.randrange(5, 35, 5)
        limit = arrive + shift if truth == "true" else max(leave + 5, arrive - shift)
        premise = rng.choice(
            (
                f"The {vehicle} left {start} at {clock(leave)} and reached {goal} {takes} minutes later",
                f"The journey of the {vehicle} from {start} to {goal} began at {clock(leave)} and took {takes} minutes",
            )
        )
        side = "earlier" if truth == "true" else "later"
        reason = f"It arrived at {clock(arrive)}, which is {side} than {clock(limit)}."
    verb = "reached" if positive else "did not reach"
    return premise + ".", f"The {vehicle} {verb} {goal} before {clock(limit)}.", reason


SHOPS = ("museum", "library", "bakery", "post office", "swimming pool", "bicycle shop", "archive")


def opening(rng: random.Random, label: int) -> Example:
    """Ask whether a place is open, by day and by hour."""
    truth, positive = polarity(rng, label)
    shop = rng.choice(SHOPS)
    start, end = rng.randint(7, 10), rng.randint(15, 19)
    hours = f"from {start}:00 to {end}:00"
    rest = rng.randrange(7)
    others = [day for day in range(7) if day != rest]
    hour = rng.randint(start + 1, end - 1)
    premise = f"The {shop} is open every day except {DAYS[rest]}, {hours} only"
    if truth == "open" and rng.random() < 0.5:
        day = rng.choice((5, 6))
        premise = f"From Monday to Friday, the {shop} is open {hours}"
        reason = f"Nothing is said about {DAYS[day]}s."
    elif truth == "open":
        day = rng.choice(others)
        premise = f"The {shop} is open every day except {DAYS[rest]}"
        reason = f"{DAYS[day]} is an opening day, but the hours are not given."
    elif truth == "true":
        day = rng.choice(others)
        reason = f"{DAYS[day]} is an opening day, and {hour}:00 lies within the opening hours."
    elif rng.random() < 0.5:
        day = rest
        reason = f"{DAYS[day]} is the day on which it is closed."
    else:
        day, hour = rng.choice(others), rng.choice((start - 1, end + 1, end + 2))
        reason = f"{hour}:00 lies outside the opening hours."
    is_open = "is open" if positive else "is not open"
    return premise + ".", f"The {shop} {is_open} on {DAYS[day]}s at {hour}:00.", reason


COURSES = ("course", "fair", "festival", "conference", "chess tournament", "flower show")


def last_day(rng: random.Random, label: int) -> Example:
    """Count days in a row, where the first day counts too."""
    truth, positive = polarity(rng, label)
    event = rng.choice(COURSES)
    begin, length = rng.randrange(7), rng.randint(2, 5)
    end = (begin + length - 1) % 7
    if truth == "open":
        asked = (begin + rng.randint(1, 5)) % 7
        premise = rng.choice(
            (
                f"The {event} began on a {DAYS[begin]} and was over within a week",
                f"The {event} began on a {DAYS[begin]} and ran for several days",
            )
        )
        reason = "The number of days is not given."
    else:
        wrong = [day for day in range(7) if day != end]
        asked = end if truth == "true" else rng.choice(wrong)
        premise = f"The {event} began on a {DAYS[begin]} and ran for {WORDS[length]} days in a row, counting the first"
        reason = f"With {DAYS[begin]} as day one, day {WORDS[length]} is {DAYS[end]}."
    verb = "ended" if positive else "did not end"
    return premise + ".", f"The {event} {verb} on a {DAYS[asked]}.", reason


FAMILIES: tuple[Family, ...] = (
    scene,
    counts,
    compared,
    conditional,
    inside,
    quantified,
    arrival,
    implied,
    shared_out,
    member,
    take_and_add,
    order_of_deeds,
    indoors,
    either,
    opening,
    last_day,
)


def build_rows() -> list[dict[str, str | int]]:
    """Return all rows, with labels as even as the count allows and no pair used twice."""
    rng = random.Random(SEED)
    rows: list[dict[str, str | int]] = []
    seen: set[tuple[str, str]] = set()
    while len(rows) < ROWS:
        label = len(rows) % 3
        family = FAMILIES[len(rows) // 3 % len(FAMILIES)]
        premise, hypothesis, reason = family(rng, label)
        if (premise, hypothesis) in seen:
            continue
        seen.add((premise, hypothesis))
        answer = {
            "thought_process": f"{reason} {rng.choice(VERDICTS[label])}",
            "predicted_label": label,
        }
        rows.append(
            {
                "prompt": f"Premise: {premise}\nHypothesis: {hypothesis}\n{INSTRUCTION}",
                "completion": json.dumps(answer, ensure_ascii=False),
                "label": label,
            }
        )
    rng.shuffle(rows)
    return rows


def render(rows: list[dict[str, str | int]]) -> bytes:
    """Return the file's bytes, with plain line feeds on every system."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")


def main(argv: list[str] | None = None) -> int:
    """Write the file, or with ``--check`` say by exit status whether it is up to date."""
    parser = argparse.ArgumentParser(description="Write nli.jsonl beside this script.")
    parser.add_argument("--check", action="store_true", help="compare only; exit with 1 when the file differs")
    arguments = parser.parse_args(argv)
    data = render(build_rows())
    if arguments.check:
        same = TARGET.is_file() and TARGET.read_bytes() == data
        print(f"{TARGET.name}: {'up to date' if same else 'differs, run make_nli.py'}")
        return 0 if same else 1
    TARGET.write_bytes(data)
    print(f"{TARGET.name}: {ROWS} rows written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
