"""GRPO, GMPO and RSPO in PyTorch, in the manner of TRL and verl: a few whole-array operations each. Needs torch.

They stand for the work of a PyTorch trainer between the token log-probs and `backward()`, on the arrays of the
benchmark and with its aggregation (the mean over responses of each response's term). Neither TRL nor verl has RSPO: it
is GMPO with log γ̃ added to the log-ratio, γ without gradient. The metrics that those trainers compute with the loss
are left out.
"""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]

Tensor = Any  # torch.Tensor, which the type checker does not see where torch is not installed


def grpo_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, clip: float = 0.2) -> Tensor:
    """Return −mean_i mean_t min(w·A, clip(w)·A)."""
    ratio = torch.exp(log_probs.float() - old_log_probs.float())
    advantages = advantages[:, None]
    clipped = torch.clamp(ratio, 1 - clip, 1 + clip)
    per_token = -torch.min(ratio * advantages, clipped * advantages)
    tokens = mask.float()
    return ((per_token * tokens).sum(-1) / tokens.sum(-1).clamp(min=1)).mean()


def gmpo_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, clip: float = 0.4) -> Tensor:
    """Return −mean_i A·exp(mean_t c(d)), with a one-sided clip in log space by the sign of the advantage."""
    return _geometric_loss(log_probs.float() - old_log_probs.float(), advantages, mask, clip)


def rspo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    gamma: Tensor,
    clip: float = 0.4,
    gamma_min: float = 0.8,
) -> Tensor:
    """Return −mean_i A·exp(mean_t c(d + log γ̃))."""
    log_weight = torch.log(gamma.detach().float().clamp(min=gamma_min))
    return _geometric_loss(log_probs.float() - old_log_probs.float() + log_weight, advantages, mask, clip)


def _geometric_loss(log_ratio: Tensor, advantages: Tensor, mask: Tensor, clip: float) -> Tensor:
    sign = torch.sign(advantages)[:, None]
    clipped = sign * torch.clamp(sign * log_ratio, max=clip)
    tokens = mask.float()
    mean = (clipped * tokens).sum(-1) / tokens.sum(-1).clamp(min=1)
    return -(torch.exp(mean) * advantages).mean()


def router_shift(router_logits: Tensor, expert_ids: Tensor, old_log_probs: Tensor) -> Tensor:
    """Return γ [B, T] from logits [L, B, T, E] and the old ids and log-probs [L, B, T, K], without gradient."""
    with torch.no_grad():
        log_probs = torch.log_softmax(router_logits.float(), dim=-1).gather(-1, expert_ids)
        return torch.exp(-(log_probs - old_log_probs).abs().mean(-1).mean(0))


def with_router(objective: str) -> Callable[..., Tensor]:
    """Return the loss of an objective that takes γ as a function of the arrays that γ is computed from."""
    loss = LOSSES[objective]

    def loss_from_router(
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        router_logits: Tensor,
        expert_ids: Tensor,
        old_router_log_probs: Tensor,
    ) -> Tensor:
        gamma = router_shift(router_logits, expert_ids, old_router_log_probs)
        return loss(log_probs, old_log_probs, advantages, mask, gamma)

    return loss_from_router


LOSSES: dict[str, Callable[..., Tensor]] = {"grpo": grpo_loss, "gmpo": gmpo_loss, "rspo": rspo_loss}
"""The objectives of `rspo_jax.OBJECTIVES` that are written here."""


def prepare(threads: int) -> None:
    """Set PyTorch up for one case: the number of threads, and every compilation from scratch."""
    torch.set_num_threads(threads)
    torch.compiler.reset()  # else the variants of earlier cases count against its limit, beyond which it runs eager
    torch.compiler.config.force_disable_caches = True  # else compile times are those of reading a file
    warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")


def tensor(array: np.ndarray) -> Tensor:
    """Copy an array into a tensor."""
    if array.dtype.name == "bfloat16":  # no dtype of NumPy's own, so that `from_numpy` refuses it
        return torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16)
    return torch.from_numpy(array.copy())


def runner(
    loss: Callable[..., Tensor], compiled: bool, direction: str, log_probs: Tensor, *others: Tensor
) -> Callable[[], tuple[Tensor, Tensor | None]]:
    """Return a call that computes the loss, or also its gradient with respect to `log_probs`.

    Args:
      loss: a function of `log_probs` and `others`.
      compiled: if true, Inductor compiles the loss at the first call.
      direction: one of `timing.DIRECTIONS`.
      log_probs: float [B, T].
      others: the remaining arguments of the loss.
    """
    function = torch.compile(loss, dynamic=False) if compiled else loss
    leaf = log_probs.requires_grad_(direction != "forward")

    def run() -> tuple[Tensor, Tensor | None]:
        value = function(leaf, *others)
        return value.detach(), torch.autograd.grad(value, leaf)[0] if leaf.requires_grad else None

    return run


def to_numpy(run: Callable[[], tuple[Tensor, Tensor | None]]) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the results of a `runner` as float32 arrays."""
    value, gradient = run()
    return value.numpy(), None if gradient is None else gradient.float().numpy()
