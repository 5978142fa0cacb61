"""-blockdev: nodes as QEMU's users write them, as a drive that a disk on virtio can have."""

from __future__ import annotations

import shlex

import pytest

from cpr.config import DriveConfig, parse_command_line
from cpr.errors import ConfigError

FILE = "driver=file,filename=/tmp/d.img"


def drives(line: str) -> tuple[DriveConfig, ...]:
    return parse_command_line(shlex.split(line)).drives


@pytest.mark.parametrize(
    "line",
    [
        f"-blockdev {FILE},node-name=f -blockdev driver=raw,file=f,node-name=d",
        f"-blockdev {FILE},node-name=d",
        "-blockdev driver=raw,node-name=d,file.driver=file,file.filename=/tmp/d.img",
        "-blockdev raw,node-name=d,file.driver=host_device,file.filename=/tmp/d.img,file.aio=native",  # noqa: E501
        """-blockdev '{"driver": "raw", "node-name": "d", "read-only": false,
            "file": {"driver": "file", "filename": "/tmp/d.img", "auto-read-only": true}}'""",
    ],
)
def test_ways_to_say_one_disk(line: str) -> None:
    (drive,) = drives(line)
    assert (drive.file, drive.id, drive.interface) == ("/tmp/d.img", "d", "none")
    assert (drive.readonly, drive.cache, drive.discards) == (False, "writeback", False)


def test_options_of_nodes() -> None:
    first, second, third = drives(
        f"-blockdev {FILE},node-name=f,read-only=on,locking=off,cache.direct=on "
        "-blockdev driver=raw,file=f,node-name=d,discard=unmap "
        "-blockdev driver=raw,node-name=e,discard=unmap,file.driver=file,file.filename=x "
        f"-blockdev {FILE},node-name=g,discard=unmap,cache.no-flush=on"
    )
    assert (first.readonly, first.locking, first.cache) == (True, False, "none")
    assert not first.discards  # the file's own node says no
    assert second.discards and second.locking
    assert third.discards and third.cache == "unsafe"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("-blockdev node-name=a", "Parameter 'driver' is missing"),
        ("-blockdev driver=foo,node-name=a", "Parameter 'driver' does not accept value 'foo'"),
        ("-blockdev driver=qcow2,file=f,node-name=a", "qemu-img convert -O raw"),
        ("-blockdev driver=file,node-name=a", "Parameter 'filename' is missing"),
        (f"-blockdev {FILE}", "'node-name' must be specified for the root node"),
        (f"-blockdev {FILE},node-name=a " * 2, "Duplicate nodes with node-name='a'"),
        (
            "-blockdev driver=raw,file=zz,node-name=a",
            "Cannot find device='zz' nor node-name='zz'",
        ),
        ("-blockdev driver=raw,node-name=a", "Parameter 'file' is missing"),
        (f"-blockdev {FILE},node-name=a,zork=1", "Parameter 'zork' is unexpected"),
        (
            "-blockdev driver=raw,file.driver=file,file.filename=x,node-name=a,file.zork=1",
            "Parameter 'file.zork' is unexpected",
        ),
        (f"-blockdev {FILE},node-name=a,read-only=maybe", "Parameter 'read-only' expects 'on' or"),
        ("-blockdev driver=raw,file.filename=x,node-name=a", "Parameter 'file.driver' is missing"),
        (f"-blockdev {FILE},node-name=1a", "Invalid node-name: '1a'"),
        (f"-blockdev {FILE},node-name=a,discard=zork", "'discard' does not accept value 'zork'"),
        (
            f"-blockdev {FILE},node-name=a -drive file=x,format=raw,if=none,id=a",
            "Device name 'a' conflicts with an existing node name",
        ),
        (
            f"-blockdev {FILE},node-name=f "
            + "".join(f"-blockdev driver=raw,file=f,node-name={name} " for name in "de"),
            "node 'f' is used already",
        ),
    ],
)
def test_what_is_wrong_is_named(line: str, problem: str) -> None:
    """The texts are QEMU 11.1.3's, but for the formats that there are, and the last."""
    with pytest.raises(ConfigError) as caught:
        parse_command_line(shlex.split(line))
    assert problem in str(caught.value)
    assert str(caught.value).startswith("-")
