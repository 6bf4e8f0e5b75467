"""Garbled text, secrets and addresses: what is found, and what is not."""

from __future__ import annotations

import base64
import json

import pytest

from data.check.secrets import find_emails, find_secrets, masked
from data.check.texts import find_garbled


def kinds(text: str) -> list[str]:
    return [kind for kind, _ in find_garbled(text)]


# what "café, don’t, Привет, 你好, 😀, a non-breaking space" become when their bytes are read as something else
@pytest.mark.parametrize("text", ["café", "don’t", "Привет", "你好", "😀", "10\u00a0°C", "“So”", "naïve", "Größe"])
@pytest.mark.parametrize("encoding", ["cp1252", "latin-1"])
def test_utf8_that_was_read_as_something_else_is_seen(text: str, encoding: str) -> None:
    read = "".join(bytes([byte]).decode(encoding, errors="ignore") or chr(byte) for byte in text.encode())
    assert read != text
    assert kinds(f"It says {read} here.") == ["mojibake"]


@pytest.mark.parametrize(
    "text",
    [
        "café don’t Привет 你好 😀 10\u00a0°C “So” naïve Größe Ångström São Paulo",
        "« Allé… » «café…» Straße… “AMANHÃ” MANHÃ… Ã Â",
        "Tiếng Việt, Ελληνικά, العربية, हिन्दी, 日本語",
        "tab\tline\nreturn\r\nform\x0cnext\x85",
        "∑ ≤ → ✓ ½ µ ™ €",
    ],
)
def test_real_text_is_not_garbled(text: str) -> None:
    assert kinds(text) == []


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("caf\ufffd", "undecodable"),
        ("a\x00b", "control-characters"),
        ("\x1b[31mred", "control-characters"),
        ("a\x9fb", "control-characters"),
        ("bullet \uf0b7 here", "private-use"),
    ],
)
def test_other_garbling_is_seen(text: str, kind: str) -> None:
    assert kinds(text) == [kind]


def token(prefix: str, length: int) -> str:
    """A made-up token, put together here so that no scanner takes this file for a leak."""
    return prefix + ("a1B2c3D4e5F6g7H8i9J0" * 5)[:length]


JWT = (
    ".".join(
        base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=")
        for part in ({"alg": "HS256", "typ": "JWT"}, {"sub": "4711", "name": "A. Person"})
    )
    + "."
    + token("", 43)
)


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("GitHub Token", token("ghp_", 36)),
        ("GitHub Token", token("github_pat_", 60)),
        ("GitLab Token", token("glpat-", 20)),
        ("AWS Access Key", "AKIA" + "Q3Z7M2K9P4X8W6TR"),
        ("Slack Token", "xoxb" + "-1234567890-abcdefghij12"),
        ("Stripe Access Key", token("sk_live_", 24)),
        ("Hugging Face Token", token("hf_", 34)),
        ("Google API Key", token("AIza", 35)),
        ("Anthropic API Key", token("sk-ant-", 60)),
        ("JSON Web Token", JWT),
        ("Telegram Bot Token", "123456789:" + token("", 35)),
        ("SendGrid API Key", "SG." + token("", 22) + "." + token("", 43)),
        ("Groq API Key", token("gsk_", 52)),
        ("OpenAI Token", token("sk-proj-", 20) + token("-", 20) + token("_", 30)),
    ],
)
def test_a_token_is_found_and_masked(name: str, secret: str) -> None:
    text = f"Use this: {secret} and go on."
    assert name in [found.name for found in find_secrets(text)]
    hidden = masked(text)
    assert hidden.startswith("Use this: •••")
    assert hidden.endswith("• and go on.")
    assert len(hidden) == len(text)
    assert not any(secret[at : at + 6] in hidden for at in range(len(secret) - 6))


def test_a_password_in_an_address_or_an_assignment_is_found() -> None:
    assert masked("https://bob:s3cr3tPw9@db.uni.edu/x") == "https://bob:•••••••••@db.uni.edu/x"
    assert masked('password = "hunter2x9Qz"  # mine') == 'password = "•••••••••••"  # mine'


@pytest.mark.parametrize(
    ("before", "secret"),
    [
        ("DB_PASSWORD=", "Sup3rS3" + "cret99x"),
        ("export API_KEY=", token("", 24)),
        ("AWS_SECRET_ACCESS_KEY=", "wJalr/UtnFEMI/K7MDENG/bPxRfi" + "CYzA1b2C3d4E"),
        ("aws_secret_access_key = ", "wJalr/UtnFEMI/K7MDENG/bPxRfi" + "CYzA1b2C3d4E"),
        ("  password: ", "hunter2" + "x9Qz"),
        ("Server=db;Password=", "hunter2" + "x9Qz"),
        ("Authorization: Bearer ", token("", 40)),
    ],
)
def test_a_secret_without_quotation_marks_is_found(before: str, secret: str) -> None:
    assert masked(f"{before}{secret}\nAnd on.") == f"{before}{'•' * len(secret)}\nAnd on."


@pytest.mark.parametrize(
    ("shown", "hidden"),
    [
        ("Use ", token("ghp_", 9)),
        ("Use ", "AKIA" + "Q3Z7"),
        ("DB_PASSWORD=", "Sup"),
        ('password = "', "hun"),
        ("Bearer ", "a1B"),
        ("Use ", token("", 14)),
    ],
)
def test_half_a_secret_is_masked_where_the_text_was_cut(shown: str, hidden: str) -> None:
    assert masked(shown + hidden, is_cut=True) == shown + "•" * len(hidden)
    assert masked(shown + hidden) == shown + hidden
    assert masked(f"{shown}{hidden} and on", is_cut=True) == f"{shown}{hidden} and on"


def test_the_end_of_a_cut_text_is_shown() -> None:
    assert masked("In 2024 they went home", is_cut=True) == "In 2024 they went home"


@pytest.mark.parametrize(
    "text",
    ["a" * 2**20 + "@", "secret" * 2**17 + " = 'x1", "password=" * 2**17, "eyJ" * 2**18, "pass: " + "a1-" * 2**18],
    ids=["address", "word", "assignments", "web-token", "value"],
)
def test_long_runs_end(text: str) -> None:
    """They took hours, not seconds, when each place of a run was a beginning."""
    assert find_secrets(text) == []
    assert find_emails(text) == []
    assert find_emails(f"{'a' * 2**20} me@uni-x.de") == ["me@uni-x.de"]


def test_the_whole_of_a_private_key_is_masked() -> None:
    key = "-----BEGIN RSA PRIVATE" + " KEY-----\nMIIBOgIBAAJB\nAKj34GkxFhD9\n-----END RSA PRIVATE KEY-----"
    hidden = masked(f"Here:\n{key}\nDone.")
    assert "MIIB" not in hidden
    assert "AKj3" not in hidden
    assert hidden.endswith("Done.")


@pytest.mark.parametrize(
    "text",
    [
        "The secret: a good night's sleep. Her password was “open sesame”.",
        'password = "your_password1"',
        "password = os.environ['DB_PASSWORD_2']",
        'secret = "changeme123"',
        "password=request.form, token = None, secret_key=settings.SECRET_KEY_2",
        "password=form2.password1 and password = getpass1(2) and token=tokens1[3] and pwd=new_password1",
        "api_key: str2bytes; API_KEY=MY_KEY_12; DB_PASSWORD=$PASS1234; API_KEY=<your key 1>; PASSWORD=${DB_PASS_1}",
        "token: 0x1f3870be274f6c49b3e31a0c6728957f1f3870be",
        "The password: 8-12 characters. The bearer of internationalisation2024 said so.",
        "https://user:password1@host/",
        "sha256 1f3870be274f6c49b3e31a0c6728957f1f3870be274f6c49b3e31a0c6728957f",
        "AKIAIOSFODNN7" + "EXAMPLE",  # of AWS's documentation
        "Stay at home, he asked, and the laws of draws are -used.",
        "pneumonoultramicroscopicsilicovolcanoconiosis and Donaudampfschifffahrtsgesellschaft",
        "https://docs.python.org/3/library/re.html#re.ASCII-and-many-more-words-here",
        "550e8400-e29b-41d4-a716-446655440000",
    ],
)
def test_no_secret_is_seen_in_words_placeholders_and_hashes(text: str) -> None:
    assert find_secrets(text) == []
    assert masked(text) == text


def test_addresses_that_belong_to_somebody() -> None:
    text = "me@uni-x.de, A.B+c@mail.uni.edu; you@example.com icon@2x.png git@github.com:a/b @decorator a@b me@uni-x.de"
    assert find_emails(text) == ["me@uni-x.de", "A.B+c@mail.uni.edu"]
