"""-run-with: the privileges and the root that a VMM gives up before its guest runs.

They stay given up over an exec: a new image finds what was done in the environment, does only what
its own command asks for besides, and an update that cannot work there is refused before anything
stops.
"""

from __future__ import annotations

import errno
import os
from importlib import import_module

from cpr.config import parse_command_line
from cpr.config.drive_options import VIRTIO
from cpr.constants import U32_LIMIT
from cpr.errors import ConfigError, CprError, KernelError
from cpr.migration.program import VERB, check_command, own_command

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

    from cpr.config import ChardevConfig, Config
    from cpr.machine import Machine

DONE = "CPR_RUN_WITH"
"""The variable with what was given up: USER/DIR, of which either may be empty."""

LATER = ("cpr.live.token", "encodings.idna", "subprocess", "traceback")
"""What is imported in functions, or by Python itself, beside what every VMM has by then."""

Account = tuple[str, int, int]
"""A user's name, empty where numbers were given, uid and gid."""


class RunWith:
    """What -run-with of this VMM's command line asks for, and is not so already."""

    def __init__(self, options: dict[str, Any], after_exec: bool) -> None:
        """`options` is Config.run_with.  Raises ConfigError for a user that there is not."""
        self.after_exec = after_exec
        done = os.environ.get(DONE, "") if after_exec else ""
        self._user, _, self._root = done.partition("/")
        self._account: Account | None = None
        self._new_root: str | None = None
        self._exits_with_parent = bool(options.get("exit-with-parent"))
        root, user = options.get("chroot"), options.get("user")
        if root is not None and (root != self._root or not after_exec):
            self._new_root = self._root = root
        if user is not None and (user != self._user or not after_exec):
            self._account, self._user = find_account(user), user
            if self._account is None:
                where = options["location"]
                given = where.removeprefix("-run-with ")
                raise ConfigError(
                    f'{where}: User "{given}" doesn\'t exist (and is not <uid>:<gid>)'
                )

    def apply(self, machine: Machine) -> None:
        """Gives them up, for good.  Raises CprError; what was given up before stays so."""
        if self._new_root is not None or self._account is not None:
            machine.keep_boot_image()
        if self._new_root is not None:
            from cpr.uapi.process import keep_libraries

            keep_libraries()
            for name in LATER:
                import_module(name)
            try:
                os.chroot(self._new_root)
                os.chdir("/")
            except (OSError, ValueError) as error:
                raise _failed("chroot failed", error) from None
        if self._account is not None:
            _become(*self._account)
        if self._exits_with_parent:  # last, as a change of the user takes it back
            from cpr.uapi.process import end_with_parent

            end_with_parent()
        if self._root or self._user:
            os.environ[DONE] = f"{self._user}/{self._root}"
        else:
            os.environ.pop(DONE, None)

    def owns(self, fd: int) -> None:
        """Gives the file to the user that this VMM becomes, so that it may still write to it."""
        if self._account is not None:
            os.fchown(fd, self._account[1], self._account[2])


def find_account(text: str) -> Account | None:
    """The account of a user's name or of UID:GID, or None."""
    import pwd

    try:
        entry = pwd.getpwnam(text)
    except (KeyError, ValueError):
        uid, colon, gid = text.partition(":")
        numbers = (_number(uid), _number(gid)) if colon else (-1, -1)
        return ("", *numbers) if min(numbers) >= 0 else None
    return (text, entry.pw_uid, entry.pw_gid)


def _number(text: str) -> int:
    """A number as strtoul(3) reads it, but 2^32 - 1, which stands for none; -1 where it is none."""
    digits = text.lstrip(" \t\n\v\f\r").removeprefix("+")
    if not (digits.isascii() and digits[:1].isdigit() and digits.isalnum()):
        return -1
    try:
        number = int(digits, 8 if digits[0] == "0" and digits.isdigit() else 0)
    except ValueError:
        return -1
    return number if number < U32_LIMIT - 1 else -1


def _become(name: str, uid: int, gid: int) -> None:
    step = f"Failed to setgid({gid})"
    try:
        os.setgid(gid)
        if name:
            step = f'Failed to initgroups("{name}", {gid})'
            os.initgroups(name, gid)
        else:
            step = f"Failed to setgroups(1, [{gid}])"
            os.setgroups([gid])
        step = f"Failed to setuid({uid})"
        os.setuid(uid)
    except OSError as error:
        raise _failed(step, error) from None
    if uid != 0:
        try:
            os.setuid(0)
        except OSError:
            return
        raise ConfigError("Dropping privileges failed")


def _failed(what: str, error: OSError | ValueError) -> CprError:
    if isinstance(error, ValueError):
        return ConfigError(f"{what}: {error}")
    remedy = "only root may: start the VMM as root" if error.errno == errno.EPERM else ""
    return KernelError(what, error.errno or 0, remedy)


def obstacles(command: Sequence[str], accel: str) -> list[str]:
    """Why an update with `command`, if it is known, could not work with what is not there, or has
    been given up.
    """
    if DONE not in os.environ or not command:
        return list(_no_proc())
    user, _, root = os.environ[DONE].partition("/")
    place = ",".join([f"chroot={root}"] * bool(root) + [f"user={user}"] * bool(user))
    reasons = dict.fromkeys(_obstacles(list(command), accel))
    return [f"under -run-with {place} {reason}" for reason in reasons]


def _obstacles(command: list[str], accel: str) -> Iterator[str]:
    yield from check_command(command)
    yield from _no_proc()
    if accel == "kvm":
        yield from _inaccessible("/dev/kvm", os.R_OK | os.W_OK)
    own = own_command()
    if VERB not in command or command[: command.index(VERB)] != own[: own.index(VERB)]:
        return  # another program: what its options mean, it knows
    try:
        config = parse_command_line(command[command.index(VERB) + 1 :])
    except CprError as error:
        yield f"the new VMM would refuse its command line: {error}"
        return
    yield from _unusable(config)
    if config.pidfile and os.environ[DONE].partition("/")[2]:
        yield from _inaccessible(config.pidfile, os.W_OK)


def _no_proc() -> Iterator[str]:
    if not os.path.exists("/proc/self/exe"):
        yield "there is no /proc, in which an update finds its descriptors"


def _unusable(config: Config) -> Iterator[str]:
    """The files of a command line that cannot be opened again; descriptors of disks go over."""
    booted = [drive.file for drive in config.drives if drive.interface != VIRTIO]
    for path in (config.kernel, config.initrd, *booted):
        if path:
            for text in _inaccessible(path, os.R_OK):
                yield f"{text}, and a reset would boot from it"
    for chardev in config.chardevs:
        yield from _unmakable(chardev)


def _unmakable(chardev: ChardevConfig) -> Iterator[str]:
    path = str(chardev.options.get("path", ""))
    if chardev.backend == "socket" and path:
        if chardev.options.get("server"):  # the old socket is unlinked, a new one bound
            yield from _inaccessible(os.path.dirname(path) or ".", os.W_OK | os.X_OK)
        return
    if chardev.backend == "file":
        there = os.path.exists(path)
        yield from _inaccessible(path if there else os.path.dirname(path) or ".", os.W_OK)
    elif chardev.backend == "pty":
        yield from _inaccessible("/dev/ptmx", os.R_OK | os.W_OK)


def _inaccessible(path: str, how: int) -> Iterator[str]:
    if not os.path.exists(path):
        yield f"'{path}' is not there"
    elif not os.access(path, how):
        yield f"'{path}' may not be {'written' if how & os.W_OK else 'read'}"
