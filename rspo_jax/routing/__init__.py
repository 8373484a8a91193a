"""What routers do while a policy learns: how far they move, how they are balanced, held and reported."""

from rspo_jax.routing.adaptive import AdaptiveShiftConfig, next_log_scale, scaled
from rspo_jax.routing.balance import expert_fractions, load_balance_reader, router_loss_of, z_loss_reader
from rspo_jax.routing.diagnostics import (
    drift_reading,
    finish,
    mismatch_statistics,
    ratio_statistics,
    response_inputs,
    routing_reader,
    routing_statistics,
)
from rspo_jax.routing.hold import ROUTINGS, freeze, records_route, scoring_route, update_route
from rspo_jax.routing.shift import (
    LAYER_AGGREGATIONS,
    ROUTE_AXES,
    check_covers,
    drift_reader,
    gamma_of,
    join_readers,
    route_of,
    route_reader,
    router_shift,
    trace_of,
    trace_reader,
    trace_router,
)

__all__ = [
    "LAYER_AGGREGATIONS",
    "ROUTE_AXES",
    "ROUTINGS",
    "AdaptiveShiftConfig",
    "check_covers",
    "drift_reader",
    "drift_reading",
    "expert_fractions",
    "finish",
    "freeze",
    "gamma_of",
    "join_readers",
    "load_balance_reader",
    "mismatch_statistics",
    "next_log_scale",
    "ratio_statistics",
    "records_route",
    "response_inputs",
    "route_of",
    "route_reader",
    "router_loss_of",
    "router_shift",
    "routing_reader",
    "routing_statistics",
    "scaled",
    "scoring_route",
    "trace_of",
    "trace_reader",
    "trace_router",
    "update_route",
    "z_loss_reader",
]
