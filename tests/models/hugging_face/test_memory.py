"""Host memory that reading and writing a checkpoint take: about that of a tensor, whatever the model.

Processes of their own read and write a checkpoint of 4.4 GB in several files and watch their anonymous memory. On the
CPU the parameters are such memory themselves, and their size is subtracted. The parameter of all experts is larger than
the limit, so that a host that gathered it would be caught.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
GIGABYTE = 10**9

PROGRAM = """
import json, sys, threading, time
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from models.hugging_face.reading import list_tensors, read_params
from models.hugging_face.tensors import Piece, flat
from models.hugging_face.writing import write_params

LAYERS, EXPERTS, VOCABULARY, SIZE, HIDDEN = 7, 16, 160_000, 2048, 4096

def of(layer, expert, name):
    return f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"

both = [(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
plan = {
    ("embedding",): [Piece("model.embed_tokens.weight")],
    ("gate_up",): [
        Piece(of(layer, expert, name), "F D -> D F", (layer, expert, None, index))
        for layer, expert in both
        for index, name in enumerate(("gate", "up"))
    ],
    ("norm",): [Piece("model.norm.weight")],
}
shapes = {
    "embedding": ((VOCABULARY, SIZE), P(None, "x")),
    "gate_up": ((LAYERS, EXPERTS, SIZE, 2, HIDDEN), P(None, "x", "y")),
    "norm": ((SIZE,), P()),
}

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon:"))

class Watch:
    def __enter__(self):
        self.start = self.peak = anonymous()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.over.wait(0.002):
            self.peak = max(self.peak, anonymous())

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()

    @property
    def grown(self):
        return self.peak - self.start

if sys.argv[1] == "plan":
    from models.hugging_face.tensors import place_pieces
    placed = place_pieces(plan, {(name,): shape for name, (shape, _) in shapes.items()})
    print(json.dumps({piece.name: piece.shape for pieces in placed.values() for piece in pieces}))
else:
    folder, copy = sys.argv[1:]
    mesh = jax.make_mesh((2, jax.device_count() // 2) if jax.device_count() > 1 else (1, 1), ("x", "y"))
    template = {
        name: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for name, (shape, spec) in shapes.items()
    }
    with Watch() as reading:
        params = read_params(folder, plan, template)
    size = sum(shard.data.nbytes for leaf in params.values() for shard in leaf.addressable_shards)
    with Watch() as writing:
        write_params(copy, plan, params, max_shard_bytes=10**9)
    print(json.dumps({"reading": reading.grown - size, "writing": writing.grown, "parameters": size}))
"""


def run(*arguments, devices=1):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def write_files(folder, shapes, room=GIGABYTE):
    """Write random numbers in the format of safetensors, file after file, and the index."""
    # Without this bit of the exponent there is no NaN, of whose bits XLA keeps only that it is one.
    bits = np.random.default_rng(0).integers(0, 2**16, 2**23, np.uint16) & np.uint16(0xBFFF)
    groups = [[]]
    left = room
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        if size > left and groups[-1]:
            groups.append([])
            left = room
        groups[-1].append((name, shape, size))
        left -= size
    weight_map = {}
    for number, group in enumerate(groups):
        file = f"model-{number + 1:05}-of-{len(groups):05}.safetensors"
        header, end = {}, 0
        for name, shape, size in group:
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
            weight_map[name] = file
            end += size
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            for index, (_, _, size) in enumerate(group):
                rolled = np.roll(bits, 1000 * number + index)  # no two tensors alike
                for start in range(0, size // 2, len(rolled)):
                    opened.write(rolled[: size // 2 - start].data)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def contents(folder):
    """Return the bits of each tensor in the files, by name."""
    found = {}
    for file in folder.glob("*.safetensors"):
        raw = np.memmap(file, np.uint8, "r")
        length = int.from_bytes(raw[:8].tobytes(), "little")
        header = json.loads(raw[8 : 8 + length].tobytes())
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            found[name] = raw[8 + length + start : 8 + length + stop]
    return found


def test_reading_and_writing_take_the_memory_of_a_tensor(tmp_path):
    shapes = run("plan")
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write_files(folder, shapes)
    largest = max(2 * int(np.prod(shape)) for shape in shapes.values())
    try:
        for devices in (1, 4):
            copy = tmp_path / "copy"
            found = run(folder, copy, devices=devices)
            print(devices, "devices:", found, "largest tensor:", largest)
            assert found["parameters"] >= 4 * GIGABYTE
            assert found["reading"] <= largest + 2 * GIGABYTE
            assert found["writing"] <= largest + 2 * GIGABYTE
            expected, written = contents(folder), contents(copy)
            assert expected.keys() == written.keys()
            for name, bits in expected.items():
                assert np.array_equal(bits, written[name]), name
            del expected, written
            for file in copy.iterdir():
                file.unlink()
            copy.rmdir()
    finally:
        for file in tmp_path.rglob("*.safetensors"):
            file.unlink()
