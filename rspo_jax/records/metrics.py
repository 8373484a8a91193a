"""The record of a run: one JSON line a step, TensorBoard scalars, and JSON files.

A run has two phases, "warm_start" (supervised) and then "rl", each with a step count of its own from 1. A row of
`metrics.jsonl` is `{"phase": "rl", "step": 12, "reward": 0.4, ...}`; a row of `diagnostics.jsonl` holds arrays instead.
Of several processes only the first writes, and the others check their arguments.
"""

import contextlib
import functools
import json
import logging
import math
import statistics
from collections.abc import Mapping
from typing import Any, Self, SupportsFloat

import numpy as np
import tensorboardX
from etils import epath
from numpy.typing import ArrayLike

from rspo_jax.hosts import Agreement, is_primary
from rspo_jax.records.files import FilePath, GrowingFiles, as_path, replace_file
from rspo_jax.records.rows import PHASES, POSITION_NAMES, Phase, RowFile, position, read_rows

_METRICS_FILE = "metrics.jsonl"
_DIAGNOSTICS_FILE = "diagnostics.jsonl"
_BEFORE_ANY_STEP = (0, -1)
_Z_95 = statistics.NormalDist().inv_cdf(0.975)
_logger = logging.getLogger(__name__)


def wilson_interval(successes: float, trials: float) -> tuple[float, float]:
    """Return the bounds of the 95 % Wilson score interval of a success rate, which has a width at 0 and 1 too.

    SciPy's takes whole trials only. Where several samples of a problem depend on each other, the rate is worth fewer
    trials than there are samples, and their effective number is no whole one.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", 1927.

    Args:
      successes: number of trials that succeeded.
      trials: number of trials, above 0.

    Returns:
      The lower and the upper bound, in [0, 1].

    Raises:
      ValueError: unless 0 <= successes <= trials and trials > 0.
    """
    if not (0 <= successes <= trials and 0 < trials < math.inf):
        raise ValueError(f"successes must be from 0 to trials, and trials above 0, got {successes} of {trials}")
    rate, pull = successes / trials, _Z_95**2 / trials
    middle = (rate + pull / 2) / (1 + pull)
    reach = math.sqrt(pull * rate * (1 - rate) + pull**2 / 4) / (1 + pull)
    # At the ends the bounds are exact, whatever is rounded.
    low = 0.0 if successes == 0 else max(middle - reach, 0.0)
    return low, 1.0 if successes == trials else min(middle + reach, 1.0)


def write_json(path: FilePath, content: Any) -> None:
    """Write an object as indented JSON, atomically; non-finite numbers become null, as JSON has none.

    Args:
      path: the file, in a folder that exists, or in a bucket.
      content: dicts, lists, strings, numbers, booleans and None, which the json module can write.

    Raises:
      TypeError: if `content` holds anything else; the file then stays as it was.
    """
    text = json.dumps(_null_for_non_finite(content), indent=2, ensure_ascii=False, allow_nan=False)
    replace_file(path, f"{text}\n".encode())


def _null_for_non_finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: _null_for_non_finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_null_for_non_finite(value) for value in content]
    return content


def read_metrics(run_dir: FilePath) -> list[dict[str, Any]]:
    """Read the rows of a run's `metrics.jsonl`, in the order written; null becomes NaN.

    A last line that was cut while it was written is left out, with a warning in the log.

    Args:
      run_dir: the run's folder, or its address in a bucket.

    Returns:
      A dict for each row: "phase" (str), "step" (int) and metrics (float).

    Raises:
      FileNotFoundError: if the folder holds no `metrics.jsonl`.
      ValueError: if any other line is not a row.
    """
    path = as_path(run_dir) / _METRICS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: is {run_dir} the folder of a run?")
    rows = read_rows(path, _as_floats)
    return [{name: math.nan if value is None else value for name, value in row.items()} for _, row in rows]


def read_diagnostics(run_dir: FilePath) -> list[dict[str, Any]]:
    """Read the rows of a run's `diagnostics.jsonl`, in the order written; none for a run that recorded no arrays.

    Args:
      run_dir: the run's folder, or its address in a bucket.

    Returns:
      A dict for each row: "phase" (str), "step" (int) and float64 arrays, in which null has become NaN.

    Raises:
      ValueError: if a line is not a row, except for a last line that was cut.
    """
    path = as_path(run_dir) / _DIAGNOSTICS_FILE
    rows = read_rows(path, _as_arrays) if path.is_file() else []
    return [
        {name: row[name] for name in POSITION_NAMES}
        | _as_arrays({name: value for name, value in row.items() if name not in POSITION_NAMES})
        for _, row in rows
    ]


class MetricsLog:
    """A log that writes a run's metrics to `metrics.jsonl` and to TensorBoard event files in `tensorboard/<phase>/`,
    and arrays of its steps to `diagnostics.jsonl`, which a run without arrays does not have.

    A context manager. A run that is interrupted and resumed ends with exactly the rows of an uninterrupted one. All
    processes of a run open a log at the same point and with the same arguments, but only the first writes.

    In a bucket, files grow on the machine and are copied up now and then: call `flush` before saving a checkpoint, so
    that a run that goes on from it finds all rows before it.
    """

    def __init__(self, run_dir: FilePath, resume_after: tuple[Phase, int] | None) -> None:
        """Open the log; for a run that is resumed, roll it back first.

        Args:
          run_dir: the run's folder, which is made if it does not exist, or its address in a bucket, gs://.
          resume_after: phase and step of the last row to keep, from the checkpoint that the run goes on from. Later
            rows are removed from the file and hidden in TensorBoard. None for a new run.

        Raises:
          FileExistsError: if `resume_after` is None and the folder holds rows already.
          ValueError: if `resume_after` is not a phase and a step; if a line of a file is not a row, except for a last
            line that was cut while it was written; or if `run_dir` is an address that cannot be written to.
        """
        self._run_dir = as_path(run_dir)
        self._last = _BEFORE_ANY_STEP if resume_after is None else position(*resume_after)
        self._metrics = RowFile(self._run_dir / _METRICS_FILE, _as_floats)
        self._diagnostics = RowFile(self._run_dir / _DIAGNOSTICS_FILE, _as_arrays)
        self._boards: dict[str, tensorboardX.SummaryWriter] = {}
        self._open_files = contextlib.ExitStack()
        self._closed = False
        self._writes = is_primary()
        Agreement("metrics").from_primary(functools.partial(self._open, resume_after))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(
        self,
        phase: Phase,
        step: int,
        metrics: Mapping[str, SupportsFloat],
        arrays: Mapping[str, ArrayLike] | None = None,
    ) -> None:
        """Append a row. Non-finite numbers become null in the files and a gap in TensorBoard.

        Args:
          phase: the phase of the run.
          step: the step within the phase, after all steps that were written before.
          metrics: numbers by name; scalar arrays will do.
          arrays: arrays of the same step by name, of any rank; kept to six significant digits.

        Raises:
          ValueError: if the row does not come after the last one, a metric is called "phase" or "step", or the log is
            closed.
          TypeError: if a metric is not a number, or an array does not hold numbers.
        """
        if self._closed:
            raise ValueError(f"{self._run_dir / _METRICS_FILE} is closed")
        at = position(phase, step)
        if at <= self._last:
            last_phase, last_step = PHASES[self._last[0]], self._last[1]
            raise ValueError(f"steps must increase, but {phase} step {step} came after {last_phase} step {last_step}")
        values, lists = _as_floats(metrics), _as_lists(arrays or {})
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        if self._writes:
            self._metrics.append({"phase": phase, "step": step} | {name: finite.get(name) for name in values})
            if lists:
                self._diagnostics.append({"phase": phase, "step": step} | lists)
        self._last = at
        if not self._writes:
            return
        board = self._boards.get(phase) or self._open_board(phase)
        for name, value in finite.items():
            board.add_scalar(f"{phase}/{name}", value, step)
        self._files.copy_soon()

    def flush(self) -> None:
        """Bring all rows so far to `metrics.jsonl`, also in a bucket. TensorBoard may be seconds behind."""
        if self._writes:
            for board in self._boards.values():
                board.flush()
            self._files.copy()

    def close(self) -> None:
        """Close all files; a second call does nothing."""
        self._closed = True
        self._open_files.close()

    def _open(self, resume_after: tuple[str, int] | None) -> None:
        files = (self._metrics, self._diagnostics)
        if resume_after is None:
            for file in files:
                file.refuse_old_rows()
        else:
            remains, *_ = [file.roll_back(self._last) for file in files]
            if resume_after[1] > 0 and remains != self._last:
                path = self._run_dir / _METRICS_FILE
                _logger.warning("%s has no row for %s step %d, after which the run goes on.", path, *resume_after)
        self._files = self._open_files.enter_context(GrowingFiles(self._run_dir))
        self._files.folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            self._open_files.callback(file.close)
            file.open_in(self._files.folder, make=file is self._metrics)
        # TensorBoard hides the points after the last row.
        last_phase, last_step = self._last
        for index, phase in enumerate(PHASES):
            if index >= last_phase and self._event_files(phase):
                self._open_board(phase, purge_step=last_step + 1 if index == last_phase else 0)

    def _event_files(self, phase: str) -> list[epath.Path]:
        return list((self._run_dir / "tensorboard" / phase).glob("events.out.tfevents.*"))

    def _open_board(self, phase: str, purge_step: int | None = None) -> tensorboardX.SummaryWriter:
        # Each phase has a folder, as purging hides all points of a folder from a step on. File names hold the time in
        # seconds; the suffix keeps a run that is resumed within a second from overwriting the last file.
        board = self._boards[phase] = tensorboardX.SummaryWriter(
            str(self._files.folder / "tensorboard" / phase),
            purge_step=purge_step,
            flush_secs=2,
            filename_suffix=f".{len(self._event_files(phase)):04d}",
        )
        self._open_files.callback(board.close)
        return board


def _as_floats(metrics: Mapping[str, SupportsFloat]) -> dict[str, float]:
    values = {}
    for name, value in metrics.items():
        _check_name(name)
        try:
            values[name] = value.__float__()  # float() would take text as well
        except (AttributeError, TypeError):
            raise TypeError(f"metric {name!r} is not a number: {value!r}") from None
    return values


def _as_lists(arrays: Mapping[str, ArrayLike]) -> dict[str, Any]:
    """Return nested lists that JSON can hold: ints, floats of six significant digits, None for non-finite numbers."""
    lists = {}
    for name, given in arrays.items():
        _check_name(name)
        array = np.asarray(given)
        if not np.issubdtype(array.dtype, np.integer):
            if not np.issubdtype(array.dtype, np.floating):
                raise TypeError(f"array {name!r} must hold numbers, not {array.dtype}")
            flat = [float(f"{value:.6g}") if math.isfinite(value) else None for value in array.reshape(-1).tolist()]
            array = np.array(flat, object).reshape(array.shape)
        lists[name] = array.tolist()
    return lists


def _as_arrays(lists: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return float64 arrays of nested lists, with NaN for None.

    Raises:
      ValueError: if a list is ragged.
      TypeError: if a list holds anything but numbers and None.
    """
    arrays = {}
    for name, nested in lists.items():
        _check_name(name)
        flat = np.array(nested, object).reshape(-1).tolist()
        if not all(value is None or type(value) in (int, float) for value in flat):
            raise TypeError(f"{name!r} is not an array of numbers")
        arrays[name] = np.array(nested, np.float64)
    return arrays


def _check_name(name: str) -> None:
    if name in POSITION_NAMES:
        raise ValueError(f"a metric cannot be called {name!r}, which is part of a row's position: rename it")
