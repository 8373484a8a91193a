"""A NaN at a response token must reach the loss, whatever the sign of the advantage, and never pass for a clip."""

import numpy as np
import pytest
from support import oracles
from support.objective_cases import CASES, case_id, run


@pytest.mark.parametrize(("name", "settings"), CASES, ids=case_id)
def test_a_nan_at_a_response_token_reaches_the_loss(name, settings):
    batch = oracles.batch_from_log_ratios(np.full((2, 3), 0.1), advantages=[1.0, -1.0], router_shift=0.5)
    assert np.isfinite(run(name, batch, settings).loss)
    for argument in ("log_probs", "old_log_probs"):
        for row in (0, 1):
            array = getattr(batch, argument).copy()
            array[row, 1] = np.nan
            assert np.isnan(run(name, batch.replace(**{argument: array}), settings).loss), (argument, row)


@pytest.mark.parametrize("use", ["weight", "mask"])
@pytest.mark.parametrize("name", ["rspo", "gspo", "gspo_token", "grpo", "cispo", "sapo"])
def test_a_router_shift_that_is_nan_reaches_the_loss(name, use):
    batch = oracles.random_batch(58)
    gamma = np.where(np.arange(7) == 0, np.nan, batch.router_shift).astype(np.float32)
    assert np.isnan(run(name, batch, {"gamma_min": 0.8, "gamma_use": use}, router_shift=gamma).total)
