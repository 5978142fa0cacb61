"""The incoming side: -incoming URI, -incoming defer and migrate-incoming.

A source on a socket is waited for, and read, on a thread; the VM comes up in one step on the main
loop, where no monitor's command comes in between.
"""

from __future__ import annotations

import os
import time
from _thread import allocate_lock, start_new_thread

from cpr import runstate
from cpr.constants import NS_PER_S
from cpr.errors import ConfigError, CprError, MigrationError
from cpr.faults import point
from cpr.migration import address as addresses
from cpr.migration import channel, loadvm
from cpr.migration.holder import check_not_abandoned, take_guest
from cpr.phases import mark
from cpr.ram_backend import claim
from cpr.report import carefully, error_report, unexpected
from cpr.state.reader import StreamError
from cpr.vcpus import VCPUS_FIRST

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cpr.machine import Machine
    from cpr.mainloop import MainLoop
    from cpr.migration.cpr_transfer import CprListener
    from cpr.migration.listener import Listener
    from cpr.migration.state import MigrationState
    from cpr.state.fds import PreservedFds

DEFER = "defer"
HAND_OVER_NS = 5 * NS_PER_S  # the source unlocks when its stream is out, a moment after its end
NO_THREAD = "cannot start a thread for the migration: raise RLIMIT_NPROC, pids.max or RLIMIT_AS"
PREFIX = "load of migration failed: "


class Sources:
    """What the -incoming options say.

    `main` is the main channel's address, "defer", or None for no -incoming at all, and `option`
    the option that said so; `cpr` is the cpr channel's address or None.
    """

    __slots__ = ("cpr", "main", "option")

    def __init__(self, options: Sequence[str]) -> None:
        """Raises CprError naming the option."""
        self.main: dict | str | None = None
        self.cpr: dict | None = None
        self.option = ""
        for option in options:
            if not is_channel(option):
                self.option = option
            if option == DEFER:
                self.main = DEFER
            elif is_channel(option):
                self._take_channel(option)
            else:
                try:
                    self.main = addresses.parse_uri(option)
                except MigrationError as error:
                    raise ConfigError(f"-incoming {option}: {error}") from None

    def _take_channel(self, option: str) -> None:
        from cpr.config.option_json import parse_channel

        parsed = parse_channel(option)
        assert parsed is not None
        try:
            address = addresses.check(parsed["addr"])
        except MigrationError as error:
            raise ConfigError(f"-incoming {option}: {error}") from None
        if parsed["channel-type"] == "cpr":
            self.cpr = address
        else:
            self.main = address
            self.option = option


def is_channel(option: str) -> bool:
    """True for JSON or keyval of a MigrationChannel, false for a URI."""
    return option.startswith(("{", "main,", "cpr,", "channel-type="))


class Incoming:
    """What this VMM does with a state that comes in.

    `expected` once -incoming was given, `started` once a load has begun.  `listener` is the cpr
    channel of a cpr-transfer: it is closed when a source can connect to the main channel.
    `claims`: the guest comes from another VMM, which may have it still.
    `commit()` is called when the guest has been loaded, just before it runs, and raises CprError
    where it is another image's, `hold(on)` while a load is waited for and when it begins,
    `refuse(reason)` where it fails and an old image can go on, and `on_running()` when the guest
    is as it was.
    """

    def __init__(
        self,
        machine: Machine,
        fds: PreservedFds,
        loop: MainLoop,
        handed: channel.Handed,
        state: MigrationState,
    ) -> None:
        self._machine = machine
        self._fds = fds
        self._loop = loop
        self._handed = handed
        self._state = state
        self.expected = False
        self.started = False
        self.start_paused = False
        self.listener: CprListener | None = None
        self.commit: Callable[[], None] = lambda: None
        self.hold: Callable[[bool], None] = lambda on: None
        self.refuse: Callable[[str], None] = lambda reason: None
        self.is_late = False
        self.claims = False
        self.on_running: Callable[[], None] = lambda: None
        self._address: dict | None = None
        self._closing = False
        self._source: Listener | channel.Channel | None = None
        self._thread_done = allocate_lock()

    def expect(self, start_paused: bool) -> None:
        """-incoming was given: the guest waits in runstate inmigrate.  `start_paused` is -S."""
        self.expected = True
        self.start_paused = start_paused
        self._machine.runstate.set(runstate.INMIGRATE)

    def load_now(self, address: dict) -> None:
        """Loads at start-up, before there are monitors.  Raises CprError; the VM is then lost.

        An address that cannot be opened raises ConfigError; the caller knows the option.
        """
        self.started = True
        try:
            source = channel.open_incoming(address, self._handed)
        except MigrationError as error:
            raise ConfigError(str(error)) from None
        self._load(source)

    def start(
        self,
        address: dict,
        exit_on_error: bool,
        before_hang_up: Callable[[], None] = lambda: None,
    ) -> None:
        """Waits for a source on a socket, or opens the channel, and loads.

        Raises MigrationError where it is refused, or cannot listen or be opened, and what
        `before_hang_up` raises: the last step, which a cpr-transfer's source must not miss.  After
        one that cannot be opened no other is taken, as in QEMU; but in a late update one is.
        """
        self.check()
        if self._state.status != "none":
            raise MigrationError(f"Illegal migration incoming state: {self._state.status}")
        self.hold(False)
        self._set_status("setup")
        self._address = address
        try:
            source = self._open(address)
        except MigrationError:
            if self.is_late:  # its guest stands still for that
                self._set_status("none")
                self._address = None
                self.hold(True)
            raise
        try:
            before_hang_up()
        except BaseException:
            source.shutdown()
            source.close()
            raise
        self._hang_up()
        self.started = True

        def begin() -> None:
            self._or_exit(lambda: self._begin(source, exit_on_error), exit_on_error)

        if isinstance(source, channel.Channel):
            # After this round of the loop: the answer to migrate-incoming goes out before `active`.
            self._loop.call_soon(begin)
        else:
            begin()

    def _open(self, address: dict) -> Listener | channel.Channel:
        if addresses.connects_in_background(address):
            from cpr.migration.listener import Listener

            return Listener(address)
        return channel.open_incoming(address, self._handed)

    def _begin(self, source: Listener | channel.Channel, exit_on_error: bool) -> None:
        """Loads a file; what may keep a reader waiting is read on a thread.  Raises CprError."""
        if isinstance(source, channel.Channel) and not source.waits:
            self._load(source)
            return
        self._source = source
        self._thread_done.acquire()
        try:
            start_new_thread(self._wait_and_read, (source, exit_on_error))
        except RuntimeError:
            self._thread_done.release()
            self._source = None
            source.shutdown()
            source.close()
            raise MigrationError(NO_THREAD) from None

    def check(self) -> None:
        """Raises MigrationError where migrate-incoming has no place."""
        if not self.expected:
            raise MigrationError("'-incoming' was not specified on the command line")
        if self.started:
            raise MigrationError("The incoming migration has already been started")

    def _wait_and_read(self, source: Listener | channel.Channel, exit_on_error: bool) -> None:
        """On a thread of its own: a source may say nothing for long, and monitors go on."""
        try:
            old_state = self._wait_for(source)
        except Exception as error:
            failure = error
            self._end_on_loop(lambda: self._fail(failure, exit_on_error))
        else:
            self._end_on_loop(
                lambda: self._or_exit(lambda: self._bring_up(old_state), exit_on_error)
            )
        finally:
            self._source = None
            self._thread_done.release()

    def _wait_for(self, source: Listener | channel.Channel) -> str:
        if not isinstance(source, channel.Channel):
            source = self._source = source.accept()
        if self._closing:  # which has not seen this source
            source.shutdown()
        return self._read_stream(source)

    def _end_on_loop(self, step: Callable[[], None]) -> None:
        if not self._closing:
            self._loop.call_soon(step)

    def close(self, timeout: float) -> None:
        """Ends a load that waits or reads, and waits so many seconds for that."""
        self._closing = True
        source = self._source
        if source is not None:
            source.shutdown()
        self._thread_done.acquire(timeout=timeout)

    def _hang_up(self) -> None:
        """Tells the source of a cpr-transfer that it can connect to the main channel."""
        if self.listener is not None:
            self.listener.close()

    def query(self) -> dict:
        """What query-migrate tells beside the status."""
        if self._address is None or self._state.status != "setup":
            return {}
        if self._address.get("transport") != "socket":
            return {}
        shown: dict = {k: v for k, v in self._address.items() if k != "transport"}
        if shown["type"] == "inet":
            shown["ipv6" if ":" in shown["host"] else "ipv4"] = True
        return {"socket-address": [shown]}

    def _set_status(self, status: str, error: str | None = None) -> None:
        self._state.error = error
        self._state.set(status)

    def _or_exit(self, step: Callable[[], None], exit_on_error: bool) -> None:
        try:
            step()
        except Exception as error:
            self._fail(error, exit_on_error)

    def _fail(self, error: Exception, exit_on_error: bool) -> None:
        text = str(error)
        if not isinstance(error, CprError):  # no state may leave a VMM that says "active" for ever
            text = f"{PREFIX}{unexpected(error)}"
        self._set_status("failed", text)
        if exit_on_error or self.is_late:  # its guest stands still, and goes on in the old VMM
            error_report(text)
            self.refuse(text)
            self._machine.request_exit(1)

    def take(self, load: Callable[[], str]) -> None:
        """Brings the VM up by what `load()` loads, which returns the state that the guest was in.

        On the main loop, or before it runs.
        """
        self._bring_up(self._read(load))

    def _load(self, source: channel.Channel) -> None:
        self._bring_up(self._read_stream(source))

    def _read_stream(self, source: channel.Channel) -> str:
        """Loads the stream and closes it; returns the state in which the guest was."""
        try:
            return self._read(
                lambda: loadvm.load(self._machine, self._state.capabilities, source),
                HAND_OVER_NS if source.waits else 0,  # no main loop waits for another VMM
            )
        except BaseException:
            source.shutdown()  # an exec: command may not be writing, and see nothing else
            raise
        finally:
            source.close()

    def _read(self, load: Callable[[], str], wait_ns: int = 0) -> str:
        """What `load` returns; waits at most `wait_ns` for who gives the guest away."""
        mark("load")
        self._set_status("active")
        try:
            ignored = self._state.capabilities.enabled("x-ignore-shared")
            if self.claims and self.listener is None and not ignored:
                claim(self._machine.blocks)  # of a guest that runs, nothing is written over
            old_state = load()
        except StreamError as error:
            for line in error.stderr:
                error_report(line)
            text = f"{PREFIX}{os.strerror(error.errno)}: {error}"
            raise MigrationError(text) from None
        self._fds.incoming = False
        if self.listener is not None:
            take_guest(self._machine.blocks, HAND_OVER_NS)
            check_not_abandoned(self._machine.blocks)
        if self.claims:
            self._machine.claim(wait_ns)
        return old_state

    def _bring_up(self, old_state: str) -> None:
        """The guest is this VMM's, and goes on."""
        point("commit")
        self.commit()
        for step in (  # there is nobody any more to go back to
            self._machine.take_over,
            lambda: mark("resume"),
            lambda: self._come_up(old_state),
            lambda: mark("run"),
            lambda: time.sleep(VCPUS_FIRST),
            lambda: self._set_status("completed"),
            self.on_running,
        ):
            carefully(step)

    def _come_up(self, old_state: str) -> None:
        machine = self._machine
        if old_state in runstate.LIVE and not self.start_paused:
            machine.cont()
        elif old_state in runstate.LIVE:
            machine.runstate.set(runstate.PAUSED)
        elif old_state in runstate.TRANSITIONS[runstate.INMIGRATE]:
            machine.runstate.set(old_state)
        else:
            machine.runstate.set(runstate.PAUSED)
