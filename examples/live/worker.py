"""A long computation that goes on where it was: `kill -HUP PID` gives it a new program.

It sieves primes below LIMIT, in memory that the next program has too.

usage: python worker.py [LIMIT]
"""

import os
import signal
import sys

from cpr import live

LIMIT = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000_000
PLACE = 8  # bytes before the table: the number that is next

memory = live.memory("sieve", PLACE + LIMIT)
wanted = False


def ask(number, frame):
    """Only notes it: the update comes between two steps, where all is in the memory."""
    global wanted
    wanted = True


def sift(number):
    """Marks the multiples; a step that is done again does no harm."""
    if not memory[PLACE + number]:
        first = number * number
        memory[PLACE + first :: number] = b"\1" * len(range(first, LIMIT, number))


signal.signal(signal.SIGHUP, ask)
at = max(int.from_bytes(memory[:PLACE], "little"), 2)
live.ready()
print(f"serving {os.getpid()} {live.generation} {at}", flush=True)
while at * at < LIMIT:
    sift(at)
    at += 1
    memory[:PLACE] = at.to_bytes(PLACE, "little")
    if wanted:
        wanted = False
        try:
            live.update()
        except live.UpdateError as error:
            print(f"failed {os.getpid()} {error}", flush=True)
print(f"done {os.getpid()} {LIMIT - 2 - memory[PLACE + 2 :].count(1)}", flush=True)
