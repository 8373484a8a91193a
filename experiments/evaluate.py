"""`python -m experiments.evaluate RUN`: how many held-out problems a trained model solves, and some of its answers.

This file must never train.
"""

import functools
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import rich.console
import rich.table
import tyro

import models
from experiments.config import Place, load_config
from rspo_jax.checkpoint import CheckpointError
from rspo_jax.metrics import wilson_interval
from rspo_jax.rollout import Judged, prompt_width, solve
from rspo_jax.sampler import SamplerConfig
from rspo_jax.trainer import restore_params


@dataclass(frozen=True)
class Evaluation:
    """Evaluate the newest checkpoint of a run."""

    run_dir: Annotated[Place, tyro.conf.Positional]
    """The folder of a run, or its address in a bucket."""
    split: Literal["train", "validation", "test"] = "test"
    samples: int = 4
    """Sampled responses to each problem, besides the greedy one."""
    temperature: float = 1.0
    show: int = 6
    """Problems to show with their greedy responses."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1 or self.show < 0:
            raise ValueError(f"samples must be at least 1 and show 0 or more, got {self.samples} and {self.show}")
        if not self.temperature > 0:
            raise ValueError(
                f"temperature must be positive, got {self.temperature}; greedy decoding is always evaluated"
            )


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for something that the user can mend."""
    try:
        evaluation = tyro.cli(Evaluation, args=arguments, prog="python -m experiments.evaluate")
        _, run = load_config(evaluation.run_dir / "config.json")
        params, step = restore_params(functools.partial(models.init_params, run.model), run.trainer, evaluation.run_dir)
    except (ValueError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    task = run.build_task()
    problems = task.problems(evaluation.split)
    width = prompt_width(task, problems)

    def answer(temperature: float, seed: int) -> Judged:
        sampler = SamplerConfig(run.trainer.sampler.max_new_tokens, temperature)
        return solve(models.Transformer(run.model), params, task, problems, jax.random.key(seed), sampler, width)

    greedy = answer(0.0, evaluation.seed)
    sampled = [answer(evaluation.temperature, evaluation.seed + number) for number in range(evaluation.samples)]
    solved_by_any = sum(any(judged.correct[row] for judged in sampled) for row in range(len(problems)))
    console = rich.console.Console()
    table = rich.table.Table(title=f"{evaluation.run_dir}, step {step}: {len(problems)} {evaluation.split} problems")
    for column in ("", "solved", "95 % interval", "cut off", "reward"):
        table.add_column(column, justify="left" if column == "" else "right")
    table.add_row("greedy", *_cells(int(greedy.correct.sum()), len(problems)), *_more([greedy]))
    pooled = sum(int(judged.correct.sum()) for judged in sampled)
    name = f"sampled at temperature {evaluation.temperature:g}, mean of {evaluation.samples}"
    table.add_row(name, *_cells(pooled, len(problems) * evaluation.samples), *_more(sampled))
    table.add_row(f"solved by any of {evaluation.samples} samples", *_cells(solved_by_any, len(problems)), "", "")
    console.print(table)
    for row in range(min(evaluation.show, len(problems))):
        verdict = "right" if greedy.correct[row] else "wrong"
        console.print(f"{task.prompt(problems[row])} {greedy.texts[row] or '(nothing)'}   {verdict}", markup=False)
    return 0


def _cells(solved: int, trials: int) -> tuple[str, str]:
    low, high = wilson_interval(solved, trials)
    return f"{100 * solved / trials:.1f} %", f"{100 * low:.1f} – {100 * high:.1f} %"


def _more(judged: list[Judged]) -> tuple[str, str]:
    truncated = sum(float(part.truncated.mean()) for part in judged) / len(judged)
    reward = sum(float(part.rewards.mean()) for part in judged) / len(judged)
    return f"{100 * truncated:.1f} %", f"{reward:.3f}"


if __name__ == "__main__":
    sys.exit(main())
