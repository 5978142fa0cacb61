"""virtconsole: the port of a virtio-serial-pci, which is a console to Linux."""

from __future__ import annotations

from cpr.devices.virtio.serial import create_console as create

__all__ = ["create"]
