"""`push`: what is shown is what arrives, nothing else does, and every mistake is one line.

The hub is a stand-in (`tests/hub_server.py`) that speaks the hub's HTTP interface to the real huggingface_hub.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import load_file

import cli
from core.adapter_files import find_adapter
from core.architecture import read_architecture
from core.evaluation.report import adapter_sha256
from core.folds import FINAL
from core.run import RunLock
from tests.cli.conftest import COLOURS, Result, write_rows
from tests.cli.pushing import BASE, NAME, assert_peft_snippet_works, go_online, is_one_mistake, shown, typed
from tests.hub_server import TOKEN, Failure, HubServer, Stored, hub_server
from tests.tiny import make_model

ROOT = Path(__file__).parents[2]
SECRET = "carol-quarterly-figures"
"""Stands in every path of the run."""
ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "adapters.safetensors"}
WHOLE = {*ADAPTER, "README.md", "training_summary.json", "training_curves.png"}
EVALUATION = {
    "data": "colours.jsonl",
    "split": "test",
    "losses": {"base": {"loss": 5.0}, "adapter": {"loss": 4.0}, "gain": 1.0, "gain_low": 0.5, "gain_high": 1.5},
    "rows": {"worst": [{"origin": "colours.jsonl:3", "text": "Say white 3."}]},
}


@dataclass(frozen=True)
class Trained:
    """A run of a user whose name and folders must not leave the machine."""

    home: Path
    run: Path
    model: Path


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    home = tmp_path_factory.mktemp(SECRET)
    model, rows = make_model(home / "model"), write_rows(home / "colours.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        done = cli.main(
            [
                *("train", "--backend", "cuda", "--device", "cpu", "--model", str(model), "--data", str(rows)),
                *("--bits", "16", "--output", "run", "--batch-size", "2", "--accumulation", "2", "--max-steps", "4"),
                *("--eval-every", "2", "--max-tokens", "96", "--lr", "5e-3", "--set", "data.test=0.1"),
            ]
        )
    assert done == 0
    report = home / "run" / "evaluation" / "evaluation_report.json"
    report.parent.mkdir()
    made = {"run": str(home / "run"), "model": str(model), "adapter_sha256": adapter_sha256(home / "run")}
    report.write_text(json.dumps(EVALUATION | made))
    return Trained(home, home / "run", model)


@pytest.fixture
def trained(trained_once: Trained, tmp_path: Path) -> Trained:
    """A copy of the run that a test may change."""
    run = shutil.copytree(trained_once.run, tmp_path / SECRET / "run")
    return Trained(tmp_path / SECRET, run, trained_once.model)


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with hub_server() as server:
        yield server


Push = Callable[..., Result]


@pytest.fixture
def push(run_cli: Callable[..., Result], trained: Trained, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> Push:
    """`push` of the run to the stand-in, with a token in the environment."""
    go_online(monkeypatch, hub.url)
    monkeypatch.setenv("HOME", str(trained.home))
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    def run(*arguments: object, repo: str = NAME) -> Result:
        return run_cli("push", trained.run, "--repo", repo, "--base-model", BASE, *arguments)

    return run


# --- the whole way ----------------------------------------------------------------------------------------------------


def test_an_upload_is_what_was_shown_and_loads_again(trained: Trained, hub: HubServer, tmp_path: Path) -> None:
    """In a process of its own, as a person types it; then back through huggingface_hub, and into PEFT."""
    command = (sys.executable, ROOT / "cli.py", "push", trained.run, "--repo", NAME, "--yes")
    done = typed(*command, "--base-model", BASE, "--license", "mit", hub=hub, home=trained.home, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == f"  {hub.url}/{NAME}"
    repo = hub.repos[NAME]
    assert repo.private
    assert len(repo.commits) == 2, "one commit, after that which makes a repository"
    stored = {name: file for name, file in repo.files.items() if name != ".gitattributes"}
    assert shown(done.stdout) == {name: file.sha256[:16] for name, file in stored.items()}
    assert stored.keys() == WHOLE
    for name in ("adapter_model.safetensors", "adapters.safetensors"):
        assert stored[name].is_lfs
        assert stored[name].content == (trained.run / "adapters" / name).read_bytes()

    download = f"import huggingface_hub; print(huggingface_hub.snapshot_download({NAME!r}))"
    done = typed(sys.executable, "-c", download, hub=hub, home=trained.home, cwd=tmp_path)
    folder = Path(done.stdout.strip())
    architecture = read_architecture(trained.model)
    found = find_adapter(folder)
    assert found.base_model == BASE
    kept = find_adapter(trained.run)
    assert found.read(architecture).fingerprint == kept.read(architecture).fingerprint
    assert found.config == dict(kept.config) | {"base_model_name_or_path": BASE}
    assert_peft_snippet_works(folder, trained.model)


def test_nothing_of_this_machine_leaves_it(push: Push, trained: Trained, hub: HubServer) -> None:
    assert push("--yes").code == 0
    sent = b"\n".join([*hub.bodies, *(file.content for file in hub.repos[NAME].files.values())])
    assert b"validation loss, base model" in sent
    private = [SECRET, str(trained.home), str(trained.model), TOKEN, str(ROOT), f"{tempfile.gettempdir()}/"]
    for text in private:
        assert text.encode() not in sent
    # nor is any row, of the data or of the evaluation
    assert not re.search(rf"Say ({'|'.join(COLOURS)}) \d".encode(), sent)
    card = hub.repos[NAME].files["README.md"].content.decode()
    assert "colours.jsonl" in card and "| loss (nats per target token) | 5.000 | 4.000 |" in card
    summary = json.loads(hub.repos[NAME].files["training_summary.json"].content)
    assert (summary["model"], summary["steps"], "error" in summary) == (BASE, 4, False)


def test_a_dry_run_shows_all_and_asks_nobody(push: Push, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = push("--dry-run", "--public")
    assert result.code == 0
    assert hub.requests == []
    assert shown(result.out).keys() == WHOLE
    assert f"{hub.url}/{NAME} · public" in result.out
    assert "dry run: nothing was uploaded" in result.out
    # the card as it would be, word for word
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert push("--yes").code == 0
    assert hub.repos[NAME].files["README.md"].content.decode() in result.out


def test_pushing_again_sends_nothing_and_a_change_is_shown(push: Push, trained: Trained, hub: HubServer) -> None:
    assert push("--yes").code == 0
    before = len(hub.uploads)
    again = push("--yes")
    assert again.code == 0 and "nothing to upload: every file is there already" in again.out
    assert len(hub.uploads) == before
    changed = push("--yes", "--license", "mit")
    assert [line.split()[0] for line in changed.out.splitlines() if line.endswith("  changed")] == ["README.md"]
    assert len(hub.repos[NAME].commits) == 3
    assert b"license: mit" in hub.repos[NAME].files["README.md"].content
    assert len(hub.asked("^PUT")) == 2, "weights that are there are not sent again"


# --- who may, and who is asked ----------------------------------------------------------------------------------------


def test_without_a_terminal_nothing_goes_without_yes(push: Push, hub: HubServer) -> None:
    assert is_one_mistake(push(), "nobody to ask")
    assert hub.uploads == []


@pytest.mark.parametrize(("answer", "uploads"), [("y", True), ("", False), ("no", False)])
def test_on_a_terminal_it_asks(
    answer: str, uploads: bool, push: Push, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    console = Console(force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr("builtins.input", lambda: answer)
    monkeypatch.setattr("core.screen.make_console", lambda: console)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    result = push()
    assert result.code == 0 and "upload? [y/N] " in result.out
    assert (NAME in hub.repos) == uploads == (hub.uploads != [])
    assert uploads or "nothing was uploaded" in result.out
    assert max(map(len, result.out.splitlines())) <= 80


def test_the_token_may_stand_in_an_env_file(
    push: Push, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert is_one_mistake(push("--yes"), "no token for the hub")
    assert hub.requests == []
    (tmp_path / ".env").write_text(f"OTHER=${{HOME}}\nexport HF_TOKEN='{TOKEN}'\n")
    result = push("--yes")
    assert result.code == 0 and "account   alice, token from .env" in result.out
    assert TOKEN not in result.out and "OTHER" not in os.environ and "HF_TOKEN" not in os.environ


def test_a_token_that_may_only_read(push: Push, hub: HubServer) -> None:
    hub.role = "read"
    assert is_one_mistake(push("--yes"), "may only read")
    assert hub.uploads == []


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "status", "what"),
    [
        ("whoami", 401, "the hub does not take the token (from HF_TOKEN)"),
        ("GET /api/models", 503, "the hub failed (it answered 503) while looking at the repository"),
        ("repos/create", 403, "may not write to alice/colours while making the repository: nothing was uploaded"),
        ("repos/create", 409, "alice/colours is in the way"),
        ("preupload", 404, "alice/colours is not on the hub while uploading"),
        ("objects/batch", 403, "may not write"),
        ("^PUT", 403, "may not write"),
        ("/commit/", 500, "the hub failed (it answered 500) while uploading: whether the files arrived is not known"),
        ("preupload", 503, "while uploading: nothing was uploaded; alice/colours was made and is empty"),
        ("/commit/", 413, "too large"),
        ("/commit/", 412, "changed by somebody else"),
        ("/commit/", 400, "the hub refused (it answered 400: made up by the test)"),
        ("/tree/", 404, "while checking what arrived: the commit was made"),
    ],
)
def test_an_answer_that_says_no_is_one_line(request_: str, status: int, what: str, push: Push, hub: HubServer) -> None:
    hub.failures.append(Failure(request_, status))
    assert is_one_mistake(push("--yes"), what)
    assert all(set(repo.files) == {".gitattributes"} for repo in hub.repos.values()) or "/tree/" in request_
    hub.failures.clear()
    result = push("--yes")
    assert result.code == 0
    assert set(hub.repos[NAME].files) > WHOLE
    assert len(hub.asked("^PUT")) == 2 + 2 * (request_ == "^PUT"), "what has arrived is not sent twice"


def test_a_commit_whose_answer_is_lost(push: Push, hub: HubServer) -> None:
    """It was made: that is seen by looking, and not taken for nothing."""
    hub.lost = "/commit/"
    result = push("--yes")
    assert result.code == 0 and "uploaded 6 files" in result.out, result.err
    assert len(hub.repos[NAME].commits) == 2 and set(hub.repos[NAME].files) > WHOLE
    # and where nobody answers any more, nothing is claimed
    hub.before["/commit/"] = lambda: hub.failures.append(Failure("GET /api/models", 503))
    what = "the hub can't be reached while uploading: whether the files arrived is not known"
    assert is_one_mistake(push("--yes", "--license", "mit"), what)
    assert b"license: mit" in hub.repos[NAME].files["README.md"].content


def test_nobody_answers(push: Push, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert is_one_mistake(push("--yes"), "the hub can't be reached while asking who you are: nothing was uploaded")


def test_another_server_answers(push: Push, hub: HubServer) -> None:
    hub.failures.append(Failure("whoami", 200, {"hello": "world"}))
    hub.failures.append(Failure("GET /api/models", 200, {"hello": "world"}))
    assert is_one_mistake(push("--yes"), "the hub's answer makes no sense")


def test_offline(push: Push, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert is_one_mistake(push("--yes"), "HF_HUB_OFFLINE")
    assert hub.requests == []


def test_a_licence_that_the_hub_does_not_know(push: Push, hub: HubServer) -> None:
    assert is_one_mistake(push("--yes", "--license", "my-own"), '"license" must be one of')
    assert is_one_mistake(push("--yes", "--license", "My Licence"), "--license My Licence")
    assert set(hub.repos[NAME].files) == {".gitattributes"}


@pytest.mark.parametrize(
    "name", ["colours", "alice/", "a/b/c", "alice/co lours", "alice/a--b", "../run", "alice/x.git"]
)
def test_bad_names(name: str, push: Push, hub: HubServer) -> None:
    assert is_one_mistake(push("--dry-run", repo=name), f"--repo {name}")
    assert is_one_mistake(push("--yes", repo="bob/colours"), "may not write to bob/colours")
    assert hub.repos == {}


# --- a repository that is there already -------------------------------------------------------------------------------


def test_a_private_push_does_not_become_public(push: Push, hub: HubServer) -> None:
    hub.add(NAME, {"README.md": b"mine"}, private=False)
    assert is_one_mistake(push("--yes"), "is public, and this push is private")
    assert hub.uploads == []
    assert push("--yes", "--public").code == 0
    hub.add("alice/hidden", {"README.md": b"mine"}, private=True)
    result = push("--yes", "--public", repo="alice/hidden")
    assert "alice/hidden · private" in result.out and hub.repos["alice/hidden"].private


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "pytorch_model.bin"])
def test_weights_there_that_would_be_loaded_as_well(name: str, push: Push, hub: HubServer) -> None:
    hub.add(NAME, {name: b"other"})
    assert is_one_mistake(push("--yes"), f"{NAME} holds {name}, which would be loaded together")
    assert hub.uploads == []


def test_other_files_there_stay_and_are_named(push: Push, hub: HubServer) -> None:
    hub.add(NAME, {"notes.md": b"mine", "README.md": b"old"})
    result = push("--yes")
    assert result.code == 0 and "  stays     notes.md" in result.out
    assert hub.repos[NAME].files["notes.md"].content == b"mine"


def test_a_commit_of_somebody_else_is_not_built_upon(push: Push, hub: HubServer) -> None:
    repo = hub.add(NAME, {"README.md": b"old"})

    def meanwhile() -> None:
        repo.commit({**repo.files, "new.md": Stored(b"new", is_lfs=False)})

    hub.before["preupload"] = meanwhile
    assert is_one_mistake(push("--yes"), f"{NAME} was changed by somebody else just now while uploading")
    assert set(repo.files) == {"README.md", "new.md"}


def test_a_file_that_arrives_as_another_is_seen(push: Push, trained: Trained, hub: HubServer) -> None:
    def damage() -> None:
        repo = hub.repos[NAME]
        repo.files["adapters.safetensors"].content += b"!"

    hub.before["/tree/"] = damage
    assert is_one_mistake(push("--yes"), f"{NAME}: adapters.safetensors did not arrive as shown")


# --- what can't be pushed ---------------------------------------------------------------------------------------------


def test_a_run_that_trains_or_has_nothing(push: Push, trained: Trained, hub: HubServer) -> None:
    with RunLock(trained.run):
        assert is_one_mistake(push("--dry-run"), "still training")
    weights = trained.run / "adapters" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-7])
    assert is_one_mistake(push("--dry-run"), "cut short or damaged")
    weights.unlink()
    assert is_one_mistake(push("--dry-run"), "no adapter yet")
    weights.write_bytes(whole)
    summary = trained.run / "training_summary.json"
    kept = json.loads(summary.read_text())
    summary.write_text(json.dumps(kept | {"best_step": None}))
    assert is_one_mistake(push("--dry-run"), "no adapter yet")
    summary.unlink()
    assert is_one_mistake(push("--dry-run"), "no verdict yet")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"status": "interrupted"}, "warning: training was interrupted at step 4 of 4"),
        ({"grade": "CRITICAL"}, "graded CRITICAL"),
        ({"base_val_loss": 0.1}, "warning: no better than the base model on held-out rows: 0.100 →"),
        (
            {"not_judged": "every row was trained on", "best_step": None, "best_val_loss": None, "gap_low": None},
            "warning: not judged: every row was trained on",
        ),
    ],
)
def test_what_speaks_against_it_is_said_before_the_upload(
    changes: dict[str, Any], line: str, push: Push, trained: Trained
) -> None:
    summary = trained.run / "training_summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | changes))
    result = push("--dry-run")
    assert result.code == 0 and line in result.out.split("--- README.md")[0]


def test_a_base_model_that_is_a_folder_is_warned_of(
    push: Push, trained: Trained, hub: HubServer, run_cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    result = run_cli("push", trained.run, "--repo", NAME, "--yes")
    assert result.code == 0 and "an adapter is of no use without it" in result.out
    config = json.loads(hub.repos[NAME].files["adapter_config.json"].content)
    assert config["base_model_name_or_path"] is None
    card = hub.repos[NAME].files["README.md"].content.decode()
    assert "base_model:" not in card and "`model` (not on the Hub)" in card
    assert is_one_mistake(push("--dry-run", "--base-model", "/no/id"), "--base-model /no/id")


def test_an_evaluation_of_an_earlier_adapter_is_left_out(push: Push, trained: Trained) -> None:
    assert "## Evaluation" in push("--dry-run").out
    report = trained.run / "evaluation" / "evaluation_report.json"
    report.write_text(json.dumps(json.loads(report.read_text()) | {"adapter_sha256": "0" * 64}))
    result = push("--dry-run")
    assert "warning: the evaluation is of an earlier adapter" in result.out and "## Evaluation" not in result.out


def test_folds_are_pushed_by_the_run_on_all_rows(push: Push, trained: Trained, run_cli: Callable[..., Result]) -> None:
    parent = trained.home / "folds"
    shutil.copytree(trained.run, parent / FINAL)
    shutil.copy(trained.run / "config.yaml", parent / "config.yaml")
    (parent / "folds.json").write_text("{}")
    result = run_cli("push", parent, "--repo", NAME, "--dry-run")
    assert result.code == 0 and shown(result.out).keys() == WHOLE


# --- a merged model ---------------------------------------------------------------------------------------------------


@pytest.fixture
def merged(trained: Trained) -> Path:
    """A folder as `merge` writes it, with things in it that are nobody's business."""
    folder = shutil.copytree(trained.model, trained.home / "merged")
    adapter = find_adapter(trained.run).read(read_architecture(folder))
    (folder / "merge_report.json").write_text(json.dumps({"adapter": adapter.fingerprint, "run": "run"}))
    (folder / ".env").write_text("HF_TOKEN=x")
    (folder / "training.log").write_text("secret")
    (folder / "checkpoints").mkdir()
    (folder / "modeling_own.py").write_text("raise SystemExit")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_name_or_path": str(trained.model)}))
    return folder


def test_a_merged_model(push: Push, merged: Path, trained: Trained, hub: HubServer) -> None:
    result = push("--yes", "--merged", merged)
    assert result.code == 0
    model = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    files = hub.repos[NAME].files
    assert set(files) - {".gitattributes"} == model | (WHOLE - ADAPTER) == shown(result.out).keys()
    assert "  left out  .env, checkpoints/, merge_report.json, modeling_own.py, training.log" in result.out
    assert json.loads(files["config.json"].content)["_name_or_path"] == BASE
    assert SECRET.encode() not in b"".join(file.content for file in files.values())
    weights = load_file(merged / "model.safetensors")
    (merged / "again.safetensors").write_bytes(files["model.safetensors"].content)
    assert all(
        np.array_equal(tensor, weights[name]) for name, tensor in load_file(merged / "again.safetensors").items()
    )
    assert b"vllm serve alice/colours" in files["README.md"].content


def test_a_merged_model_of_another_adapter(push: Push, merged: Path) -> None:
    (merged / "merge_report.json").write_text(json.dumps({"adapter": "0" * 64}))
    assert is_one_mistake(push("--dry-run", "--merged", merged), "merged from another adapter")
    (merged / "merge_report.json").unlink()
    result = push("--dry-run", "--merged", merged)
    assert result.code == 0 and "whether it is this run's can't be told" in result.out


def test_a_file_that_names_a_folder_of_this_machine(push: Push, merged: Path, hub: HubServer) -> None:
    for where in (merged / "generation_config.json", merged / "tokenizer_config.json"):
        kept = where.read_text() if where.is_file() else None
        where.write_text(json.dumps({"cache": f"{Path.home()}/models"}))
        assert is_one_mistake(push("--yes", "--merged", merged), f"{where.name} names a folder of this machine")
        where.unlink() if kept is None else where.write_text(kept)
    (merged / "tokenizer_config.json").write_text(json.dumps({"token": TOKEN}))
    assert is_one_mistake(push("--yes", "--merged", merged), "or your token")
    assert hub.uploads == []


def test_a_home_that_is_the_root_is_in_no_file(push: Push, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/")
    result = push("--dry-run")
    assert result.code == 0, result.err


def test_a_merged_folder_that_is_none(push: Push, merged: Path, trained: Trained) -> None:
    assert is_one_mistake(push("--dry-run", "--merged", trained.home / "gone"), "no such folder")
    (merged / "model.safetensors").write_bytes(b"short")
    assert is_one_mistake(push("--dry-run", "--merged", merged), "not a safetensors file")
    (merged / "model.safetensors").unlink()
    assert is_one_mistake(push("--dry-run", "--merged", merged), "no weights")
