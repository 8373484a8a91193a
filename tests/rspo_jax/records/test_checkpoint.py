"""Checkpoints: exact restores, killed writers, damaged files, and states of other runs.

A checkpoint is a folder here, and the files in it are opaque.
"""

import errno
import json
import logging
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from etils import epath
from support.processes import Member, finish

from rspo_jax.records import manifest
from rspo_jax.records.checkpoint import UNFINISHED, CheckpointError, Checkpoints, Restored
from rspo_jax.records.lock import LockLost
from rspo_jax.records.manifest import CheckpointMismatch

OPTIMIZER = optax.chain(
    optax.clip_by_global_norm(1.0),  # its state is an EmptyState
    optax.masked(optax.adamw(1e-2), {"layers": {"weight": True, "router/weight": False}, "embedding": True}),
)


class State(NamedTuple):
    params: Any
    opt_state: Any
    key: Any
    cursor: Any
    extras: Any


def make_state(seed: int) -> State:
    """Return a state with a leaf of every kind that a run may hold, and different numbers for every seed."""
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "embedding": jax.random.normal(keys[0], (60, 50)),
        "layers": {
            "weight": jax.random.normal(keys[1], (3, 4)).astype(jnp.bfloat16),
            "router/weight": jax.random.normal(keys[2], (2, 3)),
        },
    }
    extras = [
        jnp.array([True, False, seed % 2 == 0]),
        jnp.arange(7, dtype=jnp.uint8) + jnp.uint8(seed),
        jnp.zeros((0, 3)),
        # A NaN with a payload, −0, ∞ and a subnormal.
        jnp.array(np.array([0x7FC12345, 0x80000000, 0x7F800000, seed + 1], np.uint32).view(np.float32)),
        (),
        None,
    ]
    return State(params, OPTIMIZER.init(params), jax.random.key_data(keys[0]), jnp.int32(seed), extras)


def make_small_state(seed: int) -> dict[str, Any]:
    """Return a state with few leaves, which takes as many files as one with many."""
    state = make_state(seed)
    return {"embedding": state.params["embedding"], "key": state.key, "cursor": state.cursor}


def on_host(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: np.array(leaf, copy=True), tree)


def assert_identical(actual: Any, expected: Any) -> None:
    """Compare types of containers, and shapes, dtypes and bits of arrays."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, left), right in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        assert isinstance(left, jax.Array) and not left.weak_type, path
        assert (left.shape, left.dtype) == (right.shape, right.dtype), path
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes(), path


def restore(directory: Path, template: Any) -> tuple[Restored | None, list[str]]:
    """Return the checkpoint that is restored, and the sentences said."""
    said: list[str] = []
    with Checkpoints(directory) as checkpoints:
        return checkpoints.restore_newest(template, say=said.append), said


def restore_sound(directory: Path, template: Any) -> tuple[Restored, list[str]]:
    restored, said = restore(directory, template)
    assert restored is not None
    return restored, said


def save_all(directory: Path, states: dict[int, Any], keep: int = 3) -> None:
    with Checkpoints(directory, keep=keep) as checkpoints:
        for index, state in states.items():
            checkpoints.save(index, state, {"index": index})


def files_in(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def largest_file(directory: Path) -> Path:
    return max(files_in(directory), key=lambda path: path.stat().st_size)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def overwrite(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


DAMAGES: list[Callable[[Path], None]] = [truncate, flip, overwrite, Path.unlink]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints 3 and 4 of `make_state(3)` and `make_state(4)`; copy it, leave it alone."""
    directory = tmp_path_factory.mktemp("pristine") / "checkpoints"
    save_all(directory, {index: make_state(index) for index in (3, 4)})
    return directory


@pytest.fixture
def directory(pristine: Path, tmp_path: Path) -> Path:
    """A copy of `pristine` to break."""
    return Path(shutil.copytree(pristine, tmp_path / "checkpoints"))


# --- exactness ---


@pytest.mark.parametrize("abstract", [False, True], ids=["arrays", "structs"])
def test_round_trip_is_bitwise(pristine: Path, abstract: bool) -> None:
    template = jax.eval_shape(lambda: make_state(0)) if abstract else make_state(0)
    restored, said = restore_sound(pristine, template)
    assert (restored.index, restored.metadata, said) == (4, {"index": 4}, [])
    assert_identical(restored.state, make_state(4))
    assert isinstance(restored.state, State)
    clip, masked = restored.state.opt_state
    assert isinstance(clip, optax.EmptyState)
    assert isinstance(masked.inner_state[0], optax.ScaleByAdamState)
    assert isinstance(masked.inner_state[0].mu["layers"]["router/weight"], optax.MaskedNode)
    assert not any(leaf.committed for leaf in jax.tree.leaves(restored.state))


def test_nothing_to_restore(tmp_path: Path) -> None:
    assert restore(tmp_path / "run" / "checkpoints", make_state(0)) == (None, [])
    assert (tmp_path / "run" / "checkpoints").is_dir()


def test_an_interrupted_run_ends_like_one_that_was_not(tmp_path: Path) -> None:
    @jax.jit
    def step(state: tuple) -> tuple:
        params, opt_state, key_data = state
        key, noise_key = jax.random.split(jax.random.wrap_key_data(key_data))
        noise = jax.random.normal(noise_key, (5,))
        gradients = jax.grad(lambda params: jnp.sum(jnp.square(params["w"] - noise)))(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, jax.random.key_data(key)

    optimizer = optax.sgd(1e-1, momentum=0.9)
    params = {"w": jnp.arange(5.0)}
    fresh = (params, optimizer.init(params), jax.random.key_data(jax.random.key(1)))
    straight = fresh
    for _ in range(4):
        straight = step(straight)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, step(step(fresh)), {})
    restored, _ = restore_sound(tmp_path, fresh)
    assert_identical(step(step(restored.state)), straight)


def test_the_caller_may_donate_or_overwrite_at_once(tmp_path: Path) -> None:
    update = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * -3 + 1, tree), donate_argnums=0)
    numpy_leaf = np.arange(1_000_000, dtype=np.float32)
    metadata = {"losses": [0.0]}
    state = {"weight": jnp.arange(4_000_000, dtype=jnp.float32), "count": jnp.int32(7)}
    update(jax.tree.map(jnp.copy, state))  # compiled beforehand, so that it runs right after the save
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        expected = []
        for index in range(3):
            expected.append(on_host({**state, "numpy": numpy_leaf}))
            checkpoints.save(index, {**state, "numpy": numpy_leaf}, metadata)
            metadata["losses"][0] += 1
            numpy_leaf += 1
            state = jax.block_until_ready(update(state))
    for index in reversed(range(3)):
        restored, said = restore_sound(tmp_path, {**state, "numpy": numpy_leaf})
        assert (restored.index, restored.metadata, said) == (index, {"losses": [index]}, [])
        assert_identical(restored.state, expected[index])
        shutil.rmtree(tmp_path / str(index))


def test_restored_arrays_can_be_donated(pristine: Path) -> None:
    restored, _ = restore_sound(pristine, make_state(0))
    embedding = restored.state.params["embedding"]
    doubled = jax.jit(lambda array: array * 2, donate_argnums=0)(embedding)
    assert embedding.is_deleted()
    np.testing.assert_array_equal(doubled, make_state(4).params["embedding"] * 2)


def test_metadata_comes_back_as_json_has_it(tmp_path: Path) -> None:
    metadata = {"elapsed_seconds": 0.1 + 0.2, "config": {"name": "é", "sizes": (1, 2)}, "none": None}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, {"x": jnp.ones(3)}, metadata)
    restored, _ = restore_sound(tmp_path, {"x": jnp.ones(3)})
    assert restored.metadata == {**metadata, "config": {"name": "é", "sizes": [1, 2]}}


# --- which checkpoints there are ---


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_are_kept(tmp_path: Path, keep: int) -> None:
    indices = [0, 9, 10, 11]  # not the order of their names
    save_all(tmp_path, {index: make_state(index) for index in indices[:3]}, keep)
    save_all(tmp_path, {indices[3]: make_state(11)}, keep)  # another process
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == indices[-keep:]
    restored, _ = restore_sound(tmp_path, make_state(0))
    assert restored.index == 11
    assert_identical(restored.state, make_state(11))


def test_saving_the_same_again_does_nothing(directory: Path) -> None:
    with Checkpoints(directory) as checkpoints:
        restored = checkpoints.restore_newest(make_state(0))
        assert restored is not None
        checkpoints.save(4, restored.state, {"index": "again"})
        checkpoints.save(5, make_state(5), {"index": 5})
        checkpoints.save(5, make_state(5), {"index": "again"})
    assert restore_sound(directory, make_state(0))[0].metadata == {"index": 5}
    shutil.rmtree(directory / "5")
    assert restore_sound(directory, make_state(0))[0].metadata == {"index": 4}


@pytest.mark.parametrize("index", [4, 3, 0])
@pytest.mark.parametrize("resumed", [True, False])
def test_an_index_is_not_used_twice(directory: Path, index: int, resumed: bool) -> None:
    before = {path: path.read_bytes() for path in files_in(directory)}
    with Checkpoints(directory) as checkpoints:
        if resumed:
            checkpoints.restore_newest(make_state(0))
        with pytest.raises(ValueError, match=f"holds checkpoint 4 already, and {index} is not higher.*new run folder"):
            checkpoints.save(index, make_state(8), {})
        checkpoints.save(5, make_state(5), {})
        with pytest.raises(ValueError, match="holds checkpoint 5 already"):  # which may still be being written
            checkpoints.save(5, make_state(8), {})
    assert {path: path.read_bytes() for path in before} == before


# --- damage ---


@pytest.fixture(scope="module")
def small_pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints 3 and 4 of small states; copy it, leave it alone."""
    directory = tmp_path_factory.mktemp("small") / "checkpoints"
    save_all(directory, {index: make_small_state(index) for index in (3, 4)})
    return directory


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_to_any_file_is_harmless_or_found(
    small_pristine: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    """Either the file was redundant, or the checkpoint before is used; either way the run can go on saving."""
    pristine, states = small_pristine, {index: make_small_state(index) for index in (3, 4, 5)}
    names = [path.relative_to(pristine) for path in files_in(pristine / "4")]
    assert len(names) > 5
    fallen_back = set()
    for number, name in enumerate(names):
        directory = Path(shutil.copytree(pristine, tmp_path / str(number) / "checkpoints"))
        damage(directory / name)
        said: list[str] = []
        with Checkpoints(directory) as checkpoints:
            restored = checkpoints.restore_newest(states[3], say=said.append)
            assert restored is not None and restored.metadata == {"index": restored.index}, name
            assert_identical(restored.state, states[restored.index])
            aside = tmp_path / str(number) / "checkpoints-damaged" / "4"
            assert aside.exists() == (restored.index == 3), name
            if restored.index == 4:
                assert said == [], name
            else:
                fallen_back.add(name)
                assert len(said) == 2, name
                assert said[0].startswith(f"{directory / '4'} is damaged or incomplete: the "), said
                assert said[1] == f"{directory / '4'} was moved to {aside}, and {directory / '3'} is used instead."
            checkpoints.save(5, states[5], {"index": 5})
        again, _ = restore_sound(directory, states[3])
        assert again.index == 5
        assert_identical(again.state, states[5])
    assert largest_file(pristine / "4").relative_to(pristine) in fallen_back
    assert len(fallen_back) >= 4


def test_a_flipped_bit_in_the_data_is_found_by_its_fingerprint(directory: Path) -> None:
    flip(largest_file(directory / "4"))
    restored, said = restore_sound(directory, make_state(0))
    assert restored.index == 3
    assert_identical(restored.state, make_state(3))
    # One of the three arrays large enough to have a chunk of their own.
    assert "the contents of state." in said[0] and "['embedding'] are not those that were saved" in said[0]


def test_a_forged_manifest_is_found_by_its_checksum(directory: Path) -> None:
    (path,) = (path for path in files_in(directory / "4") if b"checksum" in path.read_bytes())
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "metadata": {"index": 5}}))
    restored, said = restore_sound(directory, make_state(0))
    assert restored.metadata == {"index": 3}
    assert "does not agree with its checksum" in said[0]


@pytest.mark.parametrize("sharded", [False, True], ids=["uncommitted", "sharded"])
@pytest.mark.parametrize("name", ["embedding", "key", "cursor"])
def test_a_flipped_bit_in_a_name_is_found(small_pristine: Path, tmp_path: Path, name: str, sharded: bool) -> None:
    """Orbax then hands back the template's own `ShapeDtypeStruct` for the leaf."""
    directory = Path(shutil.copytree(small_pristine, tmp_path / "checkpoints"))
    metadata = directory / "4" / "state" / "_METADATA"
    damaged = name[:-1] + chr(ord(name[-1]) ^ 1)
    metadata.write_text(metadata.read_text().replace(f"['{name}']", f"['{damaged}']"))
    template = make_small_state(0)
    if sharded:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        template = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), template)
    restored, said = restore_sound(directory, template)
    assert restored.index == 3
    assert_identical(restored.state, make_small_state(3))
    assert "4 is damaged or incomplete: the arrays " in said[0] and "moved" in said[1]


def test_a_sound_checkpoint_under_a_wrong_number_is_damage(directory: Path) -> None:
    (directory / "4").rename(directory / "40")
    restored, said = restore_sound(directory, make_state(0))
    assert restored.index == 3
    assert said[0].endswith("the manifest is of checkpoint 4, which is kept under a wrong number.")
    assert (directory.with_name("checkpoints-damaged") / "40").is_dir()


def test_a_checkpoint_of_an_earlier_version_does_not_tell_its_number(directory: Path) -> None:
    path = directory / "4" / "manifest" / "metadata"
    content = json.loads(path.read_text())
    del content["index"], content["checksum"]
    path.write_text(json.dumps({**content, "checksum": manifest._checksum(content)}))
    assert restore_sound(directory, make_state(0))[0].index == 4


def test_a_file_in_the_place_of_the_folder_for_damaged_ones_is_left_alone(directory: Path) -> None:
    aside = directory.with_name("checkpoints-damaged")
    aside.write_text("notes")
    largest_file(directory / "4").unlink()
    restored, _ = restore_sound(directory, make_state(0))
    assert restored.index == 3
    assert aside.read_text() == "notes"
    assert (directory.with_name("checkpoints-damaged-2") / "4").is_dir()


def test_damage_to_the_same_index_twice_keeps_both(directory: Path) -> None:
    for attempt, name in enumerate(["4", "4-2", "4-3"]):
        largest_file(directory / "4").unlink()
        with Checkpoints(directory) as checkpoints:
            restored = checkpoints.restore_newest(make_state(0), say=lambda _: None)
            assert restored is not None and restored.index == 3
            checkpoints.save(4, make_state(4), {"attempt": attempt})
        aside = directory.with_name("checkpoints-damaged")
        assert (aside / name).is_dir() and len(list(aside.iterdir())) == attempt + 1


def test_all_damaged(directory: Path) -> None:
    for index in (3, 4):
        largest_file(directory / str(index)).unlink()
    before = files_in(directory)
    said: list[str] = []
    with Checkpoints(directory) as checkpoints:
        with pytest.raises(
            CheckpointError, match=r"all checkpoints in .* are damaged.*start a new run folder"
        ) as error:
            checkpoints.restore_newest(make_state(0), say=said.append)
        assert str(directory) in str(error.value)
    assert [line.split(" is damaged")[0] for line in said] == [str(directory / "4"), str(directory / "3")]
    assert files_in(directory.parent) == before


def test_what_was_saved_and_then_damaged_is_not_taken_for_saved(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(4, make_state(4), {})
        checkpoints.wait()
        largest_file(tmp_path / "4").unlink()
        with pytest.raises(CheckpointError):
            checkpoints.restore_newest(make_state(0), say=lambda _: None)
        with pytest.raises(ValueError, match="holds checkpoint 4 already"):
            checkpoints.save(4, make_state(4), {})


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("none left"),
        OSError(errno.EMFILE, "Too many open files"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        PermissionError(errno.EACCES, "Permission denied"),
        ValueError("RESOURCE_EXHAUSTED: Failed to open [os_error_code='24']"),
        ValueError("UNAVAILABLE: no route"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("part", ["manifest", "arrays"])
def test_a_fault_of_the_machine_is_not_damage(
    directory: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, part: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    if part == "manifest":
        monkeypatch.setattr(type(epath.Path(directory)), "read_bytes", fail)
    else:
        monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", fail)
    with Checkpoints(directory) as checkpoints, pytest.raises(type(error)) as raised:
        checkpoints.restore_newest(make_state(0))
    assert raised.value is error
    assert not directory.with_name("checkpoints-damaged").exists()


def test_unfinished_checkpoints_are_named_and_skipped(directory: Path) -> None:
    shutil.copytree(directory / "4", directory / "5.orbax-checkpoint-tmp")
    (directory / "notes").mkdir()
    restored, said = restore_sound(directory, make_state(0))
    assert restored.index == 4
    unfinished = directory / "5.orbax-checkpoint-tmp"
    assert said == [f"{unfinished} is unfinished, left by an interrupted run unless a run is writing it now: skipped."]


@pytest.mark.parametrize("kept", ["nothing", "a file", "arrays only", "manifest only"])
def test_incomplete_copies_are_named_and_moved_aside(directory: Path, kept: str) -> None:
    if kept == "a file":
        (directory / "5").write_text("")
    elif kept == "nothing":
        (directory / "5").mkdir()
    else:
        part = "state" if kept == "arrays only" else "manifest"
        shutil.copytree(directory / "4" / part, directory / "5" / part)
    restored, said = restore_sound(directory, make_state(0))
    assert restored.index == 4
    assert said[0].startswith(f"{directory / '5'} is damaged or incomplete: ")
    assert (directory.with_name("checkpoints-damaged") / "5").exists()


def test_only_an_unfinished_checkpoint_is_none(directory: Path) -> None:
    (directory / "4").rename(directory / "4.orbax-checkpoint-tmp")
    shutil.rmtree(directory / "3")
    restored, said = restore(directory, make_state(0))
    assert restored is None
    assert len(said) == 1


def test_what_is_left_unfinished_is_replaced_in_silence(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(directory / "3", directory / "5.orbax-checkpoint-tmp")
    save_all(directory, {5: make_state(5)})
    assert not caplog.records
    restored, said = restore_sound(directory, make_state(0))
    assert (restored.index, said) == (5, [])


# --- states of other runs ---


def with_embedding(embedding: Any) -> State:
    state = make_state(0)
    return state._replace(params={**state.params, "embedding": embedding})


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            with_embedding(jnp.zeros((60, 51))),
            r"state.params['embedding'] was saved as float32[60, 50], but float32[60, 51] is expected",
        ),
        (
            with_embedding(jnp.zeros((60, 50), jnp.bfloat16)),
            r"state.params['embedding'] was saved as float32[60, 50], but bfloat16[60, 50] is expected",
        ),
        (
            with_embedding(jnp.zeros(())),
            r"state.params['embedding'] was saved as float32[60, 50], but float32[] is expected",
        ),
        (with_embedding({"table": jnp.zeros(2)}), r"it lacks state.params['embedding']['table']"),
        (with_embedding(None), r"it also holds state.params['embedding']"),
        (make_state(0)._asdict(), r"it lacks state['cursor']"),
        ({"other": jnp.zeros(2)}, r"it lacks state['other']; it also holds state."),
    ],
    ids=["shape", "dtype", "scalar", "missing", "extra", "container", "unrelated"],
)
def test_a_mismatch_is_not_damage(directory: Path, template: Any, message: str) -> None:
    before = {path: path.read_bytes() for path in files_in(directory)}
    # The arrays are not even looked at.
    largest_file(directory / "4").unlink()
    said: list[str] = []
    with Checkpoints(directory) as checkpoints, pytest.raises(CheckpointMismatch) as error:
        checkpoints.restore_newest(template, say=said.append)
    assert message in str(error.value)
    assert str(error.value).startswith(f"{directory / '4'} does not fit this run: ")
    assert "Resume with the configuration that it was written with, or start a new run folder" in str(error.value)
    assert isinstance(error.value, ValueError)
    assert said == []
    assert {path for path in before if path.exists()} == set(files_in(directory.parent))
    assert len(files_in(directory.parent)) == len(before) - 1


def test_a_mismatch_names_the_first_and_counts_the_rest(tmp_path: Path) -> None:
    save_all(tmp_path, {1: {f"w{number}": jnp.zeros(2) for number in range(9)}})
    template = {f"w{number}": jnp.zeros(3) for number in range(9)}
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointMismatch) as error:
        checkpoints.restore_newest(template)
    assert "state['w0'] was saved as float32[2], but float32[3] is expected, and so on for" in str(error.value)
    assert "state['w5'] and 3 more." in str(error.value)


def test_damage_before_a_mismatch_is_said_and_left_where_it_is(directory: Path) -> None:
    overwrite(directory / "4" / "manifest" / "metadata")
    said: list[str] = []
    with Checkpoints(directory) as checkpoints, pytest.raises(CheckpointMismatch, match="checkpoints/3 does not fit"):
        checkpoints.restore_newest({"other": jnp.zeros(2)}, say=said.append)
    assert len(said) == 1 and "checkpoints/4 is damaged" in said[0]
    assert (directory / "4").exists()


def test_containers_without_leaves_do_not_matter(directory: Path) -> None:
    """An optimizer that gained a stateless part still fits."""
    template = make_state(0)
    template = template._replace(opt_state=(*template.opt_state, optax.EmptyState(), None))
    restored, said = restore_sound(directory, template)
    assert (restored.index, said) == (4, [])
    assert jax.tree.structure(restored.state) == jax.tree.structure(template)


def test_another_format_is_a_mismatch(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rspo_jax.records.manifest.FORMAT", 2)
    with (
        Checkpoints(directory) as checkpoints,
        pytest.raises(CheckpointMismatch, match=r"format 1.*reads format 2 only"),
    ):
        checkpoints.restore_newest(make_state(0))


# --- bad input ---


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (3, "state['x'] is of type int, not an array"),
        (0.5, "state['x'] is of type float, not an array"),
        (np.float32(3), "state['x'] is of type float32, not an array"),
        ("text", "state['x'] is of type str, not an array"),
        (jax.random.key(0), "state['x'] is a typed PRNG key: pass its jax.random.key_data"),
        (jnp.zeros(2, jnp.complex64), "state['x'] is complex64: checkpoints hold"),
        (jnp.zeros(2, jnp.int4), "state['x'] is int4: checkpoints hold"),
        (np.array(["a"]), "state['x'] is <U1: checkpoints hold"),
        (np.zeros(2), "state['x'] is float64, which JAX would narrow"),
        (np.zeros(2, np.int64), "state['x'] is int64, which JAX would narrow"),
    ],
)
def test_leaves_that_cannot_be_held(tmp_path: Path, leaf: Any, message: str) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(TypeError) as error:
            checkpoints.save(0, {"x": leaf}, {})
        assert message in str(error.value)
        with pytest.raises(TypeError) as error:
            checkpoints.restore_newest({"x": leaf})
        assert message in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_other_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        Checkpoints(tmp_path, keep=0)
    for address, message in (("s3://bucket/run", "mount that place"), (Path("gs://bucket/run"), "pass it as text")):
        with pytest.raises(ValueError, match=message):
            Checkpoints(address)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match="0 or more, got -1"):
            checkpoints.save(-1, {"x": jnp.ones(2)}, {})
        with pytest.raises(TypeError, match="float"):
            checkpoints.save(1.0, {"x": jnp.ones(2)}, {})  # pyright: ignore[reportArgumentType]
        with pytest.raises(TypeError, match=r"metadata must be a dict that JSON can hold: .*ndarray"):
            checkpoints.save(1, {"x": jnp.ones(2)}, {"array": np.ones(2)})
        for nothing in ({}, None, {"x": jnp.ones((0, 2))}):
            with pytest.raises(ValueError, match="nothing to checkpoint"):
                checkpoints.save(1, nothing, {})
    assert list(tmp_path.iterdir()) == []


# --- processes ---


SHARDED = """
import sys
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from rspo_jax.records.checkpoint import Checkpoints

weight = jnp.arange(8 * 12.0).reshape(8, 12)
for kind in (AxisType.Auto, AxisType.Explicit):
    wide, square = jax.make_mesh((4,), ("x",), (kind,)), jax.make_mesh((2, 2), ("x", "y"), (kind, kind))
    rows, tiles = NamedSharding(wide, P("x")), NamedSharding(square, P("y", "x"))
    everywhere = NamedSharding(square, P())
    with Checkpoints(f"{sys.argv[1]}/{kind}") as checkpoints:
        state = {"weight": jax.device_put(weight, rows), "step": jnp.int32(3), "none": jnp.ones((0, 4))}
        checkpoints.save(1, state, {})
        for sharding in (rows, tiles, everywhere, None):
            struct = jax.ShapeDtypeStruct(weight.shape, weight.dtype, sharding=sharding)
            empty = jax.ShapeDtypeStruct((0, 4), jnp.float32, sharding=sharding)
            for like in (struct, struct if sharding is None else jax.device_put(weight, sharding)):
                template = {"weight": like, "step": jnp.int32(0), "none": empty}
                restored = checkpoints.restore_newest(template).state
                assert (restored["weight"] == jax.device_put(weight, sharding)).all(), sharding
                for name in ("weight", "none"):
                    assert restored[name].committed == (sharding is not None)
                    assert sharding is None or restored[name].sharding == sharding
                assert restored["step"] == 3 and not restored["step"].committed
print("done")
"""


def test_arrays_return_in_the_sharding_of_the_template(tmp_path: Path) -> None:
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    folder = tmp_path / "checkpoints"
    assert finish([Member(tmp_path / "log", SHARDED, folder, environment=environment)]) == ["done\n"]


WRITER = """
import itertools, sys
import jax.numpy as jnp
import numpy as np
from rspo_jax.records.checkpoint import Checkpoints

def state(index):
    return {"index": jnp.int32(index), "large": np.random.default_rng(index).random((64, 4096), np.float32)}

with Checkpoints(sys.argv[1], keep=2) as checkpoints:
    restored = checkpoints.restore_newest(state(0), say=lambda _: None)
    for index in itertools.count(0 if restored is None else restored.index + 1):
        checkpoints.save(index, state(index), {"index": index})
        print(index)
"""


def test_a_killed_writer_leaves_a_sound_checkpoint(tmp_path: Path) -> None:
    moments, newest, unfinished, folder = random.Random(0), -1, 0, tmp_path / "checkpoints"
    for attempt in range(6):
        member = Member(tmp_path / f"log-{attempt}", WRITER, folder)
        # A save begins when the one before it is complete, so the second line tells of a new checkpoint.
        begun = member.lines(moments.randint(2, 4))
        time.sleep(moments.uniform(0, 0.06))
        member.kill()
        assert member.code == -signal.SIGKILL, member.errors
        assert begun == [f"{newest + 1 + number}" for number in range(len(begun))], member.errors
        template = {"index": jnp.int32(0), "large": jax.ShapeDtypeStruct((64, 4096), jnp.float32)}
        restored, said = restore_sound(folder, template)
        assert all("is unfinished" in line for line in said), said
        unfinished += len(said)
        assert restored.index == restored.metadata["index"] == int(restored.state["index"])
        assert restored.index >= int(begun[-2])
        expected = np.random.default_rng(restored.index).random((64, 4096), np.float32)
        np.testing.assert_array_equal(restored.state["large"], expected)
        newest = restored.index
    assert unfinished, "no kill hit a save"
    assert not (tmp_path / "checkpoints-damaged").exists()


@pytest.fixture
def small_files_only() -> Iterator[None]:
    """Limit files to 1 MB, as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_save_that_fails_is_named_without_a_traceback_and_can_be_repeated(
    tmp_path: Path, small_files_only: None, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    small = {"x": jnp.arange(20.0)}
    large = {name: np.random.default_rng(0).random(1_000_000, np.float32) for name in "xyz"}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, small, {})
        for finish in (checkpoints.wait, lambda: checkpoints.save(3, small, {})):
            checkpoints.save(2, large, {})
            with pytest.raises(
                CheckpointError,
                match=f"{tmp_path / '2'} could not be written .*with ulimit -f.* before it are unchanged",
            ):
                finish()
            assert "Traceback" not in "".join(capfd.readouterr()) and not caplog.records
        checkpoints.wait()
        checkpoints.save(2, {"x": small["x"] + 1}, {})
    restored, said = restore_sound(tmp_path, small)
    assert (restored.index, said) == (2, [])
    assert_identical(restored.state, {"x": small["x"] + 1})


def test_a_run_that_must_not_write_leaves_the_folder_as_it_is(directory: Path) -> None:
    calls = iter([None, LockLost("another run's")])

    def check() -> None:
        error = next(calls)
        if error is not None:
            raise error

    with pytest.raises(LockLost, match="another run's"), Checkpoints(directory, keep=1, check=check) as checkpoints:
        checkpoints.save(5, make_state(5), {})
    assert {path.name for path in directory.iterdir()} == {"3", "4", f"5{UNFINISHED}"}


# --- logging ---


def test_orbax_is_quiet_but_not_silenced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    save_all(tmp_path, {1: make_state(1)})
    restore_sound(tmp_path, make_state(0))
    assert [record for record in caplog.records if record.name == "absl"] == []
    logger = logging.getLogger("absl")
    for path, level in ((ocp.__file__, logging.WARNING), (ocp.__file__, logging.INFO), (__file__, logging.INFO)):
        logger.handle(logging.LogRecord("absl", level, path, 1, "a message", None, None))
    levels = [record.levelno for record in caplog.records if record.name == "absl"]
    assert levels == [logging.WARNING, logging.INFO]
