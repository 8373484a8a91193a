"""The record of a run while it goes on: metrics, progress, checkpoints, the alarm, and signals that stop it."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np

from rspo_jax.hosts import Preemption
from rspo_jax.records.alarm import Alarm
from rspo_jax.records.checkpoint import Checkpoints
from rspo_jax.records.compiling import CompileWatch
from rspo_jax.records.memory import peak_memory_gib
from rspo_jax.records.metrics import MetricsLog
from rspo_jax.records.progress import PhaseProgress
from rspo_jax.records.rows import Phase
from rspo_jax.records.samples import Sample
from rspo_jax.stopwatch import Stopwatch
from rspo_jax.training.state import RunState


class Stopped(Exception):
    """The run was asked to stop by the signal named here; its state has been saved."""


@dataclass
class Recorder:
    """The record of a run, and the signals that stop it."""

    log: MetricsLog
    checkpoints: Checkpoints
    preemption: Preemption
    alarm: Alarm
    compiling: CompileWatch
    watch: Stopwatch
    """Measures the steps of the present phase."""
    elapsed_before: float
    """Seconds that earlier processes of this run took, up to the checkpoint that it goes on from."""
    started: float = field(default_factory=time.monotonic)
    _progress: PhaseProgress | None = None

    @property
    def elapsed(self) -> float:
        """Seconds of the run, those of earlier processes up to their last checkpoint included."""
        return self.elapsed_before + time.monotonic() - self.started

    @contextlib.contextmanager
    def phase(self, name: Phase, steps: int, completed: int) -> Iterator[None]:
        """Show the progress of a phase of the run as long as the context lasts."""
        with PhaseProgress(name, steps, completed=completed) as self._progress:
            self.compiling.display = self._progress
            self.watch.restart()
            yield
        self.compiling.display = None

    def write(
        self,
        phase: Phase,
        step: int,
        metrics: Mapping[str, float],
        arrays: Mapping[str, np.ndarray] | None = None,
        samples: Sequence[Sample] = (),
        beside: jax.Array | None = None,
    ) -> None:
        """Append the rows of a step, show its metrics, and sound the alarm at signs of a collapse.

        Args:
          phase: the phase of the run.
          step: the step that is done.
          metrics: those of the step; time and memory are added here, and speed if there are `response_tokens`.
          arrays: those of the step.
          samples: sample responses of the step.
          beside: something of the next step that the device was told to compute before.
        """
        assert self._progress is not None, "no phase has begun"
        metrics = {**metrics, **self.watch.take(metrics.get("response_tokens")), "peak_memory_gib": peak_memory_gib()}
        self.log.write(phase, step, metrics, arrays, samples)
        self._progress.update(step, metrics)
        why = self.alarm.update({"phase": phase, "step": step, **metrics})
        if why is not None:
            self._progress.say(f"step {step}: signs of a collapse: {why}")
        self.watch.lap("write", beside)

    def save(self, state: RunState) -> None:
        """Save a checkpoint; the rows up to it are safe first, because they have to outlive a kill as it does."""
        digests = self.log.flush()
        index = int(state.warm_start_step) + int(state.step)
        self.checkpoints.save(index, state, {"elapsed_seconds": self.elapsed, "digests": digests})
        self.watch.lap("write")

    def should_stop(self) -> str | None:
        """Return the name of a signal that asked any process of the run to stop; all processes must ask together."""
        return self.preemption.agreed()
