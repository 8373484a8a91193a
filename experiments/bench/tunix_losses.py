"""Tunix's GRPO loss on the arrays of the benchmark. Needs the optional package google-tunix.

Tunix's `grpo_loss_fn(model, train_example, algo_config, pad_id, eos_id)` runs the model, turns its logits into token
log-probs, and then computes the loss. While JAX traces, the one call that runs the model is replaced by the given
log-probs; everything after it is Tunix's own code, compiled by `jax.jit` as its trainer does.
Included: ratio, clip, advantages, aggregation ("sequence-mean-token-mean"), and GSPO in its token form. Not included:
model, log-softmax, KL term (`beta` = 0), and metrics, of which Tunix computes none here.

Differences that remain: Tunix counts a response without tokens in the mean over responses, ours does not; in GSPO it
caps the log-ratio at 10. Neither shows on the benchmark's arrays. Tunix computes in the type of the log-probs and ours
in float32, so lower precisions are converted first.
"""

from unittest import mock

import jax
from tunix.rl import common  # pyright: ignore[reportMissingImports]
from tunix.rl.grpo import dapo_learner, grpo_learner  # pyright: ignore[reportMissingImports]

from rspo_jax import GRPOConfig, GSPOConfig
from rspo_jax.types import Array

OBJECTIVES = ("grpo", "gspo")
"""The objectives of `rspo_jax.OBJECTIVES` that Tunix has too."""


def loss(
    objective: str, log_probs: Array, old_log_probs: Array, advantages: Array, mask: Array
) -> tuple[Array, dict[str, Array]]:
    """Return Tunix's loss with the bounds of our defaults, and its auxiliary dict.

    Args:
      objective: one of `OBJECTIVES`.
      log_probs: float [B, T].
      old_log_probs: float [B, T].
      advantages: float32 [B].
      mask: bool [B, T]; converted to int32, the dtype of Tunix's masks.
    """
    log_probs, old_log_probs = log_probs.astype("float32"), old_log_probs.astype("float32")
    ours = GRPOConfig() if objective == "grpo" else GSPOConfig()
    config = dapo_learner.DAPOConfig(
        policy_loss_fn="grpo",
        loss_agg_mode="sequence-mean-token-mean",
        loss_algo="grpo" if objective == "grpo" else "gspo-token",
        beta=0.0,
        epsilon=ours.clip_low,
        epsilon_high=ours.clip_high,
    )
    tokens = mask.astype("int32")
    example = grpo_learner.TrainExample(
        prompt_ids=tokens[:, :1],
        prompt_mask=mask[:, :1],
        completion_ids=tokens,
        completion_mask=tokens,
        advantages=advantages,
        ref_per_token_logps=None,
        old_per_token_logps=old_log_probs,
    )
    with (
        mock.patch.object(common, "compute_per_token_logps", lambda *_, **__: log_probs),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        return grpo_learner.grpo_loss_fn(None, example, config, pad_id=0, eos_id=1)
