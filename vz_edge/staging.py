"""Writing a bundle so that its name always stands for something whole: the one before, or the one after.

>>> with staged_folder(Path("bundles/llava"), force=True) as staging:
...     (staging / "decoder.onnx").write_bytes(graph)

Everything is written into a folder beside the target, put on the disk (fsync), and then takes the target's name in one
step of the file system: a rename, or where there is something to replace an exchange of the two names (renameat2(2),
RENAME_EXCHANGE). Power may fail, and the process may be killed, between any two of these.

Beside a target ``bundles/llava`` may lie, while it is written or after a process was killed:

``.llava.lock``          held by whoever writes there (flock(2)); the kernel lets go of it when that process ends
``.llava.partial-PID``   what is being written
``.llava.replaced-PID``  the one before, on a file system that cannot exchange names

Whoever holds the lock knows that nobody else writes, and removes what a killed process left, or puts the one before
back in its place.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import glob
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from vz_edge.errors import BundleError, DiskSpaceError, ExportError, TargetExistsError

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
# What stops a process politely: a terminal that closes, a supervisor, a shutdown. Ctrl-C raises by itself.
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def staged_folder(target: Path, force: bool, source: Path | None = None) -> Iterator[Path]:
    """Yield an empty folder beside ``target`` that takes its name when the block ends well.

    On an exception, SIGINT, SIGTERM or SIGHUP the staging folder is removed and ``target`` is as it was. Raises as
    ``check_target``, DiskSpaceError where the disk is full, and ExportError where nothing can be written there or
    another process is writing it.
    """
    check_target(target, force, source)
    with ExitStack() as stack:
        stack.enter_context(_ending_signals_raise())
        try:
            stack.enter_context(_parents(target.parent))
            stack.enter_context(_lock(target))
            _clear_up(target)
            staging = _beside(target, f"partial-{os.getpid()}")
            staging.mkdir()
        except OSError as error:
            raise _cannot_write(target, error) from error
        stack.callback(shutil.rmtree, staging, ignore_errors=True)
        try:
            yield staging
            _flush(staging)
            _take_the_name(staging, target)
        except OSError as error:
            raise _cannot_write(target, error) from error


def check_target(target: Path, force: bool, source: Path | None = None) -> None:
    """Raise TargetExistsError unless ``target`` is free, or ``force`` is given and nothing but a bundle is lost.

    ``source`` is what is read to write it: a target that is the source, holds it or lies in it is refused, ``force`` or
    not, as are symbolic links and mount points, whose names stand for something that lies elsewhere.
    """
    if source is not None:
        _check_apart(target, source)
    if target.is_symlink():
        raise TargetExistsError(f"{target} is a symbolic link; give the folder that it stands for, or another --out")
    if not os.path.lexists(target):
        return
    if not force:
        raise TargetExistsError(f"{target} exists; choose another --out, or replace it with --force")
    if os.path.ismount(target):
        raise TargetExistsError(f"{target} is a mount point, which cannot be replaced; choose a folder in it as --out")
    if reason := _lost_with(target):
        raise TargetExistsError(f"{target} {reason}, so --force does not remove it; choose another --out")


def _lost_with(target: Path) -> str | None:
    """What would be lost with ``target`` that is not a bundle's, in words; None where nothing is."""
    from vz_edge.bundle import MANIFEST, listed_files

    if not target.is_dir():
        return "is not a folder"
    if not any(target.iterdir()):
        return None
    if not (target / MANIFEST).is_file():
        return f"is not a bundle (it has no {MANIFEST})"
    try:
        listed = listed_files(target)
    except BundleError as error:
        return f"is not a bundle that vz-edge wrote ({error})"
    there = {
        path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_symlink() or not path.is_dir()
    }
    others = sorted(there - listed - {MANIFEST})
    if not others:
        return None
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    return f"holds files that are not the bundle's ({', '.join(others[:3])}{more})"


def _check_apart(target: Path, source: Path) -> None:
    one, other = (Path(os.path.realpath(path)) for path in (target, source))
    if one == other or one in other.parents or other in one.parents:
        how = "is" if one == other else "holds" if one in other.parents else "lies in"
        raise TargetExistsError(f"{target} {how} the checkpoint {source}, which is read; choose another --out")


def _beside(target: Path, ending: str) -> Path:
    return target.with_name(f".{target.name}.{ending}")


@contextmanager
def _parents(folder: Path) -> Iterator[None]:
    """Make ``folder`` and those above it; those that were made are removed again where the block raises."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # something else was put there
            for path in made:
                path.rmdir()
        raise


@contextmanager
def _lock(target: Path) -> Iterator[None]:
    """Be the only one that writes ``target``. Raises ExportError where another process is."""
    path = _beside(target, "lock")
    descriptor = _locked(path, target)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is locked: who waits for it finds that it is gone, and begins anew
        os.close(descriptor)


def _locked(path: Path, target: Path) -> int:
    """A descriptor of the lock's file, locked."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ExportError(
                f"another process is writing {target}; wait until it has ended, or choose another --out"
            ) from None
        except OSError:  # a file system without locks: all else is still done
            return descriptor
        try:
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)  # its owner ended and removed it between our two steps


def _clear_up(target: Path) -> None:
    """Remove what processes that were killed left, and put back what was in its place."""
    for kind in ("replaced", "partial"):
        for left in sorted(target.parent.glob(glob.escape(f".{target.name}.{kind}-") + "*")):
            if kind == "replaced" and not os.path.lexists(target):
                left.rename(target)
            else:
                shutil.rmtree(left)


def _flush(folder: Path) -> None:
    """Wait until all of ``folder`` is on the disk, files before the folders that name them."""
    for path in sorted(folder.rglob("*"), key=lambda path: path.is_dir()):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that keeps nothing, or knows no fsync of folders
            raise
    finally:
        os.close(descriptor)


def _take_the_name(staging: Path, target: Path) -> None:
    """Give ``staging`` the name of ``target``; what had it is removed."""
    if not os.path.lexists(target):
        staging.rename(target)
    elif _exchange(staging, target):
        _sync(target.parent)
        shutil.rmtree(staging)
    else:
        replaced = _beside(target, f"replaced-{os.getpid()}")
        target.rename(replaced)
        try:
            staging.rename(target)
        except BaseException:
            replaced.rename(target)
            raise
        _sync(target.parent)
        shutil.rmtree(replaced)
    _sync(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where kernel, C library or file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # musl before 1.2.5, or no Linux
        return False
    done: int = renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE)
    if done == 0:
        return True
    if ctypes.get_errno() in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(other))


@contextmanager
def _ending_signals_raise() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise SystemExit, so that what is begun is cleaned up; a program's own handlers stay."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = [number for number in ENDING_SIGNALS if signal.getsignal(number) == signal.SIG_DFL]
    for number in ours:
        signal.signal(number, _raise_exit)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _raise_exit(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _cannot_write(target: Path, error: OSError) -> ExportError:
    reason = error.strerror or str(error)
    if error.errno in NO_ROOM:
        return DiskSpaceError(f"{target} could not be written: {reason}; free some space, or choose another --out")
    where = f"{reason}: {error.filename}" if error.filename else reason
    return ExportError(f"{target} cannot be written ({where}); choose an --out in a folder of yours")
