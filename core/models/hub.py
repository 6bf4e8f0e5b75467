"""The Hugging Face Hub: whether it answers, what is cached, and its errors in one line each."""

from __future__ import annotations

import errno
import functools
import logging
import os
import re
import threading
from pathlib import Path

from core.errors import UserError
from core.models.folder import check_model_folder

logger = logging.getLogger("twinkeel")

# Only what is read later. No pickles, no code, and only the top level: subfolders hold other
# formats (ONNX, Core ML), Mistral's consolidated files the same weights a second time.
ALLOWED = ["*.safetensors", "*.json", "*.jinja", "tokenizer*"]
IGNORED = ["*/*", "*.bin", "*.pt", "*.pth", "*.py", "consolidated*"]

_TRUE = {"1", "on", "yes", "true"}
_PROBE_SECONDS = 3.0


class HubUnavailableError(UserError):
    """The hub doesn't answer and the cache can't help; another source may."""


def hub_reachable(timeout: float = _PROBE_SECONDS) -> bool:
    """Whether the hub (or HF_ENDPOINT) answers within `timeout` seconds; asked once per process."""
    return not offline_requested() and _probe(timeout)


def offline_requested() -> bool:
    """HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set, now or when huggingface_hub was imported."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    if any(os.environ.get(name, "").lower() in _TRUE for name in names):
        return True
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def fetch_snapshot(hub_id: str, *, revision: str | None, offline: bool) -> Path:
    """Downloads what is missing of a model and returns its folder in the hub's cache.

    Raises HubUnavailableError if it is neither cached nor reachable, UserError for everything else
    that a user can mend. No message quotes a URL: a signed one would be a key.
    """
    cached = cached_snapshot(hub_id, revision=revision)
    if offline or not hub_reachable():
        if cached is None:
            raise _unavailable(hub_id, offline=offline)
        return cached
    if cached is None:
        logger.info("downloading %s from the hub", hub_id)
    try:
        path = _snapshot(hub_id, revision, cached_only=False)
    except Exception as error:
        translated = _translate(error, hub_id, revision)
        if translated is None:
            raise
        raise translated from error
    check_model_folder(path, name=hub_id)
    return path


def cached_snapshot(hub_id: str, *, revision: str | None) -> Path | None:
    """The model's folder in the hub's cache if it is there and whole. Never asks the network.

    Raises UserError for a text that can't be a hub id.
    """
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        path = _snapshot(hub_id, revision, cached_only=True)
        # A tokenizer fetched alone leaves a snapshot without weights.
        check_model_folder(path, name=hub_id)
    except HFValidationError as error:
        raise UserError(
            f"{hub_id!r} is neither a model folder nor a hub id", hint="write a path, or org/name"
        ) from error
    except (LocalEntryNotFoundError, UserError):
        return None
    return path


def access_problem(hub_id: str, *, timeout: float = _PROBE_SECONDS) -> str | None:
    """Why this user can't download `hub_id`, in a few words; None if nothing stands in the way.

    Asks for the headers of config.json: `model_info` answers for a gated model too.
    """
    import huggingface_hub

    try:
        url = huggingface_hub.hf_hub_url(hub_id, "config.json")
        huggingface_hub.get_hf_file_metadata(url, timeout=timeout)
    except Exception as error:
        translated = _translate(error, hub_id, None)
        if translated is None:
            raise
        return translated.what.removeprefix(f"{hub_id} ")
    return None


def commit_of(snapshot: Path) -> str | None:
    """The commit that a folder of the hub's cache holds; its name is the commit's hash."""
    return snapshot.name if re.fullmatch(r"[0-9a-f]{40}", snapshot.name) else None


def _snapshot(hub_id: str, revision: str | None, *, cached_only: bool) -> Path:
    import huggingface_hub

    path = huggingface_hub.snapshot_download(
        hub_id,
        revision=revision,
        allow_patterns=ALLOWED,
        ignore_patterns=IGNORED,
        local_files_only=cached_only,
    )
    return Path(path)


@functools.cache
def _probe(timeout: float) -> bool:
    answers: list[bool] = []

    # In a thread of its own: the client's timeout doesn't cover a name lookup that hangs.
    def ask() -> None:
        answers.append(_ask_endpoint(timeout))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return bool(answers and answers[0])


def _ask_endpoint(timeout: float) -> bool:
    from huggingface_hub import constants, get_session

    no_answer: tuple[type[Exception], ...] = (OSError, *_transport_errors())
    try:
        status = get_session().head(constants.ENDPOINT, timeout=timeout).status_code
    except no_answer:
        return False
    # 403 and 407 come from a proxy that doesn't let anything through.
    return status < 500 and status not in (403, 407)


def _transport_errors() -> tuple[type[Exception], ...]:
    """The base of the HTTP client's errors; huggingface_hub changes clients between versions."""
    from huggingface_hub.errors import HfHubHTTPError

    return tuple(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception) and base is not OSError)


def _translate(error: Exception, hub_id: str, revision: str | None) -> UserError | None:
    """What a user is told; None for an error that is not theirs. Subclasses come first."""
    from huggingface_hub import errors

    cause = error.__cause__
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(cause, Exception):
        error = cause  # a failed look-up where the cache couldn't help either; the cause says more
    if isinstance(error, errors.GatedRepoError):
        return UserError(
            f"{hub_id} is gated and this account has no access",
            hint="accept the licence on the model's page and set HF_TOKEN",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(f"{hub_id} has no revision {revision or 'main'}", hint="check model.revision")
    if isinstance(error, errors.RepositoryNotFoundError):
        return UserError(
            f"{hub_id} is not on the hub, or is private",
            hint="check the spelling; a private model needs HF_TOKEN, a folder its path",
        )
    if isinstance(error, errors.HfHubHTTPError):
        return _http_error(hub_id, error.response.status_code)
    if _is_disk_full(error):
        return UserError(
            f"the disk is full: {hub_id} does not fit",
            hint="free some space, or set HF_HOME to a larger disk",
        )
    xet_error = getattr(errors, "XetDownloadError", ConnectionError)  # not in older versions
    lost = (*_transport_errors(), ConnectionError, errors.LocalEntryNotFoundError, xet_error)
    if isinstance(error, lost):
        return _unavailable(hub_id)
    return None


def _http_error(hub_id: str, status: int) -> UserError:
    if status == 401:
        return UserError(f"{hub_id} needs a valid token", hint="set HF_TOKEN, or log in again")
    if status == 403:
        return UserError(f"{hub_id} may not be downloaded with this token", hint="check the token's permissions")
    return HubUnavailableError(
        f"{hub_id} cannot be downloaded now (the hub answered {status})",
        hint="try again later: what has arrived is kept",
    )


def _unavailable(hub_id: str, *, offline: bool = False) -> UserError:
    if offline or offline_requested():
        return HubUnavailableError(
            f"{hub_id} is not in the cache, and this run is offline",
            hint="download it once with the network on, or give a local folder",
        )
    return HubUnavailableError(
        f"{hub_id} is not in the cache, and the hub is unreachable",
        hint="check the connection (HF_ENDPOINT, proxy), or give a local folder",
    )


def _is_disk_full(error: Exception) -> bool:
    # The Rust downloader (xet) reports a full disk as a plain RuntimeError.
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return isinstance(error, RuntimeError) and "No space left" in str(error)
