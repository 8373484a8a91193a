"""Several processes on one run: they find each other, agree, and stop together."""

from rspo_jax.hosts.agreement import Agreement, is_primary, say
from rspo_jax.hosts.cluster import ClusterConfig, ClusterError, joined
from rspo_jax.hosts.preemption import Preemption, StopSignal

__all__ = [
    "Agreement",
    "ClusterConfig",
    "ClusterError",
    "Preemption",
    "StopSignal",
    "is_primary",
    "joined",
    "say",
]
