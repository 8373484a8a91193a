"""The record of a run: one JSON line a step, TensorBoard scalars, and JSON files.

A run has two phases, "warm_start" (supervised) and then "rl", each with a step count of its own from 1. A row of
`metrics.jsonl` is `{"phase": "rl", "step": 12, "reward": 0.4, ...}`; a row of `diagnostics.jsonl` holds arrays instead,
and one of `samples.jsonl` a response.
Of several processes only the first writes, and the others check their arguments.
"""

import contextlib
import functools
import json
import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, SupportsFloat

import numpy as np
from etils import epath
from numpy.typing import ArrayLike

from rspo_jax.hosts import Agreement, is_primary
from rspo_jax.records.board import Board
from rspo_jax.records.files import FilePath, GrowingFiles, as_path, replace_file
from rspo_jax.records.rows import PHASES, POSITION_NAMES, Phase, RowFile, missing_rows, position, read_rows
from rspo_jax.records.samples import SAMPLES_FILE, Sample, sample_of
from rspo_jax.records.trackers import Trackers

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


def mean_interval(
    of_problems: np.ndarray, seed: int = 0, resamples: int = 10_000, level: float = 0.95
) -> tuple[float, float] | None:
    """Return the percentile interval of a mean that is no rate, from problems drawn with replacement.

    It shows how far the mean would move with other problems of the same kind.

    Source: Efron, "Bootstrap methods: another look at the jackknife", 1979.

    Args:
      of_problems: float [P], a value of each problem.
      seed: seed of the draws.
      resamples: number of times that P problems are drawn.
      level: share of the means inside the interval.

    Returns:
      The bounds; None if all problems have the same value, as a single one does: they tell nothing of others.

    Raises:
      ValueError: if there are no problems.
    """
    of_problems = np.asarray(of_problems, np.float64)
    if not (of_problems.ndim == 1 and of_problems.size):
        raise ValueError(f"values must be [problems] with at least 1 problem, got shape {of_problems.shape}")
    count = of_problems.size
    if np.ptp(of_problems) == 0:
        return None
    generator = np.random.default_rng(seed)
    block = max(1, 2**22 // count)  # keeps memory below some 100 MB
    means = []
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        means.append(of_problems[generator.integers(count, size=(rows, count))].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


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
      DamagedRows: if any other line is not a row, or rows are doubled or in a wrong order.
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
      DamagedRows: if a line is not a row, except for a last line that was cut, or rows are doubled or in a wrong order.
    """
    path = as_path(run_dir) / _DIAGNOSTICS_FILE
    rows = read_rows(path, _as_arrays) if path.is_file() else []
    return [
        {name: row[name] for name in POSITION_NAMES}
        | _as_arrays({name: value for name, value in row.items() if name not in POSITION_NAMES})
        for _, row in rows
    ]


def check_record(run_dir: FilePath) -> None:
    """Check what can be checked of the files of rows before it is known where a run goes on.

    Args:
      run_dir: the run's folder, or its address in a bucket.

    Raises:
      DamagedRows: if a line is not a row, except for a last line that was cut, or rows are doubled or in a wrong order.
    """
    for file in _row_files(as_path(run_dir)).values():
        file.check_rows()


def _row_files(run_dir: epath.Path) -> dict[str, RowFile]:
    """Return the files of rows in a run's folder by name."""
    return {
        _METRICS_FILE: RowFile(run_dir / _METRICS_FILE, _as_floats),
        _DIAGNOSTICS_FILE: RowFile(run_dir / _DIAGNOSTICS_FILE, _as_arrays),
        SAMPLES_FILE: RowFile(run_dir / SAMPLES_FILE, sample_of, several=True),
    }


class MetricsLog:
    """A log that writes a run's metrics to `metrics.jsonl` and to TensorBoard event files in `tensorboard/<phase>/`,
    and arrays and sample responses of its steps to `diagnostics.jsonl` and `samples.jsonl`, which a run without any
    does not have.

    A context manager. A run that is interrupted and resumed ends with exactly the rows of an uninterrupted one. All
    processes of a run open a log at the same point and with the same arguments, but only the first writes.

    In a bucket, files grow on the machine and are copied up now and then: call `flush` before saving a checkpoint, so
    that a run that goes on from it finds all rows before it.
    """

    def __init__(
        self,
        run_dir: FilePath,
        resume_after: tuple[Phase, int] | None,
        digests: Mapping[str, str] | None = None,
        check: Callable[[], object] = lambda: None,
        trackers: Sequence[str] = (),
    ) -> None:
        """Open the log; for a run that is resumed, roll it back first.

        Args:
          run_dir: the run's folder, which is made if it does not exist, or its address in a bucket, gs://.
          resume_after: phase and step of the last row to keep, from the checkpoint that the run goes on from. Later
            rows are removed from the file and hidden in TensorBoard. None for a new run.
          digests: those of that checkpoint, from `flush`. Rows that have been lost or changed since then are told in
            the log; without digests, only rows that `metrics.jsonl` has lost.
          check: called in the first process before anything is written; raises an error, such as `LockLost`, if this
            run must not write.
          trackers: names in `rspo_jax.records.trackers.TRACKERS`; they are shown numbers and samples too.

        Raises:
          FileExistsError: if `resume_after` is None and the folder holds rows already.
          DamagedRows: if a line of a file is not a row, except for a last line that was cut while it was written, or
            rows are doubled or in a wrong order.
          ValueError: if `resume_after` is not a phase and a step, or `run_dir` is an address that cannot be written to.
        """
        self._run_dir = as_path(run_dir)
        self._last = _BEFORE_ANY_STEP if resume_after is None else position(*resume_after)
        self._check = check if is_primary() else lambda: None
        self._rows = _row_files(self._run_dir)
        self._boards: dict[str, Board] = {}
        self._open_files = contextlib.ExitStack()
        self._closed = False
        self._writes = is_primary()
        Agreement("metrics").from_primary(functools.partial(self._open, resume_after, digests or {}, trackers))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.close(0 if error is None else 1)

    def write(
        self,
        phase: Phase,
        step: int,
        metrics: Mapping[str, SupportsFloat],
        arrays: Mapping[str, ArrayLike] | None = None,
        samples: Sequence[Sample] = (),
    ) -> None:
        """Append a row. Non-finite numbers become null in the files and a gap in TensorBoard.

        Args:
          phase: the phase of the run.
          step: the step within the phase, after all steps that were written before.
          metrics: numbers by name; scalar arrays will do.
          arrays: arrays of the same step by name, of any rank; kept to six significant digits.
          samples: responses of the same step.

        Raises:
          ValueError: if the row does not come after the last one, a metric is called "phase" or "step", or the log is
            closed, or something else has written to a file.
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
            self._check()
            where = {"phase": phase, "step": step}
            self._rows[_METRICS_FILE].append(where | {name: finite.get(name) for name in values})
            if lists:
                self._rows[_DIAGNOSTICS_FILE].append(where | lists)
            for sample in samples:
                self._rows[SAMPLES_FILE].append(where | sample.row())
        self._last = at
        if not self._writes:
            return
        board = self._boards.get(phase) or self._open_board(phase)
        board.add({f"{phase}/{name}": value for name, value in finite.items()}, step)
        self._trackers.log(phase, step, finite, samples)
        self._files.copy_soon()

    def flush(self) -> dict[str, str]:
        """Bring all rows so far to the disk, or to the bucket.

        Returns:
          Name of each file of rows -> the SHA-256 of its rows, for a checkpoint; empty in processes that do not write.
        """
        if not self._writes:
            return {}
        for file in self._rows.values():
            file.sync()
        for board in self._boards.values():
            board.sync()
        self._files.copy()
        return {name: file.digest for name, file in self._rows.items()}

    def close(self, exit_code: int = 0) -> None:
        """Close all files and tell the trackers that the run has ended; a second call does nothing."""
        self._closed = True
        try:
            self._open_files.close()
        finally:
            if self._writes:
                self._trackers.finish(exit_code)

    def _open(self, resume_after: tuple[str, int] | None, digests: Mapping[str, str], trackers: Sequence[str]) -> None:
        self._check()
        told = None if resume_after is None or not trackers else self._rows[_METRICS_FILE].last_position()
        for name, file in self._rows.items():
            if resume_after is None:
                file.refuse_old_rows()
                continue
            remaining = file.roll_back(self._last)
            first_steps = {"warm_start": 1, "rl": 0 if name == _METRICS_FILE else 1}
            missing = missing_rows([*remaining, (self._last[0], self._last[1] + 1)], first_steps)
            missing = "" if name == SAMPLES_FILE else missing  # most steps leave no samples
            if name in digests and file.digest != digests[name]:
                change = f"it lacks the rows of {missing}" if missing else "rows were removed or changed"
            elif name in digests or name != _METRICS_FILE or not missing:
                continue
            else:
                change = f"it lacks the rows of {missing}"
            path = self._run_dir / name
            _logger.warning(
                "%s is not as it was at %s step %d, after which the run goes on: %s.", path, *resume_after, change
            )
        self._files = self._open_files.enter_context(GrowingFiles(self._run_dir, self._check))
        self._files.folder.mkdir(parents=True, exist_ok=True)
        for name, file in self._rows.items():
            self._open_files.callback(file.close)
            file.open_in(self._files.folder, make=name == _METRICS_FILE)
        # TensorBoard hides the points after the last row.
        last_phase, last_step = self._last
        for index, phase in enumerate(PHASES):
            if index >= last_phase and self._event_files(phase):
                self._open_board(phase, purge_step=last_step + 1 if index == last_phase else 0)
        self._trackers = Trackers(trackers, self._run_dir, told)

    def _event_files(self, phase: str) -> list[epath.Path]:
        return list((self._run_dir / "tensorboard" / phase).glob("events.out.tfevents.*"))

    def _open_board(self, phase: str, purge_step: int | None = None) -> Board:
        # Each phase has a folder, as purging hides all points of a folder from a step on. File names hold the time in
        # seconds; the number keeps a run that is resumed within a second from overwriting the last file.
        folder = self._files.folder / "tensorboard" / phase
        board = self._boards[phase] = Board(folder, len(self._event_files(phase)), purge_step)
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
