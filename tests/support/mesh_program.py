"""The program of `test_mesh.py`: computes the same things on one device and on meshes of eight, and prints how far they
are apart, as JSON. Its argument is a JSON object: name -> sizes of a mesh."""

import functools
import json
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

import models
import models.expert_parallel
from rspo_jax.records.checkpoint import Checkpoints
from rspo_jax.rollouts import Packing, SamplerConfig, generate, pack
from rspo_jax.sharding import MeshConfig, from_own, make_mesh
from rspo_jax.statistics import reduce
from rspo_jax.training import LearnerConfig, OptimizerConfig, init_train_state, score, train_state_shardings, update
from rspo_jax.types import RolloutBatch

CONFIG = models.TransformerConfig(
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    num_experts=8,
    num_experts_per_token=3,
    expert_size=16,
)
POLICY, OPTIMIZER = models.Transformer(CONFIG), OptimizerConfig(learning_rate=1e-3, warmup_updates=0)
LEARNER, SAMPLER = LearnerConfig(micro_batches=2), SamplerConfig(max_new_tokens=6)
RESPONSES, PROMPT, RESPONSE = 32, 5, 12


def make_rollout():
    """Prompts of equal length with responses of different length, on the mesh in use."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, RESPONSE + 1, RESPONSES)
    response = np.arange(RESPONSE)[None] < lengths[:, None]
    mask = np.concatenate([np.zeros((RESPONSES, PROMPT - 1), bool), response], axis=1)
    segment_ids = np.concatenate([np.ones((RESPONSES, PROMPT), np.int32), response.astype(np.int32)], axis=1)
    return RolloutBatch(
        tokens=from_own(rng.integers(2, 64, (RESPONSES, PROMPT + RESPONSE)).astype(np.int32), "rows", None),
        segment_ids=from_own(segment_ids, "rows", None),
        mask=from_own(mask, "rows", None),
        sampler_log_probs=from_own(np.zeros(mask.shape, np.float32), "rows", None),
        advantages=from_own(rng.normal(size=RESPONSES).astype(np.float32), "rows"),
    )


def init(key):
    """A state whose router prefers one expert, as trained ones do: the fullest device then needs several rounds."""
    params = models.init_params(CONFIG, key)
    router = params["layers"]["moe"]["router"]
    params["layers"]["moe"]["router"] = router.at[:, :, 0].add(jnp.full(router.shape[:2], 0.3))
    return init_train_state(params, OPTIMIZER)


def run(mesh_config, devices, folder):
    """What one mesh makes of it: numbers to compare, whether the state stayed in its place, and where that is."""
    mesh = make_mesh(mesh_config, devices)
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(init, jax.random.key(0))
        shardings = train_state_shardings(POLICY, OPTIMIZER, shapes, mesh)
        state = jax.jit(init, out_shardings=shardings)(jax.random.key(0))
        batch, _ = pack(make_rollout(), RESPONSE, np.arange(RESPONSES), Packing(micro_batches=2, row_length=32))
        prompts = np.random.default_rng(1).integers(2, 64, (16, PROMPT)).astype(np.int32)
        keys = jax.random.split(jax.random.key(3), 16)
        rows = (from_own(array, "rows", None) for array in (prompts, prompts > 0))
        drawn = generate(POLICY, state.params, *rows, keys, SAMPLER, (1,))
        old, score_statistics = score(POLICY, state.params, batch, LEARNER)
        moved = jax.tree.map(lambda leaf: leaf * jnp.float32(1.05), state.params)  # so that γ is below 1
        state = state._replace(params=jax.device_put(moved, shardings.params))
        state, statistics = update(POLICY, OPTIMIZER, state, old, LEARNER)
        kept = jax.tree.map(lambda leaf, where: leaf.sharding.is_equivalent_to(where, leaf.ndim), state, shardings)
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(1, state, {})
        found = {
            "tokens": drawn.tokens,
            "sampler_mask": drawn.mask,
            "old_log_probs": old.old_log_probs,
            "state": state,
            "score": numbers(score_statistics),
            "statistics": numbers(statistics),
        }
        template = jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes, shardings
        )
        return jax.device_get(found), all(jax.tree.leaves(kept)), template


def numbers(statistics):
    """Finished statistics; of histograms the number of tokens, as one beside an edge may fall to either side of it."""
    reduced = reduce(statistics)
    return {name: jnp.sum(value) if name.endswith("histogram") else value for name, value in reduced.items()}


def distance(name, value, expected):
    """‖value − expected‖ / ‖expected‖; of scalars and statistics, which may cancel to almost nothing, relative to at
    least 1."""
    difference = np.linalg.norm(np.asarray(value, np.float64) - np.asarray(expected, np.float64))
    size = np.linalg.norm(expected)
    return float(difference / (size if name.startswith("state/") and np.ndim(expected) else max(1.0, size)))


def restores(folder, template, state):
    """Whether the newest checkpoint of a folder, read to where the template says, is this state, bit for bit."""
    with Checkpoints(folder) as checkpoints:
        restored = checkpoints.restore_newest(template)
    same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), jax.device_get(restored.state), state)
    return all(jax.tree.leaves(same))


def main(meshes):
    # So few tokens would be gathered; half of the meshes are to exchange them.
    models.expert_parallel.GATHER_UP_TO_TOKENS = 2
    report = {}
    with tempfile.TemporaryDirectory() as folder:
        one, _, one_template = run(MeshConfig(), jax.devices()[:1], f"{folder}/one")
        before, state_before = f"{folder}/one", one["state"]
        for index, (name, sizes) in enumerate(meshes.items()):
            own = f"{folder}/{index}"
            found, kept, template = run(MeshConfig(**sizes), jax.devices(), own)
            expected = dict(jax.tree_util.tree_leaves_with_path(one))
            keystr = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
            report[name] = {
                "distances": {
                    keystr(path): distance(keystr(path), value, expected[path])
                    for path, value in jax.tree_util.tree_leaves_with_path(found)
                    if value.dtype.kind == "f"
                },
                "equal": {
                    keystr(path): bool(np.array_equal(value, expected[path]))
                    for path, value in jax.tree_util.tree_leaves_with_path(found)
                    if value.dtype.kind != "f"
                },
                "kept": kept,
                "restored": {
                    "on one device": restores(own, one_template, found["state"]),
                    "on the mesh itself": restores(own, template, found["state"]),
                    "from the mesh before, on this one": restores(before, template, state_before),
                },
            }
            before, state_before = own, found["state"]
    print(json.dumps(report))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
