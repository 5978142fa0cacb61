"""What the devices of -device are made with; pc.Board is it.  For type checking only."""

from __future__ import annotations

from typing import Any, Protocol

from cpr.accel.base import Accelerator, VCpu
from cpr.config import DriveConfig, NetdevConfig
from cpr.devices.base import Device
from cpr.devices.iommufd import IommufdBackend
from cpr.devices.pci import PciHost
from cpr.devices.vfio import Type1
from cpr.state.fds import PreservedFds


class BoardMachine(Protocol):
    """The machine; `frontends` are devices with the ids of their chardevs."""

    devices: list[Device]
    vcpus: list[VCpu]
    frontends: list[tuple[Any, str | None]]

    @property
    def accel(self) -> Accelerator: ...
    def add_device(self, device: Device) -> None: ...


class Board(Protocol):
    """The machine, and what several devices share, made when the first one asks for it."""

    @property
    def fds(self) -> PreservedFds: ...
    @property
    def machine(self) -> BoardMachine: ...
    @property
    def ram_size(self) -> int:
        """Bytes, of -m."""

    @property
    def is_incoming(self) -> bool:
        """Whether the guest comes from elsewhere, and another VMM may yet have it."""

    def take_drive(self, name: str, owner: str) -> DriveConfig:
        """The -drive of this id, for one device; errors name `owner`.  Raises ConfigError."""

    def take_netdev(self, name: str, owner: str) -> tuple[NetdevConfig, int]:
        """The -netdev of this id, for one card, and how many were taken before it."""

    def pci_host(self) -> PciHost: ...
    def type1(self) -> Type1: ...
    def iommufd(self, identifier: str) -> IommufdBackend: ...
