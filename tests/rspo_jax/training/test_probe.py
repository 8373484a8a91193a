"""Probes of all objectives' gradients: against gradients of every part that are written down in float64 NumPy, for a
policy that is a table. Knows no real model and no run."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracles

from rspo_jax.objectives import AGGREGATIONS, CorrectionConfig, RegularizerConfig
from rspo_jax.training import LearnerConfig, TrainerConfig, check_learner, score
from rspo_jax.training.loss import part_terms
from rspo_jax.training.probe import PROBED, probe
from rspo_jax.training.update import route_to_host, split_parts
from rspo_jax.types import ModelOutput, PackedBatch, PackedRows, RouterReading

VOCABULARY, LAYERS, EXPERTS, K = 6, 2, 4, 2
ROWS, WIDTH, MINI_BATCHES, PARTS = 12, 5, 3, 6  # the middle of the parts is inside of a mini-batch
KINDS = ("cosine", "snr", "variance", "norm")


def read_layers(reader, router_logits):
    def read_layer(carry, layer):
        read, layer_logits = layer
        return read(carry, layer_logits, jax.lax.top_k(layer_logits, K)[1])

    if reader is None:
        return None
    return RouterReading(*jax.lax.scan(read_layer, reader.carry, (reader.read, router_logits)))


class Table:
    """Logits [V, V], scaled by a gain, and a router [L, V, E] that moves γ and nothing else."""

    router_score = "softmax"

    def apply(
        self, variables, tokens, positions=None, segment_ids=None, cache=None, router_reader=None, forced_route=None
    ):
        params = variables["params"]
        router_logits = params["router"][:, tokens]
        logits = params["logits"][tokens] * params["gain"]
        return ModelOutput(logits, router_logits, cache, reading=read_layers(router_reader, router_logits))

    def router_params(self):
        return {"logits": False, "router": True, "gain": True}  # for a router with a gradient


TABLE = Table()


def table(seed, drift=0.0):
    rng, away = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    shapes = {"logits": (VOCABULARY, VOCABULARY), "router": (LAYERS, VOCABULARY, EXPERTS)}
    params = {
        name: (rng.normal(size=shape) + scale * drift * away.normal(size=shape)).astype(np.float32)
        for (name, shape), scale in zip(shapes.items(), (1, 3), strict=True)
    }
    return params | {"gain": np.float32(1)}


def make_batch(seed):
    """The parts of a rollout, one response a row; one of the twelve has no token."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, VOCABULARY, (ROWS, WIDTH + 1)).astype(np.int32)
    mask = np.arange(WIDTH) >= rng.integers(0, WIDTH, (ROWS, 1))
    mask[3] = False

    def cut(array):
        return array.reshape(PARTS, ROWS // PARTS, *array.shape[1:])

    inputs, targets = cut(tokens[:, :-1]), cut(tokens[:, 1:])
    places = np.arange(ROWS // PARTS * WIDTH, dtype=np.int32).reshape(-1, WIDTH)
    return PackedBatch(
        PackedRows(inputs, targets, np.ones_like(inputs)),
        np.broadcast_to(places, (PARTS, *places.shape)).copy(),
        cut(mask),
        cut(np.where(mask, -rng.uniform(0.5, 3, mask.shape), 0).astype(np.float32)),
        cut(rng.normal(size=ROWS).astype(np.float32)),
    )


def scored(seed, params, learner=LearnerConfig()):
    """As mini-batches."""
    return [score(TABLE, params, part, learner)[0] for part in split_parts(make_batch(seed), MINI_BATCHES)]


OLD, NOW = table(0), table(0, drift=0.1)


# --- against float64 ---


def part_gradients(name, seed, params, old_params, **settings):
    """float64 [parts, all parameters]: the shares of the parts in the gradient of the batch, by hand."""
    batch = jax.tree.map(lambda leaf: np.asarray(leaf).reshape(ROWS, *leaf.shape[2:]), make_batch(seed))
    inputs, targets = batch.rows.inputs, batch.rows.targets
    everywhere, old_everywhere = (oracles.log_softmax(tree["logits"]) for tree in (params, old_params))
    log_probs, old_log_probs = (all_of[inputs, targets] for all_of in (everywhere, old_everywhere))
    gamma, _ = oracles.grid_router_shift(params["router"][:, inputs], old_params["router"][:, inputs], K)
    arrays = oracles.Batch(log_probs, old_log_probs, batch.advantages, batch.mask, gamma)
    by_log_prob = oracles.gradient(name, arrays, **settings)
    gradients = np.zeros((PARTS, VOCABULARY * VOCABULARY + 1))
    for row, position in zip(*np.nonzero(batch.mask), strict=True):
        before, after = inputs[row, position], targets[row, position]
        by_logits = np.eye(VOCABULARY)[after] - np.exp(everywhere[before])
        by_table = np.zeros((VOCABULARY, VOCABULARY))
        by_table[before] = by_logits
        by_gain = by_logits @ params["logits"][before].astype(np.float64)
        gradients[row * PARTS // ROWS] += by_log_prob[row, position] * np.append(by_table, by_gain)
    return gradients


def cosine(one, other):
    return one @ other / np.linalg.norm(one) / np.linalg.norm(other)


def spread(shares):
    """Variance and signal-to-noise ratio, from the definitions."""
    each = PARTS * shares
    mean = each.mean(axis=0)
    variance = ((each - mean) ** 2).sum() / (PARTS - 1)
    return variance, mean @ mean / (variance / PARTS)


SETTINGS = {"grpo_rs": ("grpo", {"gamma_min": 0.8}), "gspo_rs": ("gspo", {"gamma_min": 0.8})}


@pytest.fixture(scope="module")
def measured():
    return probe(TABLE, NOW, scored(1, OLD), scored(2, NOW), LearnerConfig())


def test_every_objective_has_its_metrics(measured):
    of_references = {f"probe_reference_{kind}_{way}" for kind in ("cosine", "snr", "norm") for way in AGGREGATIONS}
    assert measured.keys() == {f"probe_{kind}_{name}" for kind in KINDS for name in PROBED} | of_references
    assert all(type(value) is float and math.isfinite(value) for value in measured.values())
    assert len({measured[f"probe_cosine_{name}"] for name in ("rspo", "gmpo", "grpo", "grpo_rs", "gspo", "sapo")}) == 6


@pytest.mark.parametrize("name", PROBED)
def test_an_objective_against_the_gradients_of_its_parts(name, measured):
    objective, settings = SETTINGS.get(name, (name, {}))
    shares = part_gradients(objective, 1, NOW, OLD, **settings)
    way = PROBED[name].config.aggregation
    reference = part_gradients("grpo", 2, NOW, NOW, aggregation=way).sum(axis=0)
    gradient = shares.sum(axis=0)
    variance, ratio = spread(shares)
    expected = (cosine(gradient, reference), ratio, variance, np.linalg.norm(gradient) / np.linalg.norm(reference))
    actual = [measured[f"probe_{kind}_{name}"] for kind in KINDS]
    np.testing.assert_allclose(actual, expected, rtol=2e-5)


@pytest.mark.parametrize("way", AGGREGATIONS)
def test_a_reference_against_the_gradients_of_its_parts(way, measured):
    shares = part_gradients("grpo", 2, NOW, NOW, aggregation=way)
    halves = shares[: PARTS // 2].sum(axis=0), shares[PARTS // 2 :].sum(axis=0)
    expected = cosine(*halves), spread(shares)[1], np.linalg.norm(shares.sum(axis=0))
    actual = [measured[f"probe_reference_{kind}_{way}"] for kind in ("cosine", "snr", "norm")]
    np.testing.assert_allclose(actual, expected, rtol=2e-5)


def test_on_policy_all_objectives_are_reinforce():
    batches = scored(1, OLD)
    measured = probe(TABLE, OLD, batches, batches, LearnerConfig())
    for name, variant in PROBED.items():
        assert measured[f"probe_cosine_{name}"] == pytest.approx(1, abs=1e-5)
        assert measured[f"probe_norm_{name}"] == pytest.approx(1, rel=1e-5)
        same = measured[f"probe_reference_snr_{variant.config.aggregation}"]
        assert measured[f"probe_snr_{name}"] == pytest.approx(same, rel=1e-4)


def test_nothing_to_learn_has_no_direction():
    def without(batch):
        return batch._replace(batch=batch.batch._replace(advantages=0 * batch.batch.advantages))

    batches = [without(batch) for batch in scored(1, OLD)]
    measured = probe(TABLE, NOW, batches, scored(2, NOW), LearnerConfig())
    assert all(measured[f"probe_variance_{name}"] == measured[f"probe_norm_{name}"] == 0 for name in PROBED)
    assert all(math.isnan(measured[f"probe_{kind}_{name}"]) for name in PROBED for kind in ("cosine", "snr"))


def test_a_gradient_is_that_of_the_loss_with_the_settings_of_the_run():
    """All but penalties: against the loss of an update, by the norm."""
    plain = LearnerConfig(
        "gspo",
        PROBED["gspo_rs"].config,
        correction=CorrectionConfig("tis"),
        layer_aggregation="sum",
        temperature=0.7,
        routing="frozen",
    )
    learner = dataclasses.replace(plain, regularizers=RegularizerConfig(entropy_coefficient=0.3))
    old, fresh = scored(1, OLD, learner), scored(2, NOW, learner)
    measured = probe(TABLE, NOW, old, fresh, learner)
    parts = jax.tree.map(lambda *leaves: jnp.concatenate(leaves).reshape(-1, *leaves[0].shape[2:]), *old)
    parts = parts._replace(batch=parts.batch._replace(places=jnp.arange(ROWS * WIDTH).reshape(ROWS, WIDTH)))

    def loss(params):
        mean, _ = part_terms(TABLE, params, parts, plain)
        return mean.reduce()

    gradient = jax.jit(jax.grad(loss))(NOW)
    assert abs(gradient["gain"]) > 0.01  # a frozen parameter here
    norm = measured["probe_norm_gspo_rs"] * measured["probe_reference_norm_sequence_mean"]
    assert norm == pytest.approx(float(jnp.linalg.norm(gradient["logits"])), rel=1e-5)
    on_host = dataclasses.replace(learner, route_on_host=True)
    old, fresh = ([route_to_host(one) for one in batches] for batches in (old, fresh))
    assert probe(TABLE, NOW, old, fresh, on_host) == measured


def test_one_part_is_refused():
    (first, *_), fresh = scored(1, OLD), scored(2, NOW)
    alone = jax.tree.map(lambda leaf: leaf[:1], first)
    with pytest.raises(ValueError, match="no variance over a single part: use 2 or more mini_batches"):
        probe(TABLE, NOW, [alone], fresh, LearnerConfig())


def test_configs_that_are_refused():
    with pytest.raises(ValueError, match="probe_every must be 0 or more, got -1"):
        TrainerConfig(probe_every=-1)
    alone = TrainerConfig(probe_every=1, mini_batches=1)
    with pytest.raises(ValueError, match=r"no variance over a single part.*or leave probe_every at 0"):
        check_learner(alone, LearnerConfig())
    check_learner(alone, LearnerConfig(micro_batches=2))
    check_learner(dataclasses.replace(alone, probe_every=0), LearnerConfig())
