"""The benchmark of the diagnostics on a tiny model: both of its programs make the same update. Takes two compiles of a
whole step, so it is left out by default."""

import jax
import numpy as np
import pytest

from experiments.bench import diagnostics as bench
from experiments.bench.step_programs import StepSettings, make_inputs

TINY = ("--rows", "2", "--row-length", "16", "--layers", "2", "--hidden-size", "16", "--experts", "4")
TINY += ("--experts-per-token", "2", "--expert-size", "8", "--vocab-size", "16")


@pytest.mark.slow
def test_diagnostics_leave_the_update_as_it_is():
    settings = StepSettings(
        rows=2, row_length=16, layers=(2,), hidden_size=16, experts=4, experts_per_token=2, expert_size=8, vocab_size=16
    )
    inputs = make_inputs(settings.configs()[0], settings, seed=0)
    with jax.numpy_dtype_promotion("standard"):  # Optax promotes
        plain, watched = (
            bench.follow(bench.compile_update(inputs, diagnostics), inputs)() for diagnostics in (False, True)
        )
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
def test_the_command_prints_a_table(capsys):
    with jax.numpy_dtype_promotion("standard"):  # Optax promotes
        assert bench.main([*TINY, "--repeats", "2"]) == 0
    assert "without, again" in capsys.readouterr().out


def test_mistakes_are_told_in_a_sentence(capsys):
    assert bench.main(["--experts", "0"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
