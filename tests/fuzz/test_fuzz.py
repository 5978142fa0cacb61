"""A share of the fuzzing of guests and of the monitor."""

from __future__ import annotations

import random

import pytest

from fuzz import guests, monitor
from fuzz.__main__ import NAMES
from fuzz.readers import CORPUS, READERS

SECONDS = 1.0
COMMANDS = 300


@pytest.mark.parametrize("kind", list(guests.KINDS))
def test_a_guest_that_does_what_it_likes(accel, tmp_path, kind):
    guests.try_guest(accel, kind, random.Random(f"{accel} {kind}"), tmp_path)


def test_a_monitor_client_that_says_what_it_likes(accel, start):
    assert monitor.fuzz(accel, SECONDS, 1, least=COMMANDS)


def test_the_guests_of_the_corpus(accel, tmp_path):
    image = tmp_path / "guest.img"
    for path in sorted((CORPUS / "guests").glob("*")):
        image.write_bytes(path.read_bytes().ljust(guests.FLOPPY, b"\0"))
        with guests.running(accel, image) as vm:
            guests.watch(vm)


def test_every_reader_has_its_share():
    assert set(NAMES) == set(READERS)
