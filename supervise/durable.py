"""Files that are whole or absent, and that stay after a power cut where that matters. Blocking calls, no Trio."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from pathlib import Path


def replace(path: Path, data: bytes, *, durable: bool, mode: int = 0o600) -> None:
    """Write `data` to `path` so that a reader sees the old file or the new one, never a part.

    Args:
        path: the file.
        data: its whole new content.
        durable: the new file is on the disk when this returns (fsync of file and directory).
        mode: of the new file, before the umask takes from it.

    Raises:
        OSError: the old file is still there, and no part of the new one.
    """
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
        with open(descriptor, "wb", buffering=0) as file:
            view = memoryview(data)
            while view:  # an unbuffered write may be short
                view = view[file.write(view) :]
            if durable:
                os.fsync(file.fileno())
        new.rename(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # on a disk that is read-only, also if it is not there
            new.unlink(missing_ok=True)
        error.filename, error.filename2 = os.fspath(path), None  # the other name is another one each time
        raise
    if durable:
        sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Put the names in a directory on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_private(path: Path) -> None:
    """Make a directory and its parents; nobody else may look into the last one, which must be no link.

    Raises:
        OSError: it cannot be made, or is there and a link, or belongs to somebody else.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, f"{path} is a link; a directory has to be there", str(path))
    if found.st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, f"{path} belongs to another user (uid {found.st_uid})", str(path))
    if stat.S_IMODE(found.st_mode) & 0o077:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.fchmod(descriptor, 0o700)
        finally:
            os.close(descriptor)


def rename_new(old: Path, new: Path) -> None:
    """Rename, but never over something that is there: renameat2(2) with RENAME_NOREPLACE.

    Where kernel or file system has no such call (NFS), it looks first and renames then.

    Raises:
        FileExistsError: `new` is there.
        OSError: as of a rename.
    """
    error = _renameat2(os.fsencode(old), os.fsencode(new))
    if error in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        if os.path.lexists(new):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(old), None, str(new))
        old.rename(new)
    elif error:
        raise OSError(error, os.strerror(error), str(old), None, str(new))


def _renameat2(old: bytes, new: bytes) -> int:
    """The call; returns 0, or errno."""
    import ctypes

    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):  # a C library without it
        return errno.ENOSYS
    at_cwd, no_replace = -100, 1
    return 0 if call(at_cwd, old, at_cwd, new, no_replace) == 0 else ctypes.get_errno()
