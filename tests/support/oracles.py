"""Reference values in float64 NumPy, written row by row from the published formulas.

They cover the value of every objective, its closed-form gradient, its metrics, the router-shift ratio and the
advantages. Nothing here uses JAX or the code under test.
"""

import dataclasses

import numpy as np

_SHIFT = {"gamma_min": None, "gamma_use": "weight"}
_GRPO = _SHIFT | {
    "clip_low": 0.2,
    "clip_high": 0.2,
    "aggregation": "sequence_mean",
    "constant_length": None,
    "dual_clip": None,
}
DEFAULTS = {
    "rspo": {"gamma_min": 0.8, "gamma_use": "weight", "clip_low": 0.4, "clip_high": 0.4, "position": "pre_clip"},
    "gmpo": {"clip_low": 0.4, "clip_high": 0.4},
    "gspo": _SHIFT | {"clip_low": 3e-4, "clip_high": 4e-4},
    "gspo_token": _SHIFT | {"clip_low": 3e-4, "clip_high": 4e-4},
    "grpo": _GRPO,
    "dr_grpo": _GRPO | {"aggregation": "constant_length"},
    "dapo": _GRPO | {"clip_high": 0.28, "aggregation": "token_mean"},
    "cispo": _SHIFT | {"clip_low": None, "clip_high": 0.2},
    "sapo": _SHIFT | {"tau_positive": 1.0, "tau_negative": 1.05},
    "rloo": _GRPO | {"aggregation": "token_mean"},
    "reinforce_pp": _GRPO | {"aggregation": "token_mean"},
}
GRPO_FAMILY = ("grpo", "dr_grpo", "dapo", "rloo", "reinforce_pp")
USES_ROUTER_SHIFT = {"rspo"}
"""The objectives that use the router shift by default."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch of float32 arrays [B, T], with advantages [B] or [B, T] and a boolean mask [B, T]."""

    log_probs: np.ndarray
    old_log_probs: np.ndarray
    advantages: np.ndarray
    mask: np.ndarray
    router_shift: np.ndarray

    def replace(self, **changes) -> "Batch":
        return dataclasses.replace(self, **changes)

    def rows(self, index) -> "Batch":
        """Return the batch with the chosen rows only, in the chosen order."""
        return Batch(*(getattr(self, field.name)[index] for field in dataclasses.fields(self)))

    def arrays(self) -> dict:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def batch_from_log_ratios(log_ratios, advantages, mask=None, router_shift=None) -> Batch:
    """Return a batch with the given log-ratios; they are exact if they are multiples of 2**-10 or so."""
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
    """Return six responses of up to seven tokens with random log-ratios in [-drift, drift].

    Row 0 is full, row 1 has no response token, row 2 has one, and the others have tokens and padding. The advantage of
    row 3 is zero, that of row 4 negative, that of row 2 of either sign. Those of the others are positive and larger, so
    that the loss is not a small difference of large numbers. The router shift has entries above, below and exactly at a
    floor of 0.8, and entries that are exactly 1.
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


@dataclasses.dataclass(frozen=True)
class _Response:
    """The float64 inputs of a formula for one response that has tokens."""

    row: int
    positions: np.ndarray
    advantages: np.ndarray  # of its tokens
    log_probs: np.ndarray
    d: np.ndarray  # log-ratios
    gamma: np.ndarray  # floored router shift, 1 where there is none
    learns: np.ndarray  # False where a mask leaves the token out

    @property
    def advantage(self) -> float:
        """The advantage of a response whose tokens share one."""
        assert np.all(self.advantages == self.advantages[0])
        return float(self.advantages[0])


def _responses(batch: Batch, settings: dict):
    """Yield the responses that have tokens."""
    for row in range(batch.mask.shape[0]):
        at = np.flatnonzero(batch.mask[row])
        if at.size == 0:
            continue
        new = batch.log_probs[row, at].astype(np.float64)
        d = new - batch.old_log_probs[row, at].astype(np.float64)
        advantages = np.broadcast_to(batch.advantages[row], batch.mask.shape[1:])[at].astype(np.float64)
        gamma, learns = np.ones(at.size), np.ones(at.size, bool)
        if settings.get("gamma_min") is not None:
            raw = batch.router_shift[row, at].astype(np.float64)
            if settings["gamma_use"] == "weight":
                gamma = np.maximum(raw, settings["gamma_min"])
            else:
                learns = raw >= np.float64(np.float32(settings["gamma_min"]))
                d = np.where(learns, d, 0.0)
        yield _Response(row, at, advantages, new, d, gamma, learns)


def _aggregation(name: str, settings: dict) -> str:
    return settings.get("aggregation", "token_mean" if name == "cispo" else "sequence_mean")


def token_shares(name: str, batch: Batch, **changes) -> np.ndarray:
    """Return the share of each token in the mean over the batch, float64 [B, T]."""
    settings = {**DEFAULTS[name], **changes}
    lengths = batch.mask.sum(axis=1, keepdims=True)
    if _aggregation(name, settings) == "token_mean":
        return batch.mask / max(lengths.sum(), 1)
    share = 1 / np.maximum(lengths, 1)
    if _aggregation(name, settings) == "constant_length":
        share = 1 / (settings["constant_length"] or batch.mask.shape[1])
    return batch.mask * share / max(np.count_nonzero(lengths), 1)


def weight(name: str, batch: Batch, **changes) -> float:
    """Return the divisor of the sum of the loss terms: the number of tokens, or of responses that have some."""
    settings = {**DEFAULTS[name], **changes}
    by_token = _aggregation(name, settings) == "token_mean"
    return float(batch.mask.sum() if by_token else batch.mask.any(axis=1).sum())


def bounded_exp(x):
    """Return e^x up to 20 nats, and its tangent there beyond."""
    return np.exp(np.minimum(x, 20.0)) * (1.0 + np.maximum(x - 20.0, 0.0))


def bounded_slope(x):
    """Return the derivative of `bounded_exp`."""
    return np.exp(np.minimum(x, 20.0))


def _log_clip(x, advantage, settings):
    if advantage > 0:
        return np.minimum(x, settings["clip_high"])
    return np.maximum(x, -settings["clip_low"])


def _log_weight(name, response: _Response, settings):
    """Return the log of the sequence weight of GMPO and RSPO: the mean of the clipped log-ratios."""
    d, log_gamma, advantage = response.d, np.log(response.gamma), response.advantage
    if name == "gmpo":
        return np.mean(_log_clip(d, advantage, settings))
    if settings["position"] == "pre_clip":
        return np.mean(_log_clip(d + log_gamma, advantage, settings))
    sign = np.sign(advantage) if settings["position"] == "post_clip_literal" else 1.0
    return np.mean(_log_clip(d, advantage, settings) + sign * log_gamma)


def _surrogate(ratio, advantages, settings):
    """Return min(ratio * A, clip(ratio) * A) of PPO, and for A < 0 no less than dual_clip * A."""
    clipped = np.clip(ratio, 1.0 - settings["clip_low"], 1.0 + settings["clip_high"])
    value = np.minimum(ratio * advantages, clipped * advantages)
    if settings.get("dual_clip") is None:
        return value
    return np.where(advantages < 0, np.maximum(value, settings["dual_clip"] * advantages), value)


def _sequence_log_ratio(response: _Response) -> float:
    return np.mean(response.d + np.log(response.gamma))


def _clipped_weight(ratio, settings):
    """Return CISPO's weight, which has no gradient."""
    low = -np.inf if settings["clip_low"] is None else 1.0 - settings["clip_low"]
    return np.clip(ratio, low, 1.0 + settings["clip_high"])


def _temperature(response: _Response, settings):
    return np.where(response.advantages > 0, settings["tau_positive"], settings["tau_negative"])


def _sigmoid(x):
    return np.exp(-np.logaddexp(0.0, -x))


def _token_values(name, response: _Response, settings, fixed: _Response):
    """Return J of each token; where a formula stops the gradient, with the ratios of `fixed`."""
    advantages = response.advantages
    if name in GRPO_FAMILY:
        return _surrogate(bounded_exp(response.d) * response.gamma, advantages, settings)
    if name == "gspo_token":
        moved = np.where(response.learns, response.log_probs - fixed.log_probs, 0.0)
        return _surrogate(bounded_exp(_sequence_log_ratio(fixed) + moved), advantages, settings)
    if name == "cispo":
        log_probs = np.where(response.learns, response.log_probs, fixed.log_probs)
        return _clipped_weight(bounded_exp(fixed.d), settings) * response.gamma * advantages * log_probs
    if name == "sapo":
        tau = _temperature(response, settings)
        return 4 / tau * _sigmoid(tau * (np.exp(response.d) * response.gamma - 1)) * advantages
    if name == "gspo":
        ratio = bounded_exp(_sequence_log_ratio(response))
        return np.full(advantages.shape, _surrogate(ratio, response.advantage, settings))
    return np.full(advantages.shape, response.advantage * bounded_exp(_log_weight(name, response, settings)))


def _token_factors(name, response: _Response, settings):
    """Return the factor of A in n_i times the gradient of the mean over tokens, clips aside."""
    if name in GRPO_FAMILY:
        return bounded_slope(response.d) * response.gamma
    if name == "cispo":
        return _clipped_weight(bounded_exp(response.d), settings) * response.gamma
    if name == "sapo":
        tau, ratio = _temperature(response, settings), np.exp(response.d) * response.gamma
        return 4 * _sigmoid(tau * (ratio - 1)) * _sigmoid(-tau * (ratio - 1)) * ratio
    if name in ("gspo", "gspo_token"):
        return np.full(response.d.size, bounded_slope(_sequence_log_ratio(response)))
    return np.full(response.d.size, bounded_slope(_log_weight(name, response, settings)))


def row_losses(name: str, batch: Batch, penalty=None, fixed: Batch | None = None, **changes) -> np.ndarray:
    """Return what each row adds to the loss, -J plus the mean penalty, float64 [B].

    Where a formula stops the gradient, the ratios of `fixed` are used, so that differences of this function follow it.
    """
    settings = {**DEFAULTS[name], **changes}
    shares = token_shares(name, batch, **changes)
    result = np.zeros(len(batch.mask))
    if penalty is not None:
        result += np.sum(np.where(batch.mask, shares * penalty, 0.0), axis=1)
    pairs = zip(*(_responses(b, settings) for b in (batch, fixed or batch)), strict=True)
    for response, at_fixed in pairs:
        values = _token_values(name, response, settings, at_fixed)
        result[response.row] -= np.sum(shares[response.row, response.positions] * values)
    return result


def loss(name: str, batch: Batch, penalty=None, **changes) -> float:
    """Return the loss, -J plus the mean penalty; zero for a batch without any response token."""
    return float(row_losses(name, batch, penalty, **changes).sum())


def kept(name: str, batch: Batch, **changes) -> np.ndarray:
    """Return bool [B, T], True on the response tokens that the clip leaves alone. Ties are kept."""
    settings = {**DEFAULTS[name], **changes}
    keep = np.zeros(batch.mask.shape, bool)
    for response in _responses(batch, settings):
        d, gamma, advantages, at = response.d, response.gamma, response.advantages, (response.row, response.positions)
        if name == "sapo":
            keep[at] = True
            continue
        if name == "cispo":
            ratio = bounded_exp(d)
            keep[at] = ratio == _clipped_weight(ratio, settings)
            continue
        if name in (*GRPO_FAMILY, "gspo", "gspo_token"):
            log_ratio = _sequence_log_ratio(response)
            x = bounded_exp(d) * gamma if name in GRPO_FAMILY else np.full(d.size, bounded_exp(log_ratio))
            low, high = 1.0 - settings["clip_low"], 1.0 + settings["clip_high"]
        else:
            x = d + np.log(gamma) if settings.get("position") == "pre_clip" else d
            low, high = -settings["clip_low"], settings["clip_high"]
        highest = np.inf if settings.get("dual_clip") is None else settings["dual_clip"]
        good, bad = x <= high, (x >= low) & (x <= highest)
        keep[at] = np.where(advantages > 0, good, np.where(advantages < 0, bad, True))
    return keep


def gradient(name: str, batch: Batch, **changes) -> np.ndarray:
    """Return d loss / d log_probs in closed form, float64 [B, T]."""
    settings = {**DEFAULTS[name], **changes}
    shares = token_shares(name, batch, **changes)
    keep = np.ones(batch.mask.shape, bool) if name == "cispo" else kept(name, batch, **changes)
    result = np.zeros(batch.mask.shape)
    for response in _responses(batch, settings):
        at = (response.row, response.positions)
        active = keep[at] & response.learns
        # A cut ratio may be infinite.
        factors = np.where(active, _token_factors(name, response, settings), 0.0)
        result[at] = -response.advantages * shares[at] * factors
    return result


def _mean(values) -> float:
    return float(np.mean(values)) if np.size(values) else 0.0


def metrics(name: str, batch: Batch, **changes) -> dict[str, float]:
    """Return the metrics of a batch that has a response token, computed with its router shift."""
    settings = {**DEFAULTS[name], **changes}
    cut = ~kept(name, batch, **changes)
    advantages = batch.advantages if batch.advantages.ndim == 2 else batch.advantages[:, None]
    sign = np.sign(advantages) * np.ones(batch.mask.shape)
    cut &= sign != 0
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
    if settings.get("gamma_min") is not None:
        floor = np.float64(np.float32(settings["gamma_min"]))
        result["gamma_floor_fraction"] = _mean(gamma < floor)
    return {key: float(value) for key, value in result.items()}


def log_softmax(logits) -> np.ndarray:
    """Return the log-softmax over the last axis, in float64."""
    x = np.asarray(logits, np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def router_shift(router_logits, old_router_logits, k: int, layer_aggregation: str = "mean") -> np.ndarray:
    """Return exp(-aggregate over layers of the mean over old top-k experts of |log r - log r_old|), [B, T]."""
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
    """Return the router shift on the grid that a trace stores, and its distance from an ambiguous rounding.

    Both log-probabilities lie on a grid of 1/1024 nat down to -64: the old one is rounded, and the distance to it
    counts in whole steps, half a step plus a hundredth being none yet.

    Returns:
      The router-shift ratio, [B, T], and the smallest distance, in steps, of a token's slots from such a rounding,
      [B, T].
    """
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
    """Return (R - mean) / (unbiased standard deviation + 1e-6) of each group, float64 [prompts, group]."""
    result = []
    for group in np.asarray(rewards, np.float64):
        centered = group - group.sum() / group.size
        if scale:
            centered = centered / (np.sqrt((centered**2).sum() / (group.size - 1)) + 1e-6)
        result.append(centered)
    return np.stack(result)


def leave_one_out_advantages(rewards) -> np.ndarray:
    """Return R - the mean of the other rewards of the group, float64 [prompts, group]."""
    rewards = np.asarray(rewards, np.float64)
    result = np.zeros(rewards.shape)
    for row, column in np.ndindex(rewards.shape):
        others = [rewards[row, other] for other in range(rewards.shape[1]) if other != column]
        result[row, column] = rewards[row, column] - sum(others) / len(others)
    return result


def batch_advantages(rewards) -> np.ndarray:
    """Return (R - mean) / (unbiased standard deviation + 1e-6) of all rewards together, float64 [prompts, group]."""
    flat = np.asarray(rewards, np.float64).reshape(1, -1)
    return group_advantages(flat).reshape(np.shape(rewards))
