"""Commands in tests: called in this process, or as small training runs in this process and in others."""

import contextlib
import io
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache

from experiments import train
from rspo_jax.records import read_metrics
from rspo_jax.stopwatch import STAGES
from support.processes import SECONDS, Member, preload

Main = Callable[[list[str]], int]

QUICK = "--xla_backend_optimization_level=0" + (
    " --xla_cpu_use_fusion_emitters=false" if jax.__version__.startswith("0.10.") else ""
)
"""XLA_FLAGS as in `tests/conftest.py`, for processes that compile quickly in the slow tests as well."""

TIMINGS = {"step_seconds", "tokens_per_second", "compile_seconds", "overlapped_seconds", "peak_memory_gib"} | {
    f"seconds_{stage}" for stage in STAGES
}
"""Metrics that differ from run to run."""

SMALL: dict[str, Any] = {
    # Two numbers of one digit: no two responses fit into one row, so that all rollouts have one shape.
    "--task.numbers-min": 2,
    "--task.numbers-max": 2,
    "--task.high": 9,
    "--task.train": 60,
    "--task.validation": 8,
    "--task.test": 8,
    "--sampler.max-new-tokens": 4,
    "--model.hidden-size": 8,
    "--model.head-dim": 4,
    "--model.num-heads": 2,
    "--model.num-kv-heads": 1,
    "--model.num-layers": 1,
    "--model.expert-size": 8,
    "--model.num-experts": 4,
    "--model.num-experts-per-token": 2,
    "--prompts": 4,
    "--group-size": 2,
    "--mini-batches": 2,
    "--epochs": 1,
    "--rollout-chunks": 1,
    "--learned-groups": "None",
    "--overlong-buffer": 3,  # an untrained model earns nothing, but some of its responses are longer than others
    "--warm-start.batch-size": 4,
    "--warm-start.optimizer.warmup-updates": 1,
    "--evaluation.problems": 8,
}
"""Flags of a run of Countdown that takes seconds, most of them for compiling."""

_TRAIN = """
import sys, jax
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
from experiments import train
sys.exit(train.main(sys.argv[1:]))
"""


class Said(NamedTuple):
    """A command's exit code and what it has written."""

    code: int
    out: str
    err: str


def flags(values: Mapping[str, Any] = SMALL, **changes: Any) -> list[str]:
    """Return flags as a list of arguments; `warm_start__steps=1` sets `--warm-start.steps` to 1."""
    changed = {f"--{name.replace('__', '.').replace('_', '-')}": value for name, value in changes.items()}
    return [str(part) for pair in (dict(values) | changed).items() for part in pair]


def call(main: Main, *arguments: object) -> Said:
    """Call a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit:  # of the parser
            code = exit.code
    return Said(code, out.getvalue(), err.getvalue())


def refusal(main: Main, *arguments: object) -> str:
    """Return what a command says of a mistake: one sentence, or the box that the parser draws, unfolded."""
    said = call(main, *arguments)
    assert said.code == 2 and "Traceback" not in said.out + said.err, said
    if said.err.startswith("error: "):
        assert said.err.count("\n") == 1, said.err
        return said.err
    return " ".join(re.sub("[│╭╮╰╯─]", " ", said.err).split())


def run_training(*arguments: object) -> Said:
    """Train in this process; what an earlier run has compiled is not compiled again."""
    with jax.numpy_dtype_promotion("standard"):  # Optax promotes
        return call(train.main, "countdown", *arguments)


def start_training(
    log: Path, *arguments: object, environment: Mapping[str, str] | None = None, folder: Path | None = None
) -> Member:
    """Start to train in another process, whose working directory is `folder`, if one is given."""
    preload("experiments.train")
    enter = "" if folder is None else f"import os; os.chdir({os.fspath(folder)!r})\n"
    return Member(log, enter + _TRAIN, "countdown", *arguments, environment=environment)


@contextlib.contextmanager
def compiled_programs(folder: Path) -> Iterator[None]:
    """Read and write compiled programs in a folder; other processes get them by --compilation-cache."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    compilation_cache.reset_cache()
    for name, value in zip(names, (os.fspath(folder), 0.0), strict=True):
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def wait_until(moment: Callable[[], bool], alive: Callable[[], bool]) -> None:
    """Wait for a moment of processes that must stay alive until then."""
    deadline = time.monotonic() + SECONDS
    while not moment():
        assert alive() and time.monotonic() < deadline
        time.sleep(0.002)


def has_row(run_dir: Path, phase: str, step: int) -> bool:
    """Return whether a step of a run has its row of metrics."""
    path = run_dir / "metrics.jsonl"
    return path.exists() and f'"phase": "{phase}", "step": {step},' in path.read_text()


def rows_of(run_dir: Path) -> list[str]:
    """Return the metrics of a run without timings, each row as text, so that rows with NaN can be equal."""
    return [json.dumps({name: row[name] for name in row if name not in TIMINGS}) for row in read_metrics(run_dir)]
