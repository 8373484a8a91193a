"""`python -m experiments.train TASK`: the command that trains, and the folder that a run leaves.

Wires a task, a model and the trainer together; it must never hold training logic of its own.
"""

import functools
import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

import models
from experiments.config import RUNS, CountdownRun, differences, load_config, save_config
from experiments.plots import draw_curves
from experiments.tasks.countdown import SPLITS
from rspo_jax.checkpoint import CheckpointError, CheckpointMismatch
from rspo_jax.metrics import read_metrics, write_json
from rspo_jax.rollout import check_solutions
from rspo_jax.trainer import Stopped, train

RUNS_FOLDER = Path("runs")


class UserError(Exception):
    """Something that the user can mend, said in one sentence."""


@dataclass(frozen=True)
class Folder:
    """Where the run lives."""

    run_dir: Path | None = None
    """Gets configuration, metrics, curves and checkpoints; runs/TASK-DATE-TIME when absent."""
    resume: bool = False
    """Go on with the run in run_dir (when absent: the newest of this task), with the configuration that it was
    started with, except for the flags given now."""


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 after training or a stop that saved, 2 for something that the user can mend."""
    try:
        name, run, folder = parse(sys.argv[1:] if arguments is None else arguments)
        check_data(run)
        run_dir = prepare_folder(name, run, folder)
        return train_in(run_dir, run, folder.resume)
    except (UserError, CheckpointError, CheckpointMismatch) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parse(arguments: list[str]) -> tuple[str, CountdownRun, Folder]:
    """Flags to a task's name, a checked run, and its folder. With --resume the run's own config gives the defaults.

    Raises:
      UserError: if the configuration is not possible.
      SystemExit: from the parser, for unknown flags and for --help.
    """
    if not arguments:
        arguments = ["--help"]
    try:
        defaults = {name: run_type() for name, run_type in RUNS.items()}
        resumed = None
        if arguments[0] in RUNS and "--resume" in arguments:
            resumed = _resumed_folder(arguments[0], _flag_value(arguments, "--run-dir"))
            name, defaults[arguments[0]] = load_config(resumed / "config.json")
            if name != arguments[0]:
                raise ValueError(f"{resumed} is a run of {name}, not of {arguments[0]}")
        commands = {name: _command(name, default) for name, default in defaults.items()}
        name, run, folder = tyro.extras.subcommand_cli_from_dict(
            commands,
            args=arguments,
            prog="python -m experiments.train",
            description="Train with reinforcement learning.",
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    return name, run, Folder(resumed, True) if resumed is not None else folder


def _command(name: str, default: CountdownRun) -> Callable[..., tuple[str, CountdownRun, Folder]]:
    def command(
        run: Annotated[CountdownRun, tyro.conf.arg(name="")] = default,
        folder: Annotated[Folder, tyro.conf.arg(name="")] = Folder(),
    ) -> tuple[str, CountdownRun, Folder]:
        return name, run, folder

    command.__doc__ = type(default).__doc__
    return command


def _flag_value(arguments: list[str], flag: str) -> Path | None:
    for position, argument in enumerate(arguments):
        if argument == flag and position + 1 < len(arguments):
            return Path(arguments[position + 1])
        if argument.startswith(f"{flag}="):
            return Path(argument.removeprefix(f"{flag}="))
    return None


def _resumed_folder(name: str, run_dir: Path | None) -> Path:
    if run_dir is not None:
        if not (run_dir / "config.json").exists():
            raise ValueError(f"there is no run to resume in {run_dir}; leave --resume out to start one there")
        return run_dir
    candidates = sorted(RUNS_FOLDER.glob(f"{name}-*/config.json"), key=lambda path: path.stat().st_mtime)
    if not candidates:
        raise ValueError(f"there is no run of {name} in {RUNS_FOLDER}/ to resume; name its folder with --run-dir")
    return candidates[-1].parent


def check_data(run: CountdownRun) -> None:
    """Finds what is wrong with a run that only its problems show, before anything is written or compiled.

    Raises:
      UserError: if there are too few problems, or a worked solution does not fit a response.
    """
    task = run.build_task()
    try:
        problems = {split: task.problems(split) for split in SPLITS}
        if run.trainer.warm_start.steps:
            check_solutions(task, problems["train"], run.trainer.sampler.max_new_tokens)
    except ValueError as error:
        raise UserError(str(error)) from error


def prepare_folder(name: str, run: CountdownRun, folder: Folder) -> Path:
    """Makes the run's folder and writes its `config.json`; says how a resumed run's configuration changed.

    Raises:
      UserError: if a new run would mix with an old one.
    """
    run_dir = folder.run_dir or RUNS_FOLDER / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if folder.resume:
        _, saved = load_config(run_dir / "config.json")
        _check_same_shapes(saved.model, run.model)
        changes = differences(saved, run)
        if changes:
            print("changed since the run was started: " + "; ".join(changes))
    elif run_dir.exists() and any(run_dir.iterdir()):
        raise UserError(f"{run_dir} is not empty: add --resume to go on with it, or choose another --run-dir")
    run_dir.mkdir(parents=True, exist_ok=True)
    save_config(run_dir / "config.json", name, run)
    return run_dir


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


def train_in(run_dir: Path, run: CountdownRun, resume: bool) -> int:
    """Trains, then writes summary and curves and says where they are."""
    name = next(name for name, run_type in RUNS.items() if type(run) is run_type)
    command = f"{sys.executable} -m experiments.train {name} --run-dir {run_dir} --resume"
    print(f"run folder: {run_dir}")
    try:
        _, seconds = train(
            models.Transformer(run.model),
            functools.partial(models.init_params, run.model),
            run.build_task(),
            run.learner(),
            run.trainer,
            run_dir,
            resume,
        )
    except Stopped as stop:
        print(f"{stop}: state saved. To go on:\n  {command}")
        return 0
    curves = draw_curves(run_dir)
    summary = summarize(run_dir, run, seconds)
    write_json(run_dir / "summary.json", summary)
    print(report(summary))
    print(f"  curves:  {curves}\n  summary: {run_dir / 'summary.json'}")
    print(
        "What to try next:\n"
        f"  {sys.executable} -m experiments.evaluate {run_dir}\n"
        f"  {sys.executable} -m experiments.train {name} --objective gmpo    # the same without router shift\n"
        f"  {sys.executable} -m experiments.train {name} --help"
    )
    return 0


def summarize(run_dir: Path, run: CountdownRun, seconds: float) -> dict[str, Any]:
    """What `summary.json` holds: solve rates on the test split before and after, with 95 % intervals."""
    rows = [row for row in read_metrics(run_dir) if "test_sampled" in row]
    first, last = rows[0], rows[-1]
    skipped = int(sum(row.get("skipped_updates", 0) for row in read_metrics(run_dir)))
    summary: dict[str, Any] = {"objective": run.objective.objective, "seed": run.trainer.seed, "steps": last["step"]}
    summary["test_problems"] = run.task.test
    for mode, suffix in (("sampled", ""), ("greedy", "_greedy")):
        for name, row in (("warm_start", first), ("final", last)):
            summary[f"{name}_solve_rate{suffix}"] = row[f"test_{mode}"]
            summary[f"{name}_interval{suffix}"] = [row[f"test_{mode}_low"], row[f"test_{mode}_high"]]
        summary[f"improvement_points{suffix}"] = 100 * (last[f"test_{mode}"] - first[f"test_{mode}"])
    return summary | {"skipped_updates": skipped, "wall_seconds": seconds}


def report(summary: dict[str, Any]) -> str:
    """The summary in a few lines."""
    lines = [f"{summary['objective']}, seed {summary['seed']}, {summary['test_problems']} held-out problems:"]
    for mode, suffix in (("sampled", ""), ("greedy", "_greedy")):
        before, after = (
            f"{100 * summary[f'{name}_solve_rate{suffix}']:.1f} % "
            f"[{100 * summary[f'{name}_interval{suffix}'][0]:.1f}, {100 * summary[f'{name}_interval{suffix}'][1]:.1f}]"
            for name in ("warm_start", "final")
        )
        lines.append(f"  {mode:8} {before}  ->  {after}  ({summary[f'improvement_points{suffix}']:+.1f} points)")
    lines.append(f"  {summary['wall_seconds']:.0f} s of training, {summary['skipped_updates']} updates skipped")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
