"""Plants single faults in the pure rooms and counts those that their fast tests notice.

    make mutants                    # all of them, two at a time: about a quarter of an hour
    make mutants ARGS="packing"     # those whose file or text contains a word

Each fault is planted in a copy of the tree, and the tests of the file's room run until the first failure. A fault that
no test notices names the test that is missing; the exit code is then 1.
"""

import os
import queue
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TESTS = {
    "rspo_jax/objectives/": ["tests/rspo_jax/objectives"],
    "rspo_jax/routing/": ["tests/rspo_jax/routing"],
    "rspo_jax/log_probs/": ["tests/rspo_jax/log_probs"],
    "rspo_jax/statistics.py": ["tests/rspo_jax/test_statistics.py"],
    "rspo_jax/rollouts/packing.py": ["tests/rspo_jax/rollouts/test_packing.py"],
    "rspo_jax/rollouts/groups.py": ["tests/rspo_jax/rollouts/test_groups.py"],
    "rspo_jax/rollouts/prompts.py": ["tests/rspo_jax/rollouts/test_prompts.py"],
}
"""Beginning of a path -> the tests that have to notice a fault there."""


class Fault(NamedTuple):
    """A single change of one file."""

    path: str
    before: str
    """Text that stands in the file exactly once."""
    after: str


RSPO, GRPO, GSPO = (f"rspo_jax/objectives/{name}.py" for name in ("rspo", "grpo", "gspo"))
CISPO, SAPO, RESPONSES, TABLE, ADVANTAGES, CORRECTIONS, PENALTIES = (
    f"rspo_jax/objectives/{name}.py"
    for name in ("cispo", "sapo", "responses", "table", "advantages", "corrections", "penalties")
)
SHIFT, BALANCE, ADAPTIVE, HOLD, DIAGNOSTICS = (
    f"rspo_jax/routing/{name}.py" for name in ("shift", "balance", "adaptive", "hold", "diagnostics")
)
EXPONENTS = "rspo_jax/objectives/exponents.py"
FROM_LOGITS, FROM_HIDDEN = "rspo_jax/log_probs/from_logits.py", "rspo_jax/log_probs/from_hidden.py"
STATISTICS, PACKING = "rspo_jax/statistics.py", "rspo_jax/rollouts/packing.py"
GROUPS, PROMPTS = "rspo_jax/rollouts/groups.py", "rspo_jax/rollouts/prompts.py"

FAULTS = [
    # RSPO and GMPO: the side of the clip, γ before or after it, signs.
    Fault(RSPO, "-config.clip_low, config.clip_high)", "-config.clip_high, config.clip_low)"),
    Fault(RSPO, "batch.log_ratio + log_weight", "batch.log_ratio - log_weight"),
    Fault(RSPO, 'config.position == "pre_clip"', 'config.position == "post_clip"'),
    Fault(RSPO, "jnp.sign(batch.advantages)[:, None] * log_weight", "log_weight"),
    Fault(RSPO, "jnp.where(kept, log_ratio, bound)", "jnp.where(kept, log_ratio, 0)"),
    Fault(RSPO, "gamma_min: float | None = 0.8", "gamma_min: float | None = 0.7"),
    # The others.
    Fault(GSPO, "batch.token_mean(batch.log_ratio + jnp.log(batch.weight))", "batch.token_mean(batch.log_ratio)"),
    Fault(
        GSPO,
        "    low, high = 1 - config.clip_low, 1 + config.clip_high\n    ratio, kept = clip_ratio(mean_log_ratio",
        "    low, high = 1 - config.clip_high, 1 + config.clip_low\n    ratio, kept = clip_ratio(mean_log_ratio",
    ),
    Fault(GSPO, "log_ratio = jax.lax.stop_gradient(batch.log_ratio)", "log_ratio = batch.log_ratio"),
    Fault(GRPO, "low, high, config.dual_clip)", "low, high)"),
    Fault(GRPO, "clip_ratio(batch.log_ratio, batch.weight,", "clip_ratio(batch.log_ratio, batch.weight**0,"),
    Fault(GRPO, "    clip_high: float = 0.28", "    clip_high: float = 0.2"),
    Fault(CISPO, "bounded_exp(jax.lax.stop_gradient(batch.log_ratio))", "bounded_exp(batch.log_ratio)"),
    Fault(CISPO, "clipped * batch.weight * batch.log_probs", "clipped * batch.log_probs"),
    Fault(SAPO, "jnp.where(batch.advantages > 0,", "jnp.where(batch.advantages < 0,"),
    Fault(SAPO, "gate = 4 / tau *", "gate = 4 *"),
    # What they share: masks, floors, stop-gradients, means.
    Fault(RESPONSES, "weight = jnp.where(gamma < floor, floor, gamma)", "weight = gamma"),
    Fault(
        RESPONSES,
        "gamma = gamma if config.gamma_gradient else jax.lax.stop_gradient(gamma)",
        "gamma = gamma if not config.gamma_gradient else jax.lax.stop_gradient(gamma)",
    ),
    Fault(RESPONSES, "return self._token_sum(values) / jnp.maximum(self.lengths, 1)", "return self._token_sum(values)"),
    Fault(RESPONSES, "masked_mean(values, self.lengths > 0)", "masked_mean(values, self.lengths >= 0)"),
    Fault(RESPONSES, "jnp.sum(jnp.where(self.mask, values, 0), axis=-1)", "jnp.sum(values, axis=-1)"),
    Fault(RESPONSES, "jnp.where(mask, log_probs - old_log_probs, 0)", "log_probs - old_log_probs"),
    Fault(RESPONSES, "good = advantages >= 0", "good = advantages <= 0"),
    Fault(
        RESPONSES,
        "cut = jnp.where(good, value > high, value < low)",
        "cut = jnp.where(good, value >= high, value <= low)",
    ),
    Fault(RESPONSES, "config.constant_length or self.mask.shape[1]", "self.mask.shape[1]"),
    Fault(TABLE, "loss = Mean(-mean.total, mean.weight)", "loss = Mean(mean.total, mean.weight)"),
    Fault(TABLE, "loss.total + added.total", "loss.total - added.total"),
    Fault(TABLE, "batch.mask & (sign > 0)", "batch.mask & (sign < 0)"),
    Fault(TABLE, "(gamma < gamma_min)", "(gamma <= gamma_min)"),
    # Advantages, corrections, penalties.
    Fault(ADVANTAGES, "return jnp.std(rewards, axis=axis, ddof=1", "return jnp.std(rewards, axis=axis, ddof=0"),
    Fault(ADVANTAGES, "std = jnp.std(rewards, axis=axis, ddof=1", "std = jnp.std(rewards, axis=axis, ddof=0"),
    Fault(ADVANTAGES, "axis=axis, keepdims=True, where=valid)\n", "axis=axis, keepdims=True)\n"),
    Fault(ADVANTAGES, "(group / (group - 1))", "((group - 1) / group)"),
    Fault(ADVANTAGES, "(max_tokens - buffer)", "max_tokens"),
    Fault(CORRECTIONS, "jnp.where(truncated, config.tis_cap, ratio)", "ratio"),
    Fault(CORRECTIONS, "weights * (log_probs - value)", "weights * log_probs"),
    Fault(CORRECTIONS, "mask & ~rejected[:, None]", "mask & rejected[:, None]"),
    Fault(PENALTIES, "jnp.where(mask, reference - log_probs, 0)", "jnp.where(mask, log_probs - reference, 0)"),
    # The bounded exponential: the value and the derivative of k3, the slope beyond the bound, where the bound is.
    Fault(EXPONENTS, "jnp.expm1(near) - near + (_SLOPE - 1) * beyond", "jnp.exp(near) - near + (_SLOPE - 1) * beyond"),
    Fault(EXPONENTS, "tangent * (excess + 1) - tangent", "tangent * (excess + 1) + tangent"),
    Fault(EXPONENTS, "derivative + _SLOPE * beyond, derivative", "derivative + _SLOPE, derivative"),
    Fault(EXPONENTS, "jnp.where(is_beyond, x - bound, 0)", "jnp.where(is_beyond, x, 0)"),
    # The route and its shift.
    Fault(SHIFT, 'drift / num_layers if layer_aggregation == "mean" else drift', "drift"),
    Fault(SHIFT, "return jnp.exp(-(drift", "return jnp.exp((drift"),
    Fault(SHIFT, "jnp.mean(jnp.abs(moved) / STEPS_PER_NAT", "jnp.sum(jnp.abs(moved) / STEPS_PER_NAT"),
    Fault(SHIFT, "logits = router_logits if differentiable else", "logits = router_logits if not differentiable else"),
    Fault(SHIFT, "if router_logits.shape[-1] <= 256 else", "if router_logits.shape[-1] <= 512 else"),
    Fault(SHIFT, "jnp.log(jnp.sum(jnp.exp(logits - peak), axis=-1", "jnp.log(jnp.sum(jnp.exp(chosen - peak), axis=-1"),
    Fault(BALANCE, "logits.shape[-1] * jnp.sum(per_expert", "jnp.sum(per_expert"),
    Fault(BALANCE, "jnp.where(real, expert_ids.astype(jnp.int32), -1)", "expert_ids.astype(jnp.int32)"),
    Fault(BALANCE, "reading.carry.values / reading.carry.layers", "reading.carry.values"),
    Fault(ADAPTIVE, "config.sample_size - jnp.where(usable", "-config.sample_size + jnp.where(usable"),
    Fault(ADAPTIVE, "config.rate * (goal - log_scale)", "config.rate * goal"),
    Fault(HOLD, 'with_weights=routing == "copy"', "with_weights=False"),
    Fault(DIAGNOSTICS, "stays=carry.stays & stays", "stays=stays"),
    # Log-probabilities.
    Fault(FROM_LOGITS, "at_least_float32(logits) / temperature", "at_least_float32(logits)"),
    Fault(FROM_LOGITS, "return -jnp.sum(probs", "return jnp.sum(probs"),
    Fault(FROM_HIDDEN, "gradient = gradient / settings.temperature", "gradient = gradient * 1"),
    Fault(FROM_HIDDEN, "jnp.minimum(block * self.columns, self.vocab_size - self.columns)", "block * self.columns"),
    Fault(FROM_HIDDEN, "entropy = log_sum - sums.weighted / sums.sum_exp", "entropy = log_sum - sums.weighted"),
    # Statistics.
    Fault(STATISTICS, "jnp.sum(jnp.where(mask, values, 0)), jnp.sum(mask", "jnp.sum(values), jnp.sum(mask"),
    Fault(STATISTICS, "rank = hundreds * percent + rest * percent // 100", "rank = hundreds * percent"),
    Fault(STATISTICS, "scale**2 * self.squares", "scale * self.squares"),
    # Packing, groups, the stream of problems: alignment and order.
    Fault(PACKING, "flat[first + 1]", "flat[first]"),
    Fault(PACKING, "offsets + prompts - 1).astype", "offsets + prompts).astype"),
    Fault(PACKING, "return self.prompts + self.responses - 1", "return self.prompts + self.responses"),
    Fault(PACKING, "np.argsort(-lengths[order], kind=", "np.argsort(lengths[order], kind="),
    Fault(PACKING, "segments[row] += 1", "segments[row] = 1"),
    Fault(GROUPS, "np.ptp(rewards, axis=1) > 0", "np.ptp(rewards, axis=1) >= 0"),
    Fault(GROUPS, "np.argsort(~informative, kind=", "np.argsort(informative, kind="),
    Fault(PROMPTS, "range(cursor, cursor + size)", "range(cursor + 1, cursor + size + 1)"),
]


def plant(text: str, fault: Fault) -> str:
    """Return the text of a file with a fault in it.

    Raises:
      ValueError: unless the text to change stands there exactly once.
    """
    if text.count(fault.before) != 1:
        raise ValueError(f"{fault.path} has {text.count(fault.before)} times what should be there once: {fault.before}")
    return text.replace(fault.before, fault.after)


def noticing_tests(path: str) -> list[str]:
    """Return the tests that have to notice a fault in a file."""
    return next(tests for beginning, tests in TESTS.items() if path.startswith(beginning))


def is_noticed(fault: Fault, tree: Path) -> bool:
    """Plant a fault in a copy of the tree, run its tests until the first failure, and take the fault out again.

    Raises:
      RuntimeError: if the tests could not run.
    """
    file = tree / fault.path
    sound = file.read_text(encoding="utf-8")
    file.write_text(plant(sound, fault), encoding="utf-8")
    try:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-n0", "-p", "no:cacheprovider"]
        command += noticing_tests(fault.path)
        environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
        result = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    finally:
        file.write_text(sound, encoding="utf-8")
    if result.returncode not in (0, 1):
        raise RuntimeError(f"the tests of {fault.path} did not run with {fault.after!r}:\n{result.stdout[-2000:]}")
    return result.returncode == 1


def main(words: list[str]) -> int:
    """Plant the faults whose file or text contains all the words; return 1 if one is not noticed."""
    faults = [fault for fault in FAULTS if all(word in " ".join(fault) for word in words)]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as workers:
        trees: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for number in range(os.cpu_count() or 1):
            tree = Path(folder) / str(number)
            for part in ("rspo_jax", "models", "experiments", "tests"):
                shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__", "*.gz", "*.png"))
            shutil.copy(ROOT / "pyproject.toml", tree)
            trees.put(tree)

        def run(fault: Fault) -> bool:
            tree = trees.get()
            try:
                return is_noticed(fault, tree)
            finally:
                trees.put(tree)

        noticed = 0
        for fault, found in zip(faults, workers.map(run, faults), strict=True):
            noticed += found
            print(f"{'noticed' if found else 'MISSED '}  {fault.path}: {fault.before!r} -> {fault.after!r}", flush=True)
    print(f"{noticed} of {len(faults)} faults noticed")
    return int(noticed < len(faults))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
