"""Signals to this very process: those that are caught, the effect of a second one, and the handlers left afterwards.
Signals to one of several real processes stop all of them at the same step."""

import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.processes import Member, finish, free_port

from rspo_jax.hosts import Preemption

CAUGHT = (signal.SIGTERM, signal.SIGINT)


def send(number):
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def handlers_survive():
    """Check that no test changes pytest's own handlers."""
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


def test_outside_the_main_thread_nothing_is_caught():
    def enter():
        with Preemption() as preemption:
            return preemption.requested

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(enter).result() is None


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


def test_a_single_process_agrees_with_itself():
    with Preemption() as preemption:
        assert preemption.agreed() is None
        send(signal.SIGINT)
        assert [preemption.agreed(), preemption.agreed()] == ["SIGINT", "SIGINT"]


# --- several processes ---

MEMBER = """
import os, signal, sys, time
import jax
from rspo_jax.hosts import ClusterConfig, Preemption, joined

process, port = map(int, sys.argv[1:])
with joined(ClusterConfig(f"localhost:{port}", 2, process)):
    for run, (sender, number) in enumerate([(1, signal.SIGTERM), (0, signal.SIGINT), (None, None)]):
        stopped = None
        with Preemption() as preemption:
            if run == 1 and sender == process:  # before the first step, as while a program is compiled
                os.kill(os.getpid(), number)
            for step in range(6):
                if run == 0 and sender == process and step == 3:
                    os.kill(os.getpid(), number)
                time.sleep(0.05 * process)  # one of them is slower
                stopped = preemption.agreed()
                if stopped:
                    break
        print(f"run {run}: {stopped} at step {step}, asked by {preemption.requested}")
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    logs, port = tmp_path_factory.mktemp("logs"), free_port()
    return finish([Member(logs / str(process), MEMBER, process, port) for process in range(2)])


def test_a_signal_to_one_process_stops_all_at_the_same_step(outputs):
    assert "run 0: SIGTERM at step 3, asked by None" in outputs[0]
    assert "run 0: SIGTERM at step 3, asked by SIGTERM" in outputs[1]


def test_a_signal_before_the_first_step_is_not_lost(outputs):
    assert "run 1: SIGINT at step 0, asked by SIGINT" in outputs[0]
    assert "run 1: SIGINT at step 0, asked by None" in outputs[1]


def test_processes_that_nobody_asks_go_on(outputs):
    for output in outputs:
        assert re.search("^run 2: None at step 5, asked by None$", output, re.MULTILINE)
