"""What the VMM is asked to be: QEMU's command line and -readconfig files as a Config."""

from cpr.config.config import (
    ChardevConfig,
    Config,
    DeviceConfig,
    DriveConfig,
    MonitorConfig,
    NetdevConfig,
    ObjectConfig,
    parse_command_line,
    strip_options,
)

__all__ = [
    "ChardevConfig",
    "Config",
    "DeviceConfig",
    "DriveConfig",
    "MonitorConfig",
    "NetdevConfig",
    "ObjectConfig",
    "parse_command_line",
    "strip_options",
]
