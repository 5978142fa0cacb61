"""What a monitor command looks like: its names, its arguments, and their types.

A kind checks a JSON value, `check(path, value)`, and raises CommandError in the words of QEMU's
QAPI visitors; `hmp` says how the HMP reads it from a command line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cpr.errors import CommandError

I64 = 1 << 63

# When the HMP's prompt comes back.
NOW, AFTER_MIGRATION, NEVER = "now", "after migration", "never"


class Kind:
    """A type of argument.  This one takes any JSON value, and nothing at the HMP."""

    hmp = ""

    def check(self, path: str, value: Any) -> Any:
        return value


class Simple(Kind):
    """A JSON string, boolean, array or object that is not looked into."""

    def __init__(self, expected: str, python_type: type, hmp: str = "") -> None:
        self.expected = expected
        self._type = python_type
        self.hmp = hmp

    def check(self, path: str, value: Any) -> Any:
        if not isinstance(value, self._type):
            raise wrong_type(path, self.expected)
        return value


class Integer(Kind):
    """A signed 64-bit integer; the HMP takes an expression of 32 bits."""

    hmp = "int"

    def check(self, path: str, value: Any) -> Any:
        if type(value) is not int or not -I64 <= value < I64:
            raise wrong_type(path, "integer")
        return value


class Unsigned(Kind):
    """An unsigned 64-bit integer, where a negative one wraps; the HMP takes an expression."""

    hmp = "long"

    def check(self, path: str, value: Any) -> Any:
        if type(value) is not int or not -I64 <= value < 2 * I64:
            raise CommandError(f"Parameter '{path}' expects uint64")
        return value % (2 * I64)


class Enum(Kind):
    hmp = "string"

    def __init__(self, *values: str) -> None:
        self.values = values

    def check(self, path: str, value: Any) -> Any:
        if not isinstance(value, str):
            raise wrong_type(path, "string")
        if value not in self.values:
            name = path.rpartition(".")[2].partition("[")[0]
            raise CommandError(f"Parameter '{name}' does not accept value '{value}'")
        return value


class ListOf(Kind):
    def __init__(self, element: Kind, hmp: str = "") -> None:
        self.element = element
        self.hmp = hmp

    def check(self, path: str, value: Any) -> Any:
        if not isinstance(value, list):
            raise wrong_type(path, "array")
        return [self.element.check(f"{path}[{index}]", item) for index, item in enumerate(value)]


class Struct(Kind):
    """An object with exactly these members; a name with a trailing ? is optional."""

    def __init__(self, **members: Kind) -> None:
        self.own = {name.replace("_", "-"): kind for name, kind in members.items()}

    def members(self, path: str, value: Mapping[str, Any]) -> Mapping[str, Kind]:
        return self.own

    def check(self, path: str, value: Any) -> Any:
        if not isinstance(value, dict):
            raise wrong_type(path, "object")
        members = self.members(path, value)
        result = {}
        for name, kind in members.items():
            if name not in value:
                raise CommandError(f"Parameter '{path}.{name}' is missing")
            result[name] = kind.check(f"{path}.{name}", value[name])
        for name in value:
            if name not in members:
                raise CommandError(f"Parameter '{path}.{name}' is unexpected")
        return result


class Union(Struct):
    """An object whose member `tag` says which further members it has."""

    def __init__(self, tag: str, branches: Mapping[str, Struct]) -> None:
        super().__init__(**{tag: Enum(*branches)})
        self.tag = tag
        self.branches = branches

    def members(self, path: str, value: Mapping[str, Any]) -> Mapping[str, Kind]:
        if self.tag not in value:
            return self.own
        branch = self.own[self.tag].check(f"{path}.{self.tag}", value[self.tag])
        return {**self.own, **self.branches[branch].members(path, value)}


class Flag(Kind):
    """An option of one letter at the HMP; a boolean in QMP."""

    hmp = "flag"

    def __init__(self, letter: str) -> None:
        self.letter = letter

    def check(self, path: str, value: Any) -> Any:
        return BOOLEAN.check(path, value)


STRING = Simple("string", str, "string")
LINE = Simple("string", str, "line")  # the rest of the line at the HMP
BOOLEAN = Simple("boolean", bool, "on|off")
FORMAT = Simple("object", dict, "format")  # /COUNT FORMAT SIZE at the HMP
INTEGER = Integer()
UNSIGNED = Unsigned()
STRINGS = ListOf(STRING, "words")


class Argument:
    """One argument.  `on` is where it exists: "both", "hmp" or "qmp".

    `choices(vmm)` gives the words that can be completed.
    """

    def __init__(
        self,
        name: str,
        kind: Kind,
        optional: bool = False,
        on: str = "both",
        choices: Callable[[Any], Sequence[str]] | None = None,
    ) -> None:
        self.name = name
        self.kind = kind
        self.optional = optional or isinstance(kind, Flag)
        self.on = on
        self.choices = choices

    @property
    def keyword(self) -> str:
        return self.name.replace("-", "_")


class Command:
    """One row of the table.

    `hmp` is the HMP name with its aliases ("cont|c", "info status"), `qmp` the QMP name; either
    may be "".  `function(vmm, **arguments)` returns what QMP returns (None for {}), and `text`
    makes the HMP's output of it.  A function that needs the monitor it is called from has
    `in_session` set and gets that Session as its second argument.  `whole` is for QMP commands
    whose arguments the function checks itself: it gets them as one dict, `arguments`.
    `prompt(arguments)` says when the HMP's prompt comes back: NOW, AFTER_MIGRATION (the one that
    the command started), or NEVER.
    """

    def __init__(
        self,
        hmp: str,
        qmp: str,
        function: Callable[..., Any],
        *arguments: Argument,
        params: str = "",
        help: str = "",
        text: Callable[[Any], str] | None = None,
        in_session: bool = False,
        whole: bool = False,
        prompt: Callable[[dict[str, Any]], str] = lambda arguments: NOW,
    ) -> None:
        self.hmp = hmp
        self.qmp = qmp
        self.function = function
        self.arguments = arguments
        self.params = params
        self.help = help
        self.text = text
        self.in_session = in_session
        self.whole = whole
        self.prompt = prompt

    @property
    def names(self) -> list[str]:
        """The HMP names without "info "."""
        return self.hmp.removeprefix("info ").split("|") if self.hmp else []

    @property
    def is_info(self) -> bool:
        return self.hmp.startswith("info ")

    def hmp_arguments(self) -> list[Argument]:
        return [argument for argument in self.arguments if argument.on != "qmp"]

    def qmp_arguments(self) -> list[Argument]:
        return [argument for argument in self.arguments if argument.on != "hmp"]

    def call(self, vmm: Any, session: Session, arguments: dict[str, Any]) -> Any:
        if self.in_session:
            return self.function(vmm, session, **arguments)
        return self.function(vmm, **arguments)


class Session:
    """What a command may know of the monitor it was typed into.

    `cpu_index` is the monitor's default vCPU, `dump_format` what the last x, xp or print used,
    `take_fd()` a descriptor from the monitor's client (or -1), `history()` its command lines.
    """

    def __init__(self, take_fd: Callable[[], int], cpu_index: int = 0) -> None:
        self.take_fd = take_fd
        self.cpu_index = cpu_index
        self.dump_format = ("x", 4)
        self.history: Callable[[], list[str]] = list


def wrong_type(path: str, expected: str) -> CommandError:
    return CommandError(f"Invalid parameter type for '{path}', expected: {expected}")
