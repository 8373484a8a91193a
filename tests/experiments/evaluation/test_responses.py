"""The folder of an evaluation: responses survive an interruption, and other contents are refused."""

import dataclasses
import json
import logging

import pytest
from etils import epath

from experiments.evaluation.responses import Response, ResponseFolder

SETTINGS = {"subject": {"run": "runs/mine", "checkpoint": 3}, "seed": 0, "sampler": {"top_k": None}}


def response(problem, sample, **changes):
    text = 'x = "1/2"\n\u2028½'
    return dataclasses.replace(Response(problem, sample, 0.25, True, False, 7, "1/2", text), **changes)


@pytest.fixture
def path(tmp_path):
    return epath.Path(tmp_path) / "deep" / "evaluation"


def kept(path, settings=SETTINGS):
    with ResponseFolder(path, settings) as folder:
        return folder.responses


def test_responses_come_back_as_they_were(path):
    first, second = response(0, 0), response(4, 1, answer=None, reward=0.1, correct=False)
    with ResponseFolder(path, SETTINGS) as folder:
        folder.append([first])
        assert (path / "responses.jsonl").read_text().count("\n") == 1  # there before it is closed
        folder.append([second])
    assert kept(path) == {(0, 0): first, (4, 1): second}
    assert json.loads((path / "settings.json").read_text()) == SETTINGS


def test_a_line_of_an_earlier_version_has_its_marker(path):
    with ResponseFolder(path, SETTINGS) as folder:
        folder.append([response(0, 0)])
    line = json.loads((path / "responses.jsonl").read_text())
    del line["unmarked"]
    (path / "responses.jsonl").write_text(json.dumps(line) + "\n")
    assert kept(path) == {(0, 0): response(0, 0)}


def test_the_same_response_twice(path):
    with ResponseFolder(path, SETTINGS) as folder:
        folder.append([response(0, 0)])
        with pytest.raises(ValueError, match=r"response 0 to problem 0 is in .* already"):
            folder.append([response(0, 0)])


@pytest.mark.parametrize("cut", [1, 20])
def test_a_last_line_that_was_cut_is_dropped_and_can_be_written_again(path, caplog, cut):
    with ResponseFolder(path, SETTINGS) as folder:
        folder.append([response(0, 0), response(1, 0)])
    file = path / "responses.jsonl"
    file.write_bytes(file.read_bytes()[:-cut])
    with caplog.at_level(logging.WARNING), ResponseFolder(path, SETTINGS) as folder:
        assert list(folder.responses) == [(0, 0)]
        folder.append([response(1, 0)])
    assert "dropped the last line" in caplog.text
    assert kept(path) == {(0, 0): response(0, 0), (1, 0): response(1, 0)}


@pytest.mark.parametrize(
    "line",
    [
        "",
        "[]",
        '{"problem": 1}',
        "{",
        json.dumps(dataclasses.asdict(response(2, 0, tokens="7"))),
        json.dumps(dataclasses.asdict(response(2, 0)) | {"more": 1}),
    ],
)
def test_a_damaged_line_is_named_and_nothing_is_changed(path, line):
    with ResponseFolder(path, SETTINGS) as folder:
        folder.append([response(0, 0)])
    file = path / "responses.jsonl"
    damaged = file.read_text() + line + "\n" + json.dumps(dataclasses.asdict(response(1, 0))) + "\n"
    file.write_text(damaged)
    with pytest.raises(ValueError, match=r"responses.jsonl, line 2 is not a response: repair or remove"):
        kept(path)
    assert file.read_text() == damaged


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (SETTINGS | {"seed": 1}, "(seed: 0 -> 1)"),
        (SETTINGS | {"subject": {"run": "runs/mine", "checkpoint": 4}}, "(subject.checkpoint: 3 -> 4)"),
        (SETTINGS | {"sampler": {"top_k": 5}}, "(sampler.top_k: None -> 5)"),
        (SETTINGS | {"split": "test"}, "(split: None -> test)"),
        ({"a": 1, "b": 2, "seed": 0}, "(a: None -> 1; b: None -> 2; sampler.top_k: "),
    ],
    ids=str,
)
def test_other_settings_are_refused(path, settings, words):
    if "a" in settings:
        settings = settings | {"sampler": {"top_k": 1}}
    kept(path)
    with pytest.raises(ValueError) as refusal:
        kept(path, settings)
    assert words in str(refusal.value)
    assert str(refusal.value).endswith("choose another --output")


def test_settings_are_compared_as_json_has_them(path):
    kept(path, {"rules": ("a", "b")})
    assert kept(path, {"rules": ["a", "b"]}) == {}


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_damaged_settings(path, content):
    kept(path)
    (path / "settings.json").write_text(content)
    with pytest.raises(ValueError, match=r"settings.json is damaged: .*; choose another --output"):
        kept(path)


def test_a_folder_of_something_else_is_left_alone(path):
    path.mkdir(parents=True)
    (path / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match="is not empty and holds no evaluation: choose another --output"):
        kept(path)
    assert [entry.name for entry in path.iterdir()] == ["summary.json"]


def test_a_summary(path):
    with ResponseFolder(path, SETTINGS) as folder:
        assert folder.read_summary() == {}
        folder.write_summary({"pass@1": 0.5, "throughput": None})
        assert folder.read_summary() == {"pass@1": 0.5, "throughput": None}
    assert sorted(entry.name for entry in path.iterdir()) == ["responses.jsonl", "settings.json", "summary.json"]
