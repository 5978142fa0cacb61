"""What old and new image say to each other, and in which order an update goes."""

from __future__ import annotations

import json
import os
import socket

import pytest
from descriptors import open_fds

from cpr.live import guard, messages
from cpr.live.new_image import Predecessor, find_predecessor
from cpr.live.old_image import Update
from cpr.live.token import take_token
from cpr.live.transaction import (
    AFTER,
    BUILDING,
    CLOSED,
    END,
    GOING,
    HAND_OVER,
    HELLO,
    PREPARED,
    READY,
    REFUSE,
    RETURNING,
    STARTING,
    STATE,
    TRANSITIONS,
    VARIABLE,
    UpdateError,
)


def descriptors() -> int:
    return len(open_fds())


@pytest.fixture
def ends():
    before = descriptors()
    pair = messages.pair()
    yield pair
    for end in pair:
        end.close()
    assert descriptors() == before


# Messages.


@pytest.mark.parametrize("length", [0, 100, messages.MOST_INLINE, 1 << 20])
@pytest.mark.parametrize("count", [0, 1, 200, 201, 450])
def test_a_message_with_text_and_descriptors(ends, length, count):
    ours, theirs = ends
    text = "ä" * (length // 2)
    fds = [os.memfd_create(str(number)) for number in range(count)]
    messages.send(ours, HELLO, {"text": text, "list": [1, None]}, fds)
    message = messages.receive(theirs)
    assert (message.kind, message.body) == (HELLO, {"text": text, "list": [1, None]})
    assert [os.fstat(fd).st_ino for fd in message.fds] == [os.fstat(fd).st_ino for fd in fds]
    assert not any(os.get_inheritable(fd) for fd in message.fds)
    message.close()
    assert message.fds == []
    for fd in fds:
        os.close(fd)


def test_messages_keep_their_order(ends):
    ours, theirs = ends
    for number in range(5):
        messages.send(ours, STATE, {"number": number}, [])
    assert [messages.receive(theirs).body["number"] for _ in range(5)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("packet", "text"),
    [
        (b"x", "no message"),
        (b"i", "no message"),
        (b"i[]", "no message"),
        (b"i{}", "no message"),
        (b'i"kind"', "no message"),
        (b"i\xff\xfe", "no message"),
        (b"m", "no message"),
        (b"i" + b"x" * (messages.MOST_INLINE + 100), "came in part only"),
    ],
)
def test_what_is_no_message_leaves_nothing_open(ends, packet, text):
    ours, theirs = ends
    fds = [] if packet == b"m" else [0, 0]
    socket.send_fds(ours, [packet], fds) if fds else ours.send(packet)
    before = descriptors()
    with pytest.raises(messages.Ended, match=text):
        messages.receive(theirs)
    assert descriptors() == before


def test_a_long_text_that_is_none(ends):
    ours, theirs = ends
    memfd = os.memfd_create("text")
    os.write(memfd, b"{" * 100)
    socket.send_fds(ours, [b"m"], [memfd])
    os.close(memfd)
    before = descriptors()
    with pytest.raises(messages.Ended, match="no message"):
        messages.receive(theirs)
    assert descriptors() == before


def test_a_message_that_does_not_end(ends, monkeypatch):
    monkeypatch.setattr(messages, "MOST_PACKETS", 20)  # more do not fit into the socket
    ours, theirs = ends
    for _ in range(messages.MOST_PACKETS):
        socket.send_fds(ours, [messages.MORE], [0])
    with pytest.raises(messages.Ended, match="does not end"):
        messages.receive(theirs)


def test_hanging_up_is_told_on_both_sides(ends):
    ours, theirs = ends
    theirs.close()
    with pytest.raises(messages.Ended, match="hung up"):
        messages.receive(ours)
    with pytest.raises(messages.Ended, match="takes nothing"):
        messages.send(ours, HELLO, {}, [])


# The order.


@pytest.fixture
def update():
    update = Update()
    yield update
    update.close()
    update.close()


def theirs(update: Update) -> socket.socket:
    sock = update._theirs
    assert sock is not None
    return sock


@pytest.mark.parametrize("kind", sorted(AFTER))
@pytest.mark.parametrize("state", sorted(TRANSITIONS))
def test_each_message_in_each_state(update, state, kind):
    update.state = state
    messages.send(theirs(update), kind, {}, [])
    if AFTER[kind] in TRANSITIONS[state]:
        assert update.receive().kind == kind
        assert update.state == AFTER[kind]
    else:
        with pytest.raises(UpdateError, match=f"{state} cannot be {AFTER[kind]}"):
            update.receive()
        assert update.state == state


def test_an_update_from_start_to_end(update):
    steps = []
    for kind in (HELLO, READY):
        messages.send(theirs(update), kind, {}, [])
        update.receive()
        steps.append(update.state)
    update.send(HAND_OVER)
    assert [*steps, update.state] == [BUILDING, PREPARED, GOING]
    messages.send(theirs(update), REFUSE, {"reason": "no"}, [])
    assert update.receive().body == {"reason": "no"}
    assert update.state == RETURNING
    messages.send(theirs(update), HELLO, {}, [])
    update.receive()
    assert update.state == BUILDING


def test_a_hand_over_before_ready_is_a_mistake(update):
    assert update.state == STARTING
    with pytest.raises(UpdateError, match="starting cannot be handing over"):
        update.send(HAND_OVER)


def test_an_unknown_message_is_refused_and_its_descriptors_are_closed(update):
    messages.send(theirs(update), "nonsense", {}, [0, 0])
    before = descriptors()
    with pytest.raises(UpdateError, match="'nonsense', which is unknown"):
        update.receive()
    assert descriptors() == before


def test_the_token_is_taken_back_once(update):
    other = os.dup(update.token)
    assert update.take_back()
    assert not take_token(other)
    assert update.take_back(), "it is this image's still"
    os.close(other)


def test_the_token_is_not_taken_back_from_another(update):
    assert take_token(update.token)
    assert not update.take_back()


def test_close_frees_all_and_may_be_called_twice():
    before = descriptors()
    update = Update()
    assert update.fileno() >= 0
    update.close()
    update.close()
    assert (descriptors(), update.fileno(), update.state) == (before, -1, CLOSED)


# The new image's side.


@pytest.fixture
def predecessor(update):
    token, page, sock = (os.dup(fd) for fd in update.handed_fds)
    theirs(update).close()
    predecessor = Predecessor(token, guard.Page(page), sock, "early")
    yield predecessor
    predecessor.close()


def test_it_commits_once(update, predecessor):
    predecessor.commit()
    assert predecessor.committed
    assert not update.take_back()


def test_a_commit_that_comes_too_late(update, predecessor):
    assert update.take_back()
    with pytest.raises(UpdateError, match="taken back over"):
        predecessor.commit()
    assert not predecessor.committed


def test_it_asks_and_is_answered(update, predecessor):
    predecessor.hello("a program 1.0")
    message = update.receive()
    assert (message.kind, message.body["program"]) == (HELLO, "a program 1.0")
    update.send(STATE, {"x": 1})
    assert predecessor.receive(STATE).body == {"x": 1}


def test_an_answer_that_has_no_place(update, predecessor):
    update.send(STATE)
    with pytest.raises(UpdateError, match=f"sent '{STATE}' in place of '{HAND_OVER}'"):
        predecessor.receive(HAND_OVER)


def test_the_end_of_the_vm_ends_it(update, predecessor):
    update.send(END, {"status": 7})
    with pytest.raises(SystemExit) as ended:
        predecessor.receive(STATE)
    assert ended.value.code == 7


def test_an_old_image_that_is_gone(update, predecessor):
    update.close()
    with pytest.raises(UpdateError, match="old program has ended"):
        predecessor.receive(STATE)
    predecessor.refuse("no")  # comes back: there is nobody to go back to


def test_hold_is_seen_by_the_other_side(update, predecessor):
    predecessor.hold(True)
    assert update.page.struct.hold == 1
    predecessor.hold(False)
    assert update.page.struct.hold == 0


def test_it_is_found_by_the_environment(update, monkeypatch):
    environment = update.environment("early", {"A": "b"})
    assert environment["A"] == "b"
    numbers = environment[VARIABLE].split(",")
    copies = [str(os.dup(int(number))) for number in numbers[:3]]
    for copy in copies:
        os.set_inheritable(int(copy), True)
    monkeypatch.setenv(VARIABLE, ",".join([*copies, "early"]))
    found = find_predecessor()
    assert found is not None
    assert VARIABLE not in os.environ, "no child of this one is to take it for its own"
    assert not any(os.get_inheritable(int(copy)) for copy in copies)
    assert found.mode == "early"
    found.close()
    assert find_predecessor() is None


@pytest.mark.parametrize(
    "value", ["", "1", "a,b,c,early", "1,2,3", "1,2,3,4,5", "99990,99991,99992,early"]
)
def test_an_environment_that_names_no_update(monkeypatch, value):
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(UpdateError, match=r"names no update: .*unset it"):
        find_predecessor()
    assert VARIABLE not in os.environ


def test_messages_are_json_that_anybody_can_read(ends):
    ours, theirs = ends
    messages.send(ours, HELLO, {"protocol": 1}, [])
    packet = theirs.recv(1000)
    assert packet[:1] == messages.INLINE
    assert json.loads(packet[1:]) == {"kind": "hello", "protocol": 1}
