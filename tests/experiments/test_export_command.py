"""`python -m experiments.export`: a run's newest checkpoint as a Hugging Face folder, and the refusals."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from experiments import export
from experiments.config import CountdownRun, save_config
from experiments.tasks.countdown import CharacterTokenizer
from rspo_jax.records.checkpoint import Checkpoints
from rspo_jax.training.state import fresh_state

MODEL = models.TransformerConfig(
    vocab_size=CharacterTokenizer.vocabulary_size,
    hidden_size=8,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    num_experts=2,
    num_experts_per_token=1,
    expert_size=6,
    query_key_norm="none",
    tie_embeddings=True,
)


def call(capsys, *arguments):
    code = export.main([str(argument) for argument in arguments])
    return code, capsys.readouterr()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """The folder of a run with a checkpoint of step 3, and its parameters."""
    folder, run = tmp_path_factory.mktemp("run"), CountdownRun(model=MODEL)
    save_config(folder / "config.json", "countdown", run)
    with jax.numpy_dtype_promotion("standard"):  # Optax promotes
        fresh = jax.jit(functools.partial(fresh_state, functools.partial(models.init_params, MODEL), run.trainer))
        state = fresh()._replace(step=jnp.int32(3))
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(3, state, {"elapsed_seconds": 1.0})
    return folder, state.train.params


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_folder_holds_the_newest_parameters(run_dir, tmp_path, capsys, dtype):
    folder, params = run_dir
    code, printed = call(capsys, folder, tmp_path / "new", *(["--dtype", dtype] if dtype else []))
    assert code == 0, printed.err
    assert "after 3 steps" in printed.out
    assert json.loads((tmp_path / "new" / "config.json").read_text())["dtype"] == (dtype or "float32")
    config, loaded = models.load_hf(tmp_path / "new", dtype="float32")
    assert config == MODEL
    rounded = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype or leaf.dtype).astype(leaf.dtype), params)
    jax.tree.map(np.testing.assert_array_equal, loaded, rounded)


def test_what_is_there_is_not_overwritten(run_dir, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    code, printed = call(capsys, run_dir[0], tmp_path)
    assert code == 2 and printed.err.startswith("error: ") and str(tmp_path) in printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_mistakes(run_dir, tmp_path, capsys):
    code, printed = call(capsys, tmp_path, tmp_path / "new")
    assert code == 2 and "is not the folder of a run" in printed.err
    save_config(tmp_path / "config.json", "countdown", CountdownRun(model=MODEL))
    code, printed = call(capsys, tmp_path, tmp_path / "new")
    assert code == 2 and "has no checkpoint yet" in printed.err
    code, printed = call(capsys, run_dir[0], tmp_path / "new", "--mesh.fsdp", "3")
    assert (code == 2 and "needs a multiple of 3" in printed.err) or "devices" in printed.err
    assert not (tmp_path / "new").exists()
