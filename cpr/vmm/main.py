"""`python -m cpr.vmm VERB`: the command line.  Each verb parses and delegates.

run [guest.cfg] [QEMU options]    boots a guest, or takes over the one of an update
cpr-exec SOCKET [-t] [COMMAND…]   updates a VMM by its QMP monitor, and waits for it
inspect FILE|PID|-                shows a CPR state or a migration stream, and what is wrong in it
protocol                          the versions of what old and new VMM say to each other
"""

from __future__ import annotations

import sys

from cpr.errors import CprError
from cpr.report import error_report, exhausted, open_standard_descriptors, output

USAGE = """usage: python -m cpr.vmm run [guest.cfg] [QEMU options]
       python -m cpr.vmm run -help
       python -m cpr.vmm cpr-exec SOCKET [-t] [COMMAND...]
       python -m cpr.vmm inspect FILE|PID|-
       python -m cpr.vmm inspect --help
"""


def run(arguments: list[str]) -> int:
    from cpr.vmm.process import run_vmm

    return run_vmm(arguments)


def cpr_exec(arguments: list[str]) -> int:
    from cpr.vmm.exec_verb import run as run_cpr_exec

    return run_cpr_exec(arguments)


def inspect(arguments: list[str]) -> int:
    from cpr.vmm.inspect.command import run as run_inspect

    return run_inspect(arguments)


def protocol(arguments: list[str]) -> int:
    from cpr.migration.program import answer

    output(answer())
    return 0


VERBS = {"run": run, "cpr-exec": cpr_exec, "inspect": inspect, "protocol": protocol}


def main(arguments: list[str] | None = None) -> int:
    """Runs one verb; returns the exit status: 1 where it was refused, with the reason on stderr."""
    open_standard_descriptors()
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] not in VERBS:
        if words and words[0] in ("-h", "-help", "--help"):
            output(USAGE)
            return 0
        if words:
            error_report(f"no such verb: '{words[0]}'\n{USAGE}")
        else:
            error_report(f"no verb\n{USAGE}")
        return 1
    try:
        return VERBS[words[0]](words[1:])
    except CprError as error:
        error_report(error)
        return 1
    except (OSError, MemoryError) as error:
        text = exhausted(error)
        if not text:
            raise
        error_report(text)
        return 1
