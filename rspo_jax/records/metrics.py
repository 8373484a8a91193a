"""How a run is recorded and shown: one JSON line a step, TensorBoard scalars, a progress bar.

A run has two phases, "warm_start" (supervised) and then "rl", each with a step count of its own from 1; a row of
`metrics.jsonl` is `{"phase": "rl", "step": 12, "reward": 0.4, ...}`, and one of `diagnostics.jsonl` the same with
arrays. Of several processes the first one writes and shows, and the others check what they are given. This file takes
finished numbers by name: it must never know how one is computed, and nothing of models or plots.
"""

import collections
import contextlib
import functools
import json
import logging
import math
import operator
import re
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Self, SupportsFloat

import numpy as np
import rich.console
import rich.live
import rich.progress_bar
import rich.table
import rich.text
import tensorboardX
from etils import epath
from numpy.typing import ArrayLike

from rspo_jax.hosts import Agreement, is_primary
from rspo_jax.records.files import FilePath, GrowingFiles, as_path, replace_file
from rspo_jax.records.rows import PHASES, POSITION_NAMES, RowFile, position, read_rows

_METRICS_FILE = "metrics.jsonl"
_DIAGNOSTICS_FILE = "diagnostics.jsonl"
_BEFORE_ANY_STEP = (0, -1)
_logger = logging.getLogger(__name__)


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a success rate; unlike the normal one it stays useful near 0 and 1.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    Trials are taken as independent: several samples of one problem make the true interval wider.

    Args:
      successes: how many of the trials succeeded.
      trials: how many trials there were, at least 1.
      z: half the width in standard deviations; the default covers 95 %.

    Returns:
      The lower and the upper bound, in [0, 1].

    Raises:
      ValueError: if the counts are no whole numbers with 0 <= successes <= trials and trials >= 1, or z is not
        positive and finite.
    """
    try:
        successes, trials = operator.index(successes), operator.index(trials)
    except TypeError:
        raise ValueError(f"Counts must be whole numbers, got {successes!r} of {trials!r}.") from None
    if not (trials >= 1 and 0 <= successes <= trials):
        raise ValueError(f"There must be 1 trial or more and no more successes, got {successes} of {trials}.")
    if not (math.isfinite(z) and z > 0):
        raise ValueError(f"z must be positive and finite, got {z}.")
    rate, shrinkage = successes / trials, 1 + z**2 / trials
    centre = (rate + z**2 / (2 * trials)) / shrinkage
    half_width = z / shrinkage * math.sqrt(rate * (1 - rate) / trials + z**2 / (4 * trials**2))
    # At 0 and 1 the bound is exact; only rounding would leave it.
    low = 0.0 if successes == 0 else centre - half_width
    high = 1.0 if successes == trials else centre + half_width
    return low, high


def write_json(path: FilePath, content: Any) -> None:
    """Writes an object as indented JSON, atomically; non-finite numbers become null, as JSON has none.

    Args:
      path: the file, in a folder that exists, or in a bucket.
      content: what the json module can write: dicts, lists, strings, numbers, booleans, None.

    Raises:
      TypeError: if `content` holds anything else; the file is left as it was.
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
    """The rows of a run's `metrics.jsonl`, in the order written; null becomes NaN.

    A last line that was cut while being written is left out, with a warning in the log.

    Args:
      run_dir: the run's folder, or its address in a bucket.

    Returns:
      One dict a row: "phase" (str), "step" (int) and metrics (float).

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
    """The rows of a run's `diagnostics.jsonl`, in the order written; none for a run that recorded no arrays.

    Args:
      run_dir: the run's folder, or its address in a bucket.

    Returns:
      One dict a row: "phase" (str), "step" (int) and float64 arrays, in which null has become NaN.

    Raises:
      ValueError: if a line, except for a last one that was cut, is not a row.
    """
    path = as_path(run_dir) / _DIAGNOSTICS_FILE
    rows = read_rows(path, _as_arrays) if path.is_file() else []
    return [{name: row[name] for name in POSITION_NAMES} | _as_arrays(_beside_position(row)) for _, row in rows]


class MetricsLog:
    """Writes a run's metrics to `metrics.jsonl` and to TensorBoard event files in `tensorboard/<phase>/`, and arrays of
    its steps to `diagnostics.jsonl`, which a run without any does not have.

    A context manager. A run that is interrupted and resumed ends with exactly the rows of an uninterrupted one. All
    processes of a run make one, at the same point, with the same arguments: the first writes, the others do not.

    In a bucket, files grow on the machine and are copied up now and then: call `flush` before a checkpoint is saved, so
    that a run which goes on from it finds all rows before it.
    """

    def __init__(self, run_dir: FilePath, resume_after: tuple[str, int] | None) -> None:
        """Opens the log, and rolls it back first where a run is resumed.

        Args:
          run_dir: the run's folder; made if it does not exist. Or its address in a bucket, gs://.
          resume_after: phase and step of the last row to keep, as of the checkpoint that the run goes on from. Later
            rows are removed from the file and hidden in TensorBoard. None for a new run.

        Raises:
          FileExistsError: if `resume_after` is None and the folder holds rows already.
          ValueError: if `resume_after` is not a phase and a step, or a line of the file, except for a last one that
            was cut while being written, is not a row; or `run_dir` is an address that cannot be written to.
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
        phase: str,
        step: int,
        metrics: Mapping[str, SupportsFloat],
        arrays: Mapping[str, ArrayLike] | None = None,
    ) -> None:
        """Appends one row. Non-finite numbers become null in the files and a gap in TensorBoard.

        Args:
          phase: "warm_start" or "rl".
          step: the step within the phase, later than all that was written before.
          metrics: numbers by name; scalar arrays will do.
          arrays: of the same step, by name, of any rank; kept to six significant digits.

        Raises:
          ValueError: if the row is not later than the one before, a metric is called "phase" or "step", or the log is
            closed.
          TypeError: if a metric is not a number, or an array not one of numbers.
        """
        if self._closed:
            raise ValueError(f"{self._run_dir / _METRICS_FILE} is closed.")
        at = position(phase, step)
        if at <= self._last:
            last_phase, last_step = PHASES[self._last[0]], self._last[1]
            raise ValueError(f"Steps must increase, but {phase} step {step} came after {last_phase} step {last_step}.")
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
        """Returns once all rows so far are in `metrics.jsonl`, be it in a bucket. TensorBoard may be seconds behind."""
        if self._writes:
            for board in self._boards.values():
                board.flush()
            self._files.copy()

    def close(self) -> None:
        """Closes all files; a second call does nothing."""
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
        self._hide_removed_points()

    def _hide_removed_points(self) -> None:
        last_phase, last_step = self._last
        for index, phase in enumerate(PHASES):
            if index >= last_phase and self._event_files(phase):
                self._open_board(phase, purge_step=last_step + 1 if index == last_phase else 0)

    def _event_files(self, phase: str) -> list[epath.Path]:
        return list((self._run_dir / "tensorboard" / phase).glob("events.out.tfevents.*"))

    def _open_board(self, phase: str, purge_step: int | None = None) -> tensorboardX.SummaryWriter:
        # A folder for each phase, as purging hides all points of a folder from a step on. File names hold the time in
        # seconds; the suffix keeps a run that is resumed within one from overwriting the file before.
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
            raise TypeError(f"The metric {name!r} is not a number: {value!r}.") from None
    return values


def _as_lists(arrays: Mapping[str, ArrayLike]) -> dict[str, Any]:
    """Nested lists of what JSON can hold: ints, floats of six significant digits, and None for what is not finite."""
    lists = {}
    for name, given in arrays.items():
        _check_name(name)
        array = np.asarray(given)
        if not np.issubdtype(array.dtype, np.integer):
            if not np.issubdtype(array.dtype, np.floating):
                raise TypeError(f"The array {name!r} is not one of numbers, but of {array.dtype}.")
            flat = [float(f"{value:.6g}") if math.isfinite(value) else None for value in array.reshape(-1).tolist()]
            array = np.array(flat, object).reshape(array.shape)
        lists[name] = array.tolist()
    return lists


def _as_arrays(lists: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The way back, to float64 with NaN for None.

    Raises:
      ValueError: if a list is ragged.
      TypeError: if it holds anything but numbers and None.
    """
    arrays = {}
    for name, nested in lists.items():
        _check_name(name)
        flat = np.array(nested, object).reshape(-1).tolist()
        if not all(value is None or type(value) in (int, float) for value in flat):
            raise TypeError(f"{name!r} is not an array of numbers.")
        arrays[name] = np.array(nested, np.float64)
    return arrays


def _beside_position(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in POSITION_NAMES}


def _check_name(name: str) -> None:
    if name in POSITION_NAMES:
        raise ValueError(f"A metric cannot be called {name!r}: that is where the row says when it was.")


_TITLES = {"warm_start": "warm start", "rl": "RL"}
_SHOWN = {
    "warm_start": {"loss": "loss {:.4g}", "tokens_per_second": "{:,.0f} tokens/s"},
    "rl": {
        "reward": "reward {:.3f}",
        "solve_rate": "solve rate {:.1%}",
        "gamma_mean": "γ {:.4f}",
        "clip_fraction": "clipped {:.2%}",
        "entropy": "entropy {:.3f}",
        "tokens_per_second": "{:,.0f} tokens/s",
    },
}
_INTERVALS_TIMED = 32
_REPORTS = 20


class Progress:
    """Shows how one phase of a run is going.

    A context manager. On a terminal it is a live bar with the latest metrics under it. Elsewhere (a file, the log of
    a job) it is plain lines: after the first step, after about every 5 % of the steps, after the last one, and
    whenever there is an evaluation. A metric that is missing shows as "–". Of several processes the first one shows.
    """

    def __init__(
        self,
        phase: str,
        total: int,
        completed: int = 0,
        console: rich.console.Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepares the display; entering the context shows it.

        Args:
          phase: "warm_start" or "rl".
          total: the number of steps of the phase.
          completed: how many of them are done already, in a run that is resumed.
          console: where to print; standard output by default.
          clock: the time in seconds, from any origin.

        Raises:
          ValueError: if the phase is unknown, or not 0 <= completed <= total with total >= 1.
        """
        if phase not in PHASES:
            raise ValueError(f"The phase must be one of {', '.join(PHASES)}, got {phase!r}.")
        if not (total >= 1 and 0 <= completed <= total):
            raise ValueError(f"There must be 1 step or more and no more completed, got {completed} of {total}.")
        self._phase, self._total, self._step, self._clock = phase, total, completed, clock
        if not is_primary():
            console = rich.console.Console(quiet=True, force_interactive=False)
        # Colours may be forced where there is no terminal; a bar that redraws itself there would fill the log.
        self._console = console or rich.console.Console(force_interactive=None if sys.stdout.isatty() else False)
        self._metrics: Mapping[str, float] = {}
        self._updates = 0
        self._times = collections.deque([(completed, clock())], maxlen=_INTERVALS_TIMED + 1)
        self._live = (
            rich.live.Live(get_renderable=self._render, console=self._console, refresh_per_second=4)
            if self._console.is_interactive
            else None
        )

    def __enter__(self) -> Self:
        if self._live:
            self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows that a step is done.

        Args:
          step: the step within the phase, counted from 1.
          metrics: numbers by name. A skipped update and an evaluation get a line that stays.
        """
        before, self._step, self._metrics = self._step, step, dict(metrics)
        self._times.append((step, self._clock()))
        self._updates += 1
        if self._updates == 2:
            self._times.popleft()  # the first step is mostly compilation and says nothing about the others
        if (skipped := metrics.get("skipped_updates", 0)) > 0:
            self.say(f"{_TITLES[self._phase]} step {step}: {skipped:.0f} update{'s' if skipped > 1 else ''} skipped")
        evaluation = _describe_evaluation(metrics)
        if self._live:
            if evaluation:
                self.say(f"{_TITLES[self._phase]} step {step}: {evaluation}")
            self._live.refresh()
        elif evaluation or self._updates == 1 or self._report_is_due(before, step):
            self.say(self._report(evaluation))

    def say(self, text: str) -> None:
        """Prints a line of plain text; on a terminal it goes above the bar."""
        self._console.print(rich.text.Text(self._encodable(text)), soft_wrap=True)

    def _report_is_due(self, before: int, step: int) -> bool:
        return before * _REPORTS // self._total < step * _REPORTS // self._total

    def _report(self, evaluation: str) -> str:
        parts = [*self._describe_metrics(), *([evaluation] if evaluation else []), f"{self._time_left()} left"]
        return f"{_TITLES[self._phase]} {self._step}/{self._total}: {', '.join(parts)}"

    def _describe_metrics(self) -> list[str]:
        metrics = self._metrics
        return [
            text.format(metrics[name]) if name in metrics else re.sub(r"\{.*?\}", "–", text)
            for name, text in _SHOWN[self._phase].items()
        ]

    def _time_left(self) -> str:
        (first_step, first_time), (last_step, last_time) = self._times[0], self._times[-1]
        if last_step <= first_step:
            return "–"
        seconds = (self._total - last_step) * (last_time - first_time) / (last_step - first_step)
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{seconds:02d}"

    def _render(self) -> rich.console.RenderableType:
        grid = rich.table.Table.grid(expand=True, padding=(0, 1))
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        for _ in range(2):
            grid.add_column(no_wrap=True, justify="right")
        cells = (_TITLES[self._phase], f"{self._step}/{self._total}", f"{self._time_left()} left")
        title, count, left = (rich.text.Text(self._encodable(cell)) for cell in cells)
        title.stylize("bold")
        left.stylize("cyan")
        grid.add_row(title, rich.progress_bar.ProgressBar(total=self._total, completed=self._step), count, left)
        metrics = rich.text.Text(self._encodable("  ".join(self._describe_metrics())), style="dim")
        return rich.console.Group(grid, metrics)

    def _encodable(self, text: str) -> str:
        # An output that cannot show "γ" must not end the run.
        return text.encode(self._console.encoding, errors="replace").decode(self._console.encoding)


def _describe_evaluation(metrics: Mapping[str, float]) -> str:
    """The held-out solve rates with their intervals, or nothing where none was measured."""
    parts = []
    for kind in ("greedy", "sampled"):
        rate, low, high = (metrics.get(f"eval_{kind}{bound}") for bound in ("", "_low", "_high"))
        if rate is not None:
            interval = "" if low is None or high is None else f" [{low:.1%}, {high:.1%}]"
            parts.append(f"{kind} {rate:.1%}{interval}")
    return f"held-out {', '.join(parts)}" if parts else ""
