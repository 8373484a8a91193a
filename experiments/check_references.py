"""Command that tries the judge of mathematics on the references of data sets, without a model.

    python -m experiments.check_references math500.jsonl aime24.jsonl amc23.jsonl minerva_math.jsonl olympiadbench.jsonl

It prints for each file how many references are earned by themselves, the shortcut of equal text switched off, and how
many answers are wrong that have one number raised by one. What falls out of line is listed with its reason, and the
exit code is 1 if there is no reason for some of it.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from experiments.errors import complain
from experiments.tasks.mathematics.problems import SETS, Layout, layout_of, read_problems
from experiments.tasks.mathematics.references import Finding, try_references


@dataclass(frozen=True)
class Check:
    """Try the judge of mathematics on the references of data sets."""

    files: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Files of any format that docs/data.md lists. The name of a file begins with the name of its set, or --set names
    it, or else its fields are named."""
    set: str | None = None
    """The set whose layout all files have, where their names do not begin with it."""
    prompt_field: str | None = None
    """The field of the question in files of another layout: "prompt" or "messages" where only the other is given."""
    answer_field: str | None = None
    """The field of the answer, or of a list of answers, in such files: "answer" where only the other is given."""
    split: str = "test"
    """The part that is read of a folder with several."""


def main(arguments: list[str] | None = None) -> int:
    """Print the findings for each file and return the exit code: 1 if a wrong answer is paid without a reason."""
    check = tyro.cli(Check, args=arguments, prog="python -m experiments.check_references")
    try:
        findings = {
            path: try_references(read_problems(path, _layout_of(path, check), check.split)) for path in check.files
        }
    except ValueError as error:
        return complain(error)
    for path, finding in findings.items():
        print(_described(path, finding))
    return int(any(not reason for finding in findings.values() for _, _, reason in finding.paid))


def _layout_of(path: str, check: Check) -> Layout:
    names_fields = check.prompt_field is not None or check.answer_field is not None
    name = check.set or next((name for name in SETS if Path(path).name.startswith(name)), None)
    if not names_fields and name not in SETS:
        raise ValueError(
            f"{path} is of no set that is known; name its layout with --set, one of {', '.join(SETS)}, or its fields "
            "with --prompt-field and --answer-field"
        )
    return layout_of(name or "", check.prompt_field, check.answer_field)


def _described(path: str, finding: Finding) -> str:
    earned = finding.count - len(finding.unreadable)
    lines = [
        f"{path}: {earned} of {finding.count} references are earned by themselves as they are read; "
        f"{finding.raised - len(finding.paid)} of {finding.raised} answers with one number raised by one are wrong"
    ]
    lines += [f"  cannot be read, so that only its own text earns: {answer}" for answer in finding.unreadable]
    lines += [
        f"  right although a number is raised: {reference} <- {answer} ({reason or 'NO REASON KNOWN'})"
        for reference, answer, reason in finding.paid
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
