"""Commands that start and watch migrations; what they do is in cpr.migration."""

from __future__ import annotations

from typing import Any

from cpr.errors import CommandError
from cpr.monitor.memory import size_text
from cpr.monitor.schema import STRING, UNSIGNED, Enum, ListOf, Struct, Union

CHANNELS = ListOf(
    Struct(
        channel_type=Enum("main", "cpr"),
        addr=Union(
            "transport",
            {
                "file": Struct(filename=STRING, offset=UNSIGNED),
                "exec": Struct(args=ListOf(STRING)),
                "socket": Union(
                    "type",
                    {
                        "unix": Struct(path=STRING),
                        "inet": Struct(host=STRING, port=STRING),
                        "fd": Struct(str=STRING),
                    },
                ),
            },
        ),
    )
)

STATUSES = Enum(
    "none",
    "setup",
    "cancelling",
    "cancelled",
    "active",
    "postcopy-device",
    "postcopy-active",
    "postcopy-paused",
    "postcopy-recover-setup",
    "postcopy-recover",
    "completed",
    "failing",
    "failed",
    "colo",
    "pre-switchover",
    "device",
    "wait-unplug",
)

GLOBALS = """\
Globals:
  store-global-state: on
  only-migratable: {only_migratable}
  send-configuration: on
  send-section-footer: on
  send-switchover-start: on
  clear-bitmap-shift: 18
"""


def migrate(
    vmm: Any,
    uri: str | None = None,
    channels: list[dict] | None = None,
    resume: bool = False,
    detach: bool = True,
) -> None:
    """migrate; `detach` is only about when the HMP's prompt comes back."""
    vmm.migration.migrate(uri, channels, resume)


def migrate_incoming(
    vmm: Any,
    uri: str | None = None,
    channels: list[dict] | None = None,
    exit_on_error: bool = True,
) -> None:
    vmm.migration.incoming(uri, channels, exit_on_error)


def migrate_cancel(vmm: Any) -> None:
    vmm.migration.cancel()


def migrate_continue(vmm: Any, state: str) -> None:
    vmm.migration.continue_(state)


def hmp_migrate_continue(vmm: Any, state: str) -> None:
    if state not in STATUSES.values:
        raise CommandError(f"invalid parameter value: {state}")
    vmm.migration.continue_(state)


def set_parameters(vmm: Any, arguments: dict[str, Any]) -> None:
    vmm.migration.parameters.set(arguments)


def set_parameter(vmm: Any, parameter: str, value: str) -> None:
    vmm.migration.parameters.set_from_string(parameter, value)


def query_parameters(vmm: Any) -> Any:
    return vmm.migration.parameters.query()


def info_parameters(vmm: Any) -> str:
    return "".join(f"{line}\n" for line in vmm.migration.parameters.info_lines())


def set_capabilities(vmm: Any, capabilities: list[dict]) -> None:
    vmm.migration.capabilities.set(capabilities)


def set_capability(vmm: Any, capability: str, state: bool) -> None:
    if capability not in capability_names(vmm):
        raise CommandError(f"invalid parameter value: {capability}")
    vmm.migration.capabilities.set([{"capability": capability, "state": state}])


def query_capabilities(vmm: Any) -> Any:
    return vmm.migration.capabilities.query()


def info_capabilities(vmm: Any) -> str:
    return "".join(f"{line}\n" for line in vmm.migration.capabilities.info_lines())


def parameter_names(vmm: Any) -> list[str]:
    names: list[str] = vmm.migration.parameters.names()
    return names


def capability_names(vmm: Any) -> list[str]:
    return [row["capability"] for row in vmm.migration.capabilities.query()]


def qmp_cpr_exec(vmm: Any, command: list[str] | None = None, test: bool = False) -> dict | None:
    """cpr-exec: updates the VMM; with `test` only says what would refuse it.

    `start-time` is how many ms the new program took in a rehearsal, where it can be rehearsed.
    """
    if not test:
        vmm.migration.start_cpr_exec(command)
        return None
    found = vmm.migration.check_cpr_exec(command)
    answer = {"refusals": found.refusals}
    if found.start_ms is not None:
        answer["start-time"] = found.start_ms
    return answer


def hmp_cpr_exec(vmm: Any, test: bool = False, command: list[str] | None = None) -> str:
    answer = qmp_cpr_exec(vmm, command, test)
    if answer is None:
        return ""
    if answer["refusals"]:
        return "".join(f"Error: {refusal}\n" for refusal in answer["refusals"])
    return rehearsal_text(answer)


def rehearsal_text(answer: dict) -> str:
    """What is said of a rehearsal without refusals."""
    if "start-time" in answer:
        return f"cpr-exec would go ahead: the new program was ready in {answer['start-time']} ms\n"
    return "cpr-exec would go ahead; the new program cannot be rehearsed\n"


def query_migrate(vmm: Any) -> Any:
    return vmm.migration.query()


def info_migrate(vmm: Any, all: bool = False) -> str:
    info = vmm.migration.query()
    text = ""
    if reasons := info.get("blocked-reasons"):
        text += "Outgoing migration blocked:\n" + "".join(f"  {reason}\n" for reason in reasons)
    if "status" in info:
        text += _status_lines(info)
    if vmm.migration.update_times is not None and "x-cpr-update" in info:
        text += f"Update: \t\t{vmm.migration.update_times.text()}\n"
    if "remaining" in info:
        text += f"Remaining: \t\t{size_text(info['remaining'])}\n"
    if "ram" in info:
        text += _ram_lines(info["ram"])
    if all:
        text += GLOBALS.format(only_migratable="on" if vmm.config.only_migratable else "off")
    return text


def _status_lines(info: dict) -> str:
    text = f"Status: \t\t{info['status']}"
    if info["status"] in ("failed", "postcopy-paused") and "error-desc" in info:
        text += f" ({info['error-desc']})"
    text += "\n"
    if info.get("total-time"):
        text += f"Time (ms): \t\ttotal={info['total-time']}"
        for key, word in (
            ("setup-time", "setup"),
            ("expected-downtime", "exp_down"),
            ("downtime", "down"),
        ):
            if key in info:
                text += f", {word}={info[key]}"
        text += "\n"
    return text


def _ram_lines(ram: dict) -> str:
    def size(key: str) -> str:
        return size_text(ram[key])

    rates = f"transfer={ram['pages-per-second']}"
    if ram["dirty-pages-rate"]:
        rates += f", dirty={ram['dirty-pages-rate']}"
    others = f"dirty_syncs={ram['dirty-sync-count']}"
    for key, word in (
        ("postcopy-requests", "postcopy_req"),
        ("downtime-bytes", "downtime_bytes"),
        ("dirty-sync-missed-zero-copy", "zerocopy_fallbacks"),
    ):
        if ram[key]:
            others += f", {word}={ram[key]}"
    return (
        "RAM info:\n"
        f"  Throughput (Mbps): \t{ram['mbps']:.2f}\n"
        f"  Sizes: \t\tpagesize={size('page-size')}, total={size('total')}\n"
        f"  Transfers: \t\ttransferred={size('transferred')}, remain={size('remaining')}\n"
        f"    Channels: \t\tprecopy={size('precopy-bytes')}, multifd={size('multifd-bytes')}, "
        f"postcopy={size('postcopy-bytes')}\n"
        f"    Page Types: \tnormal={ram['normal']}, zero={ram['duplicate']}\n"
        f"  Page Rates (pps): \t{rates}\n"
        f"  Others: \t\t{others}\n"
    )
