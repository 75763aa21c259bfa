"""Writing files so that a crash leaves the old one or the new one, never half of either."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

from stages.errors import EdgeTrainError, OutputError, TransferError


def write_all(descriptor: int, data: bytes | memoryview, where: str = "output") -> None:
    """Write every byte to a file descriptor, however small the pieces it takes; `where` names it in errors.

    Raises:
        BrokenPipeError: the reader left.
        TransferError: a full disk or another failure half-way.
    """
    view = memoryview(data).cast("B")
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BrokenPipeError:
            raise
        except OSError as error:
            message = f"writing failed ({error.strerror})"
            raise TransferError(where, message, "", "free some space and run again") from error


def atomic_write(path: Path, data: bytes | memoryview, *, durable: bool = True) -> None:
    """Replace a file in one step: write beside it, sync, rename."""
    with AtomicFile(path, durable=durable) as file:
        file.write(data)


class AtomicFile:
    """A file that appears under its name only when the `with` block ends without an exception.

    Writing through a name that is not a regular file (a device, a fifo) goes straight there.

    Raises:
        OutputError: the file cannot be created.
        TransferError: writing, syncing or renaming failed; the old file is intact.
    """

    def __init__(self, path: Path, *, durable: bool = True) -> None:
        self.path = Path(os.path.realpath(path))
        self.durable = durable
        self.direct = self.path.exists() and not stat.S_ISREG(self.path.stat().st_mode)
        self.temporary = self.path if self.direct else self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            if self.path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            self.file: BinaryIO = self.temporary.open("wb", buffering=0)
        except OSError as error:
            raise OutputError(str(path), f"cannot be created ({error.strerror})", "a writable place") from error

    def __enter__(self) -> AtomicFile:
        return self

    def write(self, data: bytes | memoryview) -> None:
        write_all(self.file.fileno(), data, str(self.path))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            with contextlib.suppress(OSError):
                self.file.close()
            if not self.direct:
                self.temporary.unlink(missing_ok=True)

    def _commit(self) -> None:
        try:
            if self.durable and not self.direct:
                os.fsync(self.file.fileno())
            self.file.close()
            if not self.direct:
                if self.path.exists():
                    self.temporary.chmod(stat.S_IMODE(self.path.stat().st_mode))
                self.temporary.replace(self.path)
        except OSError as error:
            raise TransferError(str(self.path), f"writing failed ({error.strerror})") from error


def check_writable(path: Path) -> None:
    """Raise `OutputError` now if a file could not be created there later, so that no work is done in vain."""
    target = Path(os.path.realpath(path))
    folder = target.parent
    problem: EdgeTrainError | None = None
    if target.is_dir():
        problem = OutputError(str(path), "a folder", "a file name")
    elif not folder.is_dir():
        problem = OutputError(str(path), f"no folder {folder}", "an existing folder", f"mkdir -p {folder}")
    elif not os.access(target if target.exists() else folder, os.W_OK):
        problem = OutputError(str(path), "no permission to write", "a writable place")
    if problem is not None:
        raise problem


def check_folder(path: Path, mark: str) -> None:
    """Raise `OutputError` where a folder of files could not be written.

    A new, an empty or an earlier one is taken; `mark` is the file by which an earlier one is known.
    """
    if path.is_dir():
        if any(path.iterdir()) and not (path / mark).exists():
            raise OutputError(str(path), "a folder with other files", "a new folder, or one that was written before")
        if not os.access(path, os.W_OK):
            raise OutputError(str(path), "no permission to write", "a writable place")
    elif path.exists():
        raise OutputError(str(path), "a file", "a new folder, or one that was written before")
    else:
        check_writable(path)


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a folder: it appears with all of them; one that is there gets file after file."""
    if path.is_dir():
        for name, data in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path / name, data, durable=False)
        return
    with TemporaryDirectory(dir=path.absolute().parent, prefix=f".{path.name}-") as beside:
        new = Path(beside) / "new"
        for name, data in files.items():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            atomic_write(new / name, data, durable=False)
        os.rename(new, path)
