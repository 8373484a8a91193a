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
