"""Parameters read and written by a plan, against transposes and stacks written out in NumPy.

The package safetensors makes and checks the files, and the names of the tensors are made up. Processes of their own,
which import this file, run the parts that need several devices (started by `test_devices.py`) or processes.
"""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from models.hugging_face import reading, writing
from models.hugging_face.reading import CheckpointFilesError, list_tensors, read_params
from models.hugging_face.tensors import Piece, Within
from models.hugging_face.writing import write_params

ROOT = Path(__file__).resolve().parents[3]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
LAYERS, EXPERTS, SIZE, HEADS, KEY_HEADS, HEAD, HIDDEN, VOCABULARY = 2, 4, 8, 4, 2, 4, 4, 24
BOTH = [(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
PLAN = {
    ("embedding",): [Piece("embed.weight")],
    ("head",): [Piece("head.weight", "V D -> D V")],
    ("layers", "query"): [
        Piece(f"layers.{layer}.qkv", "(N H) D -> D N H", (layer,), {"N": Within(0, HEADS + KEY_HEADS)})
        for layer in range(LAYERS)
    ],
    ("layers", "key"): [
        Piece(f"layers.{layer}.qkv", "(K H) D -> D K H", (layer,), {"K": Within(HEADS, HEADS + KEY_HEADS)})
        for layer in range(LAYERS)
    ],
    # Pairs lie side by side in the file, and in two halves in the model.
    ("layers", "rotary"): [
        Piece(f"layers.{layer}.rotary", "H D -> D H", (layer, None, slice(2 * i, 2 * i + 2)), {"H": Within(i, 4, 2)})
        for layer in range(LAYERS)
        for i in range(2)
    ],
    ("layers", "gate_up"): [
        Piece(f"layers.{layer}.experts.{expert}.{name}", "F D -> D F", (layer, expert, None, index))
        for layer, expert in BOTH
        for index, name in enumerate(("gate", "up"))
    ],
    ("layers", "fused"): [Piece(f"layers.{layer}.fused", "E D (F G) -> E D G F", (layer,)) for layer in range(LAYERS)],
    ("layers", "gate"): [Piece(f"layers.{layer}.gate", "1 D -> D", (layer,)) for layer in range(LAYERS)],
    ("scale",): [Piece("norm.weight")],
}
SPECS = {
    "embedding": P("a", ("b", "c")),
    "head": P(("c", "b"), "a"),
    "layers": {
        "query": P(None, "a", "b", "c"),
        "key": P(None, None, "b"),
        "rotary": P("a", "b", "c"),
        "gate_up": P(None, ("c", "a"), None, "b"),
        "fused": P(None, "b", "c", None, "a"),
        "gate": P(),
    },
    "scale": P("b"),
}


def make_tensors(dtype=BFLOAT16):
    """Make the tensors that the files hold."""
    random = np.random.default_rng(0)
    shapes = {"embed.weight": (VOCABULARY, SIZE), "head.weight": (VOCABULARY, SIZE), "norm.weight": (SIZE,)}
    for layer in range(LAYERS):
        shapes[f"layers.{layer}.qkv"] = ((HEADS + KEY_HEADS) * HEAD, SIZE)
        shapes[f"layers.{layer}.rotary"] = (4, SIZE)
        shapes[f"layers.{layer}.fused"] = (EXPERTS, SIZE, 2 * HIDDEN)
        shapes[f"layers.{layer}.gate"] = (1, SIZE)
        for expert in range(EXPERTS):
            shapes[f"layers.{layer}.experts.{expert}.gate"] = (HIDDEN, SIZE)
            shapes[f"layers.{layer}.experts.{expert}.up"] = (HIDDEN, SIZE)
    tensors = {name: random.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    tensors["norm.weight"][0] = -0.0
    return tensors


def make_layer(tensors, layer):
    at = f"layers.{layer}"
    heads = tensors[f"{at}.qkv"].reshape(HEADS + KEY_HEADS, HEAD, SIZE).transpose(2, 0, 1)
    rotary, fused = tensors[f"{at}.rotary"].T, tensors[f"{at}.fused"]
    experts = [[tensors[f"{at}.experts.{e}.{name}"].T for name in ("gate", "up")] for e in range(EXPERTS)]
    return {
        "query": heads[:, :HEADS],
        "key": heads[:, HEADS:],
        "rotary": np.concatenate([rotary[:, ::2], rotary[:, 1::2]], axis=1),
        "gate_up": np.stack([np.stack(both, axis=1) for both in experts]),
        "fused": np.stack([fused[..., ::2], fused[..., 1::2]], axis=2),
        "gate": tensors[f"{at}.gate"][0],
    }


def make_params(tensors):
    """Make the parameters of a model from the definition of each."""
    layers = [make_layer(tensors, layer) for layer in range(LAYERS)]
    return {
        "embedding": tensors["embed.weight"],
        "head": tensors["head.weight"].T,
        "layers": {name: np.stack([layer[name] for layer in layers]) for name in layers[0]},
        "scale": tensors["norm.weight"],
    }


TENSORS = make_tensors()
PARAMS = make_params(TENSORS)


def as_shapes(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


TEMPLATE = as_shapes(PARAMS)


def bits(array):
    array = np.asarray(array)
    return array.view(np.uint16 if array.itemsize == 2 else np.uint32)


def assert_same_bits(found, expected):
    """Compare two nested dicts of arrays, bit for bit and with their dtypes."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, leaf), other in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert leaf.dtype == other.dtype, path
        np.testing.assert_array_equal(bits(leaf), bits(other), err_msg=str(path))


def save_shards(folder, tensors, count=3):
    """Write shards and an index, as somebody else would have."""
    folder.mkdir(exist_ok=True)
    names, weight_map = sorted(tensors), {}
    for number in range(count):
        file = f"part-{number}.safetensors"
        own = {name: np.ascontiguousarray(tensors[name]) for name in names[number::count]}
        save_file(own, folder / file)
        weight_map |= dict.fromkeys(own, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_shards(tmp_path_factory.mktemp("checkpoints") / "original", TENSORS)


@pytest.fixture(scope="module")
def params(checkpoint):
    return read_params(checkpoint, PLAN, TEMPLATE)


# --- both directions ---


def test_each_parameter_is_what_its_tensors_make_up(params):
    assert_same_bits(params, PARAMS)
    assert not params["embedding"].committed


def test_what_is_written_is_what_was_read(params, tmp_path):
    write_params(tmp_path / "new", PLAN, params)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert list(files_of(tmp_path / "new")) == ["model.safetensors"]
    assert_same_bits(load_file(tmp_path / "new" / "model.safetensors"), TENSORS)
    assert_same_bits(read_params(tmp_path / "new", PLAN, params), PARAMS)
    with safe_open(tmp_path / "new" / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_small_chunks_make_no_difference(checkpoint, tmp_path, monkeypatch):
    plan = {path: PLAN[path] for path in (("head",), ("layers", "fused"))}
    tensors = {name: TENSORS[name] for name in ("head.weight", "layers.0.fused", "layers.1.fused")}
    save_file(tensors, tmp_path / "model.safetensors")
    kept = {"head": PARAMS["head"], "layers": {"fused": PARAMS["layers"]["fused"]}}
    for module in (reading, writing):
        monkeypatch.setattr(module, "CHUNK_BYTES", 50)
    params = read_params(tmp_path, plan, as_shapes(kept))
    assert_same_bits(params, kept)
    write_params(tmp_path / "new", plan, params)
    assert_same_bits(load_file(tmp_path / "new" / "model.safetensors"), tensors)


@pytest.mark.parametrize("stored", [np.float32, np.float16, BFLOAT16])
def test_each_leaf_is_cast_to_its_own_dtype(stored, tmp_path):
    tensors = {
        name: values[:3] for name, values in make_tensors(stored).items() if name in ("head.weight", "norm.weight")
    }
    save_file(tensors, tmp_path / "model.safetensors")
    plan = {path: PLAN[path] for path in (("head",), ("scale",))}
    like = {"head": jax.ShapeDtypeStruct((SIZE, 3), jnp.bfloat16), "scale": jax.ShapeDtypeStruct((3,), jnp.float32)}
    params = read_params(tmp_path, plan, like)
    expected = {"head": tensors["head.weight"].T.astype(BFLOAT16), "scale": tensors["norm.weight"].astype(np.float32)}
    assert_same_bits(params, expected)
    dtypes = {"head": jnp.float32, "scale": "float16"}
    write_params(tmp_path / "new", plan, params, dtype=dtypes)
    found = load_file(tmp_path / "new" / "model.safetensors")
    assert_same_bits(found["head.weight"], expected["head"].T.astype(np.float32))
    assert_same_bits(found["norm.weight"], expected["scale"].astype(np.float16))
    write_params(tmp_path / "all", plan, params, dtype="bfloat16")
    assert {leaf.dtype for leaf in load_file(tmp_path / "all" / "model.safetensors").values()} == {BFLOAT16}


# --- many devices, many processes ---


def make_template():
    """Return the template of parameters that are spread over four devices."""
    mesh = jax.make_mesh((2, 2, 1), ("a", "b", "c"))
    return jax.tree.map(
        lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)),
        TEMPLATE,
        SPECS,
    )


def assert_holds_own_parts(params):
    for leaf, expected in zip(jax.tree.leaves(params), jax.tree.leaves(PARAMS), strict=True):
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(bits(shard.data), bits(expected[shard.index]))


def count_bytes(monkeypatch):
    """Return a list to which the size of all that goes from the host to a device will be added."""
    put, sizes = jax.device_put, []

    def counting(content, device):
        if isinstance(content, np.ndarray):
            sizes.append(content.nbytes)
        return put(content, device)

    monkeypatch.setattr(jax, "device_put", counting)
    return sizes


def check_four_devices(folder):
    """Read and write on four devices; `test_devices.py` calls it in a process that has them."""
    save_shards(folder / "original", TENSORS)
    like = make_template()
    with pytest.MonkeyPatch.context() as monkeypatch:
        sizes = count_bytes(monkeypatch)
        params = read_params(folder / "original", PLAN, like)
    assert_holds_own_parts(params)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == jax.tree.map(lambda leaf: leaf.sharding, like)
    # Nothing is put on a device but what it keeps.
    assert sum(sizes) == sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
    # A mesh in use, of whatever kind, does not get in the way.
    with jax.set_mesh(jax.make_mesh((4,), ("other",))):
        assert_holds_own_parts(read_params(folder / "original", PLAN, like))
        write_params(folder / "spread", PLAN, params, max_shard_bytes=300)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(writing, "CHUNK_BYTES", 100)
        write_params(folder / "in chunks", PLAN, params, max_shard_bytes=300)
    one = jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf), jax.devices()[3]), params)
    write_params(folder / "unspread", PLAN, one, max_shard_bytes=300)
    assert files_of(folder / "spread") == files_of(folder / "unspread") == files_of(folder / "in chunks")


def check_process(process, port, folder):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=process)
    assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 4, 2)
    with pytest.MonkeyPatch.context() as monkeypatch:
        sizes = count_bytes(monkeypatch)
        params = read_params(folder / "original", PLAN, make_template())
    assert_holds_own_parts(params)
    assert sum(sizes) == sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
    write_params(folder / "spread", PLAN, params, max_shard_bytes=300)
    assert_same_bits(read_params(folder / "spread", PLAN, TEMPLATE), PARAMS)
    error, words = (FileExistsError, "not an empty folder") if process == 0 else (OSError, "process 0 could not write")
    with pytest.raises(error, match=words):
        write_params(folder / "spread", PLAN, params)
    error, words = (RuntimeError, "disk is full") if process == 0 else (OSError, "RuntimeError: the disk is full")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(writing, "_header", fail)
        with pytest.raises(error, match=words):
            write_params(folder / "other", PLAN, params, max_shard_bytes=300)
    print("done", file=sys.stderr)


def fail(*_):
    raise RuntimeError("the disk is full")


def start(call, devices):
    """Start a process that imports this file and makes a call."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}",
    }
    program = f"from pathlib import Path; import test_tensors as tests; tests.{call}"
    command = [sys.executable, "-W", "error", "-c", program]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_processes_read_their_own_parts_and_write_together(tmp_path):
    save_shards(tmp_path / "original", TENSORS)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    members = [start(f"check_process({i}, {port}, Path({os.fspath(tmp_path)!r}))", 2) for i in range(2)]
    try:
        for member in members:
            _, errors = member.communicate(timeout=300)
            assert member.returncode == 0 and "done" in errors, errors
    finally:
        for member in members:
            member.kill()
            member.communicate()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["original", "spread"]


# --- folders that are not what was planned ---


def refuse(folder, message, plan=PLAN, like=TEMPLATE, ignored=()):
    with pytest.raises(CheckpointFilesError, match=message):
        read_params(folder, plan, like, ignored)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    refuse(tmp_path / "absent", "absent holds neither model.safetensors nor model.safetensors.index.json$")
    (tmp_path / "pytorch_model.bin").touch()
    refuse(tmp_path, r"nor model.safetensors.index.json \(convert pytorch_model.bin to safetensors first")


def test_an_index_that_names_an_absent_file_is_refused(tmp_path):
    save_shards(tmp_path, TENSORS)
    (tmp_path / "part-1.safetensors").unlink()
    refuse(tmp_path, r"index.json names part-1.safetensors, which the folder lacks: download it again")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {"a": "../b"}}', b'{"weight_map": {"a": 1}}'],
)
def test_an_index_that_is_none_is_refused(content, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    refuse(tmp_path, "model.safetensors.index.json cannot be read as an index")


@pytest.mark.parametrize("damage", [lambda raw: raw[:-1], lambda raw: raw[:5], lambda raw: b"", lambda raw: raw + b"0"])
def test_a_damaged_file_is_refused(damage, tmp_path):
    save_shards(tmp_path, TENSORS)
    path = tmp_path / "part-2.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    refuse(tmp_path, r"part-2.safetensors cannot be read \(.*\): it is damaged or incomplete, download it again")


def test_an_index_that_is_of_other_files_is_refused(tmp_path):
    save_shards(tmp_path, TENSORS)
    path = tmp_path / "part-0.safetensors"
    held = load_file(path)
    save_file({name: held[name] for name in list(held)[1:]}, path)
    refuse(tmp_path, f"part-0.safetensors lacks {re.escape(next(iter(held)))}, which the index says it holds")
    save_file(held | load_file(tmp_path / "part-1.safetensors"), path)
    refuse(tmp_path, "part-1.safetensors holds .* and .* more, as part-0.safetensors does")


def test_missing_and_unknown_tensors_are_named(tmp_path):
    tensors = {name.replace("experts", "mlp"): values for name, values in TENSORS.items()} | {
        "vision.weight": np.ones(1)
    }
    save_file(tensors, tmp_path / "model.safetensors")
    expected = (
        "lacks layers.0.experts.0.gate, layers.0.experts.0.up, layers.0.experts.1.gate and 13 more, which the model "
        "needs, and it holds layers.0.mlp.0.gate, layers.0.mlp.0.up, layers.0.mlp.1.gate and 13 more, which the model"
    )
    refuse(tmp_path, expected, ignored=["vision.*"])
    save_file({**TENSORS, "a": np.ones(1, np.float32)}, tmp_path / "model.safetensors")
    refuse(tmp_path, "it holds a, which the model does not know$")


def test_known_leftovers_are_ignored(tmp_path):
    leftovers = {f"layers.{layer}.rotary_emb.inv_freq": np.ones(3) for layer in range(LAYERS)}
    plan, like = {("scale",): PLAN[("scale",)]}, {"scale": TEMPLATE["scale"]}
    save_file(leftovers | {"norm.weight": TENSORS["norm.weight"]}, tmp_path / "model.safetensors")
    assert_same_bits(read_params(tmp_path, plan, like, ["*.rotary_emb.inv_freq"]), {"scale": PARAMS["scale"]})
    refuse(tmp_path, "layers.0.rotary_emb.inv_freq", plan, like)


def test_a_tensor_of_another_shape_is_refused(tmp_path):
    save_file({**TENSORS, "layers.1.gate": TENSORS["layers.1.gate"][0]}, tmp_path / "model.safetensors")
    refuse(tmp_path, r"layers.1.gate in .*model.safetensors has shape \[8\], where the model needs \[1, 8\]")


@pytest.mark.parametrize(
    ("dtype", "name"), [(np.uint8, "U8"), (ml_dtypes.float8_e4m3fn, "F8_E4M3"), (np.float64, "F64"), (np.int32, "I32")]
)
def test_a_tensor_of_another_dtype_is_refused(dtype, name, tmp_path):
    tensors = {**TENSORS, "layers.0.fused": np.ones((4, 8, 8), np.float32).astype(dtype)}
    save_file(tensors, tmp_path / "model.safetensors")
    refuse(tmp_path, f"layers.0.fused in .* is of dtype {name}, and only BF16, F16, F32 can be read: convert quantized")


def test_quantized_weights_under_names_of_their_own_are_called_by_their_dtype(tmp_path):
    blocks = {"layers.0.fused_blocks": np.ones(3, np.uint8), "layers.0.fused_scales": np.ones(3, np.uint8)}
    save_file({**TENSORS, **blocks}, tmp_path / "model.safetensors")
    refuse(tmp_path, "layers.0.fused_blocks in .* is of dtype U8")


def test_no_data_is_read_before_all_is_checked(tmp_path, monkeypatch):
    save_file({**TENSORS, "layers.1.gate": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(reading, "_MappedFiles", fail)
    refuse(tmp_path, "layers.1.gate")


def test_a_dtype_that_is_no_weight_is_refused(checkpoint):
    like = {**TEMPLATE, "scale": jax.ShapeDtypeStruct((SIZE,), jnp.int32)}
    with pytest.raises(ValueError, match="scale cannot be read as int32"):
        read_params(checkpoint, PLAN, like)


def test_the_headers_of_a_folder_are_listed(checkpoint):
    tensors = list_tensors(checkpoint)
    assert {name: stored.shape for name, stored in tensors.items()} == {name: t.shape for name, t in TENSORS.items()}
    assert {stored.dtype for stored in tensors.values()} == {"BF16"}


# --- what is written, and where ---


def test_files_are_named_filled_and_indexed_as_others_expect(params, tmp_path):
    extra = {"config.json": b"{}\n"}
    write_params(tmp_path / "new", PLAN, params, max_shard_bytes=600, files=extra)
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    found = {}
    files = sorted((tmp_path / "new").glob("*.safetensors"))
    assert [path.name for path in files] == [
        f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)
    ]
    for path in files:
        held = load_file(path)
        assert sum(tensor.nbytes for tensor in held.values()) <= 600
        assert {index["weight_map"][name] for name in held} == {path.name}
        found |= held
    assert_same_bits(found, TENSORS)
    assert index["weight_map"].keys() == TENSORS.keys()
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in TENSORS.values())}
    assert (tmp_path / "new" / "config.json").read_bytes() == b"{}\n"
    # Layer by layer, so that a reader who takes files in turn meets the layers in turn.
    first = [next(name for name, file in index["weight_map"].items() if file == path.name) for path in files]
    layers = [int(name.split(".")[1]) for name in first if name.startswith("layers")]
    assert layers == sorted(layers)


def test_tensors_are_aligned_where_dtypes_differ(tmp_path):
    params = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(3, jnp.float32), "c": jnp.ones(3, jnp.bfloat16)}
    plan = {(name,): [Piece(name)] for name in params}
    write_params(tmp_path / "new", plan, params)
    for stored in list_tensors(tmp_path / "new").values():
        assert stored.offset % (4 if stored.dtype == "F32" else 2) == 0
    assert_same_bits(load_file(tmp_path / "new" / "model.safetensors"), jax.tree.map(np.asarray, params))


def test_a_tensor_that_is_larger_than_a_file_has_one_of_its_own(tmp_path):
    params = {name: jnp.full(size, size, jnp.float32) for name, size in (("a", 2), ("b", 40), ("c", 3))}
    write_params(tmp_path / "new", {(name,): [Piece(name)] for name in params}, params, max_shard_bytes=20)
    held = [list(load_file(path)) for path in sorted((tmp_path / "new").glob("*.safetensors"))]
    assert held == [["a"], ["b"], ["c"]]


PLAN_OF_SCALE = {("scale",): [Piece("norm.weight")]}


def make_scale(dtype=jnp.float32):
    return {"scale": jnp.ones(SIZE, dtype)}


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path, tmp_path / "file"):
        with pytest.raises(FileExistsError, match="exists already and is not an empty folder: choose another one"):
            write_params(place, PLAN_OF_SCALE, make_scale())
    assert files_of(tmp_path) == {"file": b"mine"}


def test_an_empty_folder_and_what_an_interrupted_run_left_are_replaced(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new.unfinished").mkdir()
    (tmp_path / "new.unfinished" / "model-00001-of-00009.safetensors").write_text("half")
    write_params(tmp_path / "new", PLAN_OF_SCALE, make_scale())
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert list(files_of(tmp_path / "new")) == ["model.safetensors"]


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "_header", fail)
    with pytest.raises(RuntimeError, match="the disk is full"):
        write_params(tmp_path / "new", PLAN_OF_SCALE, make_scale())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("make", "dtype", "message"),
    [
        (make_scale, jnp.int8, "scale cannot be written as int8: choose among bfloat16, float16, float32"),
        (lambda: make_scale(jnp.int32), None, "scale cannot be written as int32"),
        (lambda: {"scale": np.ones(SIZE, np.float32)}, None, r"scale is a ndarray: give it as a jax\.Array"),
        (lambda: {**make_scale(), "more": jnp.ones(1)}, None, "the plan has no pieces for more"),
    ],
)
def test_parameters_that_cannot_be_written_are_refused(make, dtype, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_params(tmp_path / "new", PLAN_OF_SCALE, make(), dtype)
    assert not list(tmp_path.iterdir())


def test_one_tensor_is_of_one_dtype(tmp_path):
    parts = {name: Piece("x", "A -> A", within={"A": Within(start, 4)}) for start, name in ((0, "a"), (2, "b"))}
    plan = {(name,): [piece] for name, piece in parts.items()}
    with pytest.raises(ValueError, match="x would be float32 and, by b, bfloat16: choose one"):
        write_params(tmp_path / "new", plan, {"a": jnp.ones(2), "b": jnp.ones(2, jnp.bfloat16)})


def test_an_address_is_refused():
    with pytest.raises(ValueError, match="not to gs://bucket/model: mount that place as one"):
        write_params("gs://bucket/model", PLAN_OF_SCALE, make_scale())
