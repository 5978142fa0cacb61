"""guest.cfg: QEMU's -readconfig format.

    # a comment, at the start of a line
    [group]  or  [group "id"]
      key = "value"

Each group becomes one OptionGroup, located at its last line as QEMU does.  A line that QEMU would
read as something else than what it looks like (a value without quotes is empty there) is refused.
"""

from __future__ import annotations

from cpr.config.option_values import KEYVAL, error
from cpr.config.options import OptionGroup

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Container

SIZE_LIMIT = 1 << 20
SHOWN = 40  # characters of a bad line


def read_config(
    path: str, known: Container[str], location: str, base: bool = False
) -> list[OptionGroup]:
    """The groups of the file at `path`; `known` are the names that a group may have.

    Raises ConfigError: at `location` where the file cannot be read, else with file and line.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(SIZE_LIMIT + 1)
    except IsADirectoryError:
        raise error(location, "Cannot read config file: Is a directory") from None
    except OSError as problem:
        raise error(location, f"Could not open '{path}': {problem.strerror}") from None
    if b"\0" in content:
        raise error(
            location,
            f"parse error: '{path}' is not a configuration file; "
            f"a disk image is given with -drive file={path},format=raw",
        )
    if len(content) > SIZE_LIMIT:
        raise error(location, "Cannot read config file: File too large")
    return parse_config(content.decode("utf-8", "surrogateescape"), path, known, base)


def parse_config(
    text: str, path: str, known: Container[str], base: bool = False
) -> list[OptionGroup]:
    """The groups in `text`; `path` is what errors name.  Raises ConfigError."""
    groups: list[OptionGroup] = []
    for number, line in enumerate(text.split("\n"), 1):
        location = f"{path}:{number}"
        if line.startswith("#") or not line.strip():
            continue
        if line.startswith("["):
            name, identifier = _parse_header(line, location)
            if name not in known:
                raise error(location, f"There is no option group '{name}'")
            values = {} if identifier is None else {"id": identifier}
            groups.append(OptionGroup(name, values, location, KEYVAL, base))
            continue
        if not groups:
            raise error(location, "no group defined")
        key, value = _parse_setting(line, location)
        group = groups[-1]
        group.location = location
        if key != "id" or key not in group.values:
            group.values[key] = value
    return groups


def _parse_header(line: str, location: str) -> tuple[str, str | None]:
    """`[group]` or `[group "id"]`; what comes after it is not looked at."""
    name, quote, rest = line[1:].partition('"')
    identifier, closing, after = rest.partition('"')
    if quote and closing and identifier and name[-1:] == " " and after[:1] == "]":
        return name.rstrip(), identifier
    name, bracket, _ = line[1:].partition("]")
    if not bracket:
        raise _parse_error(line, location, '[group] or [group "id"]')
    if not name:
        raise error(location, "no group defined")
    return name, None


def _parse_setting(line: str, location: str) -> tuple[str, str]:
    """`key = "value"`, with nothing but a comment after it."""
    words = line.split(None, 2)
    if len(words) == 3 and words[1] == "=" and words[2].startswith('"'):
        value, closing, after = words[2][1:].partition('"')
        if closing and (not after.strip() or after.lstrip().startswith("#")):
            return words[0], value
    raise _parse_error(line, location, 'key = "value"')


def _parse_error(line: str, location: str, expected: str) -> Exception:
    shown = line.strip()
    if len(shown) > SHOWN:
        shown = shown[:SHOWN] + "…"
    return error(location, f"parse error: expected {expected}, not '{shown}'")
