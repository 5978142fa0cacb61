"""A Linux guest: examples/linux.cfg boots the same kernel to the same prompt."""

from __future__ import annotations

import shutil

from examples.linux import build as linux

from ..lab import Lab
from ..match import Mismatch, Unavailable
from ..row import Row, step
from ..steps import comes_to, connect, exits, start, until

CONFIG = linux.HERE.parent / "linux.cfg"
FOLDER = "examples/build/linux"
PROMPT = "\n/ # "
BOOT_SECONDS = 100.0


@step
def write_config(lab: Lab) -> None:
    """$dir/linux.cfg: the example's, with TCG, the console in $dir/console, no monitor."""
    try:
        folder = linux.build()
    except linux.Unavailable as lack:
        raise Unavailable(str(lack)) from None
    for name in (linux.KERNEL, linux.INITRD):
        shutil.copy(folder / name, lab.path(f"$dir/{name}"))
    text = CONFIG.read_text().replace(FOLDER, lab.names["dir"])
    changes = {
        '"kvm:tcg"': '"tcg"',
        '"monitor.sock"': f'"{lab.names["dir"]}/monitor.sock"',
        'backend = "stdio"\n  signal = "off"': (
            f'backend = "file"\n  path = "{lab.names["dir"]}/console"'
        ),
    }
    for old, new in changes.items():
        if old not in text:
            raise Mismatch(f"linux.cfg has no {old}")
        text = text.replace(old, new)
    lab.path("$dir/linux.cfg").write_text(text)


@step
def comes_to_the_prompt(lab: Lab) -> None:
    """The shell's prompt is on the console."""
    console = lab.path("$dir/console")

    def prompts() -> bool:
        return console.exists() and PROMPT in console.read_text(errors="replace")

    if not until(prompts, BOOT_SECONDS):
        raise Mismatch(f"no prompt on the console: {console.read_text(errors='replace')[-500:]!r}")


@step
def press_power_button(lab: Lab) -> None:
    lab.vm.query("system_powerdown")


ROWS = [
    Row(
        "linux-prompt",
        "linux: -readconfig boots kernel and initrd; the power button ends the guest",
        write_config(),
        start("-nodefaults -display none -readconfig $dir/linux.cfg"),
        connect(),
        comes_to("running"),
        comes_to_the_prompt(),
        press_power_button(),
        exits(0),
    ),
]
