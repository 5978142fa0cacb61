"""What -help, -version and `-machine help` print, and QEMU's options that are not supported.

Imported only where one of them is needed.
"""

from __future__ import annotations

from cpr.config.chardev_options import BACKENDS
from cpr.config.device_table import DEVICES
from cpr.config.machine_options import ACCELERATORS
from cpr.config.object_options import OBJECTS
from cpr.constants import PROGRAM, QEMU_VERSION, VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_USAGE = """\
usage: cpr-vmm run [guest.cfg] [options]

guest.cfg has the format of QEMU's -readconfig; options win over what it says.
Options are spelled as QEMU's, with one dash or two.

The machine
  -machine, -M [type=]pc[,prop=value]...
                 memory-backend=ID takes RAM from an -object, aux-ram-share=on puts the
                 machine's own memory into memfds, accel=kvm:tcg names accelerators
  -accel kvm|tcg|kvm:tcg
                 may be repeated; the first that works is taken (default: kvm, then tcg)
  -cpu MODEL     accepted; the guest sees what the accelerator offers
  -m [size=]N    size of RAM in MiB, or with a suffix: 256M, 1.5G (default: 128M)
  -smp [cpus=]N[,maxcpus=...][,sockets=...][,cores=...][,threads=...]
  -object memory-backend-memfd|-shm|-file|-ram,id=ID,size=SIZE[,share=on|off]...
                 or the same in JSON; -object iommufd,id=ID for devices of the host
@DEVICES@
  -global DRIVER.PROPERTY=VALUE
                 a default for a device's property, or a property of the migration
  -uuid UUID, -name [guest=]NAME[,process=NAME], -boot [order=]LETTERS, -rtc base=...

What it boots
  -drive file=IMAGE,format=raw[,if=floppy|ide|virtio|none][,index=N][,readonly=on|off][,id=ID]
                 [,cache=MODE][,discard=unmap][,werror=...][,rerror=...][,file.locking=off]
  -blockdev driver=raw|file|host_device,node-name=NAME[,file=NODE][,filename=IMAGE]...
                 or the same in JSON; -device virtio-blk-pci,drive=NAME has the node
  -fda, -fdb, -hda, -hdb, -hdc, -hdd IMAGE
  -kernel FILE   a flat binary, ELF32, ELF64, or a bzImage of Linux
  -initrd FILE, -append TEXT
                 the first file system and the command line of Linux

Network
  -netdev tap,id=ID[,ifname=NAME][,fd=N][,script=no][,downscript=no]

Character devices
  -chardev null|stdio|pty,id=ID[,cpr=on|off]
  -chardev file,id=ID,path=PATH[,append=on|off]
  -chardev socket,id=ID,path=PATH[,server=on|off][,wait=on|off][,reconnect-ms=N]
  -chardev socket,id=ID,host=HOST,port=PORT[,server=on|off]...
  -serial DEV    COM1, the next one COM2...; DEV is one of null, stdio, pty, file:PATH,
                 unix:PATH[,...], tcp:[HOST]:PORT[,...], chardev:ID, or none
  -debugcon DEV  what the guest writes to port 0xe9
  -monitor DEV, -qmp DEV, -qmp-pretty DEV
  -mon [chardev=]ID[,mode=readline|control][,pretty=on|off][,cpr=on|off]

Start and end
  -incoming URI|defer|CHANNEL
                 takes over the guest that another process sends
  -S             does not start the guest
  -no-reboot, -no-shutdown, -action reboot=...,shutdown=...
  -pidfile FILE, -daemonize, -sandbox on[,spawn=deny]..., -msg timestamp=on
  -run-with [user=NAME|UID:GID][,chroot=DIR][,exit-with-parent=on|off][,async-teardown=on|off]
                 drops privileges before the guest runs
  -readconfig FILE, -nodefaults, -no-user-config, -only-migratable, -enable-kvm
  -nographic, -display none, -vga none, -net none, -nic none, -parallel none
  -h, -help, -version
"""

USAGE = _USAGE.replace(
    "@DEVICES@",
    "\n".join(f"  -device {name}{model.usage}" for name, model in DEVICES.items()),
)

# Options that QEMU 11.1.3 has and this program has not.
QEMU_ONLY = frozenset(
    {
        "D",
        "L",
        "acpitable",
        "add-fd",
        "audio",
        "audiodev",
        "bios",
        "cdrom",
        "compat",
        "d",
        "dfilter",
        "dtb",
        "dump-vmstate",
        "echr",
        "enable-sync-profile",
        "fsdev",
        "full-screen",
        "fw_cfg",
        "g",
        "gdb",
        "icount",
        "iscsi",
        "jitdump",
        "k",
        "loadvm",
        "mem-path",
        "mem-prealloc",
        "mtdblock",
        "no-fd-bootchk",
        "numa",
        "option-rom",
        "overcommit",
        "perfmap",
        "pflash",
        "plugin",
        "preconfig",
        "s",
        "sd",
        "seed",
        "set",
        "shim",
        "smbios",
        "snapshot",
        "spice",
        "tpmdev",
        "trace",
        "usb",
        "usbdevice",
        "virtfs",
        "vnc",
        "watchdog-action",
        "win2k-hack",
        "xen-attach",
        "xen-domid",
        "xen-domid-restrict",
    }
)


def _version() -> str:
    return f"{PROGRAM} version {VERSION} (compatible with QEMU {QEMU_VERSION})\n"


def _help() -> str:
    return _version() + USAGE


def _list(title: str, names: Iterable[str]) -> str:
    return "\n".join([title, *(f"  {name}" for name in names)]) + "\n"


def _with_properties(title: str, kinds: dict[str, dict]) -> str:
    return _list(title, (f"{name}: {', '.join(sorted(kinds[name]))}" for name in kinds))


TEXTS: dict[str, Callable[[], str]] = {
    "accel": lambda: _list("Accelerators supported:", ACCELERATORS),
    "chardev": lambda: _list("Available chardev backend types:", BACKENDS),
    "cpu": lambda: "Any CPU model is accepted; the guest sees what the accelerator offers.\n",
    "device": lambda: _with_properties(
        "Devices and their properties:", {name: row.properties for name, row in DEVICES.items()}
    ),
    "help": _help,
    "machine": lambda: "Supported machines are:\npc    mini PC (alias: mini) (default)\n",
    "object": lambda: _with_properties("Objects and their properties:", OBJECTS),
    "version": _version,
}
