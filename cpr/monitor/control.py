"""Commands about the VM as a whole: run state, names, vCPUs, chardevs; and passed descriptors."""

from __future__ import annotations

from typing import Any

from cpr import runstate
from cpr.constants import MIB, PROGRAM_VERSION, QEMU_VERSION
from cpr.errors import CommandError, DeviceNotActive
from cpr.monitor.schema import Session

MAJOR, MINOR, MICRO = map(int, QEMU_VERSION.split("."))
VERSION = {"qemu": {"micro": MICRO, "minor": MINOR, "major": MAJOR}, "package": PROGRAM_VERSION}

MAX_UNREAD = 64 << 10
"""Bytes of answers that a monitor's client may leave unread before its next commands wait."""

NIL_UUID = "00000000-0000-0000-0000-000000000000"
ACCELERATORS = ("kvm", "tcg")
DEFAULT_MODELS = {"kvm": "host", "tcg": "qemu64"}


def query_version(vmm: Any) -> dict:
    return VERSION


def version_text(result: dict) -> str:
    qemu = result["qemu"]
    return f"{qemu['major']}.{qemu['minor']}.{qemu['micro']} ({result['package']})\n"


def query_status(vmm: Any) -> dict:
    current = vmm.machine.runstate.current
    return {"status": current, "running": current == runstate.RUNNING}


def status_text(result: dict) -> str:
    if result["running"]:
        return "VM status: running\n"
    status = result["status"]
    return f"VM status: paused{'' if status == runstate.PAUSED else f' ({status})'}\n"


def query_name(vmm: Any) -> dict:
    return {"name": vmm.config.name} if vmm.config.name else {}


def name_text(result: dict) -> str:
    return f"{result['name']}\n" if result else ""


def query_uuid(vmm: Any) -> dict:
    return {"UUID": vmm.config.uuid or NIL_UUID}


def uuid_text(result: dict) -> str:
    return f"{result['UUID']}\n"


def query_kvm(vmm: Any) -> dict:
    return {"enabled": vmm.machine.accel.name == "kvm", "present": True}


def kvm_text(result: dict) -> str:
    return f"kvm support: {'enabled' if result['enabled'] else 'disabled'}\n"


def query_accelerators(vmm: Any) -> dict:
    return {"enabled": vmm.machine.accel.name, "present": list(ACCELERATORS)}


def accelerators_text(result: dict) -> str:
    names = (f"[{n}]" if n == result["enabled"] else n for n in result["present"])
    return " ".join(names) + "\n"


def query_cpus_fast(vmm: Any) -> list[dict]:
    model = vmm.config.cpu_model or DEFAULT_MODELS.get(vmm.machine.accel.name, "qemu64")
    model = model.partition(",")[0]
    return [
        {
            "cpu-index": index,
            "qom-path": f"/machine/unattached/device[{index}]",
            "qom-type": f"{model}-x86_64-cpu",
            "thread-id": thread_id,
            "props": {"socket-id": 0, "core-id": index, "thread-id": 0},
            "target": "x86_64",
        }
        for index, thread_id in enumerate(vmm.machine.vcpu_thread_ids())
    ]


def info_cpus(vmm: Any, session: Session) -> str:
    text = ""
    for cpu in query_cpus_fast(vmm):
        mark = "*" if cpu["cpu-index"] == session.cpu_index else " "
        model = cpu["qom-type"].removesuffix("-x86_64-cpu")
        text += f"{mark} CPU #{cpu['cpu-index']}: thread_id={cpu['thread-id']} model={model}\n"
    return text


def query_chardev(vmm: Any) -> list[dict]:
    return [
        {
            "label": label,
            "filename": chardev.describe(),
            "frontend-open": chardev.has_frontend,
        }
        for label, chardev in vmm.chardevs.items()
    ]


def chardev_text(result: list[dict]) -> str:
    return "".join(f"{row['label']}: filename={row['filename']}\n" for row in result)


def stop(vmm: Any) -> None:
    """stop: also for a guest that is still to come in."""
    if vmm.machine.runstate.current == runstate.INMIGRATE:
        vmm.migration.incoming_side.start_paused = True
    else:
        vmm.machine.stop()


def cont(vmm: Any) -> None:
    """cont: a guest that is still to come in will run then."""
    vmm.migration.check_cont()
    if vmm.machine.runstate.current == runstate.INMIGRATE:
        vmm.migration.incoming_side.start_paused = False
    else:
        vmm.machine.cont()


def quit(vmm: Any) -> None:
    vmm.quit("host-qmp-quit")


def system_reset(vmm: Any) -> None:
    vmm.machine.reset()


def system_powerdown(vmm: Any) -> None:
    vmm.machine.powerdown()


def balloon(vmm: Any, value: int) -> None:
    """`value` is in bytes."""
    vmm.machine.check_finalized()
    with vmm.machine.lock:
        _balloon(vmm).set_target(value)


def balloon_to(vmm: Any, value: int) -> None:
    """`value` is in MiB."""
    balloon(vmm, value * MIB)


def query_balloon(vmm: Any) -> dict:
    return {"actual": _balloon(vmm).actual}


def balloon_text(result: dict) -> str:
    return f"balloon: actual={result['actual'] // MIB}\n"


def _balloon(vmm: Any) -> Any:
    for device in vmm.machine.devices:
        if device.balloon is not None:
            return device.balloon
    raise DeviceNotActive("No balloon device has been activated")


def system_wakeup(vmm: Any) -> None:
    vmm.machine.wakeup()


def info_history(vmm: Any, session: Session) -> str:
    return "".join(f"{index}: '{line}'\n" for index, line in enumerate(session.history()))


def getfd(vmm: Any, session: Session, fdname: str) -> None:
    vmm.passed_fds.add(fdname, _passed_fd(session))


def closefd(vmm: Any, fdname: str) -> None:
    vmm.passed_fds.close(fdname)


def add_fd(
    vmm: Any, session: Session, fdset_id: int | None = None, opaque: str | None = None
) -> dict:
    set_id, number = vmm.passed_fds.add_to_set(fdset_id, _passed_fd(session), opaque)
    return {"fdset-id": set_id, "fd": number}


def remove_fd(vmm: Any, fdset_id: int, fd: int | None = None) -> None:
    vmm.passed_fds.remove(fdset_id, fd)


def query_fdsets(vmm: Any) -> Any:
    return vmm.passed_fds.query_sets()


def _passed_fd(session: Session) -> int:
    fd = session.take_fd()
    if fd < 0:
        raise CommandError("No file descriptor supplied via SCM_RIGHTS")
    return fd
