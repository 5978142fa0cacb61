"""The exceptions of cpr.

    CprError                 anything a user is told in one line; also QMP class GenericError
    ├── ConfigError          a command-line option, guest.cfg or image that cannot be used
    ├── KernelError          a system call that failed: names the call, the errno and the remedy
    ├── StateError           bytes that are not a CPR state or a migration stream
    ├── MigrationError       a migration that is refused or has failed
    └── CommandError         a monitor command that is refused
        └── CommandNotFound  QMP class CommandNotFound

The text of each is a whole sentence fit for stderr or a QMP `desc`; no class prefixes it.
"""

from __future__ import annotations

import os


class CprError(Exception):
    """An error with a text for the user.  `qmp_class` is the error class that QMP reports."""

    qmp_class = "GenericError"


class ConfigError(CprError):
    """An option, a configuration file or an image that cannot be used."""


class KernelError(CprError):
    """System call `operation` failed with `errno`; `remedy` tells the user what to do about it."""

    def __init__(self, operation: str, errno: int, remedy: str = "") -> None:
        self.operation = operation
        self.errno = errno
        self.remedy = remedy
        text = f"{operation}: {os.strerror(errno)}"
        super().__init__(f"{text}; {remedy}" if remedy else text)


class StateError(CprError):
    """Bytes that are not what a CPR state or a migration stream holds at that place."""


class MigrationError(CprError):
    """A migration that is refused, or has failed."""


class CommandError(CprError):
    """A monitor command that is refused."""


class DeviceNotActive(CommandError):
    """A monitor command for a device that there is not."""

    qmp_class = "DeviceNotActive"


class CommandNotFound(CommandError):
    """A monitor command that does not exist."""

    qmp_class = "CommandNotFound"
