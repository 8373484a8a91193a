"""Trackers that a run is shown in beside TensorBoard: Weights & Biases and Trackio.

They are optional packages, imported only when a run asks for them. None of them can stop a run: what fails is said once
and counted. A run that is resumed goes on in the same run of each tracker, whose id `trackers.json` keeps.
"""

import importlib.util
import json
import logging
import netrc
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from etils import epath

from rspo_jax.hosts import say
from rspo_jax.records.files import is_bucket, replace_file
from rspo_jax.records.rows import PHASES, Phase
from rspo_jax.records.samples import Sample

PROJECT = "rspo_jax"
"""The project of runs, unless the tracker's own environment variable names another."""
TRACKERS_FILE = "trackers.json"
SAMPLE_COLUMNS = (
    "prompt",
    "response",
    "reward",
    "rewards",
    "correct",
    "advantage",
    "tokens",
    "gamma_mean",
    "gamma_min",
)
"""The columns of a table of sample responses."""
_logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """A run in a tracker. Any method may raise any error."""

    @property
    def id(self) -> str:
        """The name by which `open` finds the same run again."""
        ...

    def log(self, phase: Phase, step: int, scalars: Mapping[str, float]) -> None:
        """Show the numbers of a step, under names such as "rl/reward"."""
        ...

    def log_samples(self, phase: Phase, step: int, rows: Sequence[Sequence[Any]]) -> None:
        """Show a table of sample responses with the columns `SAMPLE_COLUMNS`."""
        ...

    def finish(self, exit_code: int) -> None:
        """End the run; 0 means that it has come to its end."""
        ...


class TrackedRun(NamedTuple):
    """The description of a run that a tracker is given."""

    folder: str
    """The folder for the tracker's own files; empty if the run lies in a bucket."""
    name: str
    config: Mapping[str, Any]
    tags: tuple[str, ...]
    id: str | None
    """The id of the run to go on with; None for a new one."""


@dataclass(frozen=True)
class TrackerKind:
    """An entry of `TRACKERS`."""

    module: str
    """The package; the extra that brings it is called the same."""
    start: Callable[[TrackedRun], Tracker]
    """Starts or goes on with a run; it may raise any error."""


class WandbRun:
    """A run in Weights & Biases. Without a key it is kept in the run's folder, to be sent by `wandb sync`."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        mode = os.environ.get("WANDB_MODE")
        if mode is None and not _has_wandb_key():
            mode = "offline"
            say(f"wandb: there is no key of an account, so the run is kept in {run.folder}/wandb for `wandb sync`")
        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            config=dict(run.config),
            tags=run.tags,
            id=run.id,
            resume=None if run.id is None else "allow",
            dir=run.folder or None,
            mode=mode,
            settings=wandb.Settings(
                console="off", silent=True, init_timeout=30, finish_timeout=60, finish_timeout_raises=False
            ),
        )
        # Each phase counts its own steps, while those of the tracker may never go back.
        for phase in PHASES:
            self._run.define_metric(f"{phase}/step", hidden=True)
            self._run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
        self.id = self._run.id

    def log(self, phase: Phase, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log({f"{phase}/step": step, **scalars})

    def log_samples(self, phase: Phase, step: int, rows: Sequence[Sequence[Any]]) -> None:
        table = self._wandb.Table(columns=list(SAMPLE_COLUMNS), data=[list(row) for row in rows])
        self._run.log({f"{phase}/step": step, f"{phase}/samples": table})

    def finish(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)


class TrackioRun:
    """A run in Trackio, whose data base lies on this machine (TRACKIO_DIR)."""

    def __init__(self, run: TrackedRun) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        self._trackio = trackio
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=run.id or run.name,
            config={**run.config, "tags": list(run.tags)},
            resume="never" if run.id is None else "allow",
            embed=False,
        )
        self.id = self._run.name

    def log(self, phase: Phase, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def log_samples(self, phase: Phase, step: int, rows: Sequence[Sequence[Any]]) -> None:
        table = self._trackio.Table(columns=list(SAMPLE_COLUMNS), data=[list(row) for row in rows])
        self._run.log({f"{phase}/samples": table}, step=step)

    def finish(self, exit_code: int) -> None:
        self._run.finish()


TRACKERS: dict[str, TrackerKind] = {
    "wandb": TrackerKind("wandb", WandbRun),
    "trackio": TrackerKind("trackio", TrackioRun),
}
"""The trackers by name. The commands' choices come from this table."""


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are unknown or not installed, before anything is compiled.

    Raises:
      ValueError: naming all of them, and what to install.
    """
    unknown = [name for name in names if name not in TRACKERS]
    mistakes = [f"unknown tracker {name!r}; choose from {', '.join(TRACKERS)}" for name in unknown]
    missing = [name for name in names if name in TRACKERS and not _is_installed(TRACKERS[name].module)]
    if missing:
        mistakes.append(
            f"the tracker{'s' if len(missing) > 1 else ''} {' and '.join(missing)} cannot be imported: "
            f"pip install 'rspo-jax[{','.join(missing)}]'"
        )
    if mistakes:
        raise ValueError("; ".join(mistakes))


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # a module without a spec, in place of the package
        return True


class Trackers:
    """The trackers of one run. No method raises an error: the run goes on without what has failed."""

    def __init__(self, names: Sequence[str], run_dir: epath.Path, told: tuple[int, int] | None) -> None:
        """Start or go on with the run in each tracker.

        Args:
          names: keys of `TRACKERS`.
          run_dir: the run's folder; its `config.json`, if there is one, is shown.
          told: the position of the last row of the run so far, even if the run goes on from an earlier one: trackers
            have been told up to there. None for a new run.
        """
        self._trackers: dict[str, Tracker] = {}
        self._failures: dict[str, int] = {}
        if not names:
            return
        path = run_dir / TRACKERS_FILE
        stored: dict[str, Any] = json.loads(path.read_text()) if told is not None and path.exists() else {}
        ids: dict[str, str] = dict(stored.get("ids", {}))
        # A run that is resumed makes the same rows again, bit for bit. Trackers cannot take back what they show, so
        # they are told only what comes after; a tracker that is new to the run is told everything.
        before = tuple(stored.get("told", ())) or (-1, -1)
        last = max(before, told or (-1, -1))
        self._told = {name: last if name in ids else (-1, -1) for name in names}
        config = json.loads((run_dir / "config.json").read_text()) if (run_dir / "config.json").exists() else {}
        task, objective = config.get("task_name"), (config.get("objective") or {}).get("objective")
        folder = "" if is_bucket(run_dir) else os.fspath(run_dir)
        for name in names:
            run = TrackedRun(
                folder, run_dir.resolve().name, config, tuple(filter(None, (task, objective))), ids.get(name)
            )
            self._guard(name, lambda name=name, run=run: self._start(name, run))
        ids |= {name: tracker.id for name, tracker in self._trackers.items()}
        replace_file(path, json.dumps({"ids": ids, "told": last}).encode())

    def log(self, phase: Phase, step: int, scalars: Mapping[str, float], samples: Sequence[Sample] = ()) -> None:
        """Show a row and its samples.

        Args:
          phase: the phase of the run.
          step: the step within the phase.
          scalars: finite numbers by name.
          samples: responses of the step.
        """
        at = (PHASES.index(phase), step)
        named = {f"{phase}/{name}": value for name, value in scalars.items()}
        rows = [_table_row(sample) for sample in samples]
        for name, tracker in self._trackers.items():
            if at <= self._told[name]:
                continue
            self._guard(name, lambda tracker=tracker: tracker.log(phase, step, named))
            if rows:
                self._guard(name, lambda tracker=tracker: tracker.log_samples(phase, step, rows))

    def finish(self, exit_code: int) -> None:
        """End the run in each tracker; a second call does nothing."""
        for name, tracker in self._trackers.items():
            self._guard(name, lambda tracker=tracker: tracker.finish(exit_code))
        for name, count in self._failures.items():
            if count > 1:
                say(f"{name}: {count} calls failed in all")
        self._trackers = {}

    def _start(self, name: str, run: TrackedRun) -> None:
        self._trackers[name] = TRACKERS[name].start(run)

    def _guard(self, name: str, call: Callable[[], None]) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a package's own, which a run cannot act on
                call()
        except Exception as error:  # each tracker has errors of its own
            if name not in self._failures:
                say(f"{name} has failed, and the run goes on: {type(error).__name__}: {error}")
                _logger.debug("%s", name, exc_info=error)
            self._failures[name] = self._failures.get(name, 0) + 1


def _table_row(sample: Sample) -> tuple[Any, ...]:
    """Return the values of `SAMPLE_COLUMNS`."""
    known = [gamma for gamma in sample.gamma or () if gamma is not None]
    rewards = ", ".join(f"{name} {'–' if value is None else f'{value:.4g}'}" for name, value in sample.rewards.items())
    return (
        sample.prompt,
        sample.response,
        sample.reward,
        rewards,
        sample.correct,
        sample.advantage,
        len(sample.token_ids),
        float(np.mean(known)) if known else None,
        min(known) if known else None,
    )


def _has_wandb_key() -> bool:
    """Return whether there is a key of an account, in the places that Weights & Biases looks in."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0].split(":")[0]
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
