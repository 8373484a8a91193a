"""Trackers, with stand-ins for the packages: what they are told, how a resumed run goes on, and that none stops it."""

import importlib.util
import json
import sys
import types

import pytest

from rspo_jax.records import MetricsLog
from rspo_jax.records.samples import Sample
from rspo_jax.records.trackers import SAMPLE_COLUMNS, TRACKERS, check_trackers

SAMPLE = Sample(
    prompt="1+1=",
    response="2",
    reward=1.0,
    correct=True,
    truncated=False,
    advantage=0.5,
    token_ids=[4, 1],
    tokens=["2", ""],
    old_log_probs=[-0.5, -0.5],
    log_probs=[-0.25, -0.25],
    gamma=[0.75, 0.25],
    rewards={"correct": 1.0, "brief": None},
)
ROW = ["1+1=", "2", 1.0, "correct 1, brief –", True, 0.5, 2, 0.5, 0.25]
CONFIG = {"task_name": "countdown", "objective": {"objective": "rspo"}, "trainer": {"steps": 4}}


class Package(types.ModuleType):
    """Stands in for wandb and for trackio, and records every call."""

    def __init__(self, name):
        super().__init__(name)
        self.calls, self.fails = [], set()

    def Settings(self, **settings):
        return settings

    def Table(self, columns, data):
        return ("table", tuple(columns), data)

    def _record(self, name, *values):
        self.calls.append((name, *values))
        if name in self.fails:
            raise RuntimeError(f"no {name} today")

    def init(self, **settings):
        self._record("init", settings)
        run = types.SimpleNamespace(
            id=settings.get("id") or "id1",
            name=settings["name"],
            define_metric=lambda name, **_: None,
            log=lambda values, step=None: self._record("log", values, step),
            finish=lambda exit_code=None: self._record("finish", exit_code),
        )
        return run

    def named(self, name):
        return [values for kind, *values in self.calls if kind == name]


@pytest.fixture(params=TRACKERS)
def package(request, monkeypatch):
    stand_in = Package(request.param)
    monkeypatch.setitem(sys.modules, request.param, stand_in)
    monkeypatch.setenv("WANDB_MODE", "offline")
    return stand_in


def write(package, run_dir, steps, resume_after=None, phase="rl"):
    with MetricsLog(run_dir, resume_after, trackers=[package.__name__]) as log:
        for step in steps:
            log.write(phase, step, {"reward": 0.5 * step, "broken": float("nan")}, samples=[SAMPLE] * (step % 2))


def told(package):
    """The steps and numbers that the tracker was shown, without tables."""
    shown = []
    for values, step in package.named("log"):
        numbers = {name: value for name, value in values.items() if not isinstance(value, tuple)}
        at = numbers.pop("rl/step", step)
        shown += [(at, numbers)] if numbers else []
    return shown


def test_numbers_samples_and_the_end_are_told(package, tmp_path):
    run_dir = tmp_path / "mine"
    run_dir.mkdir()
    (run_dir / "config.json").write_text(json.dumps(CONFIG))
    write(package, run_dir, [1, 2])
    ((settings,),) = package.named("init")
    assert settings["name"] == "mine" and settings["config"]["trainer"] == {"steps": 4}
    assert list(settings.get("tags") or settings["config"]["tags"]) == ["countdown", "rspo"]
    assert told(package) == [(1, {"rl/reward": 0.5}), (2, {"rl/reward": 1.0})]
    tables = [values["rl/samples"] for values, _ in package.named("log") if "rl/samples" in values]
    assert tables == [("table", SAMPLE_COLUMNS, [ROW])]
    assert package.named("finish") == [[0]] if package.__name__ == "wandb" else [[None]]
    assert package.calls[-1][0] == "finish"


def test_a_resumed_run_goes_on_in_the_same_run_and_doubles_no_step(package, tmp_path):
    write(package, tmp_path, [1, 2, 3, 4, 5])
    package.calls.clear()
    write(package, tmp_path, [4], resume_after=("rl", 3))  # rolled back by two steps, and killed after one
    write(package, tmp_path, [4, 5, 6], resume_after=("rl", 3))
    assert [step for step, _ in told(package)] == [6]
    first, second = (settings for (settings,) in package.named("init"))
    if package.__name__ == "wandb":
        assert (first["id"], first["resume"], second["id"]) == ("id1", "allow", "id1")
    else:
        assert (first["name"], first["resume"], second["name"]) == (tmp_path.name, "allow", tmp_path.name)


def test_a_tracker_that_joins_later_is_told_from_there(package, tmp_path):
    with MetricsLog(tmp_path, None) as log:
        log.write("rl", 1, {"reward": 0.5})
        log.write("rl", 2, {"reward": 0.5})
    write(package, tmp_path, [2, 3], resume_after=("rl", 1))
    assert [step for step, _ in told(package)] == [2, 3]


@pytest.mark.parametrize("failing", ["init", "log", "finish"])
def test_a_failure_is_said_once_and_stops_nothing(package, tmp_path, capsys, failing):
    package.fails = {failing}
    write(package, tmp_path, [1, 2, 3])
    out = capsys.readouterr().out
    assert out.count("has failed, and the run goes on: RuntimeError: no") == 1
    assert ("5 calls failed in all" in out) == (failing == "log")  # three steps, two of them with samples
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_the_end_tells_of_an_error(package, tmp_path):
    with pytest.raises(KeyboardInterrupt), MetricsLog(tmp_path, None, trackers=[package.__name__]):
        raise KeyboardInterrupt
    assert package.named("finish") == ([[1]] if package.__name__ == "wandb" else [[None]])


def test_what_is_unknown_or_missing_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="unknown tracker 'tensorbord'; choose from wandb, trackio"):
        check_trackers(["tensorbord"])
    with pytest.raises(ValueError, match=r"wandb and trackio cannot .* pip install 'rspo-jax\[wandb,trackio\]'"):
        check_trackers(["wandb", "trackio"])
    check_trackers([])


@pytest.mark.parametrize("key", [True, False])
def test_without_a_key_weights_and_biases_stays_offline(monkeypatch, tmp_path, capsys, key):
    package = Package("wandb")
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n" if key else "")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    write(package, tmp_path / "run", [1])
    ((settings,),) = package.named("init")
    assert settings["mode"] == (None if key else "offline")
    assert ("wandb sync" in capsys.readouterr().out) == (not key)
