"""The commands of both monitors: the one table, and the look-ups in it."""

from __future__ import annotations

from typing import Any

from cpr.migration.capabilities import CAPABILITIES
from cpr.monitor import control, memory, migrate
from cpr.monitor.schema import (
    AFTER_MIGRATION,
    BOOLEAN,
    FORMAT,
    INTEGER,
    LINE,
    NEVER,
    NOW,
    STRING,
    STRINGS,
    UNSIGNED,
    Argument,
    Command,
    Enum,
    Flag,
    ListOf,
    Session,
    Struct,
)


def query_commands(vmm: Any) -> list[dict]:
    return [{"name": command.qmp} for command in COMMANDS if command.qmp]


def query_qmp_schema(vmm: Any) -> list[dict]:
    from cpr.monitor.introspect import qmp_schema

    return qmp_schema(COMMANDS)


def human_monitor_command(
    vmm: Any, session: Session, command_line: str, cpu_index: int | None = None
) -> str:
    from cpr.monitor.hmp import run_line

    return run_line(vmm, session, command_line, cpu_index)


def help_text(vmm: Any, name: str | None = None) -> str:
    """help [command [subcommand]]."""
    words = (name or "").split()
    if not words:
        return "".join(_help_line(command) for command in hmp_commands(False))
    if words == ["info"]:
        return info_text(vmm)
    *group, last = words[: 2 if words[0] == "info" else 1]
    found = find_hmp(last, bool(group))
    if found is None:
        return f"unknown command: '{' '.join([*group, last])}'\n"
    return _help_line(found)


def info_text(vmm: Any) -> str:
    """info, without a word after it."""
    return "".join(_help_line(command) for command in hmp_commands(True))


def hmp_commands(info: bool) -> list[Command]:
    """Those of the top level, or those of `info`, sorted by name."""
    found = (command for command in COMMANDS if command.hmp and command.is_info == info)
    return sorted(found, key=lambda command: command.names)


def find_hmp(name: str, info: bool) -> Command | None:
    for command in COMMANDS:
        if command.is_info == info and name in command.names:
            return command
    return None


def find_qmp(name: str) -> Command | None:
    for command in COMMANDS:
        if name and command.qmp == name:
            return command
    return None


def _help_line(command: Command) -> str:
    return f"{command.hmp} {command.params} -- {command.help}\n"


URI = Argument("uri", STRING)
OPTIONAL_URI = Argument("uri", STRING, optional=True, on="qmp")
CHANNELS = Argument("channels", migrate.CHANNELS, optional=True, on="qmp")
CAPABILITY_STATES = ListOf(Struct(capability=Enum(*CAPABILITIES), state=BOOLEAN))
DUMP = (Argument("fmt", FORMAT), Argument("addr", UNSIGNED))
SAVE = (Argument("val", UNSIGNED), Argument("size", UNSIGNED), Argument("filename", STRING))

COMMANDS: tuple[Command, ...] = (
    # The monitors themselves.
    Command(
        "help|?",
        "",
        help_text,
        Argument("name", LINE, optional=True),
        params="[cmd]",
        help="show the help",
    ),
    Command(
        "info",
        "",
        info_text,
        params="[subcommand]",
        help="show various information about the system state",
    ),
    Command(
        "info history",
        "",
        control.info_history,
        help="show the command line history",
        in_session=True,
    ),
    Command("", "query-commands", query_commands),
    Command("", "query-qmp-schema", query_qmp_schema),
    Command(
        "",
        "human-monitor-command",
        human_monitor_command,
        Argument("command-line", STRING),
        Argument("cpu-index", INTEGER, optional=True),
        in_session=True,
    ),
    Command(
        "info version",
        "query-version",
        control.query_version,
        help="show the version of QEMU",
        text=control.version_text,
    ),
    # The VM.
    Command(
        "info status",
        "query-status",
        control.query_status,
        help="show the current VM status (running|paused)",
        text=control.status_text,
    ),
    Command("stop|s", "stop", control.stop, help="stop emulation"),
    Command("cont|c", "cont", control.cont, help="resume emulation"),
    Command(
        "quit|q",
        "quit",
        control.quit,
        help="quit the emulator",
        prompt=lambda arguments: NEVER,
    ),
    Command("system_reset", "system_reset", control.system_reset, help="reset the system"),
    Command(
        "system_powerdown",
        "system_powerdown",
        control.system_powerdown,
        help="send system power down event",
    ),
    Command(
        "system_wakeup", "system_wakeup", control.system_wakeup, help="wakeup guest from suspend"
    ),
    Command(
        "info name",
        "query-name",
        control.query_name,
        help="show the current VM name",
        text=control.name_text,
    ),
    Command(
        "info uuid",
        "query-uuid",
        control.query_uuid,
        help="show the current VM UUID",
        text=control.uuid_text,
    ),
    Command(
        "info kvm",
        "query-kvm",
        control.query_kvm,
        help="show KVM information",
        text=control.kvm_text,
    ),
    Command(
        "info accelerators",
        "query-accelerators",
        control.query_accelerators,
        help="show present and enabled information",
        text=control.accelerators_text,
    ),
    Command(
        "info chardev",
        "query-chardev",
        control.query_chardev,
        help="show the character devices",
        text=control.chardev_text,
    ),
    # vCPUs and memory.
    Command("", "query-cpus-fast", control.query_cpus_fast),
    Command("info cpus", "", control.info_cpus, help="show infos for each CPU", in_session=True),
    Command(
        "cpu",
        "",
        memory.set_cpu,
        Argument("index", INTEGER),
        params="index",
        help="set the default CPU",
        in_session=True,
    ),
    Command(
        "info registers",
        "",
        memory.info_registers,
        Argument("cpustate_all", Flag("a")),
        Argument("vcpu", INTEGER, optional=True),
        params="[-a|vcpu]",
        help="show the cpu registers (-a: show register info for all cpus; vcpu: specific vCPU "
        "to query; show the current CPU's registers if no argument is specified)",
        in_session=True,
    ),
    Command(
        "info balloon",
        "query-balloon",
        control.query_balloon,
        help="show balloon information",
        text=control.balloon_text,
    ),
    Command(
        "balloon",
        "",
        control.balloon_to,
        Argument("value", INTEGER),
        params="target",
        help="request VM to change its memory allocation (in MB)",
    ),
    Command("", "balloon", control.balloon, Argument("value", INTEGER)),
    Command("info mtree", "", memory.info_mtree, help="show memory tree"),
    Command(
        "info ramblock",
        "",
        memory.info_ramblock,
        help="Display system ramblock information",
    ),
    Command("", "x-query-ramblock", memory.query_ramblock),
    Command(
        "info memdev",
        "query-memdev",
        memory.query_memdev,
        help="show memory backends",
        text=memory.memdev_text,
    ),
    Command(
        "info memory_size_summary",
        "query-memory-size-summary",
        memory.query_memory_size_summary,
        help="show the amount of initially allocated and present hotpluggable (if enabled) "
        "memory in bytes.",
        text=memory.memory_size_summary_text,
    ),
    Command(
        "x",
        "",
        memory.dump_virtual,
        *DUMP,
        params="/fmt addr",
        help="virtual memory dump starting at 'addr'",
        in_session=True,
    ),
    Command(
        "xp",
        "",
        memory.dump_physical,
        *DUMP,
        params="/fmt addr",
        help="physical memory dump starting at 'addr'",
        in_session=True,
    ),
    Command(
        "print|p",
        "",
        memory.print_value,
        Argument("fmt", FORMAT),
        Argument("val", UNSIGNED),
        params="/fmt expr",
        help="print expression value (use $reg for CPU register access)",
        in_session=True,
    ),
    Command(
        "memsave",
        "memsave",
        memory.save_virtual,
        *SAVE,
        Argument("cpu-index", INTEGER, optional=True, on="qmp"),
        params="addr size file",
        help="save to disk virtual memory dump starting at 'addr' of size 'size'",
        in_session=True,
    ),
    Command(
        "pmemsave",
        "pmemsave",
        memory.save_physical,
        *SAVE,
        params="addr size file",
        help="save to disk physical memory dump starting at 'addr' of size 'size'",
    ),
    # Migration.
    Command(
        "migrate",
        "",
        migrate.migrate,
        Argument("detach", Flag("d")),
        Argument("resume", Flag("r")),
        URI,
        params="[-d] [-r] uri",
        help="migrate to URI (using -d to not wait for completion)\n"
        "\t\t\t -r to resume a paused postcopy migration",
        prompt=lambda arguments: NOW if arguments["detach"] else AFTER_MIGRATION,
    ),
    Command(
        "",
        "migrate",
        migrate.migrate,
        OPTIONAL_URI,
        CHANNELS,
        Argument("resume", BOOLEAN, optional=True),
    ),
    Command(
        "migrate_incoming",
        "",
        migrate.migrate_incoming,
        URI,
        params="uri",
        help="Continue an incoming migration from an -incoming defer",
    ),
    Command(
        "",
        "migrate-incoming",
        migrate.migrate_incoming,
        OPTIONAL_URI,
        CHANNELS,
        Argument("exit-on-error", BOOLEAN, optional=True),
    ),
    Command(
        "migrate_cancel",
        "migrate_cancel",
        migrate.migrate_cancel,
        help="cancel the current VM migration",
    ),
    Command(
        "migrate_continue",
        "",
        migrate.hmp_migrate_continue,
        Argument("state", STRING),
        params="state",
        help="Continue migration from the given paused state",
    ),
    Command("", "migrate-continue", migrate.migrate_continue, Argument("state", migrate.STATUSES)),
    Command(
        "info migrate",
        "",
        migrate.info_migrate,
        Argument("all", Flag("a")),
        params="[-a]",
        help="show migration status (-a: all, dump all status)",
    ),
    Command("", "query-migrate", migrate.query_migrate),
    Command(
        "migrate_set_parameter",
        "",
        migrate.set_parameter,
        Argument("parameter", STRING, choices=migrate.parameter_names),
        Argument("value", LINE),
        params="parameter value",
        help="Set the parameter for migration",
    ),
    Command("", "migrate-set-parameters", migrate.set_parameters, whole=True),
    Command(
        "info migrate_parameters",
        "",
        migrate.info_parameters,
        help="show current migration parameters",
    ),
    Command("", "query-migrate-parameters", migrate.query_parameters),
    Command(
        "migrate_set_capability",
        "",
        migrate.set_capability,
        Argument("capability", STRING, choices=migrate.capability_names),
        Argument("state", BOOLEAN, choices=lambda vmm: ("on", "off")),
        params="capability state",
        help="Enable/Disable the usage of a capability for migration",
    ),
    Command(
        "",
        "migrate-set-capabilities",
        migrate.set_capabilities,
        Argument("capabilities", CAPABILITY_STATES),
    ),
    Command(
        "info migrate_capabilities",
        "",
        migrate.info_capabilities,
        help="show current migration capabilities",
    ),
    Command("", "query-migrate-capabilities", migrate.query_capabilities),
    Command(
        "cpr-exec",
        "",
        migrate.hmp_cpr_exec,
        Argument("test", Flag("t")),
        Argument("command", STRINGS, optional=True),
        params="[-t] [command …]",
        help="update the VMM in place: exec command, or this program again, keeping the guest\n"
        "\t\t\t -t to only say what would refuse it",
        prompt=lambda arguments: NOW if arguments["test"] else AFTER_MIGRATION,
    ),
    Command(
        "",
        "cpr-exec",
        migrate.qmp_cpr_exec,
        Argument("command", STRINGS, optional=True),
        Argument("test", BOOLEAN, optional=True),
    ),
    # Descriptors passed by the monitor's client.
    Command(
        "getfd",
        "getfd",
        control.getfd,
        Argument("fdname", STRING),
        params="getfd name",
        help="receive a file descriptor via SCM rights and assign it a name",
        in_session=True,
    ),
    Command(
        "closefd",
        "closefd",
        control.closefd,
        Argument("fdname", STRING),
        params="closefd name",
        help="close a file descriptor previously passed via SCM rights",
    ),
    Command(
        "",
        "add-fd",
        control.add_fd,
        Argument("fdset-id", INTEGER, optional=True),
        Argument("opaque", STRING, optional=True),
        in_session=True,
    ),
    Command(
        "",
        "remove-fd",
        control.remove_fd,
        Argument("fdset-id", INTEGER),
        Argument("fd", INTEGER, optional=True),
    ),
    Command("", "query-fdsets", control.query_fdsets),
)
