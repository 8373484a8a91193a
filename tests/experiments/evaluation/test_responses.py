"""The folder of an evaluation: responses survive an interruption, and other contents are refused."""

import dataclasses
import json
import logging

import pytest
from etils import epath

from experiments.evaluation.responses import Response, ResponseFolder, describe_others

OLD_WEIGHTS, NEW_WEIGHTS = "0123456789abcdef" * 4, "fedcba9876543210" * 4
SETTINGS = {
    "seed": 0,
    "sampler": {"top_k": None},
    "contents": {"weights": OLD_WEIGHTS, "model": {"rope_theta": 1e4}},
    "judge": {"references": "a", "settings": {"boxed": True}},
}
OF_AN_EARLIER_VERSION = {
    "subject": {"run": "runs/mine", "checkpoint": 3},
    "prompts": "a",
    "votes": False,
} | {name: SETTINGS[name] for name in ("seed", "sampler")}


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
        json.dumps(dataclasses.asdict(response(-1, 0))),
        json.dumps(dataclasses.asdict(response(2, True))),
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
        (SETTINGS | {"sampler": {"top_k": 5}}, "(sampler.top_k: None -> 5)"),
        (SETTINGS | {"split": "test"}, "(split: None -> test)"),
        (
            SETTINGS | {"a": 1, "b": 2, "sampler": {"top_k": 1}},
            "(a: None -> 1; b: None -> 2; sampler.top_k: None -> ",
        ),
        (SETTINGS | {"a": 1, "b": 2, "c": 3, "seed": 4}, "(a: None -> 1; b: None -> 2; c: None -> 3; …)"),
    ],
    ids=["seed", "sampler", "split", "three", "four"],
)
def test_other_flags_are_refused(path, settings, words):
    kept(path)
    with pytest.raises(ValueError) as refusal:
        kept(path, settings)
    assert words in str(refusal.value)
    assert str(refusal.value).endswith("choose another --output")


def test_settings_are_compared_as_json_has_them(path):
    kept(path, SETTINGS | {"rules": ("a", "b"), "contents": {"layers": (1, 2)}})
    with ResponseFolder(path, SETTINGS | {"rules": ["a", "b"], "contents": {"layers": [1, 2]}}) as folder:
        assert folder.changes_of_judge == []
    assert sorted(entry.name for entry in path.iterdir()) == ["responses.jsonl", "settings.json"]


def files_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        (
            SETTINGS | {"contents": {"weights": NEW_WEIGHTS}},
            "with other contents (contents.model.rope_theta: None",
        ),
        (
            SETTINGS | {"contents": SETTINGS["contents"] | {"weights": NEW_WEIGHTS}},
            "drawn with other contents (contents.weights: fedcba98… -> 01234567…)",
        ),
        (OF_AN_EARLIER_VERSION, "of an earlier version, which did not record the weights' contents"),
        (SETTINGS | {"contents": None}, "of an earlier version"),
    ],
    ids=["model", "weights", "earlier version", "null"],
)
def test_responses_of_other_contents_are_moved_aside_whole(path, stored, words):
    path.mkdir(parents=True)
    line = json.dumps(dataclasses.asdict(response(0, 0))) + "\n"
    for name, text in (("settings.json", json.dumps(stored)), ("responses.jsonl", line), ("summary.json", "{}")):
        (path / name).write_text(text)
    before, said = files_of(path), []
    with ResponseFolder(path, SETTINGS, said.append) as folder:
        assert (folder.responses, folder.throughput) == ({}, None)
        folder.append([response(0, 0, text="new")])
    (sentence,) = said
    assert words in sentence
    assert sentence.endswith(f"moved to {path}/earlier-1, and responses are drawn again")
    assert files_of(path / "earlier-1") == before
    assert kept(path) == {(0, 0): response(0, 0, text="new")}
    # A second replacement takes the next free name; a move that a kill cut short is completed under its own.
    (path / "earlier-2").mkdir()
    with ResponseFolder(path, SETTINGS | {"contents": {"weights": "c"}}, said.append) as folder:
        assert folder.responses == {}
    assert files_of(path / "earlier-1") == before
    assert sorted(files_of(path / "earlier-2")) == ["responses.jsonl", "settings.json"]


def test_a_kill_right_after_a_move_is_no_dead_end(path):
    (path / "earlier-1").mkdir(parents=True)
    assert kept(path) == {}


@pytest.mark.parametrize(
    "judge",
    [{"references": "b", "settings": {"boxed": True}}, {"references": "a", "settings": {"boxed": False}}, {}],
    ids=["references", "settings", "nothing"],
)
def test_verdicts_of_another_judge_are_replaced_and_texts_stay(path, judge):
    with ResponseFolder(path, SETTINGS) as folder:
        folder.append([response(0, 0), response(1, 0)])
        folder.write_summary({"throughput": {"tokens_per_second": 2.0}})
    with ResponseFolder(path, SETTINGS | {"judge": judge}) as folder:
        assert folder.changes_of_judge
        assert folder.throughput == {"tokens_per_second": 2.0}
        with pytest.raises(ValueError, match="other responses than were judged again"):
            folder.replace_verdicts([response(1, 0)])
        folder.replace_verdicts([response(0, 0, correct=False, reward=0.0), response(1, 0)])
        assert not (path / "summary.json").exists()  # its figures are those of the old verdicts
        folder.append([response(2, 0)])
    with ResponseFolder(path, SETTINGS | {"judge": judge}) as folder:
        assert folder.changes_of_judge == []
        assert list(folder.responses.values()) == [
            response(0, 0, correct=False, reward=0.0),
            response(1, 0),
            response(2, 0),
        ]


@pytest.mark.parametrize("moment", [1, 2, 3])
def test_verdicts_that_were_replaced_in_part_never_count_as_new(path, monkeypatch, moment):
    """A kill at each write: whatever was written by then, the next start of either judge judges again."""
    with ResponseFolder(path, SETTINGS) as folder:
        folder.append([response(0, 0)])
    other, writes = SETTINGS | {"judge": {}}, []

    def write(place, content):
        writes.append(place)
        if len(writes) == moment:
            raise KeyboardInterrupt
        epath.Path(place).write_text(content if isinstance(content, str) else content.decode())

    with ResponseFolder(path, other) as folder, monkeypatch.context() as patch:
        patch.setattr("experiments.evaluation.responses.replace_file", write)
        patch.setattr(
            "experiments.evaluation.responses.write_json", lambda place, value: write(place, json.dumps(value))
        )
        with pytest.raises(KeyboardInterrupt):
            folder.replace_verdicts([response(0, 0, correct=False)])
    for settings in (SETTINGS, other):
        with ResponseFolder(path, settings) as folder:
            old_verdicts_of_the_old_judge = settings is SETTINGS and moment == 1
            assert bool(folder.changes_of_judge) != old_verdicts_of_the_old_judge


def test_other_evaluations_of_the_same_flags_are_told(path):
    for name, settings in (
        ("other", SETTINGS | {"contents": {"weights": NEW_WEIGHTS}}),
        ("seed", SETTINGS | {"seed": 1}),
        ("version", OF_AN_EARLIER_VERSION),
    ):
        (path.parent / name).mkdir(parents=True)
        (path.parent / name / "settings.json").write_text(json.dumps(settings))
    (path.parent / "settings.json").write_text("{")
    sentences = describe_others(path, SETTINGS)
    assert [sentence.split(" ")[3].split("/")[-1] for sentence in sentences] == ["other", "version"]
    assert all(sentence.endswith("it stays as it is, and responses are drawn again") for sentence in sentences)
    path.mkdir()
    assert describe_others(path, SETTINGS) == []


@pytest.mark.parametrize("content", ["", "[]", "{", "null"])
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
        (path / "summary.json").write_text("{")
        assert folder.read_summary() == {}
    assert sorted(entry.name for entry in path.iterdir()) == ["responses.jsonl", "settings.json", "summary.json"]
