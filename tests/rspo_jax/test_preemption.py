"""Signals to this very process: which are caught, what a second one does, and what is left afterwards."""

import os
import signal

import pytest

from rspo_jax.preemption import Preemption

CAUGHT = (signal.SIGTERM, signal.SIGINT)


def send(number):
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def handlers_survive():
    """No test may change what pytest itself does on a signal."""
    before = [signal.getsignal(number) for number in CAUGHT]
    yield
    assert [signal.getsignal(number) for number in CAUGHT] == before


@pytest.mark.parametrize("number", CAUGHT, ids=lambda number: number.name)
def test_a_signal_becomes_a_flag(number):
    with Preemption() as preemption:
        assert preemption.requested is None
        send(number)
        assert preemption.requested == number.name
    assert preemption.requested == number.name


def test_a_second_sigterm_waits_for_the_loop():
    with Preemption() as preemption:
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert preemption.requested == "SIGTERM"


@pytest.mark.parametrize("first", CAUGHT, ids=lambda number: number.name)
def test_a_sigint_after_a_signal_interrupts_at_once(first):
    with pytest.raises(KeyboardInterrupt), Preemption():
        send(first)
        send(signal.SIGINT)


@pytest.mark.parametrize("number", CAUGHT, ids=lambda number: number.name)
def test_the_handlers_from_before_come_back(number):
    received = []
    outer = signal.signal(number, lambda *_: received.append("outer"))
    try:
        with pytest.raises(RuntimeError, match="from inside"), Preemption() as preemption:
            send(number)
            raise RuntimeError("from inside")
        assert (preemption.requested, received) == (number.name, [])
        send(number)
        assert received == ["outer"]
    finally:
        signal.signal(number, outer)


def test_signals_that_were_ignored_are_ignored_again():
    outer = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Preemption() as preemption:
            send(signal.SIGINT)
        assert preemption.requested == "SIGINT"
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, outer)


def test_each_run_has_a_flag_of_its_own():
    with Preemption() as preemption:
        send(signal.SIGTERM)
    with Preemption() as another:
        assert another.requested is None
        send(signal.SIGINT)
    assert (preemption.requested, another.requested) == ("SIGTERM", "SIGINT")
