"""One migration parameter: what it holds, and how QMP and HMP bring it and show it."""

from __future__ import annotations

from cpr.constants import U64_LIMIT
from cpr.errors import CommandError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

# What a parameter holds.  MIB_SIZE is a SIZE whose number without a suffix is in MiB at the HMP.
SIZE, MIB_SIZE, UINT8, UINT32, BOOL, STRING, ENUM, STRINGS = range(8)
WIDTHS = {UINT8: (8, "uint8_t"), UINT32: (32, "uint32_t")}


class Parameter:
    """One parameter.  `accepts` is checked on values of the right type; `complaint` is what it
    expects where that says no, `refusal` the whole text where QEMU has another one.  `listed` is
    false for those that `info migrate_parameters` leaves out.
    """

    __slots__ = ("accepts", "default", "kind", "listed", "name", "refusal", "unit", "values")

    def __init__(
        self,
        name: str,
        kind: int,
        default: Any,
        unit: str = "",
        accepts: Callable[[int], bool] | None = None,
        complaint: str = "",
        values: tuple[str, ...] = (),
        listed: bool = True,
        refusal: str = "",
    ) -> None:
        self.name = name
        self.kind = kind
        self.default = default
        self.unit = unit
        self.accepts = accepts
        self.refusal = refusal or f"Option {name} expects {complaint}"
        self.values = values
        self.listed = listed

    def check(self, value: Any) -> None:
        """Raises CommandError for a value of the right type that is out of range."""
        if self.accepts is not None and not self.accepts(value):
            raise CommandError(self.refusal)

    def convert(self, value: Any) -> Any:
        """The value to keep for what QMP brought.  Raises CommandError for a wrong type."""
        if self.kind == BOOL:
            if not isinstance(value, bool):
                raise _wrong_type(self.name, "boolean")
        elif self.kind == STRING:
            if value is None:
                return ""
            if not isinstance(value, str):
                raise _wrong_type(self.name, "StrOrNull")
        elif self.kind == ENUM:
            if not isinstance(value, str):
                raise _wrong_type(self.name, "string")
            if value not in self.values:
                raise CommandError(f"Parameter '{self.name}' does not accept value '{value}'")
        elif self.kind == STRINGS:
            return self._convert_strings(value)
        else:
            return self._convert_integer(value)
        return value

    def _convert_strings(self, value: Any) -> list[str]:
        if not isinstance(value, list):
            raise _wrong_type(self.name, "array")
        for index, word in enumerate(value):
            if not isinstance(word, str):
                raise _wrong_type(f"{self.name}[{index}]", "string")
        return list(value)

    def _convert_integer(self, value: Any) -> int:
        if type(value) is not int or not -U64_LIMIT // 2 <= value < U64_LIMIT:
            raise CommandError(f"Parameter '{self.name}' expects uint64")
        value %= U64_LIMIT
        bits, type_name = WIDTHS.get(self.kind, (64, ""))
        if value >> bits:
            raise CommandError(f"Parameter '{self.name}' expects {type_name}")
        return int(value)

    def parse(self, text: str) -> Any:
        """What is typed at the HMP, which is the rest of the line.  Raises CommandError."""
        from cpr.migration import text as parse

        if self.kind == SIZE:
            return parse.size_parameter(self.name, text)
        if self.kind == MIB_SIZE:
            return parse.mib_parameter(text)
        if self.kind in WIDTHS:
            return parse.integer_parameter(self.name, text)
        if self.kind == BOOL:
            return parse.bool_parameter(self.name, text)
        if self.kind == STRINGS:
            return parse.words(text)
        return text

    def show(self, value: Any) -> str:
        """The line of `info migrate_parameters`."""
        if self.kind == BOOL:
            text = " on" if value else " off"
        elif self.kind == STRING:
            text = f" '{value}'"
        elif self.kind == STRINGS:
            text = "".join(f" {word}" for word in value)
        else:
            text = f" {value}"
        return f"{self.name}:{text}{self.unit}"


def _wrong_type(name: str, expected: str) -> CommandError:
    return CommandError(f"Invalid parameter type for '{name}', expected: {expected}")
