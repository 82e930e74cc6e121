"""Writing bundles: the old one or the new one, whole, whatever stops it; and what --force may remove."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.test_bundle import ignore, manifest
from vz_edge import staging
from vz_edge.bundle import MANIFEST, read_manifest, verify_files, write_manifest
from vz_edge.errors import CorruptBundleError, DiskSpaceError, ExportError, TargetExistsError
from vz_edge.staging import check_target, staged_folder

REPOSITORY = Path(__file__).parents[1]
WRITER = """
    import sys, time
    from pathlib import Path
    from tests.test_bundle import ignore, manifest
    from vz_edge import staging
    from vz_edge.bundle import write_manifest
    target, mark, pause = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    {hook}
    print("begun", flush=True)
    with staging.staged_folder(target, force=True) as folder:
        print("writing", flush=True)
        for number in range(5):
            (folder / f"part-{{number}}").write_text(mark * 1000)
            time.sleep(pause)
        (folder / "decoder.onnx").write_text(mark)
        write_manifest(folder, manifest(), ignore)
    print("done", flush=True)
"""
# Between each two steps of taking a name, as this module's own functions are called.
STEPS = ("_flush", "_take_the_name", "_exchange", "_sync", "shutil.rmtree", "_clear_up")


def write(target: Path, mark: str, force: bool = True) -> None:
    with staged_folder(target, force) as folder:
        (folder / "decoder.onnx").write_text(mark)
        write_manifest(folder, manifest(), ignore)


def mark_of(target: Path) -> str:
    """Which of the bundles it is; it must be whole."""
    verify_files(target, read_manifest(target), ignore)
    return (target / "decoder.onnx").read_text()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def target(tmp_path: Path) -> Path:
    write(tmp_path / "bundles" / "model", "old")
    return tmp_path / "bundles" / "model"


def start(target: Path, mark: str, pause: float = 0.0, hook: str = "") -> subprocess.Popen[str]:
    """A process that writes the target."""
    code = textwrap.dedent(WRITER).replace("{hook}", hook).replace("{{", "{").replace("}}", "}")
    command = [sys.executable, "-c", code, str(target), mark, str(pause)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    while (found := process.stdout.readline()) and found.strip() != line:
        pass


# --- whole or not at all


def test_what_is_written_takes_the_name_and_leaves_nothing_beside_it(target: Path) -> None:
    write(target, "new")
    assert mark_of(target) == "new" and names(target.parent) == ["model"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError, SystemExit])
@pytest.mark.parametrize("there", [True, False])
def test_what_is_interrupted_leaves_what_was_there(tmp_path: Path, stop: type[BaseException], there: bool) -> None:
    target = tmp_path / "a" / "b" / "model"
    if there:
        write(target, "old")
    with pytest.raises(stop), staged_folder(target, force=True) as folder:
        (folder / "half").write_bytes(b"half")
        raise stop
    if there:
        assert mark_of(target) == "old" and names(target.parent) == ["model"]
    else:
        assert names(tmp_path) == [], "folders above it were made for nothing"


def test_without_an_exchange_of_names_the_old_one_is_put_back(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def fail_for_the_new_one(path: Path, other: Path) -> Path:
        if "partial" in path.name:
            raise OSError("no such luck")
        return rename(path, other)

    monkeypatch.setattr(staging, "_exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", fail_for_the_new_one)
    with pytest.raises(ExportError, match="no such luck"):
        write(target, "new")
    assert mark_of(target) == "old" and names(target.parent) == ["model"]
    monkeypatch.setattr(Path, "rename", rename)
    write(target, "new")
    assert mark_of(target) == "new" and names(target.parent) == ["model"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_ends_the_process_cleans_up(target: Path, number: signal.Signals) -> None:
    process = start(target, "new", pause=30)
    wait_for(process, "writing")
    process.send_signal(number)
    status = process.wait(timeout=20)
    assert status == (-signal.SIGINT if number == signal.SIGINT else 128 + number)
    assert mark_of(target) == "old" and names(target.parent) == ["model"]


def test_handlers_of_the_program_itself_stay(target: Path) -> None:
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    try:
        with staged_folder(target, force=True) as folder:
            os.kill(os.getpid(), signal.SIGTERM)
            (folder / "new").write_bytes(b"")
        assert heard == [1] and names(target) == ["new"]
    finally:
        signal.signal(signal.SIGTERM, before)
    with staged_folder(target.with_name("other"), force=True):
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("exchanges", [True, False])
def test_a_kill_between_any_two_steps_leaves_the_old_or_the_new_one(target: Path, step: str, exchanges: bool) -> None:
    """Before and after each step, with and without an exchange of names."""
    lines = [] if exchanges else ["staging._exchange = lambda one, other: False"]
    for after in (False, True):
        kill = "__import__('os').kill(__import__('os').getpid(), 9)"
        call = f"(real(*a, **k), {kill})[0]" if after else kill
        hook = "\n".join([*lines, f"real = staging.{step}", f"staging.{step} = lambda *a, **k: {call}"])
        process = start(target, "new", hook=hook)
        status = process.wait(timeout=30)
        assert status in (-9, 0), "the hook was not reached, or killed"
        there = target.exists()
        assert there or not exchanges, "with an exchange there is always one of the two"
        found = mark_of(target) if there else None
        write(target, "next")  # the next run clears up, and puts back what was lost
        assert found in ("old", "new", "next", None)
        assert mark_of(target) == "next" and names(target.parent) == ["model"]


def test_kills_at_random_moments(target: Path) -> None:
    rng = random.Random(0)
    for number in range(8):
        process = start(target, f"new {number}", pause=0.01)
        wait_for(process, "begun")
        time.sleep(rng.uniform(0, 0.12))
        process.kill()
        process.wait()
        assert mark_of(target).startswith(("old", "new"))
    write(target, "last")
    assert mark_of(target) == "last" and names(target.parent) == ["model"]


def test_what_a_killed_process_left_is_cleared_up_and_the_one_before_put_back(target: Path) -> None:
    (target.parent / ".model.partial-4000000").mkdir()
    (target.parent / ".model.partial-4000000" / "half").write_text("half")
    (target.parent / ".model.lock").touch()
    target.rename(target.parent / ".model.replaced-4000000")
    other = target.parent / ".model-13b.partial-1"  # of another target
    other.mkdir()
    with pytest.raises(RuntimeError), staged_folder(target, force=True):
        assert mark_of(target) == "old"
        raise RuntimeError
    assert mark_of(target) == "old" and names(target.parent) == [".model-13b.partial-1", "model"]


# --- two at once


def test_of_two_that_write_the_same_one_is_told(target: Path) -> None:
    process = start(target, "new", pause=0.5)
    wait_for(process, "writing")
    with pytest.raises(ExportError, match=r"another process is writing .*model; wait"):
        write(target, "mine")
    assert mark_of(target) == "old"
    assert process.wait(timeout=20) == 0
    assert mark_of(target) == "new" and names(target.parent) == ["model"]
    write(target, "mine")
    assert mark_of(target) == "mine"


def test_a_lock_that_is_removed_between_opening_and_locking_is_taken_anew(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, calls = fcntl.flock, []

    def removed_meanwhile(descriptor: int, how: int) -> None:
        if not calls:
            (target.parent / ".model.lock").unlink()
        calls.append(how)
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", removed_meanwhile)
    write(target, "new")
    assert len(calls) == 2 and mark_of(target) == "new" and names(target.parent) == ["model"]


# --- what goes wrong on a disk


@pytest.mark.parametrize(
    ("number", "error", "message"),
    [
        (errno.ENOSPC, DiskSpaceError, "No space left on device; free some space"),
        (errno.EDQUOT, DiskSpaceError, "free some space"),
        (errno.EROFS, ExportError, "Read-only file system.*; choose an --out"),
        (errno.EIO, ExportError, "Input/output error"),
    ],
)
@pytest.mark.parametrize("where", ["body", "mkdir", "_flush", "_take_the_name"])
def test_an_error_of_the_disk_is_one_line_and_leaves_nothing(
    target: Path, number: int, error: type[ExportError], message: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), "somewhere")

    with monkeypatch.context() as patched:
        if where == "mkdir":
            patched.setattr(staging, "_clear_up", fail)
        elif where != "body":
            patched.setattr(staging, where, fail)
        with pytest.raises(error, match=message) as caught, staged_folder(target, force=True):
            if where == "body":
                fail()
    assert "\n" not in str(caught.value) and str(target) in str(caught.value)
    assert mark_of(target) == "old" and names(target.parent) == ["model"]


def test_a_target_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    for target in (tmp_path / "file" / "bundle", tmp_path / "file" / "bundles" / "bundle"):
        with pytest.raises(ExportError, match=r"bundle cannot be written \(.*\); choose an --out"):
            write(target, "new")
    assert names(tmp_path) == ["file"]


# --- what --force may remove


def test_replacing_wants_force(target: Path) -> None:
    with pytest.raises(TargetExistsError, match="--force"):
        write(target, "new", force=False)
    assert mark_of(target) == "old"


def file_beside(target: Path) -> None:
    (target / "notes.txt").write_text("years of work")


def folder_beside(target: Path) -> None:
    (target / "thesis").mkdir()
    (target / "thesis" / "notes.txt").write_text("years of work")


def link_beside(target: Path) -> None:
    (target / "link").symlink_to("/nowhere")


def not_ours(target: Path) -> None:
    (target / MANIFEST).write_text('{"files": {"decoder.onnx": {}}, "format_version": 3, "created_by": "somebody"}')


def no_json(target: Path) -> None:
    (target / MANIFEST).write_text("{")


def deep_json(target: Path) -> None:
    (target / MANIFEST).write_text("[" * 100_000)


def no_manifest(target: Path) -> None:
    (target / MANIFEST).unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (file_beside, r"holds files that are not the bundle's \(notes.txt\)"),
        (folder_beside, r"\(thesis/notes.txt\)"),
        (link_beside, r"\(link\)"),
        (not_ours, "is not a bundle that vz-edge wrote"),
        (no_json, "is not a bundle that vz-edge wrote"),
        (deep_json, "is not a bundle that vz-edge wrote"),
        (no_manifest, "is not a bundle"),
    ],
)
def test_force_removes_a_bundle_and_nothing_else(target: Path, change: Callable[[Path], None], message: str) -> None:
    change(target)
    before = {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}
    with pytest.raises(TargetExistsError, match=message):
        write(target, "new")
    assert {path: path.read_bytes() for path in target.rglob("*") if path.is_file()} == before


def test_a_damaged_bundle_of_ours_and_an_empty_folder_are_replaced(target: Path) -> None:
    (target / "decoder.onnx").unlink()
    write(target, "new")
    assert mark_of(target) == "new"
    (target.parent / "empty").mkdir()
    write(target.parent / "empty", "new")
    assert mark_of(target.parent / "empty") == "new"


def test_links_and_files_are_no_targets(target: Path) -> None:
    link, dangling, file = (target.with_name(name) for name in ("link", "dangling", "file"))
    link.symlink_to(target)
    dangling.symlink_to("/nowhere/at/all")
    file.write_text("text")
    for wrong, message in ((link, "symbolic link"), (dangling, "symbolic link"), (file, "is not a folder")):
        with pytest.raises(TargetExistsError, match=message):
            write(wrong, "new")
    assert mark_of(target) == "old" and file.read_text() == "text" and dangling.is_symlink()


def test_a_mount_point_is_no_target() -> None:
    with pytest.raises(TargetExistsError, match="mount point"):
        check_target(Path("/proc"), force=True)


def test_the_source_is_never_the_target(target: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "hub" / "checkpoint"
    checkpoint.mkdir(parents=True)
    (tmp_path / "link").symlink_to(checkpoint)
    for out, how in (
        (checkpoint, "is"),
        (tmp_path / "hub", "holds"),
        (checkpoint / "out", "lies in"),
        (tmp_path / "link" / "out", "lies in"),
    ):
        with pytest.raises(TargetExistsError, match=f"{how} the checkpoint"):
            check_target(out, force=True, source=checkpoint)
    check_target(tmp_path / "hub" / "checkpoint-bundle", force=True, source=checkpoint)


def test_a_manifest_that_cannot_be_read_is_corrupt(target: Path) -> None:
    deep_json(target)
    with pytest.raises(CorruptBundleError):
        read_manifest(target)
