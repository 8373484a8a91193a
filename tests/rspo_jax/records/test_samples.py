"""Sample responses in `samples.jsonl`: what a row holds, several rows a step, and what is refused."""

import dataclasses
import json
import math

import pytest

from rspo_jax.records import MetricsLog
from rspo_jax.records.rows import DamagedRows
from rspo_jax.records.samples import Sample, read_samples, sample_of

SAMPLE = Sample(
    prompt="1+1=",
    response="2 ✓",
    reward=1.0,
    correct=True,
    truncated=False,
    advantage=0.70710678,
    token_ids=[4, 17, 18, 1],
    tokens=["2", "", " ✓", ""],
    old_log_probs=[-0.5, -1.25, -0.123456789, -2.0],
    log_probs=[-0.25, math.nan, -0.5, -1.0],
    gamma=[1.0, 0.987654321, 0.5, 0.25],
    rewards={"correct": 1.0, "brief": math.nan},
)


def other(**changes):
    return dataclasses.replace(SAMPLE, **changes)


def write(run_dir, steps, resume_after=None, digests=None):
    with MetricsLog(run_dir, resume_after, digests) as log:
        for step in steps:
            samples = [SAMPLE, other(reward=float(step))] if step % 2 else []
            log.write("rl", step, {"reward": 0.5}, samples=samples)
        return log.flush()


def test_a_row_is_what_json_can_hold_and_comes_back_as_it_was(tmp_path):
    write(tmp_path, [1])
    first, _ = map(json.loads, (tmp_path / "samples.jsonl").read_text().splitlines())
    assert (first["phase"], first["step"], first["response"]) == ("rl", 1, "2 ✓")
    assert first["gamma"] == [1.0, 0.987654, 0.5, 0.25]
    assert first["log_probs"] == [-0.25, None, -0.5, -1.0]
    assert first["rewards"] == {"correct": 1.0, "brief": None}
    (found, _) = read_samples(tmp_path)[1]
    assert found.row() == SAMPLE.row() and found.environment is None


def test_a_run_that_goes_on_earlier_keeps_the_samples_up_to_there(tmp_path):
    write(tmp_path / "straight", [1, 2, 3, 4, 5])
    assert [len(samples) for samples in read_samples(tmp_path / "straight").values()] == [2, 2, 2]
    digests = write(tmp_path / "resumed", [1, 2, 3])
    write(tmp_path / "resumed", [4, 5], resume_after=("rl", 3), digests=digests)
    write(tmp_path / "resumed", [4, 5], resume_after=("rl", 3), digests=digests)
    straight, resumed = ((tmp_path / name / "samples.jsonl").read_bytes() for name in ("straight", "resumed"))
    assert resumed == straight


def test_lost_samples_are_told_at_a_resumption(tmp_path, caplog):
    digests = write(tmp_path, [1, 2, 3])
    lines = (tmp_path / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "samples.jsonl").write_bytes(b"".join(lines[1:]))
    write(tmp_path, [4], resume_after=("rl", 3), digests=digests)
    assert "samples.jsonl is not as it was" in caplog.text and "rows were removed or changed" in caplog.text


def test_no_samples_no_file(tmp_path):
    write(tmp_path, [2])
    assert not (tmp_path / "samples.jsonl").exists() and read_samples(tmp_path) == {}


def test_wrong_samples_are_refused():
    wrong = {
        "not text": ({"prompt": 3}, TypeError, "prompt"),
        "a number for a flag": ({"correct": 1}, TypeError, "correct"),
        "ids that are none": ({"token_ids": [4, 17, 18, True]}, TypeError, "token_ids"),
        "numbers in words": ({"gamma": ["1", 1.0, 1.0, 1.0]}, TypeError, "gamma"),
        "a list too short": ({"gamma": [1.0]}, ValueError, "differ in length"),
        "tokens of another text": ({"response": "2"}, ValueError, "do not join"),
        "rewards without names": ({"rewards": [1.0]}, TypeError, "rewards"),
    }
    for name, (changes, error, match) in wrong.items():
        with pytest.raises(error, match=match):
            other(**changes)
            pytest.fail(name)
    with pytest.raises(TypeError, match="prompt"):
        sample_of({"response": ""})
    # A later version may write more.
    assert sample_of(dataclasses.asdict(SAMPLE) | {"judge": "new"}) == SAMPLE


def test_a_damaged_line_is_named_and_a_cut_one_left_out(tmp_path):
    write(tmp_path, [1])
    path = tmp_path / "samples.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert len(read_samples(tmp_path)[1]) == 1
    path.write_bytes(whole.replace(b'"token_ids": [4, 17', b'"token_ids": [17', 1))
    with pytest.raises(DamagedRows, match="line 1 is not a row of samples"):
        read_samples(tmp_path)
    path.write_bytes(whole.replace(b'"step": 1', b'"step": 3', 1))
    with pytest.raises(DamagedRows, match="comes after that of rl step 3"):
        read_samples(tmp_path)
