"""Families of `make_nli.py` on orders, places and times."""

from __future__ import annotations

import random

from data.samples.nli_facts import Example, cap, polarity
from data.samples.nli_words import ARTICLES, COLOURS, COURSES, DAYS, DEEDS, NAMES, NESTS, SCALES, SHOPS, TOWNS, WORDS


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
