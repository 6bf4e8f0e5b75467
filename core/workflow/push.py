"""A run's adapter, or the model it was merged into, to the Hugging Face Hub: shown in full, then uploaded as shown."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from core.adapter_files import CONFIG as ADAPTER_CONFIG
from core.adapter_files import MLX_WEIGHTS, PEFT_WEIGHTS, find_adapter
from core.architecture import read_architecture
from core.checkpoint import FOLDER as CHECKPOINTS
from core.checkpoint import TRAINER
from core.config import RunConfig
from core.errors import UserError
from core.evaluation.report import read_evaluation_of
from core.files import read_json, user_path
from core.folds import run_with_adapter
from core.merging.folder import REPORT as MERGE_REPORT
from core.models.hub import offline_requested
from core.publishing.base import PublishedBase, published_base
from core.publishing.card import Facts, doubts, model_card
from core.publishing.card_evaluation import read_evaluation
from core.publishing.card_snippets import Weights
from core.publishing.files import (
    CARD,
    UploadFile,
    adapter_files,
    merged_files,
    merged_weights,
    refuse_private,
    run_files,
)
from core.publishing.hub import (
    Hub,
    Remote,
    check_repo_name,
    find_token,
    refuse_mixture,
    refuse_other_visibility,
    repo_url,
)
from core.run import ADAPTERS, CONFIG, CURVES, EXPERTS_PLOT, SPLIT, SUMMARY, is_locked, read_state
from core.screen import logging_to, wrapped
from core.settings import load_config

_log = logging.getLogger("twinkeel")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


def push(
    folder: Path,
    *,
    repo: str,
    merged: str | None,
    private: bool,
    license_name: str | None,
    dry_run: bool,
    assume_yes: bool,
    console: Console,
    base_model: str | None = None,
) -> int:
    """Shows every file and, with `dry_run`, the card; else uploads them. Returns the exit code.

    Args:
        merged: folder of a merged model, which is uploaded in place of the adapter.
        license_name: of what is uploaded, by the hub's name of it; None: the base model's, where its files say one.
        base_model: hub id of the base model, for a run whose model is a folder.

    Raises:
        UserError: nothing to upload, something that must not leave this machine, or the hub said no.
    """
    check_repo_name(repo)
    if license_name is not None and not _LICENSE.fullmatch(license_name):
        raise UserError(f"--license {license_name}: not a licence's name on the hub", hint="such as apache-2.0 or mit")
    if not dry_run and offline_requested():
        raise UserError(
            "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set: nothing can be uploaded",
            hint="unset it, or look at what would be uploaded with --dry-run",
        )
    folder = run_with_adapter(folder)
    with logging_to(console):
        facts, files, left = _planned(
            folder, repo=repo, merged=merged, license_name=license_name, base_model=base_model
        )
    screen = _Screen(console)
    if dry_run:
        refuse_private(files, _private_words(folder, facts.config))
        screen.plan(facts, files, left, remote=None, private=private)
        screen.card(files[0])
        screen.say("", "dry run: nothing was uploaded")
        return 0
    return _uploaded(folder, facts, files, left, private=private, assume_yes=assume_yes, screen=screen)


def _uploaded(
    folder: Path,
    facts: Facts,
    files: Sequence[UploadFile],
    left: Sequence[str],
    *,
    private: bool,
    assume_yes: bool,
    screen: _Screen,
) -> int:
    token = find_token()
    refuse_private(files, [*_private_words(folder, facts.config), token.value])
    hub = Hub(token, facts.repo)
    account = hub.account()
    remote = hub.look()
    refuse_other_visibility(remote, private=private, repo=facts.repo)
    refuse_mixture(remote, files, facts.repo)
    screen.plan(facts, files, left, remote=remote, private=private or (remote.exists and remote.private))
    screen.say(f"  account   {account}, token from {token.source}", "")
    if remote.exists and all(remote.change(file) == "same" for file in files):
        screen.say("nothing to upload: every file is there already", f"  {repo_url(facts.repo)}")
        return 0
    if not assume_yes and not screen.is_confirmed():
        screen.say("nothing was uploaded")
        return 0
    screen.quieten()
    message = "Adapter of a Twinkeel run" if facts.weights == "adapter" else "Merged model of a Twinkeel run"
    hub.upload(files, remote=remote, private=private, message=message)
    screen.say(f"uploaded {len(files)} files to", f"  {repo_url(facts.repo)}")
    return 0


# --- the plan ---------------------------------------------------------------------------------------------------------


def _planned(
    folder: Path, *, repo: str, merged: str | None, license_name: str | None, base_model: str | None
) -> tuple[Facts, list[UploadFile], list[str]]:
    """The card's facts, the files (the card first), and what stays of a merged model's folder."""
    config, summary = load_config(folder / CONFIG), _summary(folder)
    base = published_base(
        config.model.path, revision=config.model.revision, named=base_model, fingerprint=_fingerprint(folder)
    )
    left: list[str] = []
    weights: Weights = "adapter"
    merge = None
    if merged is None:
        files = adapter_files(folder / ADAPTERS, base)
    else:
        files, left = merged_files(Path(merged), base)
        weights, merge = merged_weights(Path(merged)), _merge_report(Path(merged), folder)
    images = tuple(name for name in (CURVES, EXPERTS_PLOT) if (folder / name).is_file())
    data_name, data_id = _data(folder, config)
    facts = Facts(
        repo=repo,
        weights=weights,
        folder=folder,
        config=config,
        summary=summary,
        base=base,
        data_name=data_name,
        data_id=data_id,
        evaluation=read_evaluation(
            _evaluation(folder), data_name=data_name, data_path=config.data.path, data_id=data_id
        ),
        merge=merge,
        license={"license": license_name} if license_name else base.license(),
        images=images,
        has_gguf=any(file.name.endswith(".gguf") for file in files),
    )
    card = UploadFile(CARD, model_card(facts).encode())
    return facts, [card, *files, *run_files(folder, summary, model=base.name, images=images)], left


def _summary(folder: Path) -> Mapping[str, Any]:
    """Raises: UserError: the run is still going on, or has no verdict or no adapter."""
    if is_locked(folder):
        raise UserError(f"{folder}: still training", hint=f"watch it with: python cli.py monitor {folder}")
    go_on = f"go on with it: python cli.py train --resume {folder}"
    summary = read_json(folder / SUMMARY)
    if not isinstance(summary, dict):
        raise UserError(f"{folder}: no verdict yet (no {SUMMARY})", hint=go_on)
    names = (ADAPTER_CONFIG, PEFT_WEIGHTS, MLX_WEIGHTS)
    is_whole = all((folder / ADAPTERS / name).is_file() for name in names)
    if not is_whole or (not summary.get("best_step") and not summary.get("not_judged")):
        raise UserError(f"{folder}: no adapter yet", hint=go_on)
    return summary


def _fingerprint(folder: Path) -> str | None:
    """That of the model folder which the run trained on, from its checkpoints."""
    for path in sorted((folder / CHECKPOINTS).glob(f"*/{TRAINER}")):
        trainer = read_json(path)
        found = (trainer.get("identity") or {}).get("model") if isinstance(trainer, dict) else None
        if isinstance(found, str):
            return found
    return None


def _data(folder: Path, config: RunConfig) -> tuple[str, str | None]:
    """The data's name without its path, and its hub id if it is on the hub.

    Rows of a file come from a name with an ending (`train.jsonl:1`), those of the hub from a split's (`train:1`).
    """
    name = str(read_state(folder).get("data") or Path(config.data.path).name)
    try:
        lines = (folder / SPLIT).read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    origin = lines[1].split(",", 2)[-1] if len(lines) > 1 else "."
    is_hub = name == config.data.path and "." not in origin.rpartition(":")[0]
    return name, name if is_hub else None


def _evaluation(folder: Path) -> object:
    """The report; None where there is none of this adapter."""
    found = read_evaluation_of(folder)
    if found.note is not None:
        _log.warning(found.note)
    return found.report


def _merge_report(merged: Path, folder: Path) -> Mapping[str, Any] | None:
    """What the merge wrote down.

    Raises:
        UserError: another adapter was merged.
    """
    report = read_json(merged / MERGE_REPORT)
    again = f"merge it again: python cli.py merge {folder}"
    if not isinstance(report, dict):
        _log.warning("%s has no %s: whether it is this run's can't be told", merged, MERGE_REPORT)
        return None
    adapter = find_adapter(folder / ADAPTERS).read(read_architecture(merged))
    if report.get("adapter") not in (None, adapter.fingerprint):
        raise UserError(f"{merged}: merged from another adapter than {folder / ADAPTERS} is now", hint=again)
    return report


def _private_words(folder: Path, config: RunConfig) -> list[str]:
    """Texts that must be in no file: folders of this machine."""
    paths = [folder.resolve(), Path.home(), user_path(config.model.path), user_path(config.data.path)]
    # a container's home may be the root, which is in every URL
    named = [path for path in paths if path.is_absolute() and path != Path(path.anchor)]
    return [f"{path}/" if path == Path.home() else str(path) for path in named]


# --- the screen -------------------------------------------------------------------------------------------------------


class _Screen:
    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, *lines: str) -> None:
        for line in lines:
            text = wrapped(line, self._console.width) if self._console.is_terminal else line
            self._console.print(Text(text), soft_wrap=True)

    def warn(self, line: str) -> None:
        text = f"warning: {line}"
        text = wrapped(text, self._console.width) if self._console.is_terminal else text
        shown = Text(text)
        shown.stylize("yellow", 0, len("warning:"))
        self._console.print(shown, soft_wrap=True)

    def plan(
        self,
        facts: Facts,
        files: Sequence[UploadFile],
        left: Sequence[str],
        *,
        remote: Remote | None,
        private: bool,
    ) -> None:
        """Everything that is uploaded, and what speaks against it."""
        known = remote is not None and remote.exists
        where = "" if remote is None else "  new" if not known else "  exists"
        self.say(
            f"push · {repo_url(facts.repo)} · {'private' if private else 'public'}{where and ' ·'}{where[1:]}",
            f"  base      {_base_words(facts.base)}",
            f"  license   {facts.license.get('license', 'none: say one with --license, such as --license apache-2.0')}",
            "",
        )
        width = max(len(file.name) for file in files)
        for file in files:
            change = remote.change(file) if remote is not None and remote.exists else ""
            self.say(f"  {file.name:<{width}}  {size(file.num_bytes):>9}  sha256 {file.sha256[:16]}  {change}".rstrip())
        self.say(f"  {len(files)} files, {size(sum(file.num_bytes for file in files))}", "")
        if left:
            self.say(f"  left out  {', '.join(left)}")
        if remote is not None and (others := remote.others(files)):
            self.say(f"  stays     {', '.join(others)}")
        for line in [*doubts(facts), *_base_notes(facts)]:
            self.warn(line)

    def card(self, card: UploadFile) -> None:
        assert isinstance(card.source, bytes)
        self.say(f"--- {CARD} ---")
        self._console.print(Text(card.source.decode()), soft_wrap=True)
        self.say("---")

    def is_confirmed(self) -> bool:
        """Raises: UserError: there is nobody to ask."""
        if not (self._console.is_terminal and sys.stdin.isatty()):
            raise UserError(
                "nobody to ask, because this is no terminal: nothing was uploaded",
                hint="upload what is shown with --yes, or only look with --dry-run",
            )
        try:
            return self._console.input("upload? [y/N] ", markup=False).strip().lower() in ("y", "yes")
        except EOFError:
            return False

    def quieten(self) -> None:
        """No progress bars in a file or a pipe."""
        if not self._console.is_terminal:
            from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

            disable_progress_bars()


def _base_words(base: PublishedBase) -> str:
    if base.hub_id is None:
        return f"{base.name}, on no hub"
    return base.hub_id if base.trained_on is None else f"{base.hub_id} (trained on {base.trained_on})"


def _base_notes(facts: Facts) -> Iterator[str]:
    base = facts.base
    if base.note is not None:
        yield base.note
    if base.hub_id is None:
        what = "an adapter is of no use without it" if facts.weights == "adapter" else "the card can't link to it"
        yield (
            f"the base model is a folder here ({base.name}), and {what}; if it is on the hub, name it with "
            "--base-model OWNER/NAME"
        )


def size(num_bytes: int) -> str:
    """`980 B`, `148.5 kB`, `270.1 MB`, `14.5 GB`; of 1000."""
    for bound, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= bound:
            return f"{num_bytes / bound:.1f} {unit}"
    return f"{num_bytes} B"
