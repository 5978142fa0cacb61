"""The registry of preserved file descriptors, which live on in the new image after an exec.

Whoever needs a descriptor that must survive calls `open` with a name and an id: it is opened and
saved, or in the new image found, by the same code.  The registry never closes a
descriptor that was saved: it stays with the object that uses it, which deletes it from here
before closing it.  Preserved descriptors are close-on-exec, so that no other program that is
started gets them; the exec of an update alone clears that, after the clone.
"""

from __future__ import annotations

import os

from cpr import mapped
from cpr.constants import STDERR
from cpr.errors import KernelError, StateError
from cpr.state.cpr_state import REMEDY, STATE_NAME, CprState, VfioDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, MutableMapping

MAX_SIZE = 16 << 20
"""More than any state has, in bytes; less than the guest RAM that a wrong number may lead to."""


class PreservedFds:
    """The preserved fds by (name, id), and the VFIO devices that go over with them.

    `incoming` is true from a successful load on, until the machine, when it has taken over
    everything, sets it to false.  `state_fd` is the memfd of the state while it is persisted,
    else -1; it is the registry's own.
    """

    def __init__(self) -> None:
        self.incoming = False
        self.state_fd = -1
        self.vfio_devices: list[VfioDevice] = []
        self._fds: list[tuple[str, int, int]] = []
        self._files: list[tuple[str, int, int]] = []
        self._taken: set[tuple[str, int]] = set()
        self._came: frozenset[tuple[str, int]] = frozenset()
        self._serials: dict[tuple[str, int], int] = {}
        self._saves = 0
        self._persisted = b""

    def save(self, name: str, id: int, fd: int) -> None:
        """Adds `fd`, which stays the caller's.  Raises ValueError if (name, id) is there."""
        if self.find(name, id) is not None:
            raise ValueError(f"cpr fd '{name}' id {id} is already saved")
        self._fds.append((name, id, fd))
        self._saves += 1
        self._serials[name, id] = self._saves

    def save_file(self, name: str, id: int, fd: int) -> None:
        """Adds `fd`, which stays the caller's, for programs that do not open its file again: it is
        no part of QEMU's state."""
        self._files.append((name, id, fd))

    def take_file(self, name: str, id: int) -> int | None:
        """The fd that another image has saved so, from now on the caller's, or None."""
        fd = self.find(name, id)
        self.delete(name, id)
        self._taken.add((name, id))
        return fd

    def find(self, name: str, id: int) -> int | None:
        """The fd saved under (name, id), or None.  After a load its finder becomes its owner.

        Of several in a state that was loaded, it is the first.
        """
        for each_name, each_id, fd in self._fds:
            if each_name == name and each_id == id:
                return fd
        return None

    def delete(self, name: str, id: int) -> None:
        """The inverse of `save`; the fd stays open.  An unknown (name, id) is ignored."""
        self._fds = [entry for entry in self._fds if entry[:2] != (name, id)]
        self._came -= {(name, id)}

    def came(self, name: str, id: int) -> bool:
        """Whether the fd is one that came with a CPR state, and what it is for exists already."""
        return self.incoming and (name, id) in self._came

    def require(self, name: str, id: int, remedy: str) -> None:
        """Raises StateError where there was a CPR state, and this is not in it."""
        if self.incoming and not self.came(name, id):
            raise StateError(f"the CPR state has no descriptor '{name}' id {id}: {remedy}")

    def open(self, name: str, id: int, opener: Callable[[], int]) -> int:
        """The fd saved under (name, id), or else a new one from `opener`, saved.

        The caller owns it.  What `opener` raises passes through; then nothing is saved.
        """
        fd = self.find(name, id)
        if fd is None:
            fd = opener()
            self.save(name, id, fd)
        return fd

    def entries(self, files: bool = False) -> list[tuple[str, int, int]]:
        """All (name, id, fd), in the order in which they were saved, and then those of files."""
        return [*self._fds, *(self._files if files else ())]

    def serials(self) -> dict[tuple[str, int], int]:
        """A number for each (name, id), another one where another descriptor has got the name."""
        return {(name, id): self._serials.get((name, id), 0) for name, id, _ in self._fds}

    def state(self, files: bool = False) -> CprState:
        """What a new image, or another process, is given; `files` as for `entries`."""
        return CprState(self.entries(files), list(self.vfio_devices))

    def persist(self, environ: MutableMapping[str, str] = os.environ) -> int:
        """Writes the state to a memfd, names it in `environ`, and returns it.

        The memfd is close-on-exec and stays the registry's; its offset is at its end.  Raises
        KernelError; then nothing has changed.
        """
        if self.state_fd >= 0:
            raise ValueError("the CPR state is persisted already")
        data = self.state().encode()
        fd = _state_memfd(data)
        environ[STATE_NAME] = str(fd)
        self.state_fd = fd
        self._persisted = data
        return fd

    def refresh(self, files: bool = False) -> None:
        """Makes the state's memfd another one under its number, where the state is another now.

        A device may have opened or closed a descriptor since `persist`, while the guest still
        ran.  Raises KernelError.
        """
        data = self.state(files).encode()
        if data == self._persisted:
            return
        fd = _state_memfd(data)
        os.dup2(fd, self.state_fd, inheritable=os.get_inheritable(self.state_fd))
        os.close(fd)
        self._persisted = data

    def unpersist(self, environ: MutableMapping[str, str] = os.environ) -> None:
        """The inverse of `persist`: closes the memfd and unsets the variable, if there are any."""
        environ.pop(STATE_NAME, None)
        if self.state_fd >= 0:
            os.close(self.state_fd)
            self.state_fd = -1

    def load(self, fd: int) -> None:
        """Takes over the state in `fd`, from its beginning, and makes its fds close-on-exec.

        `fd` is closed, on success and on failure.  Raises StateError for a state that is not
        valid or names a descriptor that is not open; then the registry is as it was, and no
        other descriptor has been closed.
        """
        self.take_over(CprState.decode(_read_and_close(fd)))

    def take_over(self, state: CprState) -> None:
        """Takes over a state that was received, and makes its fds close-on-exec.

        Raises StateError where one is not open; then the registry is as it was.
        """
        for name, id, preserved in state.fds:
            try:
                os.set_inheritable(preserved, False)
            except OSError as error:
                raise StateError(_not_open(name, id, preserved)) from error
        self._fds = state.fds
        self._came = frozenset((name, id) for name, id, _ in state.fds)
        self.vfio_devices = state.vfio_devices
        self.incoming = True

    def replace(self, state: CprState, renewed: Collection[tuple[str, int]] = ()) -> None:
        """Takes over a later version of a state that was taken over before.

        Descriptors that are here already stay as they are, and their copies are closed, but for
        the `renewed`, which are others now.  Those and the ones that the new state has not any more
        are closed here, for nobody has taken them.
        """
        known = {(name, id): fd for name, id, fd in self._fds}
        entries = []
        for name, id, fd in state.fds:
            if (name, id) in self._taken:
                os.close(fd)
                continue
            old = -1 if (name, id) in renewed else known.pop((name, id), -1)
            if old >= 0:
                os.close(fd)
            entries.append((name, id, fd if old < 0 else old))
        for fd in known.values():
            os.close(fd)
        self._fds = entries
        self._came = frozenset((name, id) for name, id, _ in entries)
        self.vfio_devices = state.vfio_devices

    def load_from_environment(self, environ: MutableMapping[str, str] = os.environ) -> bool:
        """Loads the state that `environ` names and unsets the variable; False if it names none.

        Raises StateError for a variable that is not a number, and as `load` does.
        """
        value = environ.pop(STATE_NAME, None)
        if value is None:
            return False
        try:
            fd = int(value)
            if not -(1 << 31) <= fd < 1 << 31:
                raise ValueError
        except ValueError:
            text = f"{STATE_NAME}='{value}' is not the number of a descriptor; {REMEDY}"
            raise StateError(text) from None
        if 0 <= fd <= STDERR:  # of a state these are never it, and what is to be said goes there
            try:
                fd = os.dup(fd)
            except OSError:
                fd = -1
        self.load(fd)
        return True


def _state_memfd(data: bytes) -> int:
    """A close-on-exec memfd with `data`, as QEMU's one that takes no seals.  Raises KernelError."""
    try:
        fd = os.memfd_create(STATE_NAME)
    except OSError as error:
        raise KernelError("memfd_create", error.errno or 0) from error
    try:
        write_memfd(fd, data)
    except OSError as error:
        os.close(fd)
        raise KernelError(f"write to memfd {STATE_NAME}", error.errno or 0) from error
    return fd


def _read_and_close(fd: int) -> bytes:
    """The content of a memfd, whatever its offset; nothing where there is no such fd."""
    try:
        data = os.pread(fd, min(os.fstat(fd).st_size, MAX_SIZE), 0)
    except OSError:
        data = b""
    try:
        os.close(fd)
    except OSError:
        pass
    return data


def write_memfd(fd: int, data: bytes) -> None:
    """Makes `data` the content of a small memfd, whose offset is at its end then.  Raises OSError.

    Through a mapping: where the kernel gives transparent huge pages to all memfds, a write(2)
    would have it clear one, which keeps a CPU for milliseconds.
    """
    import mmap  # not in the new image, whose guest may wait

    os.ftruncate(fd, len(data))
    if data:
        with mmap.mmap(fd, len(data)) as view:
            mapped.populate(view, fd)
            view[:] = data
    os.lseek(fd, 0, os.SEEK_END)


def _not_open(name: str, id: int, fd: int) -> str:
    return f"CPR fd '{name}' id {id}: descriptor {fd} is not open; {REMEDY}"
