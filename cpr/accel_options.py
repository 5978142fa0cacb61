"""-accel and -machine accel=: the accelerators to try, in this order."""

from __future__ import annotations

from cpr.errors import ConfigError
from cpr.option_values import BOOL, INT, KEYVAL, error, parse_property

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cpr.option_values import Kind
    from cpr.options import OptionGroup

DEFAULT = ("kvm", "tcg")

# Properties, none of which has an effect here beyond being checked.
ACCELERATORS: dict[str, dict[str, Kind]] = {
    "kvm": {"kernel-irqchip": ("on",)},
    "tcg": {
        "one-insn-per-tb": BOOL,
        "split-wx": BOOL,
        "tb-size": INT,
        "thread": ("single", "multi"),
    },
}


def parse_accels(
    machine_accel: str | None, groups: list[OptionGroup], warnings: list[str]
) -> tuple[str, ...]:
    """The names; none where neither is given.  Several names are separated by colons in both.

    An unknown name is passed over with a warning where a known one is left, as QEMU falls back.
    Raises ConfigError.
    """
    if machine_accel is not None and groups:
        raise ConfigError('The -accel and "-machine accel=" options are incompatible')
    if machine_accel == "":
        raise ConfigError("no accelerator found")
    named = [(name, "") for name in (machine_accel or "").split(":") if machine_accel]
    for group in groups:
        named += [(name, group.location) for name in group.values.get("accel", "").split(":")]
    names: list[str] = []
    problems = []
    for name, location in named:
        if name in ACCELERATORS:
            names.append(name)
        else:
            problems.append(error(location, f"invalid accelerator {name}"))
    if problems and not names:
        raise problems[0]
    warnings += [str(problem) for problem in problems]
    for group in groups:
        _check_properties(group)
    return tuple(names)


def _check_properties(group: OptionGroup) -> None:
    name = group.values.get("accel", "").partition(":")[0]
    kinds = ACCELERATORS.get(name)
    if kinds is None:
        return
    for key, value in group.values.items():
        if key in ("accel", "id"):
            continue
        if key not in kinds:
            raise group.error(f"Property '{name}-accel.{key}' not found")
        if key == "thread" and value not in kinds[key]:
            raise group.error(f"Invalid 'thread' setting {value}")
        parse_property(kinds[key], key, value, KEYVAL, group.location)
