"""guest.cfg.  What is accepted, and the errors, are those of QEMU 11.1.3 unless said."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpr.config import parse_command_line
from cpr.config.draft import GROUPS
from cpr.config.readconfig import parse_config, read_config
from cpr.errors import ConfigError

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.cfg"))

EVERYTHING = """\
# a comment

[object "ram0"]
  qom-type = "memory-backend-memfd"
\tsize\t= \t"16M"
share = "on"   # another
[machine]
type = "pc"
memory-backend = "ram0"
[memory] # a third
size = "16"
[smp-opts]
cpus = "2"
[drive]
file = "a b,c.img"
format = "raw"
if = "floppy"
[chardev "hmp"]
backend = "null"
[mon]
chardev = "hmp"
[device "exit"]
driver = "isa-debug-exit"
[accel]
accel = "tcg"
[name]
guest = "café"
process = ""
[global]
driver = "migration"
property = "store-global-state"
value = "off"
[boot-opts]
order = "a"
"""


def parse(text: str) -> list[tuple[str, dict[str, str], str]]:
    groups = parse_config(text, "guest.cfg", GROUPS)
    return [(group.name, group.values, group.location) for group in groups]


def test_groups_and_their_places() -> None:
    assert parse('[memory]\nsize = "16M"\n\n# end\n[chardev "a"]\nbackend = "null"\n[mon]\n') == [
        ("memory", {"size": "16M"}, "guest.cfg:2"),
        ("chardev", {"id": "a", "backend": "null"}, "guest.cfg:6"),
        ("mon", {}, "guest.cfg:7"),
    ]


def test_the_id_in_the_header_counts() -> None:
    assert parse('[object "a"]\nid = "b"\n')[0][1] == {"id": "a"}
    assert parse('[object]\nid = "b"\n')[0][1] == {"id": "b"}


def test_every_group_reaches_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "guest.cfg"
    path.write_text(EVERYTHING)
    for arguments in ([str(path)], ["-readconfig", str(path)]):
        config = parse_command_line(arguments)
        assert config.machine == {"memory-backend": "ram0"}
        assert config.ram_size == 16 << 20
        assert config.ram_size_given
        assert config.smp == 2
        assert config.accels == ("tcg",)
        assert config.objects[0].properties == {"size": 16 << 20, "share": True}
        assert (config.drives[0].file, config.drives[0].interface) == ("a b,c.img", "floppy")
        assert [(chardev.id, chardev.backend) for chardev in config.chardevs] == [
            ("hmp", "null"),
            ("serial0", "null"),
        ]
        assert [monitor.chardev for monitor in config.monitors] == ["hmp"]
        assert [(device.driver, device.id) for device in config.devices] == [
            ("isa-debug-exit", "exit")
        ]
        assert (config.name, config.process_name) == ("café", "")
        assert config.globals == (("migration", "store-global-state", "off"),)
        assert config.boot_order == "a"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_examples_parse(path: Path) -> None:
    config = parse_command_line([str(path)])
    assert config.ram_size == config.objects[0].properties["size"]
    assert config.accels == ("kvm", "tcg")
    assert [monitor.mode for monitor in config.monitors] == ["readline"]


# QEMU writes "-readconfig FILE" for those of a line that it refuses at once; here it is always the
# file and the line.
@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ('foo = "1"', 1, "no group defined"),
        ("[]", 1, "no group defined"),
        ('  [memory]\nsize = "16M"', 1, "no group defined"),
        ("\n[bogus]", 2, "There is no option group 'bogus'"),
        ("[Memory]", 1, "There is no option group 'Memory'"),
        ("[ memory ]", 1, "There is no option group ' memory '"),
        ('[memory ""]', 1, "There is no option group 'memory \"\"'"),
        ('[device"x"]', 1, "There is no option group 'device\"x\"'"),
        ('[memory "a"]', 1, "Invalid parameter 'id'"),
        ('[memory]\nbogus = "16M"', 2, "Invalid parameter 'bogus'"),
        ('[object]\nqom-type = "memory-backend-memfd"', 2, "Parameter 'id' is missing"),
        ('[object "a"]\nsize = "16M"', 2, "Parameter 'qom-type' is missing"),
        (
            '[object "a"]\nqom-type = "memory-backend-memfd"\nsize = "foo"',
            3,
            "Parameter 'size' expects size",
        ),
        (
            '[object "a"]\nqom-type = "memory-backend-memfd"\nsize = "16M"\nbogus = "1"',
            4,
            "Parameter 'bogus' is unexpected",
        ),
        (
            '[object "a"]\nqom-type = "memory-backend-file"\nsize = "16M"',
            3,
            "Parameter 'mem-path' is missing",
        ),
        ('[chardev]\nbackend = "null"', 2, "chardev: no id specified"),
        ('[chardev "a"]', 1, 'chardev: "a" missing backend'),
        ('[chardev "a"]\nbackend = "bogus"', 2, "'bogus' is not a valid char driver name"),
        (
            '[chardev "a"]\nbackend = "null"\n[chardev "a"]\nbackend = "null"',
            4,
            "Duplicate ID 'a' for chardev",
        ),
        ('[mon "m"]\nchardev = "x"', 2, 'chardev "x" not found'),
        ('[device]\nbogus = "1"', 2, "Parameter 'driver' is missing"),
        ('[drive "d"]\nif = "bogus"', 2, "unsupported bus type 'bogus'"),
        ('[accel]\naccel = "bogus"', 2, "invalid accelerator bogus"),
        ('[action]\nreboot = "bogus"', 2, "Parameter 'reboot' does not accept value 'bogus'"),
    ],
)
def test_errors(tmp_path: Path, text: str, line: int, message: str) -> None:
    path = tmp_path / "guest.cfg"
    path.write_text(text + "\n")
    with pytest.raises(ConfigError) as caught:
        parse_command_line([str(path)])
    assert str(caught.value) == f"{path}:{line}: {message}"


@pytest.mark.parametrize(
    "line",
    ["size = 16M", 'size = "16M', 'size="16M"', 'size = "16M" junk', "size", '= "x"', 'a b = "c"'],
)
def test_what_qemu_would_misread_is_refused(line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(f"[memory]\n{line}\n")
    assert str(caught.value) == f"guest.cfg:2: parse error: expected key = \"value\", not '{line}'"


def test_an_unclosed_header_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        parse("[memory\n")
    assert (
        str(caught.value)
        == "guest.cfg:1: parse error: expected [group] or [group \"id\"], not '[memory'"
    )


def test_unreadable_files(tmp_path: Path) -> None:
    missing, image = tmp_path / "missing", tmp_path / "image"
    image.write_bytes(bytes(512))
    for path, message in (
        (missing, f"Could not open '{missing}': No such file or directory"),
        (tmp_path, "Cannot read config file: Is a directory"),
        (
            image,
            f"parse error: '{image}' is not a configuration file; "
            f"a disk image is given with -drive file={image},format=raw",
        ),
    ):
        for arguments in ([str(path)], ["-readconfig", str(path)]):
            with pytest.raises(ConfigError) as caught:
                parse_command_line(arguments)
            assert str(caught.value) == f"{' '.join(arguments)}: {message}"


def test_a_huge_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "guest.cfg"
    path.write_text("# a comment\n" * 100_000)
    with pytest.raises(ConfigError, match="File too large"):
        read_config(str(path), GROUPS, "x")


LINES = st.sampled_from(EVERYTHING.splitlines()) | st.text(max_size=20)


@given(st.lists(LINES, max_size=12))
def test_any_text_parses_or_gives_one_error(lines: list[str]) -> None:
    try:
        groups = parse("\n".join(lines))
    except ConfigError as error:
        assert str(error).startswith("guest.cfg:")
    else:
        assert all(name in GROUPS for name, _, _ in groups)
