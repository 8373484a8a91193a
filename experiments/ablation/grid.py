"""Declared grids: cells that each change some fields of a run, combined by × (product) and + (union).

    methods = choose("method", {"gmpo": {"objective.objective": "gmpo"}, "rspo": {"objective.objective": "rspo"}})
    grid = methods * vary("updates", "trainer.mini_batches", 4, 16)

has four cells, from `method=gmpo,updates=4` to `method=rspo,updates=16`.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Level = str | int | float | bool | None
"""A level of a factor; None in a table says that a run has no such factor."""

_WORD = re.compile(r"[A-Za-z0-9_.+-]+")


@dataclass(frozen=True)
class Cell:
    """One place of a grid: a level of each factor, and the changes that they make."""

    factors: tuple[tuple[str, Level], ...]
    changes: tuple[tuple[str, Any], ...]
    """Dotted fields of the run and their values."""
    seeds: tuple[int, ...] | None = None
    """Seeds of the cell's runs; the study's by default."""

    @property
    def name(self) -> str:
        """The levels of all factors, in a form that serves as a file's name."""
        return ",".join(f"{factor}={level}" for factor, level in self.factors)


@dataclass(frozen=True)
class Grid:
    """Cells, in the order of their declaration."""

    cells: tuple[Cell, ...]

    def __iter__(self) -> Iterator[Cell]:
        return iter(self.cells)

    def __len__(self) -> int:
        return len(self.cells)

    def __mul__(self, other: "Grid") -> "Grid":
        """Return the combination of every cell of the one with every cell of the other.

        Raises:
          ValueError: if both have a factor, change a field, or have seeds of their own.
        """
        return Grid(tuple(_join_cells(left, right) for left in self for right in other))

    def __add__(self, other: "Grid") -> "Grid":
        """Return the cells of both; a cell that both have appears once, with the seeds of both.

        Raises:
          ValueError: if cells of one name change different things, or only one of them has seeds of its own.
        """
        cells = {cell.name: cell for cell in self}
        for cell in other:
            known = cells.setdefault(cell.name, cell)
            if dict(known.changes) != dict(cell.changes):
                raise ValueError(f"two cells are called {cell.name}, but change different things")
            if (known.seeds is None) != (cell.seeds is None):
                raise ValueError(
                    f"the cell {cell.name} is declared twice, only once with seeds of its own: give both the same"
                )
            if known.seeds is not None and cell.seeds is not None:
                seeds = tuple(dict.fromkeys(known.seeds + cell.seeds))
                cells[cell.name] = dataclasses.replace(known, seeds=seeds)
        return Grid(tuple(cells.values()))

    def with_seeds(self, *seeds: int) -> "Grid":
        """Return the same cells with these seeds in place of the study's."""
        return Grid(tuple(dataclasses.replace(cell, seeds=seeds) for cell in self))


def vary(factor: str, field: str, *levels: Level) -> Grid:
    """Return a cell for each value of one field."""
    return choose(factor, {level: {field: level} for level in levels})


def choose(factor: str, levels: Mapping[Any, Mapping[str, Any]]) -> Grid:
    """Return a cell for each level, with the fields that it changes; no fields stand for the run as it is.

    Raises:
      ValueError: if the factor or a level cannot be part of a file's name, or the factor's name is taken.
    """
    for text in (factor, *map(str, levels)):
        if not _WORD.fullmatch(text):
            raise ValueError(f"{text!r} becomes part of a file's name: use only letters, digits and _ . + -")
    if factor in ("run", "seed", "step"):
        raise ValueError(f"a factor cannot be called {factor!r}: the table has a column of that name")
    return Grid(tuple(Cell(((factor, level),), tuple(changes.items())) for level, changes in levels.items()))


def _join_cells(left: Cell, right: Cell) -> Cell:
    for what, ours, others in (("factor", left.factors, right.factors), ("field", left.changes, right.changes)):
        twice = sorted(dict(ours).keys() & dict(others).keys())
        if twice:
            raise ValueError(f"{left.name} times {right.name}: both have the {what} {twice[0]}")
    if left.seeds is not None and right.seeds is not None:
        raise ValueError(f"{left.name} times {right.name}: both have seeds of their own")
    seeds = left.seeds if left.seeds is not None else right.seeds
    return Cell(left.factors + right.factors, left.changes + right.changes, seeds)
