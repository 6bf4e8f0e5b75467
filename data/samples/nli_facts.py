"""Families of `make_nli.py` on everyday facts, numbers, quantifiers and rules, and what all families share."""

from __future__ import annotations

import random
from collections.abc import Callable

from data.samples.nli_words import CLUBS, DEEDS, GROUPS, HOLDERS, NAMES, PLACES, QUANTIFIERS, RULES, SCENES, WORDS

ENTAILMENT, NEUTRAL, CONTRADICTION = 0, 1, 2

Example = tuple[str, str, str]
"""Premise, hypothesis and the reason for the label."""
Family = Callable[[random.Random, int], Example]


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
