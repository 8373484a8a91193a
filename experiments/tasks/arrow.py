"""Rows of Parquet and Arrow files, and of the folders that `save_to_disk` of the library datasets writes.

Importing this module imports pyarrow, which few runs need.
"""

from collections.abc import Callable, Sequence
from typing import IO, Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
from etils import epath


def rows_of_parquet(file: epath.Path) -> list[dict[str, Any]]:
    """Return the rows of a Parquet file by column, as Python values; raise ValueError if it is damaged."""
    return _rows(file, lambda opened: pyarrow.parquet.ParquetFile(opened).read())


def rows_of_arrow(files: Sequence[epath.Path]) -> list[dict[str, Any]]:
    """Return the rows of Arrow files, in either of their formats; raise ValueError if one is damaged."""
    return [row for file in files for row in _rows(file, _table)]


def _table(opened: IO[bytes]) -> pyarrow.Table:
    is_file = opened.read(6) == b"ARROW1"
    opened.seek(0)
    return (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(opened).read_all()


def _rows(file: epath.Path, read: Callable[[IO[bytes]], pyarrow.Table]) -> list[dict[str, Any]]:
    try:
        with file.open("rb") as opened:
            table = read(opened)
        names = [name for name in table.column_names if not name.startswith("__index_level_")]  # pandas's row labels
        return table.select(names).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {str(error).splitlines()[0]}") from error
