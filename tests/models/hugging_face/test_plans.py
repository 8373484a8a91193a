"""Plans of tensors: any arrangement undone part by part, and plans that are refused."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.hugging_face.tensors import Piece, Within, place_pieces


@st.composite
def plans_of_one_tensor(draw):
    """Draw the shape of a parameter, the axes that pieces are stacked along, and order and grouping of the others."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    stacked = draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    own = [axis for axis, is_stacked in enumerate(stacked) if not is_stacked]
    order = draw(st.permutations(own))
    joined = draw(st.lists(st.booleans(), min_size=len(order), max_size=len(order)))
    return tuple(sizes), stacked, tuple(order), joined


@settings(deadline=None, max_examples=150)
@given(plans_of_one_tensor(), st.data())
def test_any_arrangement_is_undone_part_by_part(plan, data):
    sizes, stacked, order, joined = plan
    array = np.arange(math.prod(sizes)).reshape(sizes)
    groups: list[list[int]] = []
    for axis, is_joined in zip(order, joined, strict=True):
        groups = [*groups[:-1], [*groups[-1], axis]] if is_joined and groups else [*groups, [axis]]
    letters = "PQRST"
    left = " ".join("(" + " ".join(letters[axis] for axis in group) + ")" for group in groups)
    axes = f"{left} -> {' '.join(letters[axis] for axis in sorted(order))}"
    pieces, tensors = [], {}
    for place in np.ndindex(*(size if is_stacked else 1 for size, is_stacked in zip(sizes, stacked, strict=True))):
        at = tuple(index if is_stacked else None for index, is_stacked in zip(place, stacked, strict=True))
        name = f"tensor.{place}"
        part = array[tuple(slice(None) if index is None else index for index in at)]
        kept = sorted(order)
        part = part.transpose([kept.index(axis) for axis in order])
        tensors[name] = part.reshape([math.prod(sizes[axis] for axis in group) for group in groups])
        pieces.append(Piece(name, axes, at))
    placed = place_pieces({("array",): pieces}, {("array",): sizes})[("array",)]
    assert {piece.name: piece.shape for piece in placed} == {name: tensor.shape for name, tensor in tensors.items()}
    box = []
    for size in sizes:
        first = data.draw(st.integers(0, size - 1))
        box.append(range(first, data.draw(st.integers(first + 1, size))))
    elements = data.draw(st.integers(1, 30))
    rebuilt = np.full(sizes, -1)
    for piece in placed:
        part = piece.cut(box)
        for chunk in part.chunks(elements) if part is not None else ():
            assert math.prod(chunk.sizes) <= elements
            target = tuple(slice(places.start, places.stop) for places in chunk.ours)
            assert np.all(rebuilt[target] == -1)
            rebuilt[target] = chunk.view(tensors[chunk.name]).transpose(chunk.order).reshape(chunk.sizes)
    inside = tuple(slice(places.start, places.stop) for places in box)
    np.testing.assert_array_equal(rebuilt[inside], array[inside])
    assert np.count_nonzero(rebuilt != -1) == math.prod(map(len, box))


def place(shape, *pieces):
    return place_pieces({("a", "b"): pieces}, {("a", "b"): shape})


def test_plan_and_parameters_name_the_same():
    with pytest.raises(ValueError, match=r"the plan has no pieces for a/b$"):
        place_pieces({}, {("a", "b"): (2,)})
    with pytest.raises(ValueError, match="the plan has pieces for a/c, which is not a parameter"):
        place_pieces({("a", "b"): [Piece("x")], ("a", "c"): [Piece("y")]}, {("a", "b"): (2,)})


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        (Piece("x", "D"), "has axes 'D', which are not of the form"),
        (Piece("x", "(N H D -> D N H"), "not of the form"),
        (Piece("x", "A B -> A C"), "not of the form"),
        (Piece("x", "A A -> A A"), "not of the form"),
        (Piece("x", "A B C -> A B"), "not of the form"),
        (Piece("x", "A -> A"), r"names 1 axes of the parameter, but at=\(\) leaves 2"),
        (Piece("x", "A B -> B A", (0,)), r"names 2 axes of the parameter, but at=\(0,\) leaves 1"),
        (Piece("x", at=(0, 0, 0)), "more entries in at"),
        (Piece("x", at=(4,)), "outside the parameter or leaves gaps"),
        (Piece("x", at=(-1,)), "outside the parameter or leaves gaps"),
        (Piece("x", at=(slice(4, 6),)), "outside the parameter or leaves gaps"),
        (Piece("x", at=(slice(0, 4, 2),)), "outside the parameter or leaves gaps"),
        (Piece("x", "A B -> A B", within={"C": Within(0, 4)}), "a part within C, which is not one of its axes"),
        (Piece("x", "A B -> A B", within={"A": Within(1, 4)}), "takes 4 places of A"),
        (Piece("x", "A B -> A B", within={"A": Within(-1, 8)}), "takes 4 places of A"),
        (Piece("x", "A B -> A B", within={"A": Within(0, 8, 0)}), "takes 4 places of A"),
    ],
)
def test_a_piece_that_does_not_fit_is_refused(piece, message):
    with pytest.raises(ValueError, match=message) as raised:
        place((4, 3), piece)
    assert str(raised.value).startswith("the piece x of a/b [4, 3]")


def test_each_place_of_a_parameter_is_filled_once():
    place((2, 3), Piece("x", at=(0,)), Piece("y", at=(1,)))
    with pytest.raises(ValueError, match=r"parameter a/b \[2, 3\] is not .* no piece fills the place \[1, 0\]"):
        place((2, 3), Piece("x", at=(0,)))
    with pytest.raises(ValueError, match=r"more than one piece fills the place \[1, 2\]"):
        place((2, 3), Piece("x", at=(0,)), Piece("y", at=(1,)), Piece("z", at=(1, 2)))
    with pytest.raises(ValueError, match=r"no piece fills the place \[0, 0\]"):
        place((2, 3))


def test_each_place_of_a_tensor_is_used_once():
    halves = [Piece("x", "A B -> A B", (slice(i, i + 1),), {"A": Within(i, 2)}) for i in range(2)]
    place((2, 3), *halves)
    with pytest.raises(ValueError, match=r"the tensor x \[2, 3\] is not .* no piece fills the place \[1, 0\]"):
        place((2, 3), halves[0], Piece("x", "A B -> A B", (slice(1, 2),), {"A": Within(0, 2)}))
    with pytest.raises(ValueError, match=r"the tensor x \[5, 3\] is not .* no piece fills the place \[2, 0\]"):
        place((2, 3), Piece("x", "A B -> A B", within={"A": Within(0, 5)}))
    with pytest.raises(ValueError, match=r"the tensor x \[3\] is not .* more than one piece fills the place \[0\]"):
        place((2, 3), Piece("x", at=(0,)), Piece("x", at=(1,)))
    with pytest.raises(ValueError, match=r"tensor x do not split it alike: \[3\] and \[1, 3\]"):
        place((2, 3), Piece("x", at=(0,)), Piece("x", "1 B -> B", at=(1,)))
