"""The Countdown data set on disk: round trips, interrupted and concurrent builds."""

import dataclasses
import itertools
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments.tasks.countdown import dataset
from experiments.tasks.countdown.dataset import (
    Countdown,
    CountdownBuilderConfig,
    load_problems,
)
from experiments.tasks.countdown.problems import SPLITS, CountdownConfig, generate_problems

ROOT = Path(__file__).parents[4]
SMALL = CountdownConfig(2, 4, high=30, train=120, validation=10, test=20)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        check=False,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    data_dir = tmp_path_factory.mktemp("built")
    load_problems(SMALL, "train", str(data_dir))
    return data_dir


def version_folder(data_dir: Path) -> Path:
    (folder,) = data_dir.glob("countdown/numbers*/1.0.0")
    return folder


@pytest.mark.parametrize("split", SPLITS)
def test_problems_come_back_as_they_were_generated(built, split):
    problems = load_problems(SMALL, split, str(built))
    assert problems == list(generate_problems(SMALL, split))
    problem = problems[0]
    assert {type(number) for number in problem.numbers} == {int}
    assert (type(problem.numbers), type(problem.target)) == (tuple, int)
    assert type(problem.solution) is str


def test_the_builder_alone_gives_examples_by_random_access(built):
    builder: Any = Countdown(data_dir=built, config=CountdownBuilderConfig(problems=SMALL))
    source = builder.as_data_source("test")
    expected = list(generate_problems(SMALL, "test"))
    assert len(source) == len(expected)
    example = source[7]
    assert tuple(example["numbers"]) == expected[7].numbers
    assert example["target"] == expected[7].target
    assert example["solution"] == expected[7].solution.encode()
    assert builder.info.features.np_dtype == {
        "numbers": np.int32,
        "target": np.int32,
        "solution": np.object_,
    }


def test_the_builder_refuses_a_config_without_problems(tmp_path):
    builder = Countdown(data_dir=tmp_path, config=tfds.core.BuilderConfig(name="other"))
    with pytest.raises(TypeError, match="pass a CountdownBuilderConfig"):
        builder.download_and_prepare(file_format="array_record")


def test_files_are_array_records(built):
    names = {path.name for path in version_folder(built).iterdir()}
    records = {f"countdown-{split}.array_record-00000-of-00001" for split in SPLITS}
    assert names == records | {"dataset_info.json", "features.json"}


def test_problems_are_made_once(built, monkeypatch):
    def only_a_few(config, split):
        yield from itertools.islice(generate_problems(config, split), 10)
        raise AssertionError("the problems are on disk")

    monkeypatch.setattr(dataset, "generate_problems", only_a_few)
    assert len(load_problems(SMALL, "train", str(built))) == 120


@pytest.mark.parametrize(
    "field", [field.name for field in dataclasses.fields(CountdownConfig) if field.name != "judge_after"]
)
def test_every_field_that_makes_problems_is_part_of_the_name_of_their_folder(field):
    changed = dataclasses.replace(SMALL, **{field: getattr(SMALL, field) + 1})
    names = {CountdownBuilderConfig(problems=config).name for config in (SMALL, changed)}
    assert len(names) == 2


def test_two_configs_live_side_by_side(built):
    other = dataclasses.replace(SMALL, seed=1, train=50)
    assert load_problems(other, "train", str(built)) == list(generate_problems(other, "train"))
    assert load_problems(SMALL, "train", str(built)) == list(generate_problems(SMALL, "train"))
    shutil.rmtree(built / "countdown" / CountdownBuilderConfig(problems=other).name)


def test_a_split_of_size_zero_is_empty_and_disturbs_no_other(tmp_path):
    config = dataclasses.replace(SMALL, validation=0)
    assert load_problems(config, "validation", str(tmp_path)) == []
    assert load_problems(config, "test", str(tmp_path)) == list(generate_problems(config, "test"))
    assert load_problems(config, "validation", str(tmp_path)) == []


def test_a_build_prints_nothing_and_leaves_the_global_random_state(tmp_path, capfd):
    random.seed(5)
    state = random.getstate()
    load_problems(SMALL, "train", str(tmp_path))
    assert random.getstate() == state
    assert capfd.readouterr() == ("", "")


def test_default_config_default_folder_and_no_tensorflow(tmp_path):
    code = (
        "import sys\n"
        "from experiments.tasks.countdown.dataset import *\n"
        "problems = load_problems(CountdownConfig(), 'test')\n"
        "assert problems == list(generate_problems(CountdownConfig(), 'test'))\n"
        "assert len(load_problems(CountdownConfig(), 'train')) == CountdownConfig().train\n"
        "print('tensorflow' in sys.modules, 'jax' in sys.modules)\n"
    )
    result = run_python(code, TFDS_DATA_DIR=str(tmp_path))
    assert (result.stdout, result.stderr, result.returncode) == ("False False\n", "", 0)
    assert version_folder(tmp_path).is_dir()


def test_a_build_that_was_killed_does_not_disturb_the_next_one(tmp_path):
    code = (
        "import itertools, os, sys\n"
        "from experiments.tasks.countdown import dataset\n"
        "original = dataset.generate_problems\n"
        "def killed(config, split):\n"
        "    if split == 'train':\n"
        "        yield from original(config, split)\n"
        "    else:\n"
        "        yield from itertools.islice(original(config, split), 5)\n"
        "        os._exit(9)\n"
        "dataset.generate_problems = killed\n"
        f"config = dataset.{SMALL!r}\n"
        "dataset.load_problems(config, 'train', sys.argv[1])\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=False)
    assert result.returncode == 9
    (left_over,) = tmp_path.glob("countdown/numbers*/incomplete.*")
    assert list(left_over.iterdir())
    for split in SPLITS:
        problems = load_problems(SMALL, split, str(tmp_path))
        assert problems == list(generate_problems(SMALL, split))


def test_a_build_that_another_process_overtakes_uses_the_data_of_the_other(tmp_path, monkeypatch):
    original = generate_problems
    calls = []

    def overtaken(config, split):
        calls.append(split)
        if len(calls) == 1:
            other = load_problems(SMALL, "train", str(tmp_path))
            assert other == list(original(SMALL, "train"))
        return original(config, split)

    monkeypatch.setattr(dataset, "generate_problems", overtaken)
    problems = load_problems(SMALL, "train", str(tmp_path))
    assert problems == list(original(SMALL, "train"))
    assert sorted(calls) == sorted([*SPLITS, *SPLITS, "train", "train"])  # two builds; two looks at what was read
    assert [path.name for path in version_folder(tmp_path).parent.iterdir()] == ["1.0.0"]


def test_two_processes_build_at_the_same_time(tmp_path):
    code = (
        "import random, sys\n"
        "from experiments.tasks.countdown.dataset import *\n"
        "random.seed(0)\n"
        f"config = {SMALL!r}\n"
        "for split in SPLITS:\n"
        "    problems = load_problems(config, split, sys.argv[1])\n"
        "    assert problems == list(generate_problems(config, split))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    processes = [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]


def test_processes_with_one_random_seed_write_to_different_folders(tmp_path, monkeypatch):
    folders = []

    def watched(config, split):
        folders.extend(tmp_path.glob("*/countdown/numbers*/incomplete.*"))
        return generate_problems(config, split)

    monkeypatch.setattr(dataset, "generate_problems", watched)
    for name in ("first", "second"):
        random.seed(0)
        load_problems(SMALL, "train", str(tmp_path / name))
    assert len({folder.name for folder in folders}) == 2


def test_a_failed_write_is_not_taken_for_an_overtaken_one(tmp_path, monkeypatch):
    def disk_full(config, split):
        raise OSError("no space left")

    monkeypatch.setattr(dataset, "generate_problems", disk_full)
    with pytest.raises(OSError, match="no space left"):
        load_problems(SMALL, "train", str(tmp_path))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "countdown-train.array_record-00000-of-00001").unlink(),
        lambda folder: os.truncate(folder / "countdown-train.array_record-00000-of-00001", 40_000),
        lambda folder: os.truncate(folder / "countdown-train.array_record-00000-of-00001", 66_000),
        lambda folder: (folder / "countdown-train.array_record-00000-of-00001").write_bytes(bytes(70_000)),
        lambda folder: (folder / "dataset_info.json").unlink(),
        lambda folder: (folder / "dataset_info.json").write_text("garbage"),
        lambda folder: (folder / "dataset_info.json").write_text("{}"),
        lambda folder: (folder / "dataset_info.json").write_bytes(b"\x80\x81"),
        lambda folder: os.truncate(folder / "dataset_info.json", 200),
        lambda folder: ((folder / "dataset_info.json").unlink(), (folder / "dataset_info.json").mkdir()),
    ],
    ids=[
        *("no file", "short file", "cut file", "file of zeros"),
        *("no description", "garbage", "empty description", "no text", "cut description", "folder"),
    ],
)
def test_damaged_data_is_reported_and_made_again_without_its_folder(built, tmp_path, damage):
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    folder = version_folder(tmp_path)
    damage(folder)
    with pytest.raises(ValueError, match="cannot be read") as error:
        load_problems(SMALL, "train", str(tmp_path))
    assert str(folder) in str(error.value)
    shutil.rmtree(folder)
    assert load_problems(SMALL, "train", str(tmp_path)) == list(generate_problems(SMALL, "train"))


@pytest.mark.parametrize("other", [{}, {"seed": 1}, {"numbers_max": 3}])
def test_a_sound_file_in_the_place_of_another_is_noticed(built, tmp_path, other):
    shutil.copytree(built, tmp_path / "here")
    load_problems(dataclasses.replace(SMALL, **other), "train", str(tmp_path / "other"))
    split = "train" if other else "validation"
    theirs = version_folder(tmp_path / "other") / f"countdown-{split}.array_record-00000-of-00001"
    folder = version_folder(tmp_path / "here")
    shutil.copy(theirs, folder / "countdown-test.array_record-00000-of-00001")
    with pytest.raises(ValueError, match=r"are not those of the split 'test'|cannot be read") as error:
        load_problems(SMALL, "test", str(tmp_path / "here"))
    assert "delete that folder" in str(error.value) and str(folder) in str(error.value)
    assert load_problems(SMALL, "train", str(tmp_path / "here")) == list(generate_problems(SMALL, "train"))


def test_a_config_with_too_few_problems_is_reported_and_leaves_no_data(tmp_path):
    config = CountdownConfig(2, 2, high=9, train=1_000, validation=5, test=5)
    with pytest.raises(ValueError, match="set train to at most"):
        load_problems(config, "train", str(tmp_path))
    assert not list(tmp_path.glob("countdown/numbers*/*"))


def test_a_wrong_config_or_split_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="set low to at least 1"):
        load_problems(CountdownConfig(low=0), "train", str(tmp_path))
    with pytest.raises(ValueError, match="choose one of train, validation, test"):
        load_problems(SMALL, "all", str(tmp_path))
    assert not list(tmp_path.iterdir())
