"""`python -m experiments.train TASK`: the command that trains, and the folder that a run leaves.

It joins a task, a model and the trainer; the training itself is in `rspo_jax.training`.
"""

import dataclasses
import functools
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import jax
import tyro
from etils import epath

import models
from experiments.config import RUNS, FolderRun, Run, differences, load_config, save_config
from experiments.errors import INTERRUPTED, STOPPED, UserError, complain
from experiments.flags import answer_help, naming_mistyped_flags
from experiments.reporting.training_curves import draw_curves
from experiments.run_config import Place
from rspo_jax.hosts import Agreement, ClusterConfig, ClusterError, is_primary, joined, say
from rspo_jax.records import as_path, is_leftover, read_metrics, write_json
from rspo_jax.records.checkpoint import CheckpointError
from rspo_jax.records.lock import LOCK_FILE, LockHeld, LockLost, RunLock
from rspo_jax.records.manifest import CheckpointMismatch
from rspo_jax.records.rows import DamagedRows
from rspo_jax.records.trackers import TRACKERS, check_trackers
from rspo_jax.records.trouble import trouble_of
from rspo_jax.rollouts import Problems, limits_of, load_problems, with_solutions
from rspo_jax.sharding import make_mesh
from rspo_jax.training import check_mesh, state_on_mesh
from rspo_jax.training.trainer import Setup, Stopped, train
from rspo_jax.types import Params

if TYPE_CHECKING:
    TrackerName = str
else:
    TrackerName = Literal[*TRACKERS]  # the choices of the flag come from the one table
PROG = "python -m experiments.train"
RUNS_FOLDER = epath.Path("runs")
CACHE_FOLDER = "compiled"
REWARDS_FILE = "rewards.json"
"""The rewards of a run, beside its configuration: name, place, weight, and the digest of the source of each."""
MISTAKES = (UserError, CheckpointError, CheckpointMismatch, DamagedRows, LockHeld, LockLost)
"""Errors whose text is all that a user needs."""


@dataclass(frozen=True)
class Folder:
    """The place of a run. It is not part of the run's configuration, so that the next start can choose another."""

    run_dir: Place | None = None
    """The folder for configuration, metrics, curves and checkpoints, or its address in a bucket, gs://BUCKET/RUN.
    runs/TASK-DATE-TIME when absent, which works for a single process only."""
    resume: bool = False
    """Continue the run in run_dir (when absent: the newest of this task) with the configuration that it was started
    with, except for the flags given now."""
    resume_or_start: bool = False
    """Continue the run in run_dir if there is one, and start one if not: for scripts that restart a run until it is
    done."""
    trackers: tuple[TrackerName, ...] = ()
    """Places to show the run in beside TensorBoard, each an optional package (docs/tracking.md)."""
    compilation_cache: Place | None = None
    """The folder that keeps compiled programs for the next start. When absent: JAX_COMPILATION_CACHE_DIR, or else
    compiled/ beside run_dir, but none on CPUs, where a program runs only on the processor that it was compiled for."""
    cluster: ClusterConfig = ClusterConfig()


def main(arguments: list[str] | None = None) -> int:
    """Run the command.

    Returns:
      The exit code: 0 after training, `STOPPED` after a stop that saved, `INTERRUPTED` after Ctrl-C before there was
      anything to save, `TROUBLE` for trouble of the machine that may pass, `MISTAKE` for a mistake.
    """
    try:
        name, run, folder = parse(sys.argv[1:] if arguments is None else arguments)
        with joined(folder.cluster, way_out="start all processes again with --resume") as membership:
            try:
                keep_compiled_programs(folder)
                problems = check_data(run)
                check_devices(run, problems)
                folder = agree_on_flags(name, run, folder)
                assert folder.run_dir is not None
                with RunLock(folder.run_dir):
                    return train_in(agree_on_folder(name, run, folder), run, problems, folder)
            except (*MISTAKES, OSError) as error:
                return membership.give_up(str(error), _complain_or_raise(error))
            except KeyboardInterrupt:
                print("interrupted", file=sys.stderr)
                return membership.give_up("interrupted", INTERRUPTED)
    except (UserError, ClusterError, OSError) as error:
        return _complain_or_raise(error)
    except KeyboardInterrupt:  # before there were others to tell
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _complain_or_raise(error: Exception) -> int:
    """Complain of an error and return the exit code; raise an OSError that is no trouble with files."""
    if isinstance(error, OSError) and trouble_of(error) is None:
        raise error
    return complain(error)


def parse(arguments: list[str]) -> tuple[str, Run, Folder]:
    """Return the task's name, a checked run and its folder. With --resume, the run's own config gives the defaults.

    Raises:
      UserError: if the configuration is not possible.
      SystemExit: from the parser, for unknown flags and for --help.
    """
    if not arguments:
        arguments = ["--help"]
    try:
        defaults = {name: run_type.default(arguments) for name, run_type in RUNS.items()}
        resumed = _resumed_folder(arguments) if arguments[0] in RUNS else None
        if resumed is not None:
            name, defaults[arguments[0]] = load_config(resumed / "config.json")
            if name != arguments[0]:
                raise ValueError(f"{resumed} is a run of {name}, not of {arguments[0]}")
        commands = {name: _command(name, default) for name, default in defaults.items()}
        if arguments[0] in commands:
            answer_help(f"{PROG} {arguments[0]}", commands[arguments[0]], arguments[1:])
        with naming_mistyped_flags(commands, arguments):
            name, run, folder = tyro.extras.subcommand_cli_from_dict(
                commands,
                args=arguments,
                prog=PROG,
                description="Train with reinforcement learning. TASK --help shows the flags of a task.",
            )
        run.check()
        check_trackers(folder.trackers)
    except ValueError as error:
        raise UserError(str(error)) from error
    return name, run, folder if resumed is None else dataclasses.replace(folder, run_dir=resumed, resume=True)


def _command(name: str, default: Run) -> Callable[..., tuple[str, Run, Folder]]:
    def command(
        run: Annotated[Run, tyro.conf.arg(name="")] = default,
        folder: Annotated[Folder, tyro.conf.arg(name="")] = Folder(),
    ) -> tuple[str, Run, Folder]:
        return name, run, folder

    command.__doc__ = type(default).__doc__
    return command


def _resumed_folder(arguments: list[str]) -> epath.Path | None:
    """Return the folder whose configuration gives the defaults, if there is one."""
    name, run_dir = arguments[0], None
    for argument, following in itertools.pairwise([*arguments, ""]):
        if argument == "--run-dir" and following:
            run_dir = as_path(following)
        elif argument.startswith("--run-dir="):
            run_dir = as_path(argument.removeprefix("--run-dir="))
    if "--resume" in arguments:
        if run_dir is None:
            candidates = sorted(RUNS_FOLDER.glob(f"{name}-*/config.json"), key=lambda path: path.stat().mtime)
            if not candidates:
                raise ValueError(
                    f"there is no run of {name} in {RUNS_FOLDER}/ to resume; name its folder with --run-dir"
                )
            return candidates[-1].parent
        if not (run_dir / "config.json").exists():
            if contents := _contents(run_dir):
                raise ValueError(_why_not_new(run_dir, contents))
            raise ValueError(f"there is no run to resume in {run_dir}; leave --resume out to start one there")
        return run_dir
    if "--resume-or-start" in arguments:
        if run_dir is None:
            raise ValueError("--resume-or-start needs the folder of the run: name it with --run-dir")
        return run_dir if (run_dir / "config.json").exists() else None
    return None


def check_data(run: Run) -> Problems:
    """Load the problems of a run and refuse what is wrong with them, before anything is written or compiled.

    Returns:
      The task with the problems of every split; prompts are encoded here once.

    Raises:
      UserError: if there are too few problems, all of a split are too long, a worked solution does not fit into a
        response, or the limits of conversations do not fit the task.
    """
    try:
        task, sampler = run.build_task(), run.trainer.sampler
        limits = limits_of(task, sampler, run.trainer.conversation)
        problems = load_problems(task, run.trainer.max_prompt_tokens)
        if run.trainer.warm_start.steps:
            with_solutions(task, problems.train, sampler, limits)
    except ValueError as error:
        raise UserError(str(error)) from error
    return problems


def check_devices(run: Run, problems: Problems) -> None:
    """Refuse a mesh that is impossible on the devices of this machine, before anything is written or compiled.

    Raises:
      UserError: if the mesh does not fit the devices, or does not divide the rows of a step or a parameter.
    """
    model = run.architecture()
    try:
        mesh = make_mesh(run.trainer.mesh)
        limits = limits_of(problems.task, run.trainer.sampler, run.trainer.conversation)
        check_mesh(run.trainer, run.learner(), mesh, problems.width + limits.tokens - 1)
        policy, init_params = models.Transformer(model), functools.partial(models.init_params, model)
        state_on_mesh(policy, init_params, run.trainer, mesh, run.learner().regularizers.needs_reference)
    except ValueError as error:
        raise UserError(str(error)) from error


def keep_compiled_programs(folder: Folder) -> None:
    """Switch JAX's persistent compilation cache on, before anything is compiled."""
    place = folder.compilation_cache
    if place is None:
        if os.environ.get("JAX_COMPILATION_CACHE_DIR") or jax.default_backend() == "cpu":
            return
        place = (RUNS_FOLDER if folder.run_dir is None else folder.run_dir.parent) / CACHE_FOLDER
    jax.config.update("jax_compilation_cache_dir", os.fspath(place))


def agree_on_flags(name: str, run: Run, folder: Folder) -> Folder:
    """Return the folder's flags with a folder chosen; all processes must have been started with the same flags.

    Raises:
      UserError: in every process, if one of them was started with other flags, or no folder is named for several.
    """
    if jax.process_count() > 1 and folder.run_dir is None:
        raise UserError(
            "several processes need a folder that all of them see: name it with --run-dir, as gs://BUCKET/RUN"
        )
    place = None if folder.run_dir is None else os.fspath(folder.run_dir)
    given = Agreement("flags").gather((name, run, (place, folder.resume)))
    for process, other in given.items():
        if other != given[0]:
            (name, run, where), (other_name, other_run, other_where) = given[0], other
            changes = differences(run, other_run) if other_name == name else []
            what = changes[0] if changes else f"{name}, {where} -> {other_name}, {other_where}"
            raise UserError(f"process {process} has other flags than process 0 ({what}): give all the same flags")
    run_dir = folder.run_dir or RUNS_FOLDER / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return dataclasses.replace(folder, run_dir=run_dir)


def agree_on_folder(name: str, run: Run, folder: Folder) -> epath.Path:
    """Let process 0 prepare the run's folder for all processes, which hold its lock, and return its path.

    Raises:
      UserError: in every process, if the folder cannot be used, or a process does not see it.
    """
    agreement = Agreement("folder")
    run_dir = as_path(agreement.from_primary(lambda: os.fspath(prepare_folder(name, run, folder))))
    shared = (run_dir / "config.json").exists() and load_config(run_dir / "config.json") == (name, run)
    mistake = f"{run_dir} is not one folder for all hosts: choose a --run-dir as gs://BUCKET/RUN"
    agreement.settle(None if shared else UserError(mistake))
    return run_dir


def prepare_folder(name: str, run: Run, folder: Folder) -> epath.Path:
    """Make the run's folder and write its `config.json`; print how the configuration of a resumed run has changed.

    Raises:
      UserError: if the folder of a new run is not empty, or a resumed run would change the shape of a parameter.
    """
    assert folder.run_dir is not None
    run_dir = folder.run_dir
    if folder.resume:
        _, saved = load_config(run_dir / "config.json")
        _check_same_shapes(saved.architecture(), run.architecture())
        _check_same_rewards(run_dir, run)
        changes = differences(saved, run)
        if changes:
            print("changed since the run was started: " + "; ".join(changes))
    elif contents := _contents(run_dir):
        raise UserError(_why_not_new(run_dir, contents))
    run_dir.mkdir(parents=True, exist_ok=True)
    for path in [path for path in run_dir.iterdir() if is_leftover(path)]:
        path.unlink()
    if sources := run.sources():
        write_json(run_dir / REWARDS_FILE, sources)
    save_config(run_dir / "config.json", name, run)
    return run_dir


def _check_same_rewards(run_dir: epath.Path, run: Run) -> None:
    """Raise UserError, naming the first that differs, if a run was started with other rewards than it is to go on with.

    A file may have moved, but the source in it, the weight and the order are those of the start.
    """
    path = run_dir / REWARDS_FILE
    if not path.exists():
        return
    try:
        started, given = (
            [(one["reward"], one["weight"], one["sha256"]) for one in rewards]
            for rewards in (json.loads(path.read_text()), run.sources())
        )
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    before, after = ([name for name, _, _ in rewards] for rewards in (started, given))
    changes = [f"its rewards were {', '.join(before)}, and are {', '.join(after)} now"] if before != after else []
    for (name, weight, digest), (_, new_weight, new_digest) in zip(started, given, strict=False):
        if weight != new_weight:
            changes.append(f"the weight of the reward {name} was {weight:g}, and is {new_weight:g} now")
        if digest != new_digest:
            changes.append(f"the source of the reward {name} is not the one that it was started with")
    if changes:
        raise UserError(f"the run in {run_dir} cannot go on: {changes[0]}. Put it back, or start a new run folder")


def _contents(run_dir: epath.Path) -> list[str]:
    """Return the names in a folder, if it exists, without what an interrupted start may have left."""
    paths = run_dir.iterdir() if run_dir.exists() else []
    return sorted(path.name for path in paths if path.name != LOCK_FILE and not is_leftover(path))


def _why_not_new(run_dir: epath.Path, contents: list[str]) -> str:
    """Return why no new run can start in a folder with something in it, and the way out."""
    if "config.json" in contents:
        return f"{run_dir} is not empty: add --resume to continue the run in it, or choose another --run-dir"
    return (
        f"{run_dir} is not empty, but holds no config.json, so there is no run to continue in it either: put the run's "
        "config.json back, or choose another --run-dir"
    )


def _check_same_shapes(saved: models.TransformerConfig, given: models.TransformerConfig) -> None:
    shapes = [
        jax.tree_util.tree_flatten_with_path(
            jax.eval_shape(functools.partial(models.init_params, model), jax.random.key(0))
        )[0]
        for model in (saved, given)
    ]
    for before, after in itertools.zip_longest(*shapes):
        if before is None or after is None or before[0] != after[0] or before[1].shape != after[1].shape:
            path = (before or after)[0]  # pyright: ignore[reportOptionalSubscript]
            raise UserError(
                f"the flags given now change the shape of parameter {jax.tree_util.keystr(path)} "
                f"({'; '.join(differences(saved, given))}): leave them out, or start a new run folder"
            )


def train_in(run_dir: epath.Path, run: Run, problems: Problems, folder: Folder) -> int:
    """Train; process 0 then writes the summary and the curves and prints where they are. Return the exit code."""
    name = next(name for name, run_type in RUNS.items() if type(run) is run_type)
    say(f"run folder: {run_dir}")
    try:
        train_to_the_end(run_dir, run, problems, folder)
    except Stopped as stop:
        others = "" if jax.process_count() == 1 else "    # on every host, as before"
        command = f"{sys.executable} -m experiments.train {name} --run-dir {run_dir} --resume"
        say(f"{stop}: state saved. To go on:\n  {command}{others}")
        return STOPPED
    command = f"  {sys.executable} -m experiments"
    lines = [f"{command}.evaluate {run_dir}", f"{command}.report {run_dir}    # one HTML page"]
    if isinstance(run, FolderRun) and run.model:
        lines.append(f"{command}.export {run_dir} NEW_FOLDER    # the trained model as a Hugging Face folder")
    elif not isinstance(run, FolderRun):  # tasks that need no flags
        lines.append(f"{command}.train {name} --objective gmpo    # the same without router shift")
    say("\n".join(["What to try next:", *lines, f"{command}.train {name} --help"]))
    return 0


def train_to_the_end(run_dir: epath.Path, run: Run, problems: Problems, folder: Folder) -> Params:
    """Train and return the parameters; process 0 writes the summary and the curves, and prints what they say.

    Raises:
      Stopped: after a signal, once the state is saved.
    """
    model = run.architecture()
    init_params = functools.partial(models.init_params, model)
    setup = Setup(models.Transformer(model), init_params, problems, run.learner(), run.trainer, run.load_params)
    params, seconds = train(setup, run_dir, folder.resume, folder.trackers)
    if is_primary():
        curves = draw_curves(run_dir)
        summary = summarize(run_dir, run, len(problems.held_out["test"].problems), seconds)
        write_json(run_dir / "summary.json", summary)
        say(report(summary))
        say(f"  curves:  {curves}\n  summary: {run_dir / 'summary.json'}")
    return params


def summarize(run_dir: epath.Path, run: Run, test_problems: int, seconds: float) -> dict[str, Any]:
    """Return the contents of `summary.json`: solve rates on the test split before and after, with 95 % intervals.

    For a task that names its rewards there are mean rewards, beside the rates or alone.

    Raises:
      UserError: if a row that it needs is lost.
    """
    rows = [row for row in read_metrics(run_dir) if "test_sampled" in row or "test_sampled_reward" in row]
    if not rows or rows[0]["step"] != 0 or rows[-1]["step"] < run.trainer.steps:
        lost = "the last step" if rows and rows[0]["step"] == 0 else "step 0"
        raise UserError(
            f"{run_dir / 'metrics.jsonl'} lacks the evaluation of {lost}, so there is no summary: put the lost row "
            "back and resume the run, whose checkpoints are complete"
        )
    first, last = rows[0], rows[-1]
    skipped = int(sum(row.get("skipped_updates", 0) for row in read_metrics(run_dir)))
    summary: dict[str, Any] = {"objective": run.objective.objective, "seed": run.trainer.seed, "steps": last["step"]}
    summary["test_problems"] = test_problems
    for mode, suffix in (("sampled", ""), ("greedy", "_greedy")):
        for name, row in (("warm_start", first), ("final", last)):
            for kind, metric in (("solve_rate", f"test_{mode}"), ("reward", f"test_{mode}_reward")):
                if metric in row:
                    interval = "interval" if kind == "solve_rate" else "reward_interval"
                    summary[f"{name}_{kind}{suffix}"] = row[metric]
                    summary[f"{name}_{interval}{suffix}"] = [row[f"{metric}_low"], row[f"{metric}_high"]]
        if f"test_{mode}" in last:
            summary[f"improvement_points{suffix}"] = 100 * (last[f"test_{mode}"] - first[f"test_{mode}"])
    return summary | {"skipped_updates": skipped, "wall_seconds": seconds}


def report(summary: dict[str, Any]) -> str:
    """Return the summary in a few lines of text."""
    lines = [f"{summary['objective']}, seed {summary['seed']}, {summary['test_problems']} held-out problems:"]
    for mode, suffix in (("sampled", ""), ("greedy", "_greedy")):
        for kind, interval, words, scale, digits, unit in (
            ("solve_rate", "interval", "", 100, ".1f", " %"),
            ("reward", "reward_interval", ", reward", 1, ".3f", ""),
        ):
            if f"final_{kind}{suffix}" not in summary:
                continue
            values = []
            for name in ("warm_start", "final"):
                low, high = summary[f"{name}_{interval}{suffix}"]
                bounds = f" [{scale * low:{digits}}, {scale * high:{digits}}]" if math.isfinite(low + high) else ""
                values.append(f"{scale * summary[f'{name}_{kind}{suffix}']:{digits}}{unit}{bounds}")
            gain = scale * (summary[f"final_{kind}{suffix}"] - summary[f"warm_start_{kind}{suffix}"])
            points = f"({gain:+{digits}} points)" if scale == 100 else f"({gain:+{digits}})"
            lines.append(f"  {mode + words:8} {values[0]}  ->  {values[1]}  {points}")
    lines.append(f"  {summary['wall_seconds']:.0f} s of training, {summary['skipped_updates']} updates skipped")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
