"""Compilation as JAX tells of it: what is shown, and which seconds count."""

import threading

import jax
import jax.numpy as jnp
import pytest

from rspo_jax.records.compiling import CompileWatch


class Clock:
    """A clock that goes on by one second whenever it is asked."""

    now = 0.0

    def __call__(self):
        self.now += 1
        return self.now


class Display(list):
    """What a display was told."""

    def begin_compiling(self, program):
        self.append(f"{program} …")

    def end_compiling(self, program, seconds):
        self.append(f"{program} {seconds:.0f} s")


@pytest.fixture
def programs():
    """Jitted functions that no other test has compiled: an outer one that calls an inner one, and their names."""

    @jax.jit
    def inner(x):
        return jnp.sin(x)

    @jax.jit
    def outer(x):
        return inner(x) + 1

    return inner, outer


def watch(clock=None):
    compiling = CompileWatch({"outer": "the outer program"}, clock or Clock())
    compiling.display = Display()
    return compiling


def test_a_program_is_shown_once_when_it_compiles_and_again_for_other_shapes(programs):
    _, outer = programs
    with watch() as compiling:
        outer(jnp.ones(2, jnp.float32))
        # Tracing, lowering and compiling are asked for the time when they begin and when they end.
        assert compiling.display == ["the outer program …", "the outer program 5 s"]
        outer(jnp.zeros(2, jnp.float32))
        assert len(compiling.display) == 2
        outer(jnp.ones(3, jnp.float32))
        assert compiling.display[2:] == ["the outer program (variant 2) …", "the outer program (variant 2) 5 s"]


def test_seconds_of_inner_programs_count_once(programs):
    _, outer = programs
    ones = jnp.ones(2, jnp.float32)
    with watch() as compiling:
        outer(ones)
        assert compiling.seconds() == 3  # one each for tracing, lowering and compiling the outer one
        outer(ones)
        assert compiling.seconds() == 3


def test_programs_without_a_name_are_counted_but_not_shown(programs):
    inner, _ = programs
    ones = jnp.ones(2, jnp.float32)
    with watch() as compiling:
        inner(ones)
    assert compiling.seconds() == 3 and compiling.display == []


def test_what_other_threads_compile_is_theirs(programs):
    _, outer = programs
    ones = jnp.ones(2, jnp.float32)
    with watch() as compiling:
        thread = threading.Thread(target=lambda: outer(ones))
        thread.start()
        thread.join()
    assert compiling.seconds() == 0 and compiling.display == []


def test_nothing_is_heard_after_the_end(programs):
    _, outer = programs
    with watch() as compiling:
        pass
    outer(jnp.ones(2, jnp.float32))
    assert compiling.seconds() == 0 and compiling.display == []


def test_a_program_that_cannot_be_traced_leaves_the_count_right():
    @jax.jit
    def outer(x):
        raise ValueError("a mistake")

    with watch() as compiling:
        with pytest.raises(ValueError, match="a mistake"):
            outer(1)
        before = compiling.seconds()
        jax.jit(lambda x: x * 2)(jnp.float32(1))
        assert compiling.seconds() > before
    assert compiling.display == ["the outer program …"]
