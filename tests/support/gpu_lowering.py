"""Programs lowered for a GPU on a machine without one, as far as the installed JAX does that."""

import pytest

# JAX deprecates this backend since 0.11; `models.kernels.triton_tiles` does without it where it is gone.
LOWERS_TRITON = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")


def lowered(traced, platform):
    """The text of a traced program, lowered for a platform."""
    try:
        return traced.lower(lowering_platforms=(platform,)).as_text()
    except RuntimeError as error:
        if "GPU devices" in str(error):
            pytest.skip("since 0.11 JAX lowers Triton kernels only where there is a GPU")
        raise
