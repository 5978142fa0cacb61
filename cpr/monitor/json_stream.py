"""The JSON that QMP clients send: a stream of values in QEMU's dialect, parsed as it comes in.

The dialect: strings in double or single quotes, keywords in lower case, no comments.  Positions
in errors are line:column of the stream, from 1.  After a lexical error input is skipped up to the
next brace or bracket, after a syntax error to the end of the value in which it is; then parsing
goes on, so that a client with a broken command gets one error for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from cpr.errors import CommandError

MAX_TOKEN_SIZE = 64 << 20  # bytes of one value, as in QEMU
MAX_TOKEN_COUNT = 2 << 20
MAX_NESTING = 1 << 10

STRING_BYTES = rb"[\x20-\x7e\x7f\xc0\x80-\xbf\xc2-\xf4]"
# One token at the start of the buffer; a match that reaches the buffer's end may go on.
TOKEN = re.compile(
    rb"""(?P<space>[ \t\r\n]+)
    |(?P<mark>[{}\[\],:])
    |(?P<string>"(?:[\x20\x21\x23-\x5b\x5d-\x7f]|\\[^\x00-\x1f]|[\x80-\xbf\xc0\xc2-\xf4])*"
               |'(?:[\x20-\x26\x28-\x5b\x5d-\x7f]|\\[^\x00-\x1f]|[\x80-\xbf\xc0\xc2-\xf4])*')
    |(?P<number>-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?)
    |(?P<word>[a-z]+)""",
    re.VERBOSE,
)
# What may be the start of a token that has not ended yet.
PARTIAL = re.compile(
    rb"""(?:"(?:[\x20\x21\x23-\x5b\x5d-\x7f]|\\[^\x00-\x1f]|[\x80-\xbf\xc0\xc2-\xf4])*\\?
    |'(?:[\x20-\x26\x28-\x5b\x5d-\x7f]|\\[^\x00-\x1f]|[\x80-\xbf\xc0\xc2-\xf4])*\\?
    |-?(?:0|[1-9][0-9]*)?(?:\.[0-9]*)?(?:(?<=[0-9])[eE][-+]?[0-9]*)?)""",
    re.VERBOSE,
)
