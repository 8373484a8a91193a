"""Mathematics problems: boxes, the layouts of the sets, damaged files, splits, TensorFlow Datasets, and the config."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from experiments.tasks.mathematics.boxes import last_box
from experiments.tasks.mathematics.builders import BUILDERS
from experiments.tasks.mathematics.config import DEFAULT_PROMPT, MathConfig
from experiments.tasks.mathematics.dataset import load_problems
from experiments.tasks.mathematics.problems import SETS, Problem, draw, read_problems

ROOT = Path(__file__).parents[4]


def write(path: Path, *records: object) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def gsm8k(first: int, last: int) -> list[dict[str, str]]:
    return [
        {"question": f"What is {i} and one?", "answer": f"It is {i} + 1 = <<{i}+1={i + 1}>>{i + 1}.\n#### {i + 1}"}
        for i in range(first, last)
    ]


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}} done }", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a \\}", r"a \\"),
        (r"\boxed{\left\{x\right.}", r"\left\{x\right."),
        (r"\boxed {7}", "7"),
        (r"\fbox{8}", "8"),
        (r"\framebox{9}", "9"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{}", ""),
        ("\\boxed{1\n2}", "1\n2"),
        (r"\boxed{1} and then \boxed{2", None),
        (r"\boxed{2\}", None),
        (r"\boxed 5", None),
        (r"boxed{5}", None),
        ("", None),
    ],
)
def test_the_last_box_of_a_text(text, box):
    assert last_box(text) == box


RECORDS = {
    "gsm8k": (
        {"question": "Q", "answer": "He sells 40*30=$<<40*30=1200>>1200.\n#### 1,200"},
        Problem("Q", "1200", "He sells 40*30=$1200.\n\nThe final answer is $\\boxed{1200}$."),
    ),
    "math500": (
        {"problem": "Q", "solution": r"So \boxed{\frac12}.", "answer": r"\frac12", "level": 2},
        Problem("Q", r"\frac12", r"So \boxed{\frac12}."),
    ),
    "aime24": (
        {"problem": "Q", "solution": r"So \framebox{73}.", "answer": "073"},
        Problem("Q", "073", r"So \framebox{73}."),
    ),
    "amc23": ({"problem": "Q", "answer": 27.0}, Problem("Q", "27", r"The final answer is $\boxed{27}$.")),
    "minerva": (
        {"problem": "Q", "solution": r"First \boxed{1}, then $\boxed{4.5e-33} \mathrm{~m}$."},
        Problem("Q", r"4.5 \times 10^{-33}", r"First \boxed{1}, then $\boxed{4.5e-33} \mathrm{~m}$."),
    ),
    "olympiadbench": (
        {"question": "Q", "solution": ["It is so.", "Or so."], "final_answer": ["$f(n)=n$, $g(n)=1$."]},
        Problem("Q", "f(n)=n, g(n)=1", "It is so.\n\nThe final answer is $\\boxed{f(n)=n, g(n)=1}$."),
    ),
}


@pytest.mark.parametrize("name", SETS)
def test_a_record_of_each_set(tmp_path, name):
    record, problem = RECORDS[name]
    assert read_problems(write(tmp_path / "a.jsonl", record, record), name) == [problem, problem]


@pytest.mark.parametrize(
    ("box", "answer"),
    [
        ("-1./3", "-1/3"),
        ("4.5e33", r"4.5 \times 10^{33}"),
        ("3e+8", r"3 \times 10^{+8}"),
        ("np.arcsin(10/13)", r"\arcsin(10/13)"),
        (r"e^{2 x}", "e^{2 x}"),
        (r"x_{0} \cos t+$ $v \sin t", r"x_{0} \cos t+ v \sin t"),
        ("2e", "2e"),
    ],
)
def test_numbers_of_minerva_become_latex(tmp_path, box, answer):
    path = write(tmp_path / "a.jsonl", {"problem": "Q", "solution": f"\\boxed{{{box}}}"})
    assert read_problems(path, "minerva")[0].answer == answer


@pytest.mark.parametrize(("value", "answer"), [(27.0, "27"), (-1.0, "-1"), (0.5, "0.5"), (12, "12"), ("x", "x")])
def test_numbers_of_amc(tmp_path, value, answer):
    path = write(tmp_path / "a.jsonl", {"problem": "Q", "answer": value})
    assert read_problems(path, "amc23")[0].answer == answer


@pytest.mark.parametrize(
    ("name", "record", "reason"),
    [
        ("gsm8k", {"question": "Q"}, "the field 'answer' is missing"),
        ("gsm8k", {"question": "Q", "answer": "seven"}, "no #### before the answer"),
        ("gsm8k", {"question": "Q", "answer": "#### "}, "the answer in the field 'answer' is empty"),
        ("gsm8k", {"question": " ", "answer": "#### 1"}, "the field 'question' holds no text"),
        ("gsm8k", {"question": 5, "answer": "#### 1"}, "the field 'question' holds no text"),
        ("gsm8k", ["question", "answer"], "it holds list, not an object"),
        ("math500", {"problem": "Q", "answer": "1"}, "the field 'solution' is missing"),
        ("math500", {"problem": "Q", "answer": None, "solution": "S"}, "None, neither text nor a number"),
        ("math500", {"problem": "Q", "answer": True, "solution": "S"}, "True, neither text nor a number"),
        ("amc23", {"problem": "Q", "answer": float("nan")}, "the answer is nan"),
        ("minerva", {"problem": "Q", "solution": "It is 5."}, "no \\\\boxed{} answer"),
        ("olympiadbench", {"question": "Q", "solution": ["S"], "final_answer": []}, "not a list of one text"),
        ("olympiadbench", {"question": "Q", "solution": [], "final_answer": ["1"]}, "'solution' holds no text"),
    ],
)
def test_a_wrong_record_is_reported_with_file_and_line(tmp_path, name, record, reason):
    path = write(tmp_path / "a.jsonl", RECORDS[name][0], record)
    with pytest.raises(ValueError, match=f"a.jsonl, line 2, is not a problem of {name}: .*{reason}"):
        read_problems(path, name)


@pytest.mark.parametrize("damage", [b'{"question": "Q", "ans', b"\xff\xfe", b"# a comment"])
def test_a_damaged_line_is_reported_with_file_and_line(tmp_path, damage):
    (tmp_path / "a.jsonl").write_bytes(json.dumps(RECORDS["gsm8k"][0]).encode() + b"\n\n" + damage)
    with pytest.raises(ValueError, match=r"a\.jsonl, line 3, is not a problem of gsm8k"):
        read_problems(str(tmp_path / "a.jsonl"), "gsm8k")


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_reported(tmp_path, content):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.jsonl holds no problem of gsm8k"):
        read_problems(str(tmp_path / "a.jsonl"), "gsm8k")


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file .*a\.jsonl"):
        read_problems(str(tmp_path / "a.jsonl"), "gsm8k")


def test_line_ends_and_marks_of_other_systems_are_read(tmp_path):
    lines = [json.dumps(record, ensure_ascii=False) for record in [{"question": "Ä\u2028", "answer": "#### 1"}] * 2]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert [problem.question for problem in read_problems(str(tmp_path / "a.jsonl"), "gsm8k")] == ["Ä\u2028"] * 2


def test_a_draw_depends_on_the_seed_and_the_questions_alone():
    problems = [Problem(f"Q{index}", "1", "S") for index in range(100)]
    rest, drawn = draw(problems, 30, seed=0)
    assert len(drawn) == 30
    assert sorted(rest + drawn) == sorted(problems)
    assert [rest, drawn] == [sorted(part, key=problems.index) for part in (rest, drawn)]
    assert set(draw(problems[::-1], 30, seed=0)[1]) == set(drawn)
    assert set(draw(problems, 20, seed=0)[1]) < set(drawn)
    assert set(draw(problems, 30, seed=1)[1]) != set(drawn)
    assert draw(problems, 0, seed=0) == (problems, [])
    with pytest.raises(ValueError, match="validation is 100, but there are 100 problems"):
        draw(problems, 100, seed=0)


def test_the_splits_of_files(tmp_path):
    train, test = write(tmp_path / "train", *gsm8k(0, 50)), write(tmp_path / "test", *gsm8k(50, 60))
    config = MathConfig(train_path=train, test_path=test, validation=7)
    splits = {split: load_problems(config, split) for split in ("train", "validation", "test")}
    assert {split: len(problems) for split, problems in splits.items()} == {"train": 43, "validation": 7, "test": 10}
    assert len({problem.question for problems in splits.values() for problem in problems}) == 60
    few = dataclasses.replace(config, train=5, test=3)
    assert load_problems(few, "train") == splits["train"][:5]
    assert load_problems(few, "validation") == splits["validation"]
    assert load_problems(few, "test") == splits["test"][:3]
    assert load_problems(dataclasses.replace(config, validation=0), "validation") == []
    assert len(load_problems(dataclasses.replace(config, validation=0), "train")) == 50


def test_a_split_that_is_not_there_is_refused(tmp_path):
    path = write(tmp_path / "a", RECORDS["math500"][0])
    config = MathConfig("math500", test_path=path)
    with pytest.raises(ValueError, match="math500 has no train problems: give a file of them as train_path"):
        load_problems(config, "train")
    with pytest.raises(ValueError, match="math500 has no train problems"):
        load_problems(config, "validation")
    with pytest.raises(ValueError, match="choose one of train, validation, test"):
        load_problems(config, "all")
    with pytest.raises(ValueError, match="test is 2, but there are only 1 such problems"):
        load_problems(dataclasses.replace(config, test=2), "test")


def test_reading_a_file_loads_neither_tfds_nor_jax(tmp_path):
    path = write(tmp_path / "a", *gsm8k(0, 3))
    code = (
        "import sys\n"
        "from experiments.tasks.mathematics.dataset import MathConfig, load_problems\n"
        "assert len(load_problems(MathConfig(test_path=sys.argv[1]), 'test')) == 3\n"
        "print({'tensorflow_datasets', 'tensorflow', 'jax', 'sympy'} & set(sys.modules))\n"
    )
    result = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.stdout, result.stderr, result.returncode) == ("set()\n", "", 0)


@pytest.fixture
def downloads(tmp_path, monkeypatch) -> Path:
    """A stand-in for the network: the files that the builder of TensorFlow Datasets downloads."""
    folder = tmp_path / "downloads"
    folder.mkdir()
    ranges = {"train": (0, 40), "test": (40, 50), "train_socratic": (0, 40), "test_socratic": (40, 50)}
    files = {name: write(folder / name, *gsm8k(*ends)) for name, ends in ranges.items()}
    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", lambda self, urls: files)
    tfds.disable_progress_bar()
    return folder


def test_tensorflow_datasets_gives_the_same_splits_as_the_files(downloads, tmp_path, monkeypatch):
    data = str(tmp_path / "data")
    files = MathConfig(train_path=str(downloads / "train"), test_path=str(downloads / "test"), validation=9)
    builder = MathConfig(data_dir=data, validation=9)
    for split in ("train", "validation", "test"):
        assert sorted(load_problems(builder, split)) == sorted(load_problems(files, split))

    def must_not_be_called(self, urls):
        raise AssertionError("the problems are on disk")

    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", must_not_be_called)
    assert len(load_problems(builder, "test")) == 10
    mixed = dataclasses.replace(builder, train_path=files.train_path)
    assert load_problems(mixed, "validation") == load_problems(files, "validation")
    assert "tensorflow" not in sys.modules


def test_a_set_that_cannot_be_downloaded_or_read_is_reported(downloads, tmp_path, monkeypatch):
    data = tmp_path / "data"
    config = MathConfig(data_dir=str(data), validation=9)
    load_problems(config, "test")
    (records,) = data.glob("gsm8k/*/gsm8k-test.array_record*")
    records.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"cannot provide the test problems of gsm8k .*: give their file as test_path"):
        load_problems(config, "test")

    def no_network(self, urls):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", no_network)
    elsewhere = dataclasses.replace(config, data_dir=str(tmp_path / "elsewhere"))
    with pytest.raises(ValueError, match=r"cannot provide the train problems of gsm8k \(no network\)"):
        load_problems(elsewhere, "train")


def test_a_download_that_another_process_overtakes_is_read(downloads, tmp_path, monkeypatch):
    config = MathConfig(data_dir=str(tmp_path / "data"), validation=9)
    prepare = BUILDERS["gsm8k"].download_and_prepare

    def overtaken(self, **options):
        prepare(BUILDERS["gsm8k"](data_dir=config.data_dir), **options)
        raise OSError("the folder is not empty")

    monkeypatch.setattr(BUILDERS["gsm8k"], "download_and_prepare", overtaken)
    assert len(load_problems(config, "test")) == 10


def test_sets_with_a_builder_have_one():
    assert {layout.builder for layout in SETS.values() if layout.builder} == set(BUILDERS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "math"}, "there is no set 'math'; choose one of gsm8k, math500"),
        ({"name": "math500"}, "TensorFlow Datasets has no math500: give its file"),
        ({"prompt": "Answer in \\boxed{}."}, "0 times"),
        ({"prompt": "{problem} {problem} \\boxed{}"}, "2 times"),
        ({"prompt": "{problem}"}, "neither prompt nor system asks for"),
        ({"validation": -1}, "validation is -1"),
        ({"train": 0}, "train is 0"),
        ({"test": 0}, "test is 0"),
        ({"workers": 0}, "workers is 0"),
        ({"time_limit": 0.0}, "time_limit is 0.0"),
        ({"time_limit": float("inf")}, "time_limit is inf"),
        ({"time_limit": 5.0, "wall_limit": 4.0}, "wall_limit"),
        ({"memory_limit": -1.0}, "memory_limit is -1.0"),
        ({"wrong_reward": 1.0}, "has to earn more than a wrong one"),
        ({"unanswered_reward": 0.5}, "a wrong one no less than none"),
        ({"correct_reward": float("nan")}, "rewards are nan"),
    ],
)
def test_a_wrong_config_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        MathConfig(**change).check()


def test_right_configs():
    MathConfig().check()
    MathConfig(prompt="{problem}", system="Put the answer into \\boxed{}.").check()
    MathConfig(prompt="{problem}", must_be_boxed=False).check()
    MathConfig("aime24", test_path="a").check()
    MathConfig(correct_reward=1.0, wrong_reward=-0.5, unanswered_reward=-1.0).check()
    assert MathConfig(workers=3).worker_count() == 3
    assert 1 <= MathConfig().worker_count() <= 16
    assert DEFAULT_PROMPT.count("{problem}") == 1
