"""What has to be known before a program can be started, and the kernel's refusals in words."""

from __future__ import annotations

import errno
import os
import pwd
import shutil

from attrs import frozen

from supervise.errors import SpawnError
from supervise.processes.containment import Command


def find_program(command: Command) -> str:
    """The path of the program that `command` names.

    Raises:
        SpawnError: there is none, it cannot be executed, or the working directory is missing.
    """
    name = command.argv[0]
    if not os.path.isdir(command.cwd):
        raise SpawnError(
            name,
            "bad_cwd",
            f"{name!r} was not started: its working directory {command.cwd!r} is missing or no directory",
        )
    if "/" in name:
        path = os.path.join(command.cwd, name)
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
        exists = os.path.exists(path)
    else:
        search = command.env.get("PATH", os.defpath)
        found = shutil.which(name, path=search)
        if found is not None:
            return os.path.abspath(found)
        exists = shutil.which(name, mode=os.F_OK, path=search) is not None
    if exists:
        raise SpawnError(name, "not_executable", f"the program {name!r} cannot be executed; check its mode bits")
    where = "" if "/" in name else " on the PATH"
    raise SpawnError(
        name,
        "not_found",
        f"the program {name!r} was not found{where}; install it, or name another (agent.command, index.command)",
    )


@frozen
class User:
    """Whom to run a program as."""

    uid: int
    gid: int
    groups: tuple[int, ...]


def credentials(command: Command) -> User | None:
    """The user that `command` names; None for ours.

    Raises:
        SpawnError: there is none of this name, or we may not become it.
    """
    if command.user is None:
        return None
    name = command.argv[0]
    try:
        entry = pwd.getpwnam(command.user)
    except KeyError:
        raise SpawnError(name, "user", f"{name!r} was not started: there is no user {command.user!r} here") from None
    if entry.pw_uid == os.geteuid():
        return None
    if os.geteuid() != 0:
        raise SpawnError(
            name,
            "user",
            f"{name!r} was not started as {command.user!r}: only root may run programs as another user",
        )
    return User(entry.pw_uid, entry.pw_gid, tuple(os.getgrouplist(command.user, entry.pw_gid)))


def spawn_error(command: Command, error: OSError) -> SpawnError:
    """What the kernel said, in words that name the program."""
    name = command.argv[0]
    kinds = {
        errno.ENOENT: ("not_found", "was not found, or its interpreter (the #! line) is missing"),
        errno.ENOTDIR: ("not_found", "was not found"),
        errno.EACCES: ("not_executable", "may not be executed, or its directory may not be entered"),
        errno.EPERM: ("not_executable", "may not be executed"),
        errno.ENOEXEC: (
            "bad_format",
            "is no program: neither a binary of this machine nor a script with a #! line",
        ),
        errno.E2BIG: ("limit", "was given arguments and environment that are too large"),
        errno.EAGAIN: ("limit", "was not started: the limit of processes is reached"),
        errno.ENOMEM: ("limit", "was not started: no memory"),
        errno.EMFILE: ("limit", "was not started: this process has no file descriptor left"),
        errno.ENFILE: ("limit", "was not started: the system has no file descriptor left"),
    }
    kind, text = kinds.get(error.errno or 0, ("other", f"was not started: {error.strerror}"))
    return SpawnError(name, kind, f"the program {name!r} {text}")
