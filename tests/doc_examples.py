"""The examples in a Markdown document: found, typed at real terminals, and compared.

A fenced block ```console NAME [TERMINAL]``` is a piece of the example NAME; an example may have
several terminals, each a shell of its own, and goes on from block to block:

    $ COMMAND            typed at the shell
    (qemu) COMMAND       typed at a monitor, when its prompt is there
    {"execute": …}       typed at a QMP monitor; further lines of it begin with a blank
    anything else        the output; … stands for any text, on a line of its own for any lines

A fenced block ```python NAME FILE``` or ```ini NAME FILE``` is a file in the example's folder.
A line `<!-- wait-for: PATH -->` waits until PATH exists; `<!-- ask-again -->` before a block says
that what is typed there at the monitor is a question to be asked until it has this answer.

The shell and the HMP must put out exactly what the example shows; of what comes from QMP, events
above all, the example may leave lines out.
"""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
from conformance.terminal import Screen
from harness.vm import ROOT
from waiting import wait_for

ACCEPTS = 0x10000  # __SO_ACCEPTCON of linux/net.h, in the flags of /proc/net/unix
TIMEOUT = 20.0
SHELL, MORE, MONITOR = "$ ", "> ", "(qemu) "
BANNER = "(qemu) QEMU "  # a new image's, after the prompt of the old one
QUESTION = "info "
ANY = "…"
FENCE = re.compile(r"```(?P<language>console|python|ini) (?P<name>[\w-]+) ?(?P<word>[\w.-]*)$")
WAIT = re.compile(r"<!-- wait-for: (?P<path>\S+) -->$")
ASK_AGAIN = "<!-- ask-again -->"
# Where there is no KVM, the VMM says so before it falls back.
FALLBACK = re.compile(r"cpr-vmm: (-accel kvm: .*|falling back to tcg)\n")


class Block:
    """One fenced block, or a line that waits; `number` is the line of the document it begins at."""

    def __init__(self, language: str, name: str, word: str, number: int) -> None:
        self.language = language
        self.name = name
        self.word = word
        self.number = number
        self.lines: list[str] = []
        self.ask_again = False


def find(path: Path) -> dict[str, list[Block]]:
    """The blocks of all the examples in a document, by the name of the example."""
    examples: dict[str, list[Block]] = {}
    block: Block | None = None
    name, ask_again = "", False
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if block is not None:
            if line == "```":
                block = None
            else:
                block.lines.append(line)
        elif match := FENCE.match(line):
            name = match["name"]
            block = Block(match["language"], name, match["word"], number)
            block.ask_again, ask_again = ask_again, False
            examples.setdefault(name, []).append(block)
        elif match := WAIT.match(line):
            examples[name].append(Block("wait", name, match["path"], number))
        elif line == ASK_AGAIN:
            ask_again = True
    return examples


class Step:
    """One line that is typed, and what comes of it.

    `typed` is "" for what comes at a terminal without anything typed in this block.
    """

    def __init__(self, prompt: str, typed: str, number: int) -> None:
        self.prompt = prompt
        self.typed = typed
        self.number = number
        self.output: list[str] = []


def steps(block: Block) -> Iterator[Step]:
    """The steps of a console block."""
    step = Step("", "", block.number)
    for number, line in enumerate(block.lines, block.number + 1):
        if line.startswith('{"execute"'):
            yield step
            step = Step("", line, number)
        elif step.typed and not step.prompt and line.startswith(" "):
            step.typed += "\n" + line
        elif line.startswith((SHELL, MONITOR)) and not line.startswith(BANNER):
            yield step
            prompt = SHELL if line.startswith(SHELL) else MONITOR
            step = Step(prompt, line.removeprefix(prompt), number)
        elif step.prompt == SHELL and step.typed.endswith("\\"):
            step.typed += "\n" + line.removeprefix(MORE)
        else:
            step.output.append(line)
    yield step


def matches(shown: list[str], lines: list[str]) -> bool:
    """Whether `lines` are what the document shows."""
    parts = [r"(?:.*\n)*?" if line == ANY else f"{line_pattern(line)}\n" for line in shown]
    return bool(re.fullmatch("".join(parts), "".join(f"{line.rstrip()}\n" for line in lines)))


def contains(lines: list[str], shown: list[str]) -> bool:
    """Whether `shown` is among `lines`, in this order."""
    rest = iter(lines)
    return all(
        any(re.fullmatch(line_pattern(wanted), line.rstrip()) for line in rest)
        for wanted in shown
        if wanted != ANY
    )


def line_pattern(line: str) -> str:
    return re.escape(line).replace(ANY, ".*")


class Terminal:
    """A shell on a pty, and its screen."""

    def __init__(self, folder: Path) -> None:
        self.pid, self._master = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            words = ["bash", "--noprofile", "--norc", "--noediting", "-i"]
            os.execvpe("bash", words, environment(folder))
        self._screen = Screen()
        self._mark = 0  # the line after which the output of the last step is
        self._open = Step("", "", 0)  # the step whose output is still to be compared
        self._is_qmp = False

    def play(self, block: Block) -> None:
        """Types the block; compares all but what comes of a last line that shows no output."""
        for step in steps(block):
            if not step.typed:
                self._open.output += step.output
                continue
            self._settle(step.prompt)
            self._type(step)
            if block.ask_again and step.typed.startswith(QUESTION):
                self._ask_again()
        if self._open.output:
            self._settle(None)

    def end(self) -> None:
        """The shell must be back, and what came last is compared."""
        self._settle(SHELL)

    def close(self) -> None:
        os.close(self._master)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def _type(self, step: Step) -> None:
        self._open = step
        self._is_qmp = not step.prompt
        self._mark = len(self._screen.lines) - 1
        for number, line in enumerate(step.typed.split("\n")):
            if number and step.prompt:
                self._wait(lambda: self._screen.lines[self._mark :] == [MORE], step)
            os.write(self._master, line.encode() + b"\r")
            self._mark += bool(step.prompt)

    def _ask_again(self) -> None:
        """Types the question that is open until its answer is as shown."""
        deadline = time.monotonic() + TIMEOUT
        step = self._open
        while time.monotonic() < deadline:
            self._wait(lambda: self._lines()[-1:] == [MONITOR], step)
            if self._has_come(step.output, MONITOR):
                return
            self._type(step)

    def _settle(self, prompt: str | None) -> None:
        """Waits until what the open step shows has come, and `prompt` after it."""
        self._wait(lambda: self._has_come(self._open.output, prompt), self._open)

    def _has_come(self, shown: list[str], prompt: str | None) -> bool:
        lines = self._lines()
        if prompt and (not lines or lines.pop() != prompt):
            return False
        if self._is_qmp or prompt == "":
            return contains(lines, shown)
        if prompt is None and lines and lines[-1] in (SHELL, MONITOR, ""):
            lines.pop()
        return matches(shown, lines)

    def _lines(self) -> list[str]:
        """What came of the open step, line by line."""
        return FALLBACK.sub("", "\n".join(self._screen.lines[self._mark :])).split("\n")

    def _wait(self, condition: Callable[[], bool], step: Step) -> None:
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            left = deadline - time.monotonic()
            if not select.select([self._master], [], [], max(left, 0))[0]:
                place = f"line {step.number}: {step.typed}"
                shown, lines = "\n".join(step.output), "\n".join(self._lines())
                raise AssertionError(f"{place}\nshows:\n{shown}\nbut what came is:\n{lines}")
            self._screen.feed(os.read(self._master, 1 << 16))


def environment(folder: Path) -> dict[str, str]:
    """The shell's environment: this Python first in PATH, this checkout's package."""
    return {
        "HOME": str(folder),
        "LANG": "C.UTF-8",
        "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
        "PS1": SHELL,
        "PS2": MORE,
        "PYTHONPATH": str(ROOT),
        "TERM": "dumb",
        "TMPDIR": str(folder),
    }


def is_there(path: Path) -> bool:
    """A file; a socket only when somebody listens, which comes a moment after it has its name."""
    if not path.is_socket():
        return path.exists()
    with open("/proc/net/unix") as table:  # its row has the name that it was bound to
        rows = [line.split() for line in table if line.endswith(f"{path.name}\n")]
    return any(int(row[3], 16) & ACCEPTS for row in rows)


def run(blocks: list[Block], folder: Path) -> None:
    """Plays one example in `folder`.  Raises AssertionError where it is not as shown."""
    (folder / "examples").symlink_to(ROOT / "examples")
    terminals: dict[str, Terminal] = {}
    try:
        for block in blocks:
            if block.language == "wait":
                path = folder / block.word
                wait_for(partial(is_there, path), f"there is {path}")
            elif block.language == "console":
                if block.word not in terminals:
                    terminals[block.word] = Terminal(folder)
                terminals[block.word].play(block)
            else:
                (folder / block.word).write_text("\n".join(block.lines) + "\n")
        for terminal in terminals.values():
            terminal.end()
        shells = {terminal.pid for terminal in terminals.values()}
        wait_for(lambda: processes_in(folder) == shells, "the example's processes end")
    finally:
        for terminal in terminals.values():
            terminal.close()
        for pid in processes_in(folder):
            os.kill(pid, signal.SIGKILL)


def processes_in(folder: Path) -> set[int]:
    """The processes that have `folder` as their working directory."""
    processes = psutil.process_iter(["cwd"])
    return {each.pid for each in processes if each.info["cwd"] == str(folder.resolve())}
