"""Files to a model repository of the Hugging Face Hub, in one commit: all of them arrive, or none.

Every error becomes one line. No message holds a URL or a token: a signed URL is a key.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from core.errors import UserError
from core.publishing.base import is_hub_id
from core.publishing.files import UploadFile

TOKEN = "HF_TOKEN"
ENV_FILE = ".env"
_LOADED_TOGETHER = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json", "config.json", "*.bin")
"""What libraries pick up from a repository beside the files that are meant."""
_NO_TOKEN = f"set {TOKEN}, put it into {ENV_FILE}, or log in with: hf auth login"

Change = Literal["new", "changed", "same"]


@dataclass(frozen=True, slots=True)
class Token:
    """A token and where it was found; its value is not in its text."""

    value: str
    source: str

    def __repr__(self) -> str:
        return f"Token(from {self.source})"


def find_token() -> Token:
    """The hub's token: from the environment, `.env` in this folder, or the stored login.

    Raises:
        UserError: there is none.
    """
    if value := os.environ.get(TOKEN, "").strip():
        return Token(value, TOKEN)
    if Path(ENV_FILE).is_file():
        from dotenv import dotenv_values

        if value := (dotenv_values(ENV_FILE, interpolate=False).get(TOKEN) or "").strip():
            return Token(value, ENV_FILE)
    from huggingface_hub import get_token

    if stored := get_token():
        return Token(stored, "the stored login")
    raise UserError("no token for the hub", hint=_NO_TOKEN)


def check_repo_name(repo: str) -> None:
    """Raises: UserError: not `owner/name`, or letters that the hub does not take."""
    if repo.count("/") != 1:
        raise UserError(f"--repo {repo}: not a repository's name", hint="write OWNER/NAME, such as alice/my-adapter")
    if not is_hub_id(repo):
        raise UserError(
            f"--repo {repo}: not a name that the hub takes",
            hint="letters, digits, '-', '_' and '.', at most 96; neither '--' nor '..', no '-' or '.' at the ends",
        )


def repo_url(repo: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo}"


@dataclass(frozen=True, slots=True)
class Remote:
    """A repository as it is now."""

    exists: bool
    private: bool = True
    commit: str | None = None
    hashes: Mapping[str, str] | None = None
    """Name of a file -> SHA-256 where it is in large-file storage, else git's SHA-1 of it."""

    def change(self, file: UploadFile) -> Change:
        known = (self.hashes or {}).get(file.name)
        if known is None:
            return "new"
        return "same" if known == (file.sha256 if len(known) == 64 else file.git_hash) else "changed"

    def others(self, files: Sequence[UploadFile]) -> list[str]:
        """Files there that the push leaves as they are."""
        return sorted((self.hashes or {}).keys() - {file.name for file in files} - {".gitattributes"})


class Hub:
    """One account's way to a repository."""

    def __init__(self, token: Token, repo: str) -> None:
        from huggingface_hub import HfApi

        self._api = HfApi(token=token.value, library_name="twinkeel")
        self._token = token
        self.repo = repo

    def account(self) -> str:
        """Whose token it is.

        Raises:
            UserError: the token is not valid, or may not write.
        """
        with self._errors("asking who you are"):
            answer = self._api.whoami()
        role = ((answer.get("auth") or {}).get("accessToken") or {}).get("role")
        if role == "read":
            raise UserError(
                f"the token (from {self._token.source}) may only read",
                hint="make one that may write, in the account's settings on the hub",
            )
        return str(answer.get("name"))

    def look(self) -> Remote:
        """The repository as it is; asks, changes nothing."""
        from huggingface_hub import RepoFile
        from huggingface_hub.errors import RepositoryNotFoundError

        with self._errors("looking at the repository"):
            try:
                info = self._api.model_info(self.repo)
            except RepositoryNotFoundError as error:
                if error.response.status_code == 404:
                    return Remote(exists=False)
                raise
            entries = self._api.list_repo_tree(self.repo, recursive=True, revision=info.sha)
            hashes = {
                entry.path: entry.lfs.sha256 if entry.lfs else entry.blob_id
                for entry in entries
                if isinstance(entry, RepoFile)
            }
        return Remote(True, bool(info.private), info.sha, hashes)

    def upload(self, files: Sequence[UploadFile], *, remote: Remote, private: bool, message: str) -> str:
        """Makes the repository if need be, uploads in one commit and checks what arrived. Returns the commit's URL.

        A commit whose answer was lost is looked for: it may have been made all the same.

        Raises:
            UserError: with what is there now, as far as it is known.
        """
        if not remote.exists:
            with self._errors("making the repository"):
                self._api.create_repo(self.repo, private=private)
        was_made = "" if remote.exists else f"; {self.repo} was made and is empty"
        with self._errors("uploading", after=was_made):
            try:
                commit = self._commit(files, parent=remote.commit, message=message)
            except Exception as error:
                if not _may_be_committed(error):
                    raise
                return self._found_again(files, error)
        with self._errors("checking what arrived", done=True):
            self._check(files, commit.oid)
        return str(commit.commit_url)

    def _commit(self, files: Sequence[UploadFile], *, parent: str | None, message: str) -> Any:
        from huggingface_hub import CommitOperationAdd

        operations = [
            CommitOperationAdd(
                path_in_repo=file.name,
                path_or_fileobj=file.source if isinstance(file.source, bytes) else str(file.source),
            )
            for file in files
        ]
        # the parent: a commit of somebody else's since the table was shown is not built upon
        return self._api.create_commit(self.repo, operations, commit_message=message, parent_commit=parent)

    def _found_again(self, files: Sequence[UploadFile], error: Exception) -> str:
        """The URL of a commit whose answer was lost, if every file is there.

        Raises:
            UserError: they are not, or not yet, or nobody answers.
        """
        with suppress(UserError):
            remote = self.look()
            if all(remote.change(file) == "same" for file in files):
                return f"{repo_url(self.repo)}/commit/{remote.commit}"
        what, _ = self._explained(error)
        raise UserError(
            f"{what} while uploading: whether the files arrived is not known",
            hint="push again: it shows what is there, and sends nothing twice",
        ) from error

    def _check(self, files: Sequence[UploadFile], commit: str) -> None:
        """Raises: UserError: a file is not there, or is another one than was shown."""
        from huggingface_hub import RepoFile

        found = {
            entry.path: entry.lfs.sha256 if entry.lfs else entry.blob_id
            for entry in self._api.list_repo_tree(self.repo, recursive=True, revision=commit)
            if isinstance(entry, RepoFile)
        }
        arrived = Remote(True, hashes=found)
        wrong = [file.name for file in files if arrived.change(file) != "same"]
        if wrong:
            raise UserError(
                f"{self.repo}: {', '.join(wrong)} did not arrive as shown",
                hint="a file that changed meanwhile, or a .gitignore there; look at the repository, then push again",
            )

    @contextmanager
    def _errors(self, doing: str, *, after: str = "", done: bool = False) -> Iterator[None]:
        """Turns the library's errors into one line.

        Args:
            after: what else is true now, for the line.
            done: the upload is complete, and only the check of it failed.
        """
        lost: tuple[type[Exception], ...] = (OSError, RuntimeError, ValueError, KeyError, *_transport_errors())
        try:
            yield
        except UserError:
            raise
        except lost as error:
            nothing = "the commit was made" if done else f"nothing was uploaded{after}"
            what, hint = self._explained(error)
            raise UserError(f"{what} while {doing}: {nothing}", hint=hint) from error

    def _explained(self, error: Exception) -> tuple[str, str]:
        """What is wrong and what to do, for an error of the library."""
        if isinstance(error, ValueError) and "Invalid metadata" in str(error):
            complaint = " ".join(str(error).split()).removeprefix("Invalid metadata in README.md. - ")
            return f"the hub does not take the card's metadata ({complaint[:200]})", "check --license"
        if (status := _status(error)) is not None:
            return self._answered(status, error)
        if isinstance(error, FileNotFoundError | PermissionError) and error.filename is not None:
            return f"cannot read {Path(str(error.filename)).name} ({error.strerror})", "push again"
        if isinstance(error, PermissionError):  # hf_xet's
            return self._answered(403, error)
        if _is_transport(error):
            return "the hub can't be reached", "check the connection (HF_ENDPOINT, proxy), then push again"
        return f"the hub's answer makes no sense ({type(error).__name__})", "check HF_ENDPOINT"

    def _answered(self, status: int, error: Exception) -> tuple[str, str]:
        """What is wrong and what to do, for an HTTP status."""
        known = {
            401: (f"the hub does not take the token (from {self._token.source})", _NO_TOKEN),
            402: ("the account's storage is full", "free some, or push to another account"),
            403: (f"this token may not write to {self.repo}", "check the name's owner, and the token's permissions"),
            404: (f"{self.repo} is not on the hub", "check the name's owner, and the token's permissions"),
            409: (f"{self.repo} is in the way: made or changed by somebody else just now", "push again"),
            412: (f"{self.repo} was changed by somebody else just now", "push again to see what it holds now"),
            413: ("a file is too large for the hub", "merge again with a smaller --max-shard-gb"),
            429: ("the hub asks for fewer requests", "wait a few minutes, then push again"),
        }
        if status in known:
            return known[status]
        if status >= 500:
            return f"the hub failed (it answered {status})", "push again later: what has arrived is not sent twice"
        said = getattr(error, "server_message", None)
        words = f": {' '.join(str(said).split())[:160]}" if said and "://" not in str(said) else ""
        return f"the hub refused (it answered {status}{words})", "check the name and the token's permissions"


def refuse_mixture(remote: Remote, files: Sequence[UploadFile], repo: str) -> None:
    """Raises: UserError: files there would be loaded together with those of the push."""
    for name in remote.others(files):
        if "/" not in name and any(fnmatchcase(name, pattern) for pattern in _LOADED_TOGETHER):
            raise UserError(
                f"{repo} holds {name}, which would be loaded together with what you push",
                hint="delete it there, or choose another --repo",
            )


def refuse_other_visibility(remote: Remote, *, private: bool, repo: str) -> None:
    """Raises: UserError: what was to be private would be public."""
    if remote.exists and private and not remote.private:
        raise UserError(f"{repo} is public, and this push is private", hint="say --public, or choose another --repo")


def _status(error: BaseException | None) -> int | None:
    """Of the HTTP answer behind an error; the library wraps some in a RuntimeError."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        error = error.__cause__
    return None


def _may_be_committed(error: Exception) -> bool:
    """Whether the hub may have made the commit, for an error of making it: the answer did not come, or makes no sense.

    What comes before the commit itself, the large files above all, fails with the request of another address, or,
    from hf_xet, with a plain RuntimeError.
    """
    status, address = _status(error), _address(error)
    if address is not None:
        return "/commit/" in address and (status is None or status >= 500)
    return isinstance(error, KeyError | json.JSONDecodeError | ConnectionError | TimeoutError | _transport_errors())


def _address(error: BaseException | None) -> str | None:
    """Of the request behind an error."""
    while error is not None:
        with suppress(AttributeError, RuntimeError):  # httpx raises the latter where none is known
            return str(error.request.url)  # type: ignore[attr-defined]
        error = error.__cause__
    return None


def _is_transport(error: BaseException | None) -> bool:
    kinds: tuple[type[Exception], ...] = (ConnectionError, TimeoutError, *_transport_errors())
    while error is not None:
        # hf_xet, in Rust, raises plain errors with these words
        if isinstance(error, kinds) or "onnect" in str(error):
            return True
        error = error.__cause__
    return False


def _transport_errors() -> tuple[type[Exception], ...]:
    """The base of the HTTP client's errors; huggingface_hub changes clients between versions."""
    from huggingface_hub.errors import HfHubHTTPError

    return tuple(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception) and base is not OSError)
