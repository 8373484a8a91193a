"""Programs lowered for TPUs and GPUs on a machine without them, as far as the installed JAX does that."""

import jax
import pytest

from rspo_jax.sharding import lowering_for

# JAX deprecates this backend since 0.11; `models.kernels.triton_tiles` does without it where it is gone.
LOWERS_TRITON = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")


def lowered(function, platform, *inputs):
    """Return the text of a function of arrays, lowered for a platform."""
    try:
        with lowering_for(platform):
            return jax.jit(function).trace(*inputs).lower(lowering_platforms=(platform,)).as_text()
    except RuntimeError as error:
        if "GPU devices" in str(error):
            pytest.skip("since 0.11 JAX lowers Triton kernels only where there is a GPU")
        raise
