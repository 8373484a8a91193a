"""`python -m experiments.evaluate RUN`, or `--model FOLDER --task TASK`: how many problems a model solves.

Draws several responses to each problem, and says how often one is right, at least one of k, or the one that most of k
agree on. What was drawn is kept, so that the same command goes on after an interruption. This file must never train.
"""

import contextlib
import dataclasses
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import jax
import tyro

from experiments.config import Place
from experiments.evaluation.draw import Drawing, draw_missing, wanted_pairs
from experiments.evaluation.progress import Progress, describe, make_console, print_plain
from experiments.evaluation.responses import SUMMARY_FILE, Response, ResponseFolder
from experiments.evaluation.subject import Source, Subject, Votes, open_subject
from experiments.evaluation.summary import describe_lengths, make_table, show_response, summarize
from rspo_jax.records.checkpoint import CheckpointError
from rspo_jax.rollouts import SamplerConfig, usable_problems
from rspo_jax.sharding import MeshConfig, make_mesh


@dataclass(frozen=True)
class Evaluation:
    """Evaluate the newest checkpoint of a run, or a model of Hugging Face's format on a task."""

    source: Annotated[Source, tyro.conf.arg(name="")]
    split: Literal["train", "validation", "test"] = "test"
    limit: int | None = None
    """Only the first so many problems."""
    samples: int | None = None
    """Responses to each problem: 4 when absent, or 1 at temperature 0. More may be asked for later."""
    temperature: float = 1.0
    """0 is greedy: always the likeliest token."""
    top_k: int | None = None
    """Draw among the k likeliest tokens only."""
    top_p: float = 1.0
    """Draw among the fewest likeliest tokens that hold this much probability."""
    max_new_tokens: int | None = None
    """The longest response. When absent: as long as in training, or as the model's folder says."""
    seed: int = 0
    batch: int = 512
    """Responses that are drawn at once."""
    output: Place | None = None
    """Gets settings.json, responses.jsonl and summary.json. When absent: a folder in evaluations/ of the run, or for a
    model in evaluations/, named after split and settings. Where it has responses of the same settings, only what is
    missing is drawn."""
    show: int = 6
    """Problems to show with their first responses."""
    mesh: MeshConfig = MeshConfig()
    """How the devices are arranged. Unless it says otherwise, all split rows and parameters (fsdp)."""

    def __post_init__(self) -> None:
        for name in ("samples", "limit", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.show < 0 or self.seed < 0:
            raise ValueError(f"show and seed must be 0 or more, got {self.show} and {self.seed}")
        if self.temperature == 0 and self.drawn_samples > 1:
            raise ValueError(
                f"at temperature 0 all {self.samples} samples would be alike: "
                "leave --samples out, or raise --temperature"
            )
        self.sampler(1)

    @property
    def drawn_samples(self) -> int:
        """Responses to each problem."""
        return self.samples or (1 if self.temperature == 0 else 4)

    def sampler(self, max_new_tokens: int) -> SamplerConfig:
        """How to draw; `max_new_tokens` is for where the flags do not say it."""
        longest = max_new_tokens if self.max_new_tokens is None else self.max_new_tokens
        return SamplerConfig(longest, self.temperature, self.top_k, self.top_p)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for something that the user can mend, or 130 after Ctrl-C."""
    with contextlib.ExitStack() as stack:
        try:
            evaluation = tyro.cli(Evaluation, args=arguments, prog="python -m experiments.evaluate")
            stack.enter_context(jax.set_mesh(make_mesh(evaluation.mesh)))
            subject = open_subject(evaluation.source, evaluation.mesh)
            problems = _usable_problems(subject, evaluation.split)
            folder = stack.enter_context(_open_folder(evaluation, subject, problems))
        except (ValueError, OSError, CheckpointError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        try:
            evaluate(evaluation, subject, problems[: evaluation.limit], folder)
        except KeyboardInterrupt:
            print(f"stopped: {len(folder.responses)} responses are in {folder.path}; the same command goes on")
            return 130
    return 0


def _usable_problems(subject: Subject, split: str) -> Sequence[Any]:
    """The problems of a split, without those whose prompts are too long; says how many these are."""
    usable = usable_problems(subject.task, subject.task.problems(split), subject.max_prompt_tokens)
    if usable.dropped:
        print(
            f"{usable.dropped} problems are left out: their prompts have more than {subject.max_prompt_tokens} tokens"
        )
    return usable.problems


def _open_folder(evaluation: Evaluation, subject: Subject, problems: Sequence[Any]) -> ResponseFolder:
    """The folder that the responses go to.

    Raises:
      ValueError: if there are no problems, or the folder holds anything else.
    """
    if not problems:
        raise ValueError(f"there are no {evaluation.split} problems")
    prompts = "\0".join(subject.task.prompt(problem) for problem in problems)
    settings = {
        "subject": subject.identity,
        "split": evaluation.split,
        "prompts": hashlib.sha256(prompts.encode()).hexdigest(),
        "sampler": dataclasses.asdict(evaluation.sampler(subject.max_new_tokens)),
        "seed": evaluation.seed,
        "votes": isinstance(subject.task, Votes),
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return ResponseFolder(evaluation.output or subject.home / f"{evaluation.split}-{digest}", settings)


def evaluate(evaluation: Evaluation, subject: Subject, problems: Sequence[Any], folder: ResponseFolder) -> None:
    """Draws what is missing in the folder, writes its summary, and shows it."""
    samples, console = evaluation.drawn_samples, make_console()
    wanted = wanted_pairs(len(problems), samples)
    present = [folder.responses[pair] for pair in wanted if pair in folder.responses]
    with Progress(len(wanted), present, console) as progress:

        def keep(responses: list[Response]) -> None:
            folder.append(responses)
            progress.update(responses)

        sampler = evaluation.sampler(subject.max_new_tokens)
        drawing = Drawing(sampler, samples, evaluation.batch, evaluation.seed)
        draw_missing(subject, problems, drawing, folder.responses, keep)
    throughput = folder.read_summary().get("throughput")
    if progress.throughput is not None:
        throughput = progress.throughput._asdict()
    found = summarize(folder.responses, len(problems), samples, isinstance(subject.task, Votes))
    about = {"title": subject.title, "settings": folder.settings}
    folder.write_summary(about | found | {"throughput": throughput})
    how = f"{samples} samples at temperature {evaluation.temperature:g}" if evaluation.temperature else "greedy"
    print_plain(console, f"{subject.title}: {len(problems)} {evaluation.split} problems, {how}")
    console.print(make_table(found))
    print_plain(console, describe_lengths(found["lengths"]))
    print_plain(console, describe(len(wanted) - len(present), progress.throughput))
    print_plain(console, f"summary: {folder.path / SUMMARY_FILE}")
    for row in range(min(evaluation.show, len(problems))):
        print_plain(console, show_response(subject.task.prompt(problems[row]), folder.responses[row, 0]))


if __name__ == "__main__":
    sys.exit(main())
