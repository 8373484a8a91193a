"""`python -m experiments.train TASK`: the command that trains, and the folder that a run leaves.

Wires a task, a model and the trainer together; it must never hold training logic of its own.
"""

import dataclasses
import functools
import itertools
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import tyro
from etils import epath

import models
from experiments.config import RUNS, Place, Run, differences, load_config, save_config
from experiments.errors import STOPPED, UserError, complain
from experiments.reporting.training_curves import draw_curves
from rspo_jax.hosts import Agreement, ClusterConfig, ClusterError, is_primary, joined
from rspo_jax.records import as_path, read_metrics, write_json
from rspo_jax.records.checkpoint import CheckpointError
from rspo_jax.records.manifest import CheckpointMismatch
from rspo_jax.rollouts import Problems, check_solutions, load_problems
from rspo_jax.sharding import make_mesh
from rspo_jax.training import check_mesh, state_on_mesh
from rspo_jax.training.trainer import Stopped, train

RUNS_FOLDER = epath.Path("runs")
CACHE_FOLDER = "compiled"


@dataclass(frozen=True)
class Folder:
    """Where the run lives. Nothing of it is kept in the run's configuration: the next start may have it otherwise."""

    run_dir: Place | None = None
    """Gets configuration, metrics, curves and checkpoints: a folder, or an address in a bucket, gs://BUCKET/RUN.
    runs/TASK-DATE-TIME when absent, which is for a single process only."""
    resume: bool = False
    """Go on with the run in run_dir (when absent: the newest of this task), with the configuration that it was
    started with, except for the flags given now."""
    resume_or_start: bool = False
    """Go on with the run in run_dir if there is one, and start one there if not: for scripts that start a run again
    and again until it is done."""
    compilation_cache: Place | None = None
    """Keeps compiled programs for the next start. When absent: JAX_COMPILATION_CACHE_DIR, or else compiled/ beside
    run_dir, but nothing on CPUs, where a program fits the very processor that it was compiled on."""
    cluster: ClusterConfig = ClusterConfig()


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 after training, `STOPPED` after a stop that saved, `MISTAKE` for a mistake."""
    try:
        name, run, folder = parse(sys.argv[1:] if arguments is None else arguments)
        with joined(folder.cluster, way_out="start all processes again with --resume") as membership:
            try:
                keep_compiled_programs(folder)
                problems = check_data(run)
                check_devices(run, problems.width)
                return train_in(agree_on_folder(name, run, folder), run, problems, folder.resume)
            except (UserError, CheckpointError, CheckpointMismatch) as error:
                return membership.give_up(str(error), complain(error))
    except (UserError, ClusterError) as error:
        return complain(error)


def parse(arguments: list[str]) -> tuple[str, Run, Folder]:
    """Flags to a task's name, a checked run, and its folder. With --resume the run's own config gives the defaults.

    Raises:
      UserError: if the configuration is not possible.
      SystemExit: from the parser, for unknown flags and for --help.
    """
    if not arguments:
        arguments = ["--help"]
    try:
        defaults = {name: run_type() for name, run_type in RUNS.items()}
        resumed = _resumed_folder(arguments) if arguments[0] in RUNS else None
        if resumed is not None:
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
        run.check()
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


def _flag_value(arguments: list[str], flag: str) -> str | None:
    for position, argument in enumerate(arguments):
        if argument == flag and position + 1 < len(arguments):
            return arguments[position + 1]
        if argument.startswith(f"{flag}="):
            return argument.removeprefix(f"{flag}=")
    return None


def _resumed_folder(arguments: list[str]) -> epath.Path | None:
    """The folder whose configuration gives the defaults, if one does."""
    name, given = arguments[0], _flag_value(arguments, "--run-dir")
    run_dir = None if given is None else as_path(given)
    if "--resume" in arguments:
        if run_dir is None:
            return _newest_folder(name)
        if not (run_dir / "config.json").exists():
            raise ValueError(f"there is no run to resume in {run_dir}; leave --resume out to start one there")
        return run_dir
    if "--resume-or-start" in arguments:
        if run_dir is None:
            raise ValueError("--resume-or-start needs the folder of the run: name it with --run-dir")
        return run_dir if (run_dir / "config.json").exists() else None
    return None


def _newest_folder(name: str) -> epath.Path:
    candidates = sorted(RUNS_FOLDER.glob(f"{name}-*/config.json"), key=lambda path: path.stat().mtime)
    if not candidates:
        raise ValueError(f"there is no run of {name} in {RUNS_FOLDER}/ to resume; name its folder with --run-dir")
    return candidates[-1].parent


def check_data(run: Run) -> Problems:
    """Load the problems of a run and refuse what is wrong with them, before anything is written or compiled.

    Returns:
      The task with the problems of every split; prompts are encoded here once.

    Raises:
      UserError: if there are too few problems, all of a split are too long, or a worked solution does not fit into a
        response.
    """
    try:
        problems = load_problems(run.build_task(), run.trainer.max_prompt_tokens)
        if run.trainer.warm_start.steps:
            check_solutions(problems.task, problems.splits["train"].problems, run.trainer.sampler.max_new_tokens)
    except ValueError as error:
        raise UserError(str(error)) from error
    return problems


def check_devices(run: Run, prompt_width: int) -> None:
    """Finds what is wrong with a run's mesh on the devices that there are, before anything is written or compiled.

    Raises:
      UserError: if the mesh does not fit the devices, or does not divide what a step works on or a parameter.
    """
    model = run.architecture()
    try:
        mesh = make_mesh(run.trainer.mesh)
        check_mesh(run.trainer, run.learner(), mesh, prompt_width + run.trainer.sampler.max_new_tokens - 1)
        policy, init_params = models.Transformer(model), functools.partial(models.init_params, model)
        state_on_mesh(policy, init_params, run.trainer, mesh, run.learner().regularizers.needs_reference)
    except ValueError as error:
        raise UserError(str(error)) from error


def keep_compiled_programs(folder: Folder) -> None:
    """Switches JAX's persistent compilation cache on; before anything is compiled, or JAX would not look again."""
    place = folder.compilation_cache
    if place is None:
        if os.environ.get("JAX_COMPILATION_CACHE_DIR") or jax.default_backend() == "cpu":
            return
        place = (RUNS_FOLDER if folder.run_dir is None else folder.run_dir.parent) / CACHE_FOLDER
    jax.config.update("jax_compilation_cache_dir", os.fspath(place))


def agree_on_folder(name: str, run: Run, folder: Folder) -> epath.Path:
    """Lets process 0 prepare the run's folder for all; returns its path.

    Raises:
      UserError: in every process, if the folder cannot be used, or one of them does not see it or was started with
        other flags.
    """
    agreement = Agreement("folder")
    if jax.process_count() > 1 and folder.run_dir is None:
        raise UserError(
            "several processes need a folder that all of them see: name it with --run-dir, as gs://BUCKET/RUN"
        )
    place = None if folder.run_dir is None else os.fspath(folder.run_dir)
    _check_same(agreement.gather((name, run, (place, folder.resume))))
    run_dir = as_path(agreement.from_primary(lambda: os.fspath(prepare_folder(name, run, folder))))
    shared = (run_dir / "config.json").exists() and load_config(run_dir / "config.json") == (name, run)
    agreement.settle(
        None
        if shared
        else UserError(f"{run_dir} is not one folder for all hosts: choose a --run-dir as gs://BUCKET/RUN")
    )
    return run_dir


def _check_same(given: dict[int, tuple[str, Run, tuple[str | None, bool]]]) -> None:
    name, run, place = given[0]
    for process, (other_name, other_run, other_place) in given.items():
        if (other_name, other_run, other_place) != (name, run, place):
            changes = differences(run, other_run) if other_name == name else []
            what = changes[0] if changes else f"{name}, {place} -> {other_name}, {other_place}"
            raise UserError(f"process {process} was started otherwise than process 0 ({what}): give all the same flags")


def prepare_folder(name: str, run: Run, folder: Folder) -> epath.Path:
    """Makes the run's folder and writes its `config.json`; says how a resumed run's configuration changed.

    Raises:
      UserError: if a new run would mix with an old one.
    """
    run_dir = folder.run_dir or RUNS_FOLDER / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if folder.resume:
        _, saved = load_config(run_dir / "config.json")
        _check_same_shapes(saved.architecture(), run.architecture())
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


def train_in(run_dir: epath.Path, run: Run, problems: Problems, resume: bool) -> int:
    """Trains; process 0 then writes summary and curves and says where they are. Returns the exit code."""
    name = next(name for name, run_type in RUNS.items() if type(run) is run_type)
    say = print if is_primary() else _say_nothing
    say(f"run folder: {run_dir}")
    model = run.architecture()
    try:
        _, seconds = train(
            models.Transformer(model),
            functools.partial(models.init_params, model),
            problems,
            run.learner(),
            run.trainer,
            run_dir,
            resume,
            run.load_params,
        )
    except Stopped as stop:
        say(f"{stop}: state saved. To go on:\n  {_resume_command(name, run_dir)}")
        return STOPPED
    if is_primary():
        curves = draw_curves(run_dir)
        summary = summarize(run_dir, run, len(problems.splits["test"].problems), seconds)
        write_json(run_dir / "summary.json", summary)
        say(report(summary))
        say(f"  curves:  {curves}\n  summary: {run_dir / 'summary.json'}")
        say(
            "What to try next:\n"
            f"  {sys.executable} -m experiments.evaluate {run_dir}\n"
            f"  {sys.executable} -m experiments.train {name} --objective gmpo    # the same without router shift\n"
            f"  {sys.executable} -m experiments.train {name} --help"
        )
    return 0


def _say_nothing(_: str) -> None:
    pass


def _resume_command(name: str, run_dir: epath.Path) -> str:
    others = "" if jax.process_count() == 1 else "    # on every host, as before"
    return f"{sys.executable} -m experiments.train {name} --run-dir {run_dir} --resume{others}"


def summarize(run_dir: epath.Path, run: Run, test_problems: int, seconds: float) -> dict[str, Any]:
    """What `summary.json` holds: solve rates on the test split before and after, with 95 % intervals."""
    rows = [row for row in read_metrics(run_dir) if "test_sampled" in row]
    first, last = rows[0], rows[-1]
    skipped = int(sum(row.get("skipped_updates", 0) for row in read_metrics(run_dir)))
    summary: dict[str, Any] = {"objective": run.objective.objective, "seed": run.trainer.seed, "steps": last["step"]}
    summary["test_problems"] = test_problems
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
