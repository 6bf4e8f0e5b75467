"""Likely secrets and e-mail addresses in a text: detect-secrets' detectors, run only where a cheap look finds cause."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import NamedTuple


class Secret(NamedTuple):
    """A likely secret, by its kind and place; `value` must not be shown or written."""

    name: str
    """`GitHub Token`"""
    value: str


# Detector -> what its secrets hold; a text without it is not searched. Those with nothing so plain need a long word.
# Left out: detectors by entropy and of IP addresses, which find cause in any code.
_NEEDLES: Mapping[str, tuple[str, ...]] = {
    "aws.AWSKeyDetector": ("AKIA", "ASIA", "ABIA", "ACCA", "A3T", "aws_", "AWS_"),
    "azure_storage_key.AzureStorageKeyDetector": ("AccountKey=",),
    "basic_auth.BasicAuthDetector": ("://",),
    "cloudant.CloudantDetector": ("cloudant", "CLOUDANT"),
    "github_token.GitHubTokenDetector": ("ghp_", "gho_", "ghu_", "ghs_", "ghr_"),
    "gitlab_token.GitLabTokenDetector": (
        "glpat-",
        "gldt-",
        "glft-",
        "glsoat-",
        "glrt-",
        "GR1348941",
        "glcbt-",
        "glptt-",
    ),
    "jwt.JwtTokenDetector": ("eyJ",),
    "mailchimp.MailchimpDetector": ("-us",),
    "npm.NpmDetector": ("_authToken",),
    "openai.OpenAIDetector": ("T3BlbkFJ",),
    "private_key.PrivateKeyDetector": ("PRIVATE KEY", "PuTTY-User-Key-File-2"),
    "pypi_token.PypiTokenDetector": ("pypi-AgE",),
    "sendgrid.SendGridDetector": ("SG.",),
    "slack.SlackDetector": ("xox", "hooks.slack.com"),
    "square_oauth.SquareOAuthDetector": ("sq0csp-",),
    "stripe.StripeDetector": ("k_live_",),
    "discord.DiscordBotTokenDetector": (),
    "telegram_token.TelegramBotTokenDetector": (),
    "twilio.TwilioKeyDetector": (),
}
_LONG = 34
"""Characters of the shortest secret of a detector without needles."""
# Keys that detect-secrets does not know.
_OTHERS: Mapping[str, tuple[str, re.Pattern[str]]] = {
    "Hugging Face Token": ("hf_", re.compile(r"\bhf_[A-Za-z0-9]{34}\b")),
    "Google API Key": ("AIza", re.compile(r"\bAIza[0-9A-Za-z_-]{35}")),
    "Anthropic API Key": ("sk-ant-", re.compile(r"\bsk-ant-[A-Za-z0-9_-]{32,}")),
    "OpenAI Token": ("sk-", re.compile(r"\bsk-(?:proj-|svcacct-)?[A-Za-z0-9_]{40,}")),
    "GitHub Token": ("github_pat_", re.compile(r"\bgithub_pat_[A-Za-z0-9_]{40,}")),
}
_ALL_NEEDLES = (*(needle for needles in _NEEDLES.values() for needle in needles), *(one for one, _ in _OTHERS.values()))
_WORDS = ("password", "passwd", "pwd", "secret", "apikey", "api_key", "auth_key", "private_key", "access_key")
_ASSIGNED = re.compile(
    r"(?:password|passwd|pwd|secret|(?:api|auth|private|access)_?key)\w*['\"\]]{0,2}\s{0,3}(?:=>|:=|={1,3}|:)\s{0,3}['\"`]",
    re.IGNORECASE,
)
_PLACEHOLDER = re.compile(
    r"example|sample|dummy|placeholder|change.?me|your|test|fake|xxx|\*\*\*|\.\.\.|…|^[<{\[$%(]|^(?:user|pass)",
    re.IGNORECASE,
)
_EMAIL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._%+-]*@(?:[A-Za-z0-9-]+\.)+[A-Za-z]{2,}")
# RFC 2606's names, which belong to nobody, and what GitHub writes for people who don't show theirs
_NOBODY = re.compile(
    r"^git@|@(?:[\w-]+\.)*(?:example\.\w+|test|invalid|localhost|email\.com|domain\.com|users\.noreply\.github\.com)$"
)
_FILE = re.compile(r"\.(?:png|jpe?g|gif|svg|webp|css|js|py)$", re.IGNORECASE)  # icon@2x.png


def find_secrets(text: str) -> list[Secret]:
    """The likely secrets of a text, each once, in the order of the detectors."""
    found: list[Secret] = []
    if any(map(text.__contains__, _ALL_NEEDLES)):  # in C, as this is asked of every row
        names = [name for name, needles in _NEEDLES.items() if any(needle in text for needle in needles)]
        found += _found(names, text)
        for name, (needle, pattern) in _OTHERS.items():
            if needle in text:
                found += [Secret(name, value) for value in pattern.findall(text) if not _is_placeholder(value)]
    if len(text) >= _LONG and _has_long_word(text):
        found += _found([name for name, needles in _NEEDLES.items() if not needles], text)
    if any(map(text.lower().__contains__, _WORDS)) and _ASSIGNED.search(text):
        found += _keywords(text)
    return list(dict.fromkeys(found))


def find_emails(text: str) -> list[str]:
    """The e-mail addresses of a text, each once; those that belong to nobody left out."""
    if "@" not in text:
        return []
    found = dict.fromkeys(_EMAIL.findall(text))
    return [address for address in found if not (_NOBODY.search(address.lower()) or _FILE.search(address))]


def masked(text: str) -> str:
    """The text with a dot in place of each character of a likely secret; what follows keeps its place."""
    for value in dict.fromkeys(secret.value for secret in find_secrets(text)):
        whole = re.escape(value) + (_KEY_BODY if "PRIVATE KEY" in value else r"[\w.+/=-]*")
        text = re.sub(whole, lambda found: re.sub(r"\S", "•", found[0]), text, flags=re.DOTALL)
    return text


_KEY_BODY = r".*?(?=-----END|\Z)"
_LONG_WORD = re.compile(rf"[\w.:-]{{{_LONG},}}")


def _has_long_word(text: str) -> bool:
    return max(map(len, text.split()), default=0) >= _LONG and _LONG_WORD.search(text) is not None


def _found(names: Sequence[str], text: str) -> Iterator[Secret]:
    for name in names:
        detector = _detector(name)
        for value in detector.analyze(text):
            if name.startswith("private_key.") or _is_likely(value):
                yield Secret(detector.name, value)


def _keywords(text: str) -> Iterator[Secret]:
    """What is assigned, in quotation marks, to something called a password or a key, if it looks drawn at random."""
    detector = _detector("keyword.KeywordDetector")
    for line in text.splitlines():
        if len(line) < 2000 and _ASSIGNED.search(line):
            for value in detector.analyze(line):
                if len(value) >= 8 and not re.search(r"\s", value) and _is_likely(value) and _entropy(value) >= 3.0:
                    yield Secret("Password or Key", value)


def _is_likely(value: str) -> bool:
    """Not a word, a placeholder, or characters in a row."""
    return any(map(str.isdigit, value)) and not _is_placeholder(value)


def _is_placeholder(value: str) -> bool:
    return len(set(value)) < 5 or _PLACEHOLDER.search(value) is not None


def _entropy(value: str) -> float:
    """Shannon entropy in bits per character."""
    return -sum(n / len(value) * math.log2(n / len(value)) for n in Counter(value).values())


class _Detector(NamedTuple):
    name: str
    analyze: Callable[[str], Iterator[str]]


@cache
def _detector(name: str) -> _Detector:
    """A detector of detect-secrets, by module and class. Imported here: it takes a while, and most data needs none."""
    from importlib import import_module

    module, _, cls = name.partition(".")
    made = getattr(import_module(f"detect_secrets.plugins.{module}"), cls)()
    if not hasattr(made, "denylist"):
        return _Detector(made.secret_type, made.analyze_string)
    is_valid = getattr(made, "is_formally_valid", lambda value: True)
    # analyze_string gives the groups of a pattern, which for many tokens is no more than their prefix
    group = 1 if name.startswith("basic_auth.") else 0

    def analyze(text: str) -> Iterator[str]:
        matches = (found[group] for pattern in made.denylist for found in pattern.finditer(text))
        return filter(is_valid, matches)

    return _Detector(made.secret_type, analyze)
