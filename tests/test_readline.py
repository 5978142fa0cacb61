"""The line editor: what was typed into QEMU 11.1.3, and the bytes that came back."""

from __future__ import annotations

import pytest

from cpr.monitor.readline import HISTORY_SIZE, LINE_SIZE, Readline

PROMPT = b"(qemu) "
LEFT = b"\x1b[D"


class Editor:
    """A Readline whose screen and lines the test looks at."""

    def __init__(self, candidates: list[str] | None = None) -> None:
        self.screen = bytearray()
        self.lines: list[str] = []
        self.asked: list[str] = []
        self.candidates = candidates or []
        self.readline = Readline(self._write, self._on_line, self._complete, "(qemu) ")

    def _write(self, data: bytes) -> None:
        self.screen += data

    def _on_line(self, line: str) -> None:
        self.lines.append(line)
        self.readline.show_prompt()

    def _complete(self, line: str) -> tuple[list[str], int]:
        self.asked.append(line)
        typed = line.rpartition(" ")[2]
        return [word for word in self.candidates if word.startswith(typed)], len(typed)

    def type(self, keys: bytes) -> bytes:
        self.screen = bytearray()
        for byte in keys:
            self.readline.feed(byte)
        return bytes(self.screen)


def test_typing_redraws_the_line() -> None:
    assert Editor().type(b"inf") == b"i\x1b[K\x1b[Din\x1b[K\x1b[D\x1b[Dinf\x1b[K"


def test_enter() -> None:
    for key in (b"\n", b"\r"):
        editor = Editor()
        assert editor.type(b"a" + key) == b"a\x1b[K\r\n" + PROMPT
        assert editor.lines == ["a"]


@pytest.mark.parametrize(
    ("keys", "screen", "line"),
    [
        (b"\x1b[D\x1b[Dxy", b"\x1b[D\x1b[D\x1b[Daxbc\x1b[K\x1b[D\x1b[D", "axybc"),
        (b"\x01Z", b"\x1b[D\x1b[D\x1b[DZabc\x1b[K\x1b[D\x1b[D\x1b[D", "Zabc"),
        (b"\x01\x05Y", b"\x1b[D\x1b[D\x1b[D\x1b[C\x1b[C\x1b[C", "abcY"),
        (b"\x1b[1~\x04", b"\x1b[D\x1b[D\x1b[Dbc\x1b[K\x1b[D\x1b[D", "bc"),
        (b"\x1bOH\x1b[3~", b"\x1b[D\x1b[D\x1b[Dbc\x1b[K\x1b[D\x1b[D", "bc"),
        (b"\x1b[D\x1bOFz", b"\x1b[D\x1b[C", "abcz"),
        (b"\x1b[4~", b"", "abc"),
        (b"\x08", b"\x1b[D\x1b[D\x1b[Dab\x1b[K", "ab"),
        (b"\x7f\x7f", b"\x1b[D\x1b[D\x1b[Dab\x1b[K\x1b[D\x1b[Da\x1b[K", "a"),
        (b"\x15", b"\x1b[D\x1b[D\x1b[D\x1b[K", ""),
        (b"\x1b[D\x15", b"\x1b[D\x1b[D\x1b[Dc\x1b[K\x1b[D", "c"),
        (b"\x0c", b"\x1b[2J\x1b[1;1H" + PROMPT + b"abc\x1b[K", "abc"),
        (b"\x02\x06\x0b\x12\x14\x19\x00\x1f", b"", "abc"),
        (b"\x1b[H\x1bx\x1bOA", b"", "abc"),
    ],
)
def test_editing_abc(keys: bytes, screen: bytes, line: str) -> None:
    editor = Editor()
    editor.type(b"abc")
    assert editor.type(keys).startswith(screen)
    editor.type(b"\n")
    assert editor.lines == [line]


@pytest.mark.parametrize(
    ("text", "left"),
    [(b"foo bar baz", "foo bar "), (b"foo bar  ", "foo "), (b"foo", ""), (b" foo", ""), (b"", "")],
)
def test_deleting_a_word(text: bytes, left: str) -> None:
    editor = Editor()
    editor.type(text + b"\x17\n")
    assert editor.lines == [left]


def test_history() -> None:
    editor = Editor()
    editor.type(b"abc\ndef ghi\n")
    assert editor.type(b"\x10") == b"def ghi\x1b[K"
    assert editor.type(b"\x1b[A") == LEFT * 7 + b"abc\x1b[K"
    assert editor.type(b"\x10") == b""  # there is nothing before it
    assert editor.type(b"\x0e") == LEFT * 3 + b"def ghi\x1b[K"
    assert editor.type(b"\x1b[B") == LEFT * 7 + b"\x1b[K"
    assert editor.type(b"\x0e") == b""


def test_history_keeps_one_of_the_same_and_no_empty_ones() -> None:
    editor = Editor()
    editor.type(b"one\ntwo\none\n\n")
    assert editor.readline.history == [b"two", b"one"]


def test_history_is_bounded() -> None:
    editor = Editor()
    for number in range(HISTORY_SIZE + 10):
        editor.type(b"%d\n" % number)
    assert editor.readline.history[0] == b"10"
    assert len(editor.readline.history) == HISTORY_SIZE


def test_a_line_is_bounded() -> None:
    editor = Editor()
    editor.type(b"x" * (LINE_SIZE + 100) + b"\n")
    assert editor.lines == ["x" * LINE_SIZE]


def test_characters_beyond_ascii() -> None:
    editor = Editor()
    editor.type("é\n".encode())
    editor.type(b"\xff\n")
    assert editor.lines == ["é", "\udcff"]


def test_completion_of_one() -> None:
    editor = Editor(["info", "quit"])
    editor.type(b"inf")
    assert editor.type(b"\t") == LEFT * 3 + b"info \x1b[K"


def test_completion_of_several() -> None:
    editor = Editor(["migrate", "migrate_capabilities", "migrate_parameters"])
    editor.type(b"info mig")
    assert editor.type(b"\t") == (
        b"\r\nmigrate               migrate_capabilities  migrate_parameters    \r\n"
        b"(qemu) info migrate\x1b[K"
    )
    assert editor.asked == ["info mig"]


def test_completion_fills_lines_of_the_screen() -> None:
    editor = Editor(["stats", "status"])
    editor.type(b"help info st")
    assert editor.type(b"\t") == b"\r\nstats     status    \r\n(qemu) help info stat\x1b[K"


def test_completion_looks_only_before_the_cursor() -> None:
    editor = Editor(["info"])
    editor.type(b"inx\x1b[D")
    editor.type(b"\t\n")
    assert editor.asked == ["in"]
    assert editor.lines == ["info x"]


def test_no_completion() -> None:
    editor = Editor()
    editor.type(b"zz")
    assert editor.type(b"\t") == b""
