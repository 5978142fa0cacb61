"""What fork() does not give a child of the relations between processes (prctl(2)), without the C
part."""

from __future__ import annotations

# linux/prctl.h
PR_SET_PDEATHSIG, PR_GET_PDEATHSIG = 1, 2
PR_SET_CHILD_SUBREAPER, PR_GET_CHILD_SUBREAPER = 36, 37


class Parentage:
    """The signal at the parent's death and whether orphans come to this process, as they are."""

    def __init__(self) -> None:
        self._death_signal = _get(PR_GET_PDEATHSIG)
        self._subreaper = _get(PR_GET_CHILD_SUBREAPER)

    def give_orphans(self) -> None:
        """In a child that goes on in this process's place."""
        _prctl(PR_SET_CHILD_SUBREAPER, self._subreaper)

    def give_parent(self) -> None:
        """As `give_orphans`, when the child has the parent that this process had."""
        _prctl(PR_SET_PDEATHSIG, self._death_signal)


def _prctl(option: int, argument: object) -> None:
    import ctypes

    ctypes.CDLL(None).prctl(ctypes.c_int(option), argument, 0, 0, 0)


def _get(option: int) -> int:
    import ctypes

    value = ctypes.c_int(0)
    _prctl(option, ctypes.byref(value))
    return value.value
