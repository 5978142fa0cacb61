"""What is measured: one case for each VMM mode, accelerator, RAM size, page size and backing."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import psutil

from cpr.constants import GIB, MIB, PAGE_SIZE

UNITS = {"M": MIB, "G": GIB}

# From the longest pause to the shortest; the plots and tables keep this order.
MODES = ("qemu", "late", "early")
# A guest that only computes, and one that uses a device in each step.
GUESTS = ("heartbeat", "ports")
ACCELS = ("kvm", "tcg")
PAGES = ("4K", "THP", "2M", "1G")
BACKINGS = ("lazy", "prealloc")
RAM = ("64M", "256M", "1G", "4G", "8G", "16G")
PAGE_SIZES = {"4K": PAGE_SIZE, "THP": PAGE_SIZE, "2M": 2 * MIB, "1G": GIB}
HUGETLB = ("2M", "1G")
OVERHEAD = 160 * MIB  # a VMM process without its guest's RAM, and what it needs to start


def parse_size(text: str) -> int:
    """Bytes of a size such as 256M or 4G.  Raises ValueError naming it."""
    number, unit = text[:-1], text[-1:].upper()
    if unit not in UNITS or not number.isdecimal() or int(number) == 0:
        raise ValueError(f"'{text}' is no size: write it as 256M or 4G")
    return int(number) * UNITS[unit]


def size_text(size: int) -> str:
    return f"{size // GIB}G" if size % GIB == 0 else f"{size // MIB}M"


@dataclass(frozen=True)
class Case:
    """One thing to measure: `ram` in bytes, the others as in MODES, ACCELS, PAGES and so on."""

    mode: str
    accel: str
    ram: int
    pages: str
    backing: str
    guest: str = GUESTS[0]

    @property
    def label(self) -> str:
        words = (self.accel, size_text(self.ram), self.pages, self.backing, self.guest, self.mode)
        return " ".join(words)

    @property
    def series(self) -> tuple[str, str, str, str, str]:
        """What cases that differ in RAM size alone have in common."""
        return self.mode, self.accel, self.pages, self.backing, self.guest

    @property
    def hugetlb(self) -> bool:
        return self.pages in HUGETLB

    def memory(self, touched: bool = False) -> int:
        """The bytes of memory that it takes; of lazy RAM none if the guest has not touched it."""
        taken = touched or self.hugetlb or self.backing == "prealloc"
        return OVERHEAD + (self.ram if taken else 0)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Case:
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})


def grid(
    modes: list[str],
    accels: list[str],
    ram: list[int],
    pages: list[str],
    backings: list[str],
    guests: list[str],
) -> list[list[Case]]:
    """Groups of the cases that are compared: they differ in the mode alone."""
    return [
        [Case(mode, accel, size, page, backing, guest) for mode in modes]
        for accel, size, page, backing, guest in product(accels, ram, pages, backings, guests)
    ]


def kvm_is_usable() -> bool:
    return os.access("/dev/kvm", os.R_OK | os.W_OK)


def obstacle(case: Case, touched: bool = False) -> str | None:
    """Why this machine cannot run the case, as far as one can tell without a try."""
    if case.accel == "kvm" and not kvm_is_usable():
        return "/dev/kvm is not there, or not for this user"
    if case.ram % PAGE_SIZES[case.pages]:
        return f"RAM is no multiple of {case.pages} pages"
    if (need := case.memory(touched)) > (available := available_memory()):
        return f"needs {need / GIB:.1f} GiB of memory, {available / GIB:.1f} are available"
    return None


def available_memory() -> int:
    """Bytes of memory that can be had."""
    return psutil.virtual_memory().available


def batches(cases: list[Case], memory: int, touched: bool = False) -> list[list[Case]]:
    """Splits a group into runs of cases whose VMs fit into `memory` bytes at the same time."""
    found: list[list[Case]] = []
    for case in cases:
        if found and sum(each.memory(touched) for each in (*found[-1], case)) <= memory:
            found[-1].append(case)
        else:
            found.append([case])
    return found
