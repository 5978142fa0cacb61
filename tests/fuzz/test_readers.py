"""A share of the fuzzing of every reader of bytes: the corpus, and some seconds of new inputs."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest

from fuzz.mutate import mutate
from fuzz.readers import CORPUS, READERS, close_machine, seeds

SECONDS = 0.4  # of each reader
SLOW = 5.0  # s, which no input takes


@pytest.fixture(scope="module", autouse=True)
def without_threads_at_the_end() -> Iterator[None]:
    yield
    close_machine()


@pytest.mark.parametrize("name", list(READERS))
def test_reader(name):
    read, inputs = READERS[name][0], seeds(name)
    for data in inputs:
        read(data)
    chance = random.Random(name)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        data = mutate(chance, inputs)
        began = time.monotonic()
        try:
            read(data)
        except Exception as error:
            error.add_note(f"the input: {data[:2000]!r}")
            raise
        assert time.monotonic() - began < SLOW, data[:2000]


def test_the_corpus_is_of_readers():
    assert {path.name for path in CORPUS.iterdir() if path.is_dir()} <= {*READERS, "guests"}
