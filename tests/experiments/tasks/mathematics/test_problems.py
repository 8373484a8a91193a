"""Mathematics problems: boxes, the layouts of the sets, damaged files, splits, TensorFlow Datasets, and the config."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow_datasets as tfds
from support.data_sets import save_to_disk

from experiments.tasks import splits
from experiments.tasks.chats import Message
from experiments.tasks.mathematics.boxes import last_box
from experiments.tasks.mathematics.builders import BUILDERS
from experiments.tasks.mathematics.config import DEFAULT_PROMPT, MathConfig
from experiments.tasks.mathematics.dataset import load_problems
from experiments.tasks.mathematics.problems import SETS, Problem, read_problems
from experiments.tasks.splits import SPLITS

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
    assert read_problems(write(tmp_path / "a.jsonl", record, record), SETS[name]) == [problem, problem]


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
    assert read_problems(path, SETS["minerva"])[0].answer == answer


@pytest.mark.parametrize(("value", "answer"), [(27.0, "27"), (-1.0, "-1"), (0.5, "0.5"), (12, "12"), ("x", "x")])
def test_numbers_of_amc(tmp_path, value, answer):
    path = write(tmp_path / "a.jsonl", {"problem": "Q", "answer": value})
    assert read_problems(path, SETS["amc23"])[0].answer == answer


@pytest.mark.parametrize(
    ("name", "record", "reason"),
    [
        ("gsm8k", {"question": "Q"}, "'answer' is missing or null; the record has 'question'"),
        ("gsm8k", {"question": "Q", "answer": "seven"}, "no #### before the answer"),
        ("gsm8k", {"question": "Q", "answer": "#### "}, "the answer in the field 'answer' is empty"),
        ("gsm8k", {"question": " ", "answer": "#### 1"}, "'question' is empty"),
        ("gsm8k", {"question": 5, "answer": "#### 1"}, "'question' is 5: it must be a text, or a list"),
        ("gsm8k", ["question", "answer"], "it is a list, not an object"),
        (
            "math500",
            {"problem": "Q", "answer": "1"},
            "'solution' is missing or null; the record has 'problem', 'answer'",
        ),
        ("math500", {"problem": "Q", "answer": None, "solution": "S"}, "'answer' is missing or null"),
        ("math500", {"problem": "Q", "answer": True, "solution": "S"}, "True, neither text nor a number"),
        ("amc23", {"problem": "Q", "answer": float("nan")}, "'answer' is NaN, which JSON does not have"),
        ("minerva", {"problem": "Q", "solution": "It is 5."}, "no \\\\boxed{} answer"),
        ("olympiadbench", {"question": "Q", "solution": ["S"], "final_answer": []}, "not a list of one text"),
        ("olympiadbench", {"question": "Q", "solution": [], "final_answer": ["1"]}, "'solution' holds no text"),
    ],
)
def test_a_wrong_record_is_reported_with_file_and_line(tmp_path, name, record, reason):
    path = write(tmp_path / "a.jsonl", RECORDS[name][0], record)
    with pytest.raises(ValueError, match=f"a.jsonl, line 2: .*{reason}"):
        read_problems(path, SETS[name])


@pytest.mark.parametrize("damage", [b'{"question": "Q", "ans', b"\xff\xfe", b"# a comment"])
def test_a_damaged_line_is_reported_with_file_and_line(tmp_path, damage):
    (tmp_path / "a.jsonl").write_bytes(json.dumps(RECORDS["gsm8k"][0]).encode() + b"\n\n" + damage)
    with pytest.raises(ValueError, match=r"a\.jsonl, line 3: "):
        read_problems(str(tmp_path / "a.jsonl"), SETS["gsm8k"])


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_reported(tmp_path, content):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.jsonl holds no record: it is empty"):
        read_problems(str(tmp_path / "a.jsonl"), SETS["gsm8k"])


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file or folder .*a\.jsonl"):
        read_problems(str(tmp_path / "a.jsonl"), SETS["gsm8k"])


def test_line_ends_and_marks_of_other_systems_are_read(tmp_path):
    lines = [json.dumps(record, ensure_ascii=False) for record in [{"question": "Ä\u2028", "answer": "#### 1"}] * 2]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert [problem.question for problem in read_problems(str(tmp_path / "a.jsonl"), SETS["gsm8k"])] == ["Ä\u2028"] * 2


def test_a_draw_depends_on_the_seed_and_the_questions_alone():
    problems = [Problem(f"Q{index}", "1", "S") for index in range(100)]

    def draw(problems, count, seed):
        return splits.draw(problems, lambda problem: problem.question, count, seed)

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
        ({"name": "math500"}, "TensorFlow Datasets has no math500: give their file"),
        ({"prompt": "Answer in \\boxed{}."}, "0 times"),
        ({"prompt": "{problem} {problem} \\boxed{}"}, "2 times"),
        ({"prompt": "{problem}"}, "neither prompt nor system asks for"),
        ({"prompt_field": "prompt"}, "TensorFlow Datasets has no problems of your own"),
        ({"validation_path": "a", "validation_share": 0.1}, "validation_path and validation_share are both given"),
        ({"test_path": "a", "test_share": 0.1}, "test_path and test_share are both given"),
        ({"validation_share": 0.5, "test_share": 0.5}, "leaves nothing to train on"),
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


def test_files_of_any_layout_are_read_by_the_fields_that_are_named(tmp_path):
    rows = [
        {"prompt": "Q1 \\boxed{}", "answer": 27.0, "label": ["1", 0.5, " 0.5 "]},
        {"prompt": [{"role": "user", "content": "Q2 \\boxed{}"}], "answer": "x", "label": "2"},
    ]
    chat = (Message("user", "Q2 \\boxed{}"),)
    plain = {"prompt": "Q1 \\boxed{}", "answer": 27.0}
    path = save_to_disk(tmp_path / "saved", {"test": [plain, plain], "train": [plain]})
    read = {
        ("prompt", None, write(tmp_path / "a.jsonl", *rows)): [
            Problem("Q1 \\boxed{}", "27", "The final answer is $\\boxed{27}$."),
            Problem(chat, "x", "The final answer is $\\boxed{x}$."),
        ],
        (None, "label", write(tmp_path / "b.json", *rows)): [
            Problem("Q1 \\boxed{}", "1", "The final answer is $\\boxed{1}$.", ("0.5",)),
            Problem(chat, "2", "The final answer is $\\boxed{2}$."),
        ],
        ("prompt", "answer", path): [Problem("Q1 \\boxed{}", "27", "The final answer is $\\boxed{27}$.")] * 2,
    }
    for (prompt_field, answer_field, file), problems in read.items():
        for asks in (DEFAULT_PROMPT, "{problem}"):
            config = MathConfig("", prompt_field, answer_field, test_path=file, prompt=asks)
            assert load_problems(config, "test") == problems


def test_the_reply_of_a_conversation_is_its_worked_solution(tmp_path):
    ask, reply = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "It is so: \\boxed{4}."}
    path = write(tmp_path / "a.jsonl", {"messages": [ask, reply], "answer": "4"}, {"messages": [ask], "answer": "5"})
    solutions = [
        problem.solution for problem in load_problems(MathConfig(answer_field="answer", test_path=path), "test")
    ]
    assert solutions == ["It is so: \\boxed{4}.", "The final answer is $\\boxed{5}$."]


def test_lists_of_answers_in_the_known_layouts(tmp_path):
    math500 = {**RECORDS["math500"][0], "answer": ["1", "2"]}
    assert read_problems(write(tmp_path / "a", math500), SETS["math500"])[0].references == ("1", "2")
    listed = {**RECORDS["olympiadbench"][0], "final_answer": ["$1$", "$2$"]}
    with pytest.raises(ValueError, match="not a list of one text"):
        read_problems(write(tmp_path / "b", listed), SETS["olympiadbench"])


def test_all_wrong_records_of_a_file_of_any_layout_are_named(tmp_path):
    wrong = [
        {"prompt": "Q", "answer": []},
        {"prompt": "Q", "answer": ["1", None]},
        {"prompt": "Q", "answer": ["1", " "]},
        {"prompt": "Q", "answer": [["1"]]},
        {"prompt": "Q", "answer": {"value": 1}},
        {"prompt": [{"role": "robot", "content": "Q"}], "answer": "1"},
        {"prompt": "Q", "label": "1"},
        {"prompt": "Q", "answer": "1"},
    ]
    path = write(tmp_path / "a.jsonl", *wrong)
    with pytest.raises(ValueError) as caught:
        load_problems(MathConfig(prompt_field="prompt", test_path=path), "test")
    *lines, hint = str(caught.value).splitlines()
    assert [line.removeprefix(f"{path}, ") for line in lines] == [
        "line 1: the list of answers in 'answer' is empty",
        "line 2: the answer is None, neither text nor a number",
        "line 3: the answer in the field 'answer' is empty",
        "line 4: the answer is ['1'], neither text nor a number",
        "line 5: the answer is {'value': 1}, neither text nor a number",
        "line 6: prompt[0] has the role 'robot'; the roles are system, user, assistant",
        "line 7: 'answer' is missing or null; the record has 'prompt', 'label'",
    ]
    assert "task.prompt_field and task.answer_field" in hint
    silent = MathConfig(prompt_field="prompt", test_path=write(tmp_path / "b", *wrong[-1:] * 3), prompt="{problem}")
    with pytest.raises(ValueError, match=r"3 of 3 problems do not either, the first of them .*b, line 1; ask"):
        load_problems(silent, "test")
    system = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    told = MathConfig(
        prompt_field="prompt", test_path=write(tmp_path / "c", {"prompt": system, "answer": 1}), system="S"
    )
    with pytest.raises(ValueError, match=r"c, line 1: 'prompt' brings a system message of its own"):
        load_problems(told, "test")


def test_one_file_is_split_by_shares_and_a_folder_by_its_parts(tmp_path):
    path = write(tmp_path / "all", *gsm8k(0, 300), *gsm8k(0, 300))
    config = MathConfig(train_path=path, validation_share=0.1, test_share=0.2)
    parts = {split: load_problems(config, split) for split in SPLITS}
    asked = {split: {problem.question for problem in problems} for split, problems in parts.items()}
    assert sum(map(len, asked.values())) == len(set.union(*asked.values())) == 300
    assert all(2 * len(asked[split]) == len(parts[split]) for split in SPLITS)
    assert 10 < len(asked["validation"]) < 55 and 30 < len(asked["test"]) < 95
    fewer = write(tmp_path / "fewer", *gsm8k(299, 300), *gsm8k(0, 100))
    for split in SPLITS:
        some = {problem.question for problem in load_problems(dataclasses.replace(config, train_path=fewer), split)}
        assert some == {question for question in asked[split] if int(question.split()[2]) < 100 or "299" in question}
    by_number = dataclasses.replace(config, validation_share=0.0, validation=7)
    assert len(load_problems(by_number, "validation")) == 7
    assert load_problems(by_number, "test") == parts["test"]
    folder = save_to_disk(tmp_path / "parts", {"train": gsm8k(0, 9), "validation": gsm8k(9, 13), "test": gsm8k(13, 15)})
    named = MathConfig(train_path=folder, validation_path=folder, test_path=folder)
    assert [len(load_problems(named, split)) for split in SPLITS] == [9, 4, 2]
    with pytest.raises(ValueError, match="validation is left without problems by its share of so few"):
        load_problems(dataclasses.replace(config, train_path=write(tmp_path / "two", *gsm8k(0, 2))), "validation")
