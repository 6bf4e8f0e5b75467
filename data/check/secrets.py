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
# Instead of a detector's own patterns, which go over a long line once for each place where they could begin.
_BOUNDED: Mapping[str, re.Pattern[str]] = {
    "jwt.JwtTokenDetector": re.compile(r"(?<![\w=-])eyJ[\w=-]+\.[\w=-]+(?:\.[\w+/=-]+)?", re.ASCII),
    "npm.NpmDetector": re.compile(r"/:_authToken=\s{0,9}(?:npm_\S+|[A-Fa-f0-9-]{36})"),
}
# Keys that detect-secrets does not know, or not in all their forms.
_OTHERS: Mapping[str, tuple[str, re.Pattern[str]]] = {
    "Hugging Face Token": ("hf_", re.compile(r"\bhf_[A-Za-z0-9]{34}\b")),
    "Google API Key": ("AIza", re.compile(r"\bAIza[0-9A-Za-z_-]{35}")),
    "Anthropic API Key": ("sk-ant-", re.compile(r"\bsk-ant-[A-Za-z0-9_-]{32,}")),
    "OpenAI Token": ("sk-", re.compile(r"\bsk-(?:(?:proj|svcacct|admin|or-v1)-[A-Za-z0-9_-]{40,}|[A-Za-z0-9_]{40,})")),
    "Groq API Key": ("gsk_", re.compile(r"\bgsk_[A-Za-z0-9]{52}\b")),
    "GitHub Token": ("github_pat_", re.compile(r"\bgithub_pat_[A-Za-z0-9_]{40,}")),
    "Bearer Token": ("earer ", re.compile(r"\b[Bb]earer {1,3}([A-Za-z0-9][A-Za-z0-9._~+/-]{19,}=*)")),
}
_ALL_NEEDLES = (*(needle for needles in _NEEDLES.values() for needle in needles), *(one for one, _ in _OTHERS.values()))
_WORDS = (
    *("password", "passwd", "pwd", "secret", "token", "apikey", "api_key", "api-key"),
    *("auth_key", "private_key", "access_key"),
)
_NAME = r"(?:password|passwd|pwd|secret|(?:api|auth|private|access|secret)[_-]?key"
_SET_TO = r"""\w{0,40}['"\]]{0,2}\s{0,3}(?:=>|:=|={1,3}|:)\s{0,3}"""
_QUOTED = re.compile(
    _NAME + ")" + _SET_TO + r"""(?:'([^'\s]{8,200})'|"([^"\s]{8,200})"|`([^`\s]{8,200})`)""", re.IGNORECASE
)
_AWS = re.compile(r"aws_?secret_?(?:access_?)?key['\"]?\s{0,3}[=:]\s{0,3}([A-Za-z0-9/+]{40})(?![\w/+=])", re.IGNORECASE)
_BARE = r"([A-Za-z0-9!#%&*+./=?@^_~-]{8,200}+)(?![\w(\[{])"
# of an environment file, a shell or a compose file: DB_PASSWORD=…
_EXPORTED = re.compile(
    r"(?<![a-z])(?:PASSWORD|PASSWD|PWD|SECRET|TOKEN|(?:API|AUTH|PRIVATE|ACCESS|SECRET)_?KEY)[A-Z0-9_]{0,40}=" + _BARE
)
# of a settings file, a connection string or code, where what is not in quotation marks is a name, mostly
_UNQUOTED = re.compile(
    _NAME + r"|(?:api|auth|access|refresh|bot)[_-]?token)\w{0,40}\s{0,3}[=:]\s{0,3}" + _BARE, re.IGNORECASE
)
_PATH = re.compile(r"[A-Za-z_]\w*(?:[./][A-Za-z_]\w*)+|[A-Z0-9]+(?:_[A-Z0-9]+)+|0x[0-9a-fA-F]{40}")
"""An attribute, a path, a constant, a public address: what a value without quotation marks may be."""
_SWITCH = re.compile(r"(?<=[A-Za-z])(?=[0-9])|(?<=[0-9])(?=[A-Za-z])")
_NUM_SWITCHES = 3
"""Between letters and digits, from which a bare word looks drawn at random: `hunter2x9Qz` has 4, `sha256` has 1."""
_PLACEHOLDER = re.compile(
    r"example|sample|dummy|placeholder|change.?me|your|test|fake|xxx|\*\*\*|\.\.\.|…|^[<{\[$%(]|^(?:user|pass)",
    re.IGNORECASE,
)
# an address is tried only where a run of its characters begins: beside a run of a million it would take hours
_EMAIL = re.compile(r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]+\.)+[A-Za-z]{2,}")
# RFC 2606's names, which belong to nobody, and what GitHub writes for people who don't show theirs
_NOBODY = re.compile(
    r"^git@|@(?:[\w-]+\.)*(?:example\.\w+|test|invalid|localhost|email\.com|domain\.com|users\.noreply\.github\.com)$"
)
_FILE = re.compile(r"\.(?:png|jpe?g|gif|svg|webp|css|js|py)$", re.IGNORECASE)  # icon@2x.png


def find_secrets(text: str) -> list[Secret]:
    """The likely secrets of a text, each once, in the order of the detectors. The time is linear in its length."""
    found: list[Secret] = []
    if any(map(text.__contains__, _ALL_NEEDLES)):  # in C, as this is asked of every row
        names = [name for name, needles in _NEEDLES.items() if any(needle in text for needle in needles)]
        found += _found(names, text)
        for name, (needle, pattern) in _OTHERS.items():
            if needle in text:
                found += [Secret(name, value) for value in pattern.findall(text) if _is_likely(value)]
    if len(text) >= _LONG and _has_long_word(text):
        found += _found([name for name, needles in _NEEDLES.items() if not needles], text)
    if any(map(text.lower().__contains__, _WORDS)):
        found += [Secret("Password or Key", value) for value in dict.fromkeys(_assigned(text))]
    return list(dict.fromkeys(found))


def find_emails(text: str) -> list[str]:
    """The e-mail addresses of a text, each once; those that belong to nobody left out."""
    if "@" not in text:
        return []
    found = dict.fromkeys(_EMAIL.findall(text))
    return [address for address in found if not (_NOBODY.search(address.lower()) or _FILE.search(address))]


def masked(text: str, *, is_cut: bool = False) -> str:
    """The text with a dot in place of each character of a likely secret; what follows keeps its place.

    Args:
        is_cut: whether the text was cut off at its end, where half a secret may stand that is none by its form.
    """
    for value in dict.fromkeys(secret.value for secret in find_secrets(text)):
        whole = re.escape(value) + (_KEY_BODY if "PRIVATE KEY" in value else r"[\w.+/=-]*")
        text = re.sub(whole, lambda found: _dots(found[0]), text, flags=re.DOTALL)
    if is_cut:
        start = _half_secret(text)
        text = text[:start] + _dots(text[start:])
    return text


def _dots(text: str) -> str:
    return re.sub(r"\S", "•", text)


def _half_secret(text: str) -> int:
    """Where the beginning of a secret may stand at the end of a text; the text's length if it does not."""
    tail = text[-_TAIL:]
    offset = len(text) - len(tail)
    if found := _HALF_ASSIGNED.search(tail):
        return offset + found.start(1)
    word = re.search(r"\S*\Z", tail)
    assert word is not None
    starts = [at for needle in _ALL_NEEDLES if (at := word[0].find(needle)) >= 0]
    if starts or (len(word[0]) >= _HALF and any(map(str.isdigit, word[0]))):
        return offset + word.start() + min(starts, default=0)
    return len(text)


_TAIL = 4096
"""Characters at the end of a text that are looked at."""
_HALF = 12
"""Characters of a word with a digit that is not shown where the text was cut off in it."""
_HALF_ASSIGNED = re.compile(
    "(?:" + _NAME + "|token)" + _SET_TO + r"""['"`]?|bearer )([^\s'"`]{1,200})\Z""", re.IGNORECASE
)
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


def _assigned(text: str) -> Iterator[str]:
    """What is assigned to something called a password or a key, if it looks drawn at random."""
    for groups in _QUOTED.findall(text):
        if _is_random(value := "".join(groups)):
            yield value
    yield from filter(_is_random, _AWS.findall(text))
    for value in _EXPORTED.findall(text):
        if _is_random(value) and not _PATH.fullmatch(value):
            yield value
    for value in _UNQUOTED.findall(text):
        value = value.rstrip(".!?")  # of a sentence
        if _is_random(value) and not _PATH.fullmatch(value) and len(_SWITCH.findall(value)) >= _NUM_SWITCHES:
            yield value


def _is_random(value: str) -> bool:
    return len(value) >= 8 and _is_likely(value) and _entropy(value) >= 3.0


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
    patterns = [_BOUNDED[name]] if name in _BOUNDED else made.denylist
    is_valid = getattr(made, "is_formally_valid", lambda value: True)
    # analyze_string gives the groups of a pattern, which for many tokens is no more than their prefix
    group = 1 if name.startswith("basic_auth.") else 0

    def analyze(text: str) -> Iterator[str]:
        matches = (found[group] for pattern in patterns for found in pattern.finditer(text))
        return filter(is_valid, matches)

    return _Detector(made.secret_type, analyze)
