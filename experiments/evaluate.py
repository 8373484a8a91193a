"""`python -m experiments.evaluate RUN`, or `--model FOLDER --task TASK`: how many problems a model solves.

Several responses are drawn to each problem. The command reports how often one of them is right, how often at least one
of k is, and how often the answer that most of k agree on is. Responses are kept, so that the same command continues
after an interruption.
"""

import contextlib
import dataclasses
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import jax
import tyro

from experiments.errors import INTERRUPTED, complain
from experiments.evaluation.draw import Drawing, draw_missing, judge_again, wanted_pairs
from experiments.evaluation.identity import digest_of, judge_identity, prompts_digest
from experiments.evaluation.progress import EvaluationProgress, describe_throughput, make_console, print_plain
from experiments.evaluation.responses import SUMMARY_FILE, Response, ResponseFolder, describe_others, shorten
from experiments.evaluation.subject import Source, Subject, Votes, open_subject
from experiments.evaluation.summary import (
    describe_lengths,
    make_kinds_table,
    make_table,
    show_response,
    summarize_kinds,
    summarize_responses,
)
from experiments.run_config import Place
from rspo_jax.records.checkpoint import CheckpointError
from rspo_jax.rollouts import SamplerConfig, limits_of, usable_problems
from rspo_jax.sharding import MeshConfig, make_mesh
from rspo_jax.types import ConversationTask, KindsTask


@dataclass(frozen=True)
class EvaluateOptions:
    """Evaluate the newest checkpoint of a run, or a model of Hugging Face's format on a task."""

    source: Annotated[Source, tyro.conf.arg(name="")]
    split: Literal["train", "validation", "test"] = "test"
    limit: int | None = None
    """Number of problems to use, the first ones of the split; all of them by default."""
    samples: int | None = None
    """Number of responses to each problem; 4 by default, or 1 at temperature 0. It can be raised later."""
    temperature: float = 1.0
    """Temperature of the sampler; 0 is greedy: always the likeliest token."""
    top_k: int | None = None
    """Draw only among the k likeliest tokens."""
    top_p: float = 1.0
    """Draw only among the likeliest tokens, as few as together have this probability."""
    max_new_tokens: int | None = None
    """Longest response in tokens; as in training by default, or as the model's folder says."""
    seed: int = 0
    batch: int = 512
    """Number of responses that are drawn at once."""
    output: Place | None = None
    """The folder for settings.json, responses.jsonl and summary.json. By default a folder in evaluations/ of the run,
    or in evaluations/ for a model, named after split and settings. If it has responses of the same settings, weights
    and prompts, only missing ones are drawn, and the others are judged again if references or judge have changed."""
    show: int = 6
    """Number of problems to show with their first responses."""
    mesh: MeshConfig = MeshConfig()
    """Arrangement of the devices. By default all of them share rows and parameters (fsdp)."""

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
        """The number of responses to each problem."""
        return self.samples or (1 if self.temperature == 0 else 4)

    def sampler(self, max_new_tokens: int) -> SamplerConfig:
        """Return the settings of the sampler; `max_new_tokens` applies unless the flags set a longest response."""
        longest = max_new_tokens if self.max_new_tokens is None else self.max_new_tokens
        return SamplerConfig(longest, self.temperature, self.top_k, self.top_p)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code: 0, `MISTAKE`, or `INTERRUPTED` after Ctrl-C."""
    with contextlib.ExitStack() as stack:
        try:
            options = tyro.cli(EvaluateOptions, args=arguments, prog="python -m experiments.evaluate")
            stack.enter_context(jax.set_mesh(make_mesh(options.mesh)))
            subject = open_subject(options.source, options.mesh)
            usable = usable_problems(subject.task, subject.task.problems(options.split), subject.max_prompt_tokens)
            if usable.dropped:
                longest = subject.max_prompt_tokens
                print(f"{usable.dropped} problems are left out: their prompts have more than {longest} tokens")
            folder = stack.enter_context(_open_folder(options, subject, usable.problems))
            _renew_verdicts(subject, usable.problems, folder)
        except (ValueError, OSError, CheckpointError) as error:
            return complain(error)
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # set while the command was imported
            signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            evaluate(options, subject, usable.problems[: options.limit], folder)
        except KeyboardInterrupt:
            print(f"stopped: {len(folder.responses)} responses are in {folder.path}; the same command continues")
            return INTERRUPTED
    return 0


def _open_folder(options: EvaluateOptions, subject: Subject, problems: Sequence[Any]) -> ResponseFolder:
    """Open the folder that the responses go to.

    Raises:
      ValueError: if there are no problems, or the folder holds anything else.
    """
    if not problems:
        raise ValueError(f"there are no {options.split} problems")
    settings = {
        "split": options.split,
        "sampler": dataclasses.asdict(options.sampler(subject.max_new_tokens)),
        "seed": options.seed,
        "contents": subject.contents | {"prompts": prompts_digest(subject.task, problems)},
    }
    judge = judge_identity(subject.task, problems) | {"votes": isinstance(subject.task, Votes)}
    limits = limits_of(subject.task, options.sampler(subject.max_new_tokens), subject.conversation)
    if isinstance(subject.task, ConversationTask):  # its environment takes part in what is said
        settings["contents"] |= {"environment": judge | limits._asdict()}
    path = options.output or subject.home / f"{options.split}-{digest_of(settings)[:8]}"
    if options.output is None:
        for sentence in describe_others(path, settings):
            print(sentence)
    return ResponseFolder(path, settings | {"judge": judge})


def _renew_verdicts(subject: Subject, problems: Sequence[Any], folder: ResponseFolder) -> None:
    """Judge the responses in the folder again if references, tests or judge are not those that judged them.

    Raises:
      ValueError: if the judge's verdicts are no rewards.
    """
    before = list(folder.responses.values())
    if not folder.changes_of_judge:
        return
    changes = shorten(folder.changes_of_judge)
    print(f"{len(before)} responses are judged again, because references or judge have changed ({changes})")
    after = judge_again(subject.task, problems, before)
    changed = sum(old != new for old, new in zip(before, after, strict=True))
    right_before, right = (sum(bool(response.correct) for response in responses) for responses in (before, after))
    folder.replace_verdicts(after)
    print(f"{changed} verdicts have changed: {right_before} responses were right before, {right} are now")


def evaluate(options: EvaluateOptions, subject: Subject, problems: Sequence[Any], folder: ResponseFolder) -> None:
    """Draw the responses that are missing in the folder, write its summary, and show it."""
    samples, console = options.drawn_samples, make_console()
    wanted = wanted_pairs(len(problems), samples)
    present = [folder.responses[pair] for pair in wanted if pair in folder.responses]
    with EvaluationProgress(len(wanted), present, console) as progress:

        def keep(responses: list[Response]) -> None:
            folder.append(responses)
            progress.update(responses)

        drawing = Drawing(options.sampler(subject.max_new_tokens), samples, options.batch, options.seed)
        draw_missing(subject, problems, drawing, folder.responses, keep)
    throughput = folder.throughput
    if progress.throughput is not None:
        throughput = progress.throughput._asdict()
    found = summarize_responses(folder.responses, len(problems), samples, isinstance(subject.task, Votes))
    if isinstance(subject.task, KindsTask):
        kinds = [subject.task.kind(problem) for problem in problems]
        found["kinds"] = summarize_kinds(folder.responses, kinds, samples)
    about = {"title": subject.title, "settings": folder.settings}
    folder.write_summary(about | found | {"throughput": throughput})
    how = f"{samples} samples at temperature {options.temperature:g}" if options.temperature else "greedy"
    print_plain(console, f"{subject.title}: {len(problems)} {options.split} problems, {how}")
    console.print(make_table(found))
    if "kinds" in found:
        console.print(make_kinds_table(found["kinds"]))
    print_plain(console, describe_lengths(found["lengths"]))
    print_plain(console, describe_throughput(len(wanted) - len(present), progress.throughput))
    print_plain(console, f"summary: {folder.path / SUMMARY_FILE}")
    for row in range(min(options.show, len(problems))):
        print_plain(console, show_response(subject.task.prompt(problems[row]), folder.responses[row, 0]))


if __name__ == "__main__":
    sys.exit(main())
