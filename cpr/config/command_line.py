"""The options: which there are, whether they take an argument, and what they add to a Draft.

OPTIONS are those that set the keys of a group, as a configuration file does; HANDLERS and FLAGS
are the others, with and without an argument.
"""

from __future__ import annotations

from cpr.config.device_options import split_global
from cpr.config.draft import GROUPS, Draft
from cpr.config.drive_options import FLOPPY, IDE
from cpr.config.frontend_options import CONTROL, NO_DEVICE, READLINE, SHORT_FORM
from cpr.config.option_values import JSON, KEYVAL, OPTS, error
from cpr.config.options import OptionGroup, is_uri, parse_keyval, parse_opts
from cpr.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Handler = Callable[[Draft, str, str], None]  # (draft, argument, location)

# Option: the group that it adds to.
OPTIONS = {
    "accel": "accel",
    "action": "action",
    "blockdev": "blockdev",
    "boot": "boot-opts",
    "chardev": "chardev",
    "device": "device",
    "drive": "drive",
    "m": "memory",
    "M": "machine",
    "machine": "machine",
    "mon": "mon",
    "msg": "msg",
    "name": "name",
    "netdev": "netdev",
    "object": "object",
    "rtc": "rtc",
    "run-with": "run-with",
    "sandbox": "sandbox",
    "smp": "smp-opts",
}

IN_JSON = ("blockdev", "device", "object")
WITH_HELP = ("accel", "chardev", "device", "M", "machine", "object")
HELP_WORDS = frozenset({"help", "?"})


def read_command_line(arguments: Sequence[str]) -> Draft:
    """Raises ConfigError.  Stops at an option that asks for a text, as -help does."""
    words = _split_words(arguments)
    draft = Draft()
    files = [location for option, _, location in words if not option]
    if len(files) > 1:
        raise error(
            files[1],
            f"there is one guest.cfg already, '{files[0]}'; "
            f"a disk image is given with -drive file={files[1]},format=raw",
        )
    for path in files:
        _read_config(draft, path, path, base=True)
    for option, argument, location in words:
        if option:
            _take(draft, option, argument, location)
        if draft.action is not None:
            break
    return draft


def _split_words(arguments: Sequence[str]) -> list[tuple[str, str, str]]:
    """(option, argument, location) for each option; ("", "", word) for a word that is none."""
    words = []
    rest = iter(arguments)
    for word in rest:
        if not word.startswith("-"):
            words.append(("", "", word))
            continue
        option = word[2:] if word.startswith("--") else word[1:]
        if option in FLAGS:
            words.append((option, "", word))
        elif option in OPTIONS or option in HANDLERS:
            argument = next(rest, None)
            if argument is None:
                raise error(word, "requires an argument")
            words.append((option, argument, f"{word} {argument}"))
        else:
            raise error(word, _no_option(option))
    return words


def _no_option(option: str) -> str:
    from cpr.config.usage import QEMU_ONLY

    if option in QEMU_ONLY:
        return "this option of QEMU is not supported; -help lists those that are"
    return "invalid option"


def strip_options(arguments: Sequence[str], options: Sequence[str]) -> list[str]:
    """`arguments` without those `options` (names without dashes) and their arguments.

    It is for a command line that has been parsed before.
    """
    kept: list[str] = []
    position = 0
    for option, _, _ in _split_words(arguments):
        length = 2 if option in OPTIONS or option in HANDLERS else 1
        if option not in options:
            kept += arguments[position : position + length]
        position += length
    return kept


def _take(draft: Draft, option: str, argument: str, location: str) -> None:
    if option in FLAGS:
        FLAGS[option](draft)
    elif option in HANDLERS:
        HANDLERS[option](draft, argument, location)
    elif option in WITH_HELP and not HELP_WORDS.isdisjoint(argument.split(",")):
        _inform(draft, OPTIONS[option])
    else:
        draft.add(_parse_group(draft, OPTIONS[option], argument, location))


def _parse_group(draft: Draft, name: str, argument: str, location: str) -> OptionGroup:
    dialect, implied = GROUPS[name]
    if name in IN_JSON and argument.startswith("{"):
        from cpr.config.option_json import parse_json

        return OptionGroup(name, parse_json(argument, location), location, JSON)
    if dialect == KEYVAL and implied is not None:
        values = parse_keyval(argument, implied, location)
    else:
        values = parse_opts(argument, implied, location, draft.warnings)
    return OptionGroup(name, values, location, dialect)


def _read_config(draft: Draft, path: str, location: str, base: bool = False) -> None:
    from cpr.config.readconfig import read_config

    groups = {name: GROUPS[name] for name in GROUPS if name != "blockdev"}  # as with QEMU
    for group in read_config(path, groups, location, base):
        draft.add(group)


def _inform(draft: Draft, topic: str) -> None:
    """Sets the text that is to be printed instead of running a guest."""
    from cpr.config.usage import TEXTS

    draft.action = "version" if topic == "version" else "help"
    draft.action_text = TEXTS[topic]()


def _setting(name: str) -> Handler:
    def take(draft: Draft, argument: str, location: str) -> None:
        draft.settings[name] = argument

    return take


def _machine_property(name: str) -> Handler:
    def take(draft: Draft, argument: str, location: str) -> None:
        draft.add(OptionGroup("machine", {name: argument}, location, KEYVAL))

    return take


def _disk(interface: str, index: int) -> Handler:
    """-fda and its like: the file name is taken as it is, commas included."""

    def take(draft: Draft, argument: str, location: str) -> None:
        values = {"file": argument, "if": interface, "index": str(index)}
        draft.add(OptionGroup("drive", values, location, OPTS))

    return take


def _monitor(mode: str, pretty: str = "off") -> Handler:
    def take(draft: Draft, argument: str, location: str) -> None:
        values = {"mode": mode, "pretty": pretty, SHORT_FORM: argument}
        draft.add(OptionGroup("mon", values, location, OPTS))

    return take


def _serial(draft: Draft, argument: str, location: str) -> None:
    draft.serials.append((argument, location))


def _debugcon(draft: Draft, argument: str, location: str) -> None:
    draft.debugcons.append((argument, location))


def _only_none(problem: str, hint: str) -> Handler:
    """An option for something that this machine has not: only `none` is possible."""

    def take(draft: Draft, argument: str, location: str) -> None:
        if argument != NO_DEVICE:
            raise error(location, f"{problem.format(argument.partition(',')[0])}\n{hint}")

    return take


def _global(draft: Draft, argument: str, location: str) -> None:
    values = split_global(argument)
    if values is None:
        draft.add(_parse_group(draft, "global", argument, location))
    else:
        draft.add(OptionGroup("global", dict(values), location, OPTS))


def _incoming(draft: Draft, argument: str, location: str) -> None:
    if argument != "defer" and not is_uri(argument):
        from cpr.config.option_json import parse_channel

        parse_channel(argument, location)
    draft.incoming.append(argument)


def _cpu(draft: Draft, argument: str, location: str) -> None:
    if argument in HELP_WORDS:
        _inform(draft, "cpu")
    elif argument:
        draft.settings["cpu_model"] = argument
    else:
        raise ConfigError("-cpu option cannot be empty")


def _uuid(draft: Draft, argument: str, location: str) -> None:
    parts = argument.split("-")
    digits = "".join(parts)
    if [len(part) for part in parts] != [8, 4, 4, 4, 12] or digits.strip("0123456789abcdefABCDEF"):
        raise error(location, "failed to parse UUID string: wrong format")
    draft.settings["uuid"] = argument.lower()


def _flag(name: str) -> Callable[[Draft], None]:
    def take(draft: Draft) -> None:
        draft.settings[name] = True

    return take


def _key(group: str, key: str, value: str) -> Callable[[Draft], None]:
    def take(draft: Draft) -> None:
        draft.add(OptionGroup(group, {key: value}, "", KEYVAL))

    return take


def _text(topic: str) -> Callable[[Draft], None]:
    return lambda draft: _inform(draft, topic)


def _ignore(draft: Draft) -> None:
    pass


NO_TYPE = "Parameter 'type' does not accept value '{}'"

HANDLERS: dict[str, Handler] = {
    "append": _machine_property("append"),
    "cpu": _cpu,
    "debugcon": _debugcon,
    "display": _only_none(NO_TYPE, "There is no display: use -display none."),
    "fda": _disk(FLOPPY, 0),
    "fdb": _disk(FLOPPY, 1),
    "global": _global,
    "hda": _disk(IDE, 0),
    "hdb": _disk(IDE, 1),
    "hdc": _disk(IDE, 2),
    "hdd": _disk(IDE, 3),
    "incoming": _incoming,
    "initrd": _machine_property("initrd"),
    "kernel": _machine_property("kernel"),
    "monitor": _monitor(READLINE),
    "net": _only_none(NO_TYPE, "There are no network cards: use -net none."),
    "nic": _only_none(NO_TYPE, "There are no network cards: use -nic none."),
    "parallel": _only_none(
        "could not connect parallel device to character backend '{}'",
        "There is no parallel port: use -parallel none.",
    ),
    "pidfile": _setting("pidfile"),
    "qmp": _monitor(CONTROL),
    "qmp-pretty": _monitor(CONTROL, pretty="on"),
    "readconfig": _read_config,
    "serial": _serial,
    "uuid": _uuid,
    "vga": _only_none("unknown vga type: {}", "There is no display: use -vga none."),
}

FLAGS: dict[str, Callable[[Draft], None]] = {
    "S": _flag("start_paused"),
    "daemonize": _flag("daemonize"),
    "enable-kvm": _key("machine", "accel", "kvm"),
    "h": _text("help"),
    "help": _text("help"),
    "no-reboot": _key("action", "reboot", "shutdown"),
    "no-shutdown": _key("action", "shutdown", "pause"),
    "no-user-config": _ignore,
    "nodefaults": _flag("nodefaults"),
    "nographic": _ignore,
    "only-migratable": _flag("only_migratable"),
    "version": _text("version"),
}
