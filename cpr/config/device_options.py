"""-device and -global: the devices besides the board's own, and defaults for their properties."""

from __future__ import annotations

from cpr.config.device_table import DEVICES
from cpr.config.option_values import INT, JSON, KEYVAL, STRING, error, parse_property
from cpr.config.record import Record
from cpr.constants import U32_LIMIT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cpr.config.frontend_options import ChardevTable
    from cpr.config.option_values import Kind
    from cpr.config.options import OptionGroup

MIGRATION = "migration"  # the -global driver of the migration's own properties

GLOBAL_KEYS: dict[str, Kind] = {"driver": STRING, "property": STRING, "value": STRING}


class DeviceConfig(Record):
    """One -device.  `properties` are as QEMU names them: of the devices in DEVICES int, bool or
    str by type, of others str (or JSON's values); `id` is None where none was given; `location` is
    what an error about it begins with.
    """

    __slots__ = ("driver", "id", "properties", "location")  # noqa: RUF023 - constructor's order
    driver: str
    id: str | None
    properties: dict[str, Any]
    location: str

    def __init__(
        self, driver: str, id: str | None, properties: dict[str, Any], location: str = ""
    ) -> None:
        self._fill(driver, id, properties, location)


def split_global(argument: str) -> dict[str, str] | None:
    """`driver.property=value` as the keys of the long form; None where it is not this form."""
    name, equals, value = argument.partition("=")
    driver, _, name = name.partition(".")
    if not (equals and driver and name) or "," in driver:
        return None
    return {"driver": driver, "property": name, "value": value}


def parse_global(group: OptionGroup) -> tuple[str, str, str]:
    """(driver, property, value).  Raises ConfigError."""
    values = group.typed(GLOBAL_KEYS)
    if len(values) < len(GLOBAL_KEYS):
        raise group.error("options 'driver', 'property', and 'value' are required")
    return values["driver"], values["property"], values["value"]


def parse_devices(
    groups: list[OptionGroup],
    defaults: tuple[tuple[str, str, str], ...],
    chardevs: ChardevTable,
    warnings: list[str],
) -> tuple[DeviceConfig, ...]:
    """The devices; `defaults` are the globals (driver, property, value).  Raises ConfigError."""
    devices = tuple(_parse_device(group, defaults, chardevs) for group in groups)
    drivers = {device.driver for device in devices}
    for driver, name, value in defaults:
        if driver != MIGRATION and driver not in drivers:
            warnings.append(f"warning: global {driver}.{name}={value} not used")
    return devices


def _parse_device(
    group: OptionGroup, defaults: tuple[tuple[str, str, str], ...], chardevs: ChardevTable
) -> DeviceConfig:
    group.check_id()
    values = dict(group.values)
    identifier = values.pop("id", None)
    driver = values.pop("driver", None)
    if driver is None:
        raise group.error("Parameter 'driver' is missing")
    if not isinstance(driver, str):
        raise group.error("Invalid parameter type for 'driver', expected: string")
    properties = {}
    for default_driver, name, value in defaults:
        if default_driver == driver:
            location = f"{group.location}: can't apply global {driver}.{name}={value}"
            properties[name] = _parse(driver, name, value, KEYVAL, location)
    dialect = JSON if group.dialect == JSON else KEYVAL
    for name, value in values.items():
        properties[name] = _parse(driver, name, value, dialect, group.location)
    model = DEVICES.get(driver)
    if isinstance(properties.get("chardev"), str):
        owner = model.chardev if model is not None and model.chardev else driver
        _use_chardev(group, owner, properties["chardev"], chardevs)
    elif model is not None and model.needs_chardev:
        raise group.error("Can't create debugcon device, empty char device")
    return DeviceConfig(driver, identifier, properties, group.location)


def _parse(driver: str, name: str, value: Any, dialect: str, location: str) -> Any:
    if driver not in DEVICES:
        return value
    kinds = DEVICES[driver].properties
    if name not in kinds:
        raise error(location, f"Property '{driver}.{name}' not found")
    parsed = parse_property(kinds[name], name, value, dialect, location)
    if kinds[name] == INT and not 0 <= parsed < U32_LIMIT:
        raise error(location, f"Parameter '{name}' expects uint32_t")
    return parsed


def _use_chardev(group: OptionGroup, owner: str, identifier: str, chardevs: ChardevTable) -> None:
    if identifier not in chardevs:
        raise group.error(f"Property '{owner}.chardev' can't find value '{identifier}'")
    problem = chardevs.use(identifier)
    if problem is not None:
        raise group.error(f"Property '{owner}.chardev' can't take value '{identifier}': {problem}")
