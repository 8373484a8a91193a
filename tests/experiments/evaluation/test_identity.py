"""Identity by content: planted replacements of files are noticed, unchanged ones are read once, and whatever a verdict
rests on counts."""

import hashlib
import json
import os
import shutil

import pytest
from etils import epath

from experiments.evaluation import identity
from experiments.evaluation.identity import (
    FileDigests,
    digest_of,
    judge_identity,
    list_files,
    prompts_digest,
    stamps_of,
)
from experiments.tasks.countdown import CountdownConfig, CountdownReward
from experiments.tasks.countdown.task import CountdownTask
from experiments.tasks.mathematics.config import MathConfig
from experiments.tasks.mathematics.problems import Problem
from experiments.tasks.mathematics.task import MathTask


class Place:
    """A folder of weights, reached through a link, whose digest is taken again and again by one cache."""

    def __init__(self, root):
        self.root, self.cache, self.read = root, epath.Path(root / "cache" / "digests.json"), 0
        (root / "real" / "shards").mkdir(parents=True)
        (root / "real" / "one").write_bytes(b"weights 1")
        (root / "real" / "shards" / "two").write_bytes(b"weights 2")
        (root / "link").symlink_to("real")

    def digest(self):
        files = list_files(epath.Path(self.root / "link"))
        return FileDigests(self.cache).of(files, stamps_of(files))


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "_SETTLED_NS", -(10**18))  # files of this moment count as old
    place, file_digest = Place(tmp_path), hashlib.file_digest

    def counted(*arguments):
        place.read += 1
        return file_digest(*arguments)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    return place


def test_the_digest_is_of_names_and_contents(place):
    contents = {"one": b"weights 1", "shards/two": b"weights 2"}
    expected = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    assert place.digest() == digest_of(expected)
    assert place.digest() == digest_of(expected)
    assert place.read == 2  # each file once


def in_place(root):
    before = os.stat(root / "real" / "one")
    (root / "real" / "one").write_bytes(b"weights X")
    os.utime(root / "real" / "one", ns=(before.st_atime_ns, before.st_mtime_ns))


def renamed(root):
    (root / "new").write_bytes(b"weights X")
    shutil.copystat(root / "real" / "one", root / "new")
    os.replace(root / "new", root / "real" / "one")


def hard_link(root):
    (root / "other").write_bytes(b"weights X")
    shutil.copystat(root / "real" / "one", root / "other")
    (root / "real" / "one").unlink()
    os.link(root / "other", root / "real" / "one")


def link_of_the_folder(root):
    shutil.copytree(root / "real", root / "other")
    (root / "other" / "one").write_bytes(b"weights X")
    shutil.copystat(root / "real" / "one", root / "other" / "one")
    (root / "link").unlink()
    (root / "link").symlink_to("other")


def link_of_a_file(root):
    (root / "other").write_bytes(b"weights X")
    (root / "real" / "one").rename(root / "first")
    (root / "real" / "one").symlink_to(root / "other")


def exchanged(root):
    (root / "real" / "one").rename(root / "first")
    (root / "real" / "shards" / "two").rename(root / "real" / "one")
    (root / "first").rename(root / "real" / "shards" / "two")


def one_more(root):
    (root / "real" / "three").write_bytes(b"")


def one_less(root):
    (root / "real" / "shards" / "two").unlink()


def another_name(root):
    (root / "real" / "one").rename(root / "real" / "first")


PLANTED = [
    in_place, renamed, hard_link, link_of_the_folder, link_of_a_file, exchanged, one_more, one_less, another_name
]  # fmt: skip


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_planted_replacements(place, plant):
    before = place.digest()
    plant(place.root)
    after = place.digest()
    assert after != before
    place.cache.unlink()
    assert place.digest() == after  # the cache has no part in it


def test_the_same_content_elsewhere_is_the_same(place):
    before = place.digest()
    shutil.copytree(place.root / "real", place.root / "copy")
    (place.root / "link").unlink()
    (place.root / "link").symlink_to("copy")
    assert place.digest() == before
    assert place.read == 4  # but it has to be read


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}', '{"a": [[1], "b"]}', "null"])
def test_a_damaged_cache_is_an_empty_one(place, content):
    before = place.digest()
    place.cache.write_text(content)
    assert (place.digest(), place.read) == (before, 4)
    assert (place.digest(), place.read) == (before, 4)


def test_a_cache_that_cannot_be_written_costs_only_time(place):
    (place.root / "cache").write_bytes(b"a file where the folder belongs")
    assert place.digest() == place.digest()
    assert place.read == 4


def test_a_file_of_this_moment_is_read_again(place, monkeypatch):
    """Two changes within the resolution of a file's times would leave the same stamp."""
    monkeypatch.setattr(identity, "_SETTLED_NS", 10**18)
    place.digest()
    place.digest()
    assert place.read == 4


def test_files_that_are_gone_leave_the_cache(place):
    place.digest()
    one_less(place.root)
    one_more(place.root)
    place.digest()
    assert sorted(name.rsplit("/", 1)[1] for name in json.loads(place.cache.read_text())) == ["one", "three"]


@pytest.mark.parametrize("plant", [in_place, link_of_the_folder, link_of_a_file, one_more], ids=lambda p: p.__name__)
def test_a_change_while_the_weights_are_loaded(place, plant):
    folder = epath.Path(place.root / "link")
    seen = stamps_of(list_files(folder))
    plant(place.root)
    with pytest.raises(ValueError, match="was changed while it was being read: start the command again"):
        FileDigests(place.cache).of(list_files(folder), seen)


def test_a_file_that_vanishes_while_the_weights_are_loaded(place):
    files = list_files(epath.Path(place.root / "link"))
    seen = stamps_of(files)
    one_less(place.root)
    with pytest.raises(ValueError, match="two was changed while it was being read"):
        FileDigests(place.cache).of(files, seen)


# --- prompts and judge ---


class Tokenizer:
    stop_ids, pad_id = (0,), 0

    def encode(self, text):
        return [ord(character) % 7 for character in text]

    def chat(self, messages):
        return messages[-1]["content"]


PROBLEMS = [Problem("1+1?", "2", "\\boxed{2}"), Problem("1+2?", "3", "\\boxed{3}")]


def math_task(**changes):
    return MathTask(MathConfig(**({"name": "math500", "test_path": "test.jsonl", "workers": 1} | changes)), Tokenizer())


def test_prompts_count_as_texts_and_as_tokens(monkeypatch):
    task = math_task()
    digests = [
        prompts_digest(task, PROBLEMS),
        prompts_digest(task, PROBLEMS[::-1]),
        prompts_digest(task, PROBLEMS[:1]),
        prompts_digest(math_task(prompt="{problem} \\boxed{}"), PROBLEMS),
    ]
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: [len(text)])
    digests.append(prompts_digest(task, PROBLEMS))
    assert len(set(digests)) == len(digests)


def test_a_corrected_reference_counts():
    task, corrected = math_task(), [PROBLEMS[0], PROBLEMS[1]._replace(answer="4")]
    assert judge_identity(task, PROBLEMS) == judge_identity(math_task(), list(PROBLEMS))
    assert judge_identity(task, PROBLEMS)["references"] != judge_identity(task, corrected)["references"]


@pytest.mark.parametrize(
    ("changes", "counts"),
    [
        ({"must_be_boxed": False}, True),
        ({"correct_reward": 2.0}, True),
        ({"unanswered_reward": -1.0}, True),
        ({"time_limit": 1.0}, True),
        ({"test_path": "elsewhere.jsonl"}, False),
        ({"workers": 2}, False),
        ({"prompt": "{problem} \\boxed{}"}, False),  # it shows in the prompts
    ],
    ids=str,
)
def test_settings_of_the_judge(changes, counts):
    assert (judge_identity(math_task(**changes), PROBLEMS) != judge_identity(math_task(), PROBLEMS)) == counts


def test_the_reward_of_countdown_counts():
    config, problems = CountdownConfig(), [((1, 2), 3, "1+2")]
    one, other = (CountdownTask(config, CountdownReward(format_reward=reward)) for reward in (0.0, 0.1))
    assert judge_identity(one, problems) != judge_identity(other, problems)


def test_the_judge_of_a_package_is_all_of_its_source(tmp_path, monkeypatch):
    package = tmp_path / "judges_for_this_test"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "task.py").write_text("class Task:\n    def judge(self, problems, responses):\n        return []\n")
    (package / "rule.py").write_text("LIMIT = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    from judges_for_this_test.task import Task  # pyright: ignore[reportMissingImports]

    found = [judge_identity(Task(), [])]
    (package / "rule.py").write_text("LIMIT = 2\n")
    found.append(judge_identity(Task(), []))
    monkeypatch.setattr(Task, "judge", lambda self, problems, responses: None)
    found.append(judge_identity(Task(), []))
    monkeypatch.setattr(Task, "answers", lambda self, problems, responses: None, raising=False)
    found.append(judge_identity(Task(), []))
    monkeypatch.setattr(identity.importlib.metadata, "version", lambda name: "another")
    found.append(judge_identity(Task(), []))
    assert len({digest_of(one) for one in found}) == len(found)
