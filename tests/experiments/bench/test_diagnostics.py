"""The benchmark of the diagnostics on a tiny model: its table, and that both of its programs make the same update.

The compilation of two whole updates takes long, so most of it is left out by default.
"""

import contextlib
import io

import jax
import numpy as np
import pytest

from experiments.bench import diagnostics as bench

TINY = ("--rows", "2", "--row-length", "16", "--layers", "2", "--hidden-size", "16", "--experts", "4")
TINY += ("--experts-per-token", "2", "--expert-size", "8", "--vocab-size", "16")


@pytest.fixture(scope="module")
def run():
    """One run of the command: its output, the inputs that it made, and diagnostics -> the program that it timed."""
    made, programs, output = [], {}, io.StringIO()
    make_inputs, compile_update = bench.make_inputs, bench.compile_update

    def compile_and_keep(inputs, diagnostics):
        programs[diagnostics] = compile_update(inputs, diagnostics)
        return programs[diagnostics]

    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stdout(output):
        monkeypatch.setattr(bench, "make_inputs", lambda *settings: made.append(make_inputs(*settings)) or made[-1])
        monkeypatch.setattr(bench, "compile_update", compile_and_keep)
        with jax.numpy_dtype_promotion("standard"):  # Optax promotes
            assert bench.main([*TINY, "--repeats", "2"]) == 0
    return output.getvalue(), made[0], programs


@pytest.mark.slow
def test_diagnostics_leave_the_update_as_it_is(run):
    _, inputs, programs = run
    plain, watched = (bench.follow_updates(programs[kind], inputs.state, inputs.scored)() for kind in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), plain[0], watched[0])
    assert plain[1].keys() < watched[1].keys()
    for name, value in plain[1].items():
        np.testing.assert_allclose(value, watched[1][name], rtol=1e-5, atol=1e-7, err_msg=name)
    shown = watched[1]
    assert shown["expert_load"].shape == (2, 4) and shown["layer_drift"].shape == (2,)
    # γ is the exponential of the mean drift over layers; the two are averaged over the same tokens.
    assert 0 < float(np.mean(shown["layer_drift"])) >= -np.log(float(shown["gamma_mean"])) - 1e-6
    assert 0.5 < float(shown["effective_sample_size"]) <= 1


@pytest.mark.slow
def test_the_command_prints_a_table(run):
    assert "without, again" in run[0]


def test_mistakes_are_told_in_a_sentence(capsys):
    assert bench.main(["--experts", "0"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
