"""Reference values in float64 numpy, written row by row from the published formulas: the value of
every objective, its closed-form gradient, its metrics, the router-shift ratio and the advantages.
Must never import JAX or the code under test."""

import dataclasses

import numpy as np

DEFAULTS = {
    "rspo": {"gamma_min": 0.8, "clip_low": 0.4, "clip_high": 0.4, "position": "pre_clip"},
    "gmpo": {"clip_low": 0.4, "clip_high": 0.4},
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4},
    "gspo_rs": {"clip_low": 3e-4, "clip_high": 4e-4, "gamma_min": 0.8},
    "grpo": {"clip_low": 0.2, "clip_high": 0.2, "aggregation": "sequence_mean"},
    "grpo_rs": {
        "clip_low": 0.2,
        "clip_high": 0.2,
        "aggregation": "sequence_mean",
        "gamma_min": 0.8,
    },
}
USES_ROUTER_SHIFT = {"rspo", "gspo_rs", "grpo_rs"}


@dataclasses.dataclass(frozen=True)
class Batch:
    """One batch of float32 arrays [B, T], with advantages [B] and a boolean mask [B, T]."""

    log_probs: np.ndarray
    old_log_probs: np.ndarray
    advantages: np.ndarray
    mask: np.ndarray
    router_shift: np.ndarray

    def replace(self, **changes) -> "Batch":
        return dataclasses.replace(self, **changes)

    def rows(self, index) -> "Batch":
        """The same batch with the chosen rows only, in the chosen order."""
        return Batch(*(getattr(self, field.name)[index] for field in dataclasses.fields(self)))

    def arrays(self) -> dict:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def batch_from_log_ratios(log_ratios, advantages, mask=None, router_shift=None) -> Batch:
    """A batch with the given log-ratios: exactly, if they are multiples of 2**-10 or so."""
    log_ratios = np.asarray(log_ratios, np.float32)
    mask = np.ones(log_ratios.shape, bool) if mask is None else np.asarray(mask, bool)
    gamma = np.ones(log_ratios.shape) if router_shift is None else router_shift
    return Batch(
        log_probs=np.minimum(log_ratios, 0.0).astype(np.float32) - np.float32(1.0),
        old_log_probs=np.minimum(-log_ratios, 0.0).astype(np.float32) - np.float32(1.0),
        advantages=np.asarray(advantages, np.float32),
        mask=mask,
        router_shift=np.broadcast_to(np.asarray(gamma, np.float32), log_ratios.shape).copy(),
    )


def random_batch(seed: int, drift: float = 0.3) -> Batch:
    """Six responses of up to seven tokens with random log-ratios in [-drift, drift].

    Row 0 is full, row 1 has no response token, row 2 has one, the others have some of each kind.
    The advantage of row 3 is zero, of row 4 negative, of row 2 of either sign, of the others
    positive and larger, so that the loss is not a small difference of large numbers. The router
    shift has entries above, below and exactly at a floor of 0.8, and entries that are exactly 1.
    """
    rows, tokens = 6, 7
    rng = np.random.default_rng(seed)
    mask = rng.random((rows, tokens)) < 0.7
    mask[0] = True
    mask[1:3] = False
    mask[2, rng.integers(tokens)] = True
    mask[3:, 0], mask[3:, 6] = True, False
    advantages = rng.uniform(0.5, 1.5, rows)
    advantages[2:5] *= [rng.choice([-0.3, 0.3]), 0.0, -0.5]
    log_ratios = rng.uniform(-drift, drift, (rows, tokens))
    start = rng.uniform(-3.0, -0.1, (rows, tokens))
    router_shift = rng.uniform(0.6, 1.0, (rows, tokens))
    router_shift[:, 1] = 1.0
    router_shift[:, 2] = 0.8
    return Batch(
        log_probs=(start + np.minimum(log_ratios, 0.0)).astype(np.float32),
        old_log_probs=(start - np.maximum(log_ratios, 0.0)).astype(np.float32),
        advantages=advantages.astype(np.float32),
        mask=mask,
        router_shift=router_shift.astype(np.float32),
    )


def _responses(name: str, batch: Batch, settings: dict):
    """Yields (row, positions, advantage, log-ratios, floored shift) of each non-empty response."""
    for row in range(batch.mask.shape[0]):
        positions = np.flatnonzero(batch.mask[row])
        if positions.size == 0:
            continue
        new = batch.log_probs[row, positions].astype(np.float64)
        old = batch.old_log_probs[row, positions].astype(np.float64)
        gamma = np.ones(positions.size)
        if name in USES_ROUTER_SHIFT:
            raw = batch.router_shift[row, positions].astype(np.float64)
            gamma = np.maximum(raw, settings["gamma_min"])
        yield row, positions, float(batch.advantages[row]), new - old, gamma


def _log_clip(x, advantage, settings):
    if advantage > 0:
        return np.minimum(x, settings["clip_high"])
    return np.maximum(x, -settings["clip_low"])


def _log_weight(name, d, gamma, advantage, settings):
    """Log of the sequence weight of GMPO and RSPO: the mean of the clipped log-ratios."""
    if name == "gmpo":
        return np.mean(_log_clip(d, advantage, settings))
    if settings["position"] == "pre_clip":
        return np.mean(_log_clip(d + np.log(gamma), advantage, settings))
    sign = np.sign(advantage) if settings["position"] == "post_clip_literal" else 1.0
    return np.mean(_log_clip(d, advantage, settings) + sign * np.log(gamma))


def _surrogate(ratio, advantage, settings):
    """min(ratio * A, clip(ratio) * A) of PPO."""
    clipped = np.clip(ratio, 1.0 - settings["clip_low"], 1.0 + settings["clip_high"])
    return np.minimum(ratio * advantage, clipped * advantage)


def total_and_weight(name: str, batch: Batch, **changes) -> tuple[float, float]:
    """Sum of the loss terms and the number that it is divided by."""
    settings = {**DEFAULTS[name], **changes}
    total, weight = 0.0, 0.0
    for _, _, advantage, d, gamma in _responses(name, batch, settings):
        if name in ("grpo", "grpo_rs"):
            terms = _surrogate(np.exp(d) * gamma, advantage, settings)
            by_token = settings["aggregation"] == "token_mean"
            total -= np.sum(terms) if by_token else np.mean(terms)
            weight += d.size if by_token else 1
        elif name in ("gspo", "gspo_rs"):
            total -= _surrogate(np.exp(np.mean(d + np.log(gamma))), advantage, settings)
            weight += 1
        else:
            total -= advantage * np.exp(_log_weight(name, d, gamma, advantage, settings))
            weight += 1
    return total, weight


def loss(name: str, batch: Batch, **changes) -> float:
    """The loss, -J; zero for a batch without any response token."""
    total, weight = total_and_weight(name, batch, **changes)
    return total / weight if weight else 0.0


def kept(name: str, batch: Batch, **changes) -> np.ndarray:
    """Bool [B, T]: response tokens whose gradient is not cut by the clip. Ties are kept."""
    settings = {**DEFAULTS[name], **changes}
    keep = np.zeros(batch.mask.shape, bool)
    for row, positions, advantage, d, gamma in _responses(name, batch, settings):
        if name in ("grpo", "grpo_rs"):
            x, low, high = (
                np.exp(d) * gamma,
                1.0 - settings["clip_low"],
                1.0 + settings["clip_high"],
            )
        elif name in ("gspo", "gspo_rs"):
            x = np.full(d.size, np.exp(np.mean(d + np.log(gamma))))
            low, high = 1.0 - settings["clip_low"], 1.0 + settings["clip_high"]
        else:
            x = d + np.log(gamma) if settings.get("position") == "pre_clip" else d
            low, high = -settings["clip_low"], settings["clip_high"]
        if advantage > 0:
            keep[row, positions] = x <= high
        elif advantage < 0:
            keep[row, positions] = x >= low
        else:
            keep[row, positions] = True
    return keep


def gradient(name: str, batch: Batch, **changes) -> np.ndarray:
    """Closed form of d loss / d log_probs, float64 [B, T]."""
    settings = {**DEFAULTS[name], **changes}
    keep = kept(name, batch, **changes)
    _, weight = total_and_weight(name, batch, **changes)
    result = np.zeros(batch.mask.shape)
    for row, positions, advantage, d, gamma in _responses(name, batch, settings):
        share = 1.0 / d.size
        if name in ("grpo", "grpo_rs"):
            factor = np.exp(d) * gamma
            share = 1.0 if settings["aggregation"] == "token_mean" else share
        elif name in ("gspo", "gspo_rs"):
            factor = np.exp(np.mean(d + np.log(gamma)))
        else:
            factor = np.exp(_log_weight(name, d, gamma, advantage, settings))
        result[row, positions] = -advantage * share / weight * factor * keep[row, positions]
    return result


def _mean(values) -> float:
    return float(np.mean(values)) if np.size(values) else 0.0


def metrics(name: str, batch: Batch, **changes) -> dict[str, float]:
    """The metrics of a batch that has at least one response token, router shift given."""
    settings = {**DEFAULTS[name], **changes}
    cut = ~kept(name, batch, **changes)
    sign = np.sign(batch.advantages)[:, None] * np.ones(batch.mask.shape)
    selected = batch.mask
    d = batch.log_probs[selected].astype(np.float64) - batch.old_log_probs[selected]
    gamma = batch.router_shift[selected].astype(np.float64)
    result = {
        "clip_fraction": _mean(cut[selected]),
        "clip_fraction_positive": _mean(cut[selected & (sign > 0)]),
        "clip_fraction_negative": _mean(cut[selected & (sign < 0)]),
        "ratio_mean": np.mean(np.exp(d)),
        "ratio_max": np.max(np.exp(d)),
        "approx_kl": np.mean(np.expm1(d) - d),
        "gamma_mean": np.mean(gamma),
        "gamma_min": np.min(gamma),
        "gamma_p10": np.quantile(gamma, 0.1),
    }
    if name in USES_ROUTER_SHIFT:
        floor = np.float64(np.float32(settings["gamma_min"]))
        result["gamma_floor_fraction"] = _mean(gamma < floor)
    return {key: float(value) for key, value in result.items()}


def log_softmax(logits) -> np.ndarray:
    x = np.asarray(logits, np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def router_shift(router_logits, old_router_logits, k: int, layer_aggregation: str = "mean") -> np.ndarray:
    """exp(-aggregate over layers of mean over old top-k experts of |log r - log r_old|), [B, T]."""
    layers, batch, tokens, _ = np.shape(router_logits)
    new, old = log_softmax(router_logits), log_softmax(old_router_logits)
    result = np.zeros((batch, tokens))
    for row in range(batch):
        for token in range(tokens):
            shifts = []
            for layer in range(layers):
                ids = np.argsort(-old[layer, row, token], kind="stable")[:k]
                shifts.append(np.mean(np.abs(new[layer, row, token, ids] - old[layer, row, token, ids])))
            drift = np.mean(shifts) if layer_aggregation == "mean" else np.sum(shifts)
            result[row, token] = np.exp(-drift)
    return result


def grid_router_shift(router_logits, old_router_logits, k: int, layer_aggregation: str = "mean"):
    """The same with both log-probabilities on a grid of 1/1024 nat down to -64, [B, T]: the old one is rounded, and
    the distance to it counts in whole steps, half a step and a hundredth being none yet. And how far, in steps, each
    token's slots stay from any rounding that could have gone the other way."""
    new, old = log_softmax(router_logits), log_softmax(old_router_logits)
    drift, clearance = np.zeros(new.shape[1:3]), np.full(new.shape[1:3], np.inf)
    for layer, row, token in np.ndindex(new.shape[:3]):
        slots = []
        for expert in np.argsort(-old[layer, row, token], kind="stable")[:k]:
            old_exact = min(-old[layer, row, token, expert] * 1024, 65535)
            distance = abs(min(-new[layer, row, token, expert] * 1024, 65535) - np.rint(old_exact)) - 0.01
            slots.append(np.rint(max(distance, 0)) / 1024)
            margins = [abs(x % 1 - 0.5) for x in (old_exact, distance)]
            clearance[row, token] = min(clearance[row, token], *margins)
        drift[row, token] += np.mean(slots)
    return np.exp(-drift / new.shape[0]) if layer_aggregation == "mean" else np.exp(-drift), clearance


def group_advantages(rewards, scale: bool = True) -> np.ndarray:
    """(R - mean) / (unbiased standard deviation + 1e-6) of each group, float64 [prompts, group]."""
    result = []
    for group in np.asarray(rewards, np.float64):
        centered = group - group.sum() / group.size
        if scale:
            centered = centered / (np.sqrt((centered**2).sum() / (group.size - 1)) + 1e-6)
        result.append(centered)
    return np.stack(result)
