"""The pages do what they say: links lead somewhere, commands have the flags that they show, programs run."""

import importlib
import re

import jax
import pytest
import tyro
from support.pages import ROOT, Page, read_pages

from experiments import train
from experiments.config import RUNS

PAGES = read_pages()
WITH_PROGRAMS = [name for name, page in PAGES.items() if page.programs() and name not in ("docs/code_rewards.md",)]
"""Pages whose programs run one after the other in one namespace; those of code_rewards.md have a test of their own,
`tests/experiments/tasks/code/test_task.py`."""
TARGETS = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


class Parsed(Exception):
    """A command has read its flags."""


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_files_and_headings(name):
    lost = []
    for target in PAGES[name].links():
        path, _, anchor = target.partition("#")
        file = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        other = PAGES.get(file.relative_to(ROOT).as_posix()) if file.is_relative_to(ROOT) else None
        if not file.exists() or (anchor and (other is None or anchor not in other.anchors())):
            lost.append(target)
    assert lost == []


@pytest.fixture
def refusal(monkeypatch, capsys):
    """A function that returns what a command of this project says against its arguments; None if it takes them."""

    def stopping(parse):
        def parse_and_stop(*arguments, **options):
            parse(*arguments, **options)
            raise Parsed

        return parse_and_stop

    monkeypatch.setattr(tyro, "cli", stopping(tyro.cli))
    monkeypatch.setattr(tyro.extras, "subcommand_cli_from_dict", stopping(tyro.extras.subcommand_cli_from_dict))
    monkeypatch.setattr(train, "_resumed_folder", lambda arguments: None)

    def refuse(module, arguments):
        if module == "experiments.launch.jobset":
            module = "experiments.train"
        if module == "experiments.notebooks":
            module = "experiments.notebooks.__main__"
        arguments = [argument.replace("gs://", "") for argument in arguments]  # buckets need the extra gcs
        try:
            code = importlib.import_module(module).main(arguments)
        except Parsed:
            return None
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        return None if code == 0 else said.err or said.out

    return refuse


def calls_of(page: Page):
    """Yield module and arguments of each call of a command of this project on a page."""
    for words in page.commands():
        if "-m" in words and words[words.index("-m") + 1].startswith("experiments."):
            at = words.index("-m") + 1
            yield words[at], words[at + 1 :]
        elif "experiments/launch/" in " ".join(words):
            scripts = [word for word in words if word.startswith("experiments/launch/")]
            assert all((ROOT / script).exists() for script in scripts), words
            tasks = [number for number, word in enumerate(words) if word in RUNS]
            if tasks:
                yield "experiments.train", words[tasks[0] :]


@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if list(calls_of(page))])
def test_commands_have_the_flags_that_a_page_shows(name, refusal):
    calls = {(module, tuple(arguments)) for module, arguments in calls_of(PAGES[name])}
    # A call in the prose may name a command alone, or a task by a placeholder.
    shown = [call for call in sorted(calls) if call[1] and not call[1][0].isupper()]
    found = {call: refusal(call[0], list(call[1])) for call in shown}
    assert {" ".join((module, *arguments)): said for (module, arguments), said in found.items() if said} == {}


@pytest.mark.parametrize("name", PAGES)
def test_pages_name_targets_of_make_and_extras_that_there_are(name):
    made = {word for words in PAGES[name].commands() if words[0] == "make" for word in words[1:]}
    assert {word for word in made if "=" not in word} <= TARGETS
    extras = {extra for names in re.findall(r"rspo-jax\[([\w,-]+)\]", PAGES[name].text) for extra in names.split(",")}
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(f"\n{extra} = [" in pyproject for extra in extras)


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_PROGRAMS)
def test_programs_of_a_page_run_in_order(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for number, (program, expected) in enumerate(PAGES[name].programs()):
        with jax.numpy_dtype_promotion("standard"):  # as readers have it
            exec(compile(program, f"{name}, program {number}", "exec"), namespace)
        printed = capsys.readouterr().out.strip()
        assert expected is None or printed == expected
