"""A run of several processes: one answer in all of them, one record, and checkpoints that any other devices can read.

Two real processes of two devices each are started once. Each prints the outcome of everything that it tries, so that
the two can be compared. Two methods of Orbax are replaced, to let one process fail where the other does not.
"""

import json
import os
import random
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.processes import Member, finish, free_port

from rspo_jax.records import read_metrics
from rspo_jax.records.checkpoint import Checkpoints

pytestmark = pytest.mark.slow

# The state of an index, in every program here.
STATE = """
import sys
import jax, jax.numpy as jnp, ml_dtypes, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from rspo_jax.records.checkpoint import Checkpoints

def content(index):
    bits = np.random.default_rng(index)
    return {
        "rows": bits.random((8, 12), np.float32),
        "tiles": bits.random((4, 6)).astype(ml_dtypes.bfloat16),
        "everywhere": bits.integers(0, 9, 5, np.int32),
        "none": np.zeros((0, 4), np.float32),
        "key": bits.integers(0, 2**32, 2, np.uint32),
        "step": np.array(index, np.int32),
    }

def assert_holds(state, index):
    for name, expected in content(index).items():
        for shard in state[name].addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), expected[shard.index])
"""

MEMBER = (
    STATE
    + """
import contextlib, io, json, pathlib, time
import orbax.checkpoint as ocp
from rspo_jax.hosts import agreement
from rspo_jax.records import checkpoint
from rspo_jax.records import PhaseProgress, metrics

process, port, folder, alone = int(sys.argv[1]), *sys.argv[2:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=process)
assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 4, 2)
mesh = jax.make_mesh((2, 2), ("x", "y"))
SPECS = {"rows": P(("x", "y")), "tiles": P("y", "x"), "everywhere": P(), "none": P(None, "x")}
SHARDINGS = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}

def make_state(index):
    # Leaves without a sharding belong to each process alone: one on its device, one in NumPy.
    state = content(index) | {"step": jnp.int32(index)}
    for name, sharding in SHARDINGS.items():
        value = state[name]
        state[name] = jax.make_array_from_callback(value.shape, sharding, lambda part, value=value: value[part])
    return state

def say_outcome(what, function):
    try:
        outcome = function()
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    print(json.dumps({what: outcome}), flush=True)

def restore(checkpoints, template=None):
    said = []
    restored = checkpoints.restore_newest(template or make_state(0), say=said.append)
    assert (len(said) > 0) == (process == 0 and restored.index == 1), said
    assert_holds(restored.state, restored.index)
    for name, sharding in SHARDINGS.items():
        assert restored.state[name].sharding == sharding and restored.state[name].committed, name
    assert not restored.state["step"].committed and restored.state["step"].is_fully_addressable
    return restored.index, restored.metadata["saved"]

def failing_here(attribute, error):
    # Only the second process fails.
    if process == 0:
        return lambda: None
    original = getattr(ocp.PyTreeCheckpointHandler, attribute)
    def fail(*_, **__):
        raise error
    setattr(ocp.PyTreeCheckpointHandler, attribute, fail)
    return lambda: setattr(ocp.PyTreeCheckpointHandler, attribute, original)

def save_and_wait(index, state, saved):
    checkpoints.save(index, state, {"saved": saved})
    checkpoints.wait()

def flip_largest_file(path):
    if process == 0:
        file = max(path.rglob("*"), key=lambda file: file.is_file() and file.stat().st_size)
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 0x10
        file.write_bytes(data)

say_outcome("of one process", lambda: restore(Checkpoints(alone)))
with Checkpoints(folder, keep=2) as checkpoints:
    for index in (0, 1, 2):
        checkpoints.save(index, make_state(index), {"saved": index, "by": process})
    say_outcome("the newest", lambda: restore(checkpoints))
    again = checkpoints.restore_newest(make_state(0)).state
    say_outcome("the same again", lambda: checkpoints.save(2, again, {"saved": "again"}))
    say_outcome("a used index", lambda: checkpoints.save(2, make_state(3), {}))
    say_outcome("other indices", lambda: checkpoints.save(3 + process, make_state(3), {}))
    state = make_state(3) | {"key": content(3 + process)["key"], "step": jnp.int32(process)}
    say_outcome("other values", lambda: checkpoints.save(3, state, {}))

    mend = failing_here("async_save", OSError("the disk of the second is full"))
    say_outcome("one cannot write", lambda: save_and_wait(3, make_state(3), "never"))
    mend()
    say_outcome("now both can", lambda: save_and_wait(3, make_state(3), "second time"))

    mend = failing_here("restore", MemoryError("the second has none left"))
    say_outcome("one has no memory", lambda: restore(checkpoints))
    mend()
    other = make_state(0) | ({"rows": jnp.zeros(3)} if process else {})
    say_outcome("one expects others", lambda: restore(checkpoints, other))
    say_outcome("both can read", lambda: restore(checkpoints))
    mend = failing_here("restore", ValueError("the second reads nonsense"))
    say_outcome("one reads nonsense everywhere", lambda: restore(checkpoints))
    mend()
    say_outcome("nothing was moved", lambda: sorted(path.name for path in pathlib.Path(folder).iterdir()))

    checkpoints.save(4, make_state(4), {"saved": 4})
    checkpoints.wait()
    say_outcome("older ones are gone", lambda: sorted(path.name for path in pathlib.Path(folder).iterdir()))

with Checkpoints(f"{folder}-broken") as checkpoints:
    for index in (1, 2):
        checkpoints.save(index, make_state(index), {"saved": index})
    checkpoints.wait()
    flip_largest_file(pathlib.Path(f"{folder}-broken/2"))
    say_outcome("the newest is broken", lambda: restore(checkpoints))
    say_outcome("it was moved", lambda: pathlib.Path(f"{folder}-broken-damaged/2").is_dir())
    say_outcome("its index is free", lambda: save_and_wait(2, make_state(2), "once more"))

checkpoint.SIGHT_SECONDS = 0
with Checkpoints(f"{folder}-of-{process}") as checkpoints:
    say_outcome("not one folder", lambda: checkpoints.save(1, make_state(1), {}))

run_dir, shown = f"{folder}-log", io.StringIO()
with contextlib.redirect_stdout(shown):
    with metrics.MetricsLog(run_dir, None) as log, PhaseProgress("rl", 2) as progress:
        for step in (1, 2):
            log.write("rl", step, {"reward": 0.5 + process})
            progress.update(step, {"reward": 0.5 + process})
        log.flush()
        progress.say("half done")
assert (len(shown.getvalue().splitlines()) == 3) == (process == 0), shown.getvalue()
say_outcome("a used log", lambda: metrics.MetricsLog(run_dir, None))
with metrics.MetricsLog(run_dir, ("rl", 1)) as log:
    say_outcome("an old row", lambda: log.write("rl", 1, {}))
    say_outcome("a bad row", lambda: log.write("rl", 2, {"reward": "high"}))
    log.write("rl", 2, {"reward": 3.0})
say_outcome("a closed log", lambda: log.write("rl", 3, {}))
say_outcome("no display of nothing", lambda: PhaseProgress("rl", 0))

class Odd(Exception):
    def __init__(self):
        super().__init__("odd")
        self.function = lambda: None

def fail_oddly():
    raise Odd

line = agreement.Agreement("test")
try:
    line.from_primary(fail_oddly)
except (Odd if process == 0 else RuntimeError) as error:
    assert "odd" in str(error)
say_outcome("words", lambda: sorted(line.gather(process or None).items()))
agreement.PATIENCE_SECONDS = 1
time.sleep(3 * process)
say_outcome("no answer", lambda: line.gather("late"))
jax.distributed.shutdown()
print("done")
"""
)

WRITER = (
    STATE
    + """
import itertools

process, port, folder = int(sys.argv[1]), *sys.argv[2:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=process)
spread = NamedSharding(jax.make_mesh((4,), ("x",)), P("x"))

def make_state(index):
    state = content(index)
    rows = state["rows"]
    return state | {"rows": jax.make_array_from_callback(rows.shape, spread, lambda part: rows[part])}

with Checkpoints(folder, keep=1) as checkpoints:
    restored = checkpoints.restore_newest(make_state(0), say=lambda _: None)
    for index in itertools.count(0 if restored is None else restored.index + 1):
        checkpoints.save(index, make_state(index), {"saved": index})
        print(index, flush=True)
"""
)

READER = (
    STATE
    + """
mesh = jax.make_mesh((2,), ("x",))
specs = {"rows": P(None, "x"), "tiles": P("x"), "everywhere": P(), "none": P("x"), "key": P("x"), "step": P()}
template = {
    name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=NamedSharding(mesh, specs[name]))
    for name, value in content(0).items()
}
with Checkpoints(sys.argv[1]) as checkpoints:
    restored = checkpoints.restore_newest(template)
    assert restored.index == int(sys.argv[2])
    assert all(restored.state[name].sharding == leaf.sharding for name, leaf in template.items())
    assert_holds(restored.state, restored.index)
    checkpoints.save(restored.index, restored.state, {})  # the same again, though sharded in another way
    restored.state["rows"] += 1
    checkpoints.save(restored.index + 1, restored.state, {"saved": "by two devices"})
print("done")
"""
)


def start(log: Path, program: str, *arguments: object) -> Member:
    """Start a process with two devices."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    return Member(log, program, *arguments, environment=environment)


def content(index: int) -> dict[str, np.ndarray]:
    namespace: dict[str, Any] = {}
    exec(STATE, namespace)
    return namespace["content"](index)


def restore_here(folder: Path) -> tuple[int, dict[str, Any]]:
    """Restore the newest checkpoint on the one device of this process; return its index and metadata."""
    template = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in content(0).items()}
    with Checkpoints(folder) as checkpoints:
        restored = checkpoints.restore_newest(template)
    assert restored is not None
    assert all(leaf.devices() == {jax.devices()[0]} for leaf in restored.state.values())
    for name, expected in content(restored.index).items():
        assert restored.state[name].dtype == expected.dtype
        np.testing.assert_array_equal(np.asarray(restored.state[name]), expected)
    return restored.index, restored.metadata


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run") / "checkpoints"


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, Any]:
    """The outcome of everything that the two processes tried, the same in both."""
    alone = folder.with_name("alone")
    with Checkpoints(alone) as checkpoints:
        checkpoints.save(7, {name: jnp.asarray(value) for name, value in content(7).items()}, {"saved": "alone"})
    port = free_port()
    members = [start(folder.with_name(f"log-{process}"), MEMBER, process, port, folder, alone) for process in range(2)]
    first, second = finish(members)
    assert first == second
    *lines, last = first.splitlines()
    assert last == "done"
    return {what: outcome for line in lines for what, outcome in json.loads(line).items()}


def test_what_one_process_saved_many_restore(outcomes: dict[str, Any]) -> None:
    assert outcomes["of one process"] == [7, "alone"]


def test_all_save_and_restore_together(outcomes: dict[str, Any], folder: Path) -> None:
    assert outcomes["the newest"] == [2, 2]
    assert outcomes["the same again"] is None
    assert "holds checkpoint 2 already, and 2 is not higher" in outcomes["a used index"]
    assert outcomes["older ones are gone"] == ["3", "4"]
    parts = {path.name for path in (folder / "4" / "state").glob("ocdbt.process_*")}
    assert parts == {"ocdbt.process_0", "ocdbt.process_1"}  # each wrote its own


def test_processes_that_save_different_things_are_told(outcomes: dict[str, Any]) -> None:
    assert outcomes["other indices"] == "ValueError: a process saves checkpoint 4 while the first saves 3"
    assert "ValueError: state['key'], state['step'] differ between processes" in outcomes["other values"]


def test_what_one_process_cannot_write_none_has_written(outcomes: dict[str, Any], folder: Path) -> None:
    assert outcomes["one cannot write"].startswith(f"CheckpointError: {folder / '3'} could not be written (OSError: ")
    assert outcomes["now both can"] is None


def test_a_folder_that_is_not_shared_is_found(outcomes: dict[str, Any], folder: Path) -> None:
    assert outcomes["not one folder"].startswith(f"CheckpointError: {folder}-of-1 is not one folder for all processes")


def test_what_one_process_meets_all_raise(outcomes: dict[str, Any]) -> None:
    assert outcomes["one has no memory"] == "MemoryError: the second has none left"
    assert outcomes["one expects others"].startswith("CheckpointMismatch: ")
    assert outcomes["both can read"] == [3, "second time"]
    assert "are damaged or incomplete (2 in number)" in outcomes["one reads nonsense everywhere"]
    assert outcomes["nothing was moved"] == ["2", "3"]


def test_all_fall_back_to_the_same_checkpoint(outcomes: dict[str, Any]) -> None:
    assert outcomes["the newest is broken"] == [1, 1]
    assert outcomes["it was moved"] is True
    assert outcomes["its index is free"] is None


def test_one_process_writes_the_record(outcomes: dict[str, Any], folder: Path) -> None:
    run_dir = folder.with_name("checkpoints-log")
    rows = [{"phase": "rl", "step": 1, "reward": 0.5}, {"phase": "rl", "step": 2, "reward": 3.0}]
    assert read_metrics(run_dir) == rows
    assert len(list((run_dir / "tensorboard" / "rl").iterdir())) == 2  # one for each time that the log was opened
    assert outcomes["a used log"].startswith("FileExistsError: ")
    assert outcomes["an old row"] == "ValueError: steps must increase, but rl step 1 came after rl step 1"
    assert outcomes["a bad row"] == "TypeError: metric 'reward' is not a number: 'high'"
    assert "ValueError" in outcomes["a closed log"] and "closed" in outcomes["a closed log"]
    assert outcomes["no display of nothing"].startswith("ValueError: ")


def test_a_process_that_does_not_answer_is_named(outcomes: dict[str, Any]) -> None:
    assert outcomes["words"] == [[1, 1]]
    assert outcomes["no answer"].startswith("TimeoutError: process 1 has not answered for ")


@pytest.mark.usefixtures("outcomes")
def test_other_devices_restore_what_two_processes_saved(folder: Path) -> None:
    assert restore_here(folder) == (4, {"saved": 4})
    assert finish([start(folder.with_name("log"), READER, folder, 4)]) == ["done\n"]
    with Checkpoints(folder) as checkpoints:
        restored = checkpoints.restore_newest(dict(jax.eval_shape(lambda: content(0))))
    assert restored is not None and (restored.index, restored.metadata) == (5, {"saved": "by two devices"})
    np.testing.assert_array_equal(np.asarray(restored.state["rows"]), content(4)["rows"] + 1)


def test_killed_processes_leave_the_old_or_the_new(tmp_path: Path) -> None:
    moments, newest, folder = random.Random(1), -1, tmp_path / "checkpoints"
    for attempt in range(2):
        port = free_port()
        members = [start(tmp_path / f"log-{attempt}-{process}", WRITER, process, port, folder) for process in range(2)]
        # A save begins when the one before it is complete, so the second line tells of a new checkpoint.
        begun = members[0].lines(moments.randint(2, 4))
        time.sleep(moments.uniform(0, 0.1))
        for member in moments.sample(members, 2):
            member.kill()
        errors = [member.errors for member in members]
        assert begun == [f"{newest + 1 + number}" for number in range(len(begun))], errors
        newest, metadata = restore_here(folder)
        assert newest >= int(begun[-2]) and metadata == {"saved": newest}
    assert not (tmp_path / "checkpoints-damaged").exists()
