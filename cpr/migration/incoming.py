"""The incoming side: -incoming URI, -incoming defer and migrate-incoming."""

from __future__ import annotations

import os
import sys
from _thread import start_new_thread

from cpr import runstate
from cpr.errors import ConfigError, CprError, MigrationError
from cpr.migration import channel, savevm
from cpr.state.reader import StreamError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from cpr.migration.migration import Migration

DEFER = "defer"
PREFIX = "load of migration failed: "


def incoming_source(options: Sequence[str]) -> dict | str | None:
    """What the -incoming options say: the main channel's address, "defer", or None for nothing.

    Raises CprError naming the option.
    """
    source: dict | str | None = None
    for option in options:
        if option == DEFER:
            source = DEFER
        elif is_channel(option):
            from cpr.config.option_json import parse_channel

            parsed = parse_channel(option)
            assert parsed is not None
            if parsed["channel-type"] == "cpr":
                raise ConfigError(
                    f"-incoming {option}: a 'cpr' channel needs mode cpr-transfer, which is not "
                    "supported"
                )
            source = channel.check(parsed["addr"])
        else:
            try:
                source = channel.parse_uri(option)
            except MigrationError as error:
                raise ConfigError(f"-incoming {option}: {error}") from None
    return source


def is_channel(option: str) -> bool:
    """True for JSON or keyval of a MigrationChannel, false for a URI."""
    return option.startswith(("{", "main,", "cpr,", "channel-type="))


class Incoming:
    """What this VMM does with a state that comes in.  `expected` once -incoming was given.

    `on_fatal(text)` ends the process; it is called on the main loop's thread or, for a load in
    the background, through it.
    """

    def __init__(self, migration: Migration) -> None:
        self._migration = migration
        self.expected = False
        self.started = False
        self.start_paused = False

    def expect(self, start_paused: bool) -> None:
        """-incoming was given: the guest waits in runstate inmigrate.  `start_paused` is -S."""
        self.expected = True
        self.start_paused = start_paused
        self._migration.machine.runstate.set(runstate.INMIGRATE)

    def load_now(self, address: dict) -> None:
        """Loads at start-up, before there are monitors.  Raises CprError; the VM is then lost."""
        self.started = True
        source = channel.open_incoming(address, self._migration.find_fd)
        self._load(source)

    def start(self, address: dict, exit_on_error: bool) -> None:
        """migrate-incoming.  Raises MigrationError where it is refused or cannot be opened."""
        if not self.expected:
            raise MigrationError("'-incoming' was not specified on the command line")
        if self.started:
            raise MigrationError("The incoming migration has already been started")
        status = self._migration.status
        if status != "none":
            raise MigrationError(f"Illegal migration incoming state: {status}")
        self._migration.set_incoming_status("setup")
        if channel.connects_in_background(address):
            self.started = True
            start_new_thread(self._wait_and_load, (address, exit_on_error))
            return
        source = channel.open_incoming(address, self._migration.find_fd)
        self.started = True
        # After this round of the loop: the answer to migrate-incoming goes out before `active`.
        self._migration.loop.call_soon(lambda: self._load_or_exit(source, exit_on_error))

    def _wait_and_load(self, address: dict, exit_on_error: bool) -> None:
        try:
            source = channel.open_incoming(address, self._migration.find_fd)
        except CprError as error:
            text = str(error)
            self._migration.loop.call_soon(lambda: self._fail(text, exit_on_error))
            return
        self._migration.loop.call_soon(lambda: self._load_or_exit(source, exit_on_error))

    def _load_or_exit(self, source: channel.Channel, exit_on_error: bool) -> None:
        try:
            self._load(source)
        except CprError as error:
            self._fail(str(error), exit_on_error)

    def _fail(self, text: str, exit_on_error: bool) -> None:
        self._migration.set_incoming_status("failed", text)
        print(f"cpr-vmm: {text}", file=sys.stderr)
        if exit_on_error:
            self._migration.machine.on_exit(1)

    def _load(self, source: channel.Channel) -> None:
        """Loads the stream and brings the VM up as it was."""
        migration = self._migration
        migration.set_incoming_status("active")
        try:
            old_state = savevm.load(migration.machine, migration.capabilities, source.read)
        except StreamError as error:
            for line in error.stderr:
                print(f"cpr-vmm: {line}", file=sys.stderr)
            text = f"{PREFIX}{os.strerror(error.errno)}: {error}"
            raise MigrationError(text) from None
        finally:
            source.close()
        migration.fds.incoming = False
        self._come_up(old_state)
        migration.set_incoming_status("completed")

    def _come_up(self, old_state: str) -> None:
        machine = self._migration.machine
        if old_state in runstate.LIVE and not self.start_paused:
            machine.cont()
        elif old_state in runstate.LIVE:
            machine.runstate.set(runstate.PAUSED)
        elif old_state in runstate.TRANSITIONS[runstate.INMIGRATE]:
            machine.runstate.set(old_state)
        else:
            machine.runstate.set(runstate.PAUSED)
