"""Meshes of TPU pods that need not exist: the axes that multiply to a topology's devices."""

import pytest

from experiments.compilers import tpu


@pytest.mark.parametrize(
    ("axes", "filled"),
    [({"data": -1}, {"data": 8}), ({"data": 2, "expert": -1}, {"data": 2, "expert": 4}), ({"data": 8}, {"data": 8})],
)
def test_the_free_axis_of_a_topology_takes_what_is_left(axes, filled):
    assert tpu.fill_in(axes, 8, "v5p:2x2x2") == filled


@pytest.mark.parametrize("axes", [{"data": 4}, {"data": 3, "expert": -1}, {"data": -1, "expert": -1}, {"data": 0}])
def test_axes_that_do_not_fit_a_topology_are_refused(axes):
    with pytest.raises(ValueError, match="must multiply to the 8 devices of v5p:2x2x2"):
        tpu.fill_in(axes, 8, "v5p:2x2x2")
