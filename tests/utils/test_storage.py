"""Mirrors of object storage, with a fake that keeps its blobs in a local folder and records requests."""

import json
import subprocess
import sys
from pathlib import Path

import blobfile
import pytest

from guided_diffusion.checkpoint import TRAINING_FILES, needed_to_resume
from scoring.chain import newest_ema
from utils import storage
from utils.cli import UserError
from utils.storage import Folder, Mirror, StorageError, open_folder

REMOTE = "fake://bucket/experiments"
LOGS = ("config.json", "log.txt", "progress.csv")  # needed to resume training, besides checkpoints


class Blobs:
    """Fake of the blobfile context that `Mirror` uses, for addresses that start with fake://."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.done: list[tuple[str, str]] = []
        self.fails: str | None = None  # requests for names with this suffix fail
        self._local = blobfile.create_context()

    def _note(self, verb: str, address: str) -> str:
        assert address.startswith(f"{REMOTE}/"), address
        name = address.removeprefix(f"{REMOTE}/")
        self.done.append((verb, name))
        if self.fails and name.endswith(self.fails):
            raise blobfile.Error("unexpected status 503\nand much more")
        return str(self.folder / name)

    def scandir(self, address: str):
        return self._local.scandir(self._note("list", address))

    def copy(self, source: str, target: str, overwrite: bool) -> None:
        assert overwrite
        if source.startswith("fake://"):
            source = self._note("pull", source)
        else:
            target = self._note("push", target)
        self._local.copy(source, target, overwrite=True)

    def remove(self, address: str) -> None:
        self._local.remove(self._note("remove", address))

    def take_requests(self) -> list[tuple[str, str]]:
        """Return the requests since the last call."""
        done, self.done = self.done, []
        return done


@pytest.fixture
def blobs(tmp_path, monkeypatch) -> Blobs:
    fake = Blobs(tmp_path / "bucket")
    monkeypatch.setattr(blobfile, "create_context", lambda **_: fake)
    return fake


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch) -> Path:
    """Create mirrors in a folder of this test."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(storage.tempfile, "tempdir", str(folder))
    return folder


def write(folder: Path, *names: str, text: str = "x") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def checkpoints(*steps: int) -> list[str]:
    return [f"{kind}{step:06d}.pt" for step in steps for kind in ("model", "ema_0.9999_", "opt")]


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# ----------------------------------------------------------------------------------------------------------
# Local folders


def test_a_local_folder_is_used_directly_without_blobfile(tmp_path):
    code = (
        "import sys; from pathlib import Path; from utils.storage import open_folder\n"
        "with open_folder('./somewhere') as folder:\n"
        "    folder.pull('a', '*'); folder.push(); folder.remove('a', '*')\n"
        "print(folder.local, folder.remote, folder.list_files('a'), folder.address(folder.local / 'a'))\n"
        "print(sorted({'blobfile', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "somewhere None [] somewhere/a\n[]\n"


@pytest.mark.parametrize("address", ["gs://bucket/a", "az://account/container", "https://a.blob.core.windows.net/c"])
def test_addresses_are_distinguished_from_paths(address):
    with pytest.raises(storage.argparse.ArgumentTypeError, match="copy it here first"):
        storage.local_path(address)
    for path in ("./experiments", "gs:/bucket", "C:/a", "gs"):
        assert storage.local_path(path) == Path(path)


# ----------------------------------------------------------------------------------------------------------
# Pushing


def test_opt_is_pushed_last_and_removed_first(blobs):
    with Mirror(REMOTE) as mirror:
        write(mirror.local, *(f"run/{name}" for name in checkpoints(5, 10)), "run/progress.csv", "run/zzz")
        mirror.push()
        pushed = [name for verb, name in blobs.take_requests() if verb == "push"]
        assert set(pushed) == files_in(blobs.folder) == files_in(mirror.local)
        assert pushed[-2:] == ["run/opt000005.pt", "run/opt000010.pt"]
        for name in checkpoints(5):
            (mirror.local / "run" / name).unlink()
        mirror.push()
        removed = blobs.take_requests()
        assert removed[0] == ("remove", "run/opt000005.pt")
        assert sorted(removed) == sorted(("remove", f"run/{name}") for name in checkpoints(5))
    assert blobs.take_requests() == []


def test_unchanged_files_are_not_pushed_again(blobs):
    with Mirror(REMOTE) as mirror:
        write(mirror.local, "run/log.txt", "run/figures/a.png", text="one")
        mirror.push()
        assert sorted(blobs.take_requests()) == [("push", "run/figures/a.png"), ("push", "run/log.txt")]
        mirror.push()
        assert blobs.take_requests() == []
        write(mirror.local, "run/log.txt", text="two")  # same size as before
        mirror.push()
        assert blobs.take_requests() == [("push", "run/log.txt")]
        assert (blobs.folder / "run/log.txt").read_text() == "two"


def test_temporary_and_hidden_files_are_not_pushed(blobs):
    with Mirror(REMOTE) as mirror:
        write(mirror.local, "run/.lock", "run/opt000005.pt.tmp", "run/config.json")
    assert files_in(blobs.folder) == {"run/config.json"}


def test_files_that_were_not_pulled_are_not_removed(blobs):
    write(blobs.folder, "run/events.out.1", "run/log.txt", "other/log.txt")
    with Mirror(REMOTE) as mirror:
        mirror.pull("run", "log.txt")
        assert sorted(mirror.list_files("run")) == ["events.out.1", "log.txt"]
    assert files_in(blobs.folder) == {"run/events.out.1", "run/log.txt", "other/log.txt"}
    assert {verb for verb, _ in blobs.take_requests()} == {"list", "pull"}


def test_a_mirror_that_is_not_writable_changes_nothing(blobs):
    write(blobs.folder, "run/log.txt")
    with Mirror(REMOTE) as mirror:
        mirror.writable = False
        mirror.pull("run", "*")
        write(mirror.local, "run/log.txt", "run/config.json", text="mine")
        mirror.remove("run", "*")
        mirror.push()
    assert files_in(blobs.folder) == {"run/log.txt"}
    assert (blobs.folder / "run/log.txt").read_text() == "x"


# ----------------------------------------------------------------------------------------------------------
# Pulling


def test_resuming_pulls_logs_and_the_newest_two_sets(blobs):
    names = [*checkpoints(5, 999_990, 999_995, 1_000_000), "model1000005.pt", "config.json", "log.txt", "progress.csv"]
    write(blobs.folder, *(f"run/{name}" for name in (*names, "events.out.1")))
    with Mirror(REMOTE) as mirror:
        mirror.pull("run", *LOGS, *needed_to_resume(mirror.list_files("run"), keep_last=0))
        expected = {*checkpoints(999_995, 1_000_000), "config.json", "log.txt", "progress.csv"}
        assert files_in(mirror.local / "run") == expected


def test_all_sets_are_pulled_if_old_ones_will_be_removed(blobs):
    names = {*checkpoints(5, 10, 15), "model000020.pt"}
    write(blobs.folder, *(f"run/{name}" for name in (*names, "events.out.1")))
    with Mirror(REMOTE) as mirror:
        mirror.pull("run", *LOGS, *needed_to_resume(mirror.list_files("run"), keep_last=1))
        assert files_in(mirror.local / "run") == names


def test_testing_pulls_the_config_and_the_newest_ema(blobs):
    names = [*checkpoints(999_995, 1_000_000), "config.json", "log.txt", "progress.csv"]
    write(blobs.folder, *(f"run/{name}" for name in names))
    with Mirror(REMOTE) as mirror:
        assert newest_ema(mirror, "run") == mirror.local / "run" / "ema_0.9999_1000000.pt"
        assert files_in(mirror.local) == {"run/config.json", "run/ema_0.9999_1000000.pt"}


def test_error_for_a_missing_experiment_names_its_address(blobs):
    with pytest.raises(UserError, match=f"no experiment 'run' in {REMOTE}; train it first"), Mirror(REMOTE) as mirror:
        newest_ema(mirror, "run")


def test_overwriting_removes_only_the_files_of_training(blobs):
    written = [*checkpoints(5), "config.json", "log.txt", "progress.csv", "events.out.tfevents.1"]
    write(blobs.folder, *(f"run/{name}" for name in (*written, "notes.txt")), "other/log.txt")
    with Mirror(REMOTE) as mirror:
        mirror.remove("run", *TRAINING_FILES, "config.json")
        removed = [name for verb, name in blobs.take_requests() if verb == "remove"]
        assert removed[0] == "run/opt000005.pt"
    assert files_in(blobs.folder) == {"run/notes.txt", "other/log.txt"}


# ----------------------------------------------------------------------------------------------------------
# Exit and errors


@pytest.mark.parametrize("end", [SystemExit, KeyboardInterrupt, UserError, ZeroDivisionError, None])
def test_every_exit_pushes_and_removes_the_local_folder(blobs, scratch, end):
    def go() -> None:
        with open_folder(f"{REMOTE}/") as mirror:
            assert list(scratch.iterdir()) == [mirror.local]
            write(mirror.local, "run/log.txt")
            if end:
                raise end

    if end:
        with pytest.raises(end):
            go()
    else:
        go()
    assert files_in(blobs.folder) == {"run/log.txt"}
    assert not list(scratch.iterdir())


def test_an_interrupted_pull_is_not_pushed_back(blobs, monkeypatch):
    write(blobs.folder, "run/opt000005.pt", text="whole")

    def cut(source: str, target: str, overwrite: bool) -> None:
        Path(target).parent.mkdir()
        Path(target).write_text("wh")
        raise KeyboardInterrupt

    mirror = Mirror(REMOTE)
    with monkeypatch.context() as patched:
        patched.setattr(blobs, "copy", cut)
        with pytest.raises(KeyboardInterrupt), mirror:
            mirror.pull("run", "*")
    assert (blobs.folder / "run/opt000005.pt").read_text() == "whole"


def test_unreadable_storage_is_a_storage_error(blobs, scratch):
    blobs.fails = "run"
    expected = rf"^{REMOTE} cannot be read \(unexpected status 503\): check [^\n]+$"
    with pytest.raises(StorageError, match=expected), Mirror(REMOTE) as mirror:
        mirror.list_files("run")
    assert not list(scratch.iterdir())


def test_a_failed_first_push_is_not_retried(blobs, scratch):
    blobs.fails = "config.json"
    mirror = Mirror(REMOTE)
    write(mirror.local, "run/config.json")
    with pytest.raises(StorageError, match=r"cannot be written to \(unexpected"), mirror:
        mirror.push()
    assert blobs.take_requests() == [("push", "run/config.json")]
    assert not list(scratch.iterdir())


def test_the_next_push_completes_a_failed_one(blobs):
    with Mirror(REMOTE) as mirror:
        write(mirror.local, *(f"run/{name}" for name in checkpoints(5)))
        blobs.fails = "model000005.pt"
        with pytest.raises(StorageError):
            mirror.push()
        assert files_in(blobs.folder) == {"run/ema_0.9999_000005.pt"}  # opt would make the set valid
        blobs.take_requests()
        blobs.fails = None
        mirror.push()
        assert blobs.take_requests() == [("push", "run/model000005.pt"), ("push", "run/opt000005.pt")]


def test_a_failed_last_push_keeps_the_local_folder(blobs, scratch):
    blobs.fails = "log.txt"
    with pytest.raises(StorageError, match="files not yet uploaded are in") as error, Mirror(REMOTE) as mirror:
        write(mirror.local, "run/log.txt")
    assert str(mirror.local) in str(error.value)
    assert files_in(mirror.local) == {"run/log.txt"}


def test_errors_and_addresses_name_the_storage_and_not_the_local_folder(blobs):
    mirror = Mirror(REMOTE)
    assert mirror.address(mirror.local / "run" / "a.pt") == f"{REMOTE}/run/a.pt"
    with pytest.raises(UserError, match=f"^{REMOTE}/run was begun with others$"), mirror:
        raise UserError(f"{mirror.local / 'run'} was begun with others")


@pytest.mark.parametrize("address", ["s3://bucket/a", "https://example.com/a", "gs://"])
def test_unsupported_addresses_are_refused(address):
    with pytest.raises(StorageError, match="cannot be read"), open_folder(address) as folder:
        folder.list_files("run")


def test_no_token_is_saved_and_retries_are_limited(monkeypatch):
    given = {}
    monkeypatch.setattr(blobfile, "create_context", lambda **kwargs: given.update(kwargs))
    with Mirror("gs://bucket/a"):
        pass
    assert given["save_access_token_to_disk"] is False
    assert given["retry_limit"] < 10


def test_newest_ema_in_a_local_folder(tmp_path):
    write(tmp_path, "run/config.json", text=json.dumps({}))
    write(tmp_path, *(f"run/{name}" for name in checkpoints(5, 10)))
    assert newest_ema(Folder(tmp_path), "run").name == "ema_0.9999_000010.pt"
