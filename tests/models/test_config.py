"""Shapes that a model may have, and those that are refused."""

import dataclasses

import pytest

from models import LatentAttention, TransformerConfig
from models.config import Stack

COUNTS = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "num_experts_per_token",
    "expert_size",
)
ZERO_FOR_NONE = ("num_experts", "dense_size", "shared_expert_size", "sliding_window")
GROUPS = ("router_groups", "router_groups_per_token")
LATENT = {
    "latent": LatentAttention(kv_rank=8, plain_dim=6, rotary_dim=4, value_dim=5),
    "head_dim": 10,
    "num_kv_heads": 4,
    "query_key_norm": "none",
}


def refuse(message, **changes):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**changes)


def test_every_count_is_at_least_one():
    for name in COUNTS:
        for value in (0, -1):
            refuse(f"^{name} must be at least 1, got {value}", **{name: value})


def test_what_may_be_none_is_not_negative():
    for name in (*ZERO_FOR_NONE, "clip_qkv"):
        refuse(f"^{name} must be 0 or more, got -1", **{name: -1})


def test_every_whole_number_of_the_configuration_is_tried_above():
    numbers = {field.name for field in dataclasses.fields(TransformerConfig) if type(field.default) is int}
    assert numbers == {*COUNTS, *ZERO_FOR_NONE, *GROUPS}


def test_sizes_of_latent_attention():
    sizes = {"kv_rank": 8, "plain_dim": 6, "rotary_dim": 4, "value_dim": 5}
    assert LatentAttention(**sizes).query_rank == 0
    for name in (*sizes, "query_rank"):
        with pytest.raises(ValueError, match=rf"^latent\.{name} must be .*got -1"):
            LatentAttention(**{**sizes, name: -1})


def test_layers_with_and_without_experts_lie_in_stacks():
    def stacks(**changes):
        return TransformerConfig(num_layers=5, dense_size=8, **changes).stacks

    assert stacks() == (Stack("layers", 0, 5, True),)
    assert stacks(num_experts=0) == (Stack("layers", 0, 5, False),)
    assert stacks(dense_layers=(0, 1)) == (Stack("layers_0", 0, 2, False), Stack("layers_1", 2, 3, True))
    assert [(stack.name, stack.first, stack.length) for stack in stacks(dense_layers=(1, 4))] == [
        ("layers_0", 0, 1),
        ("layers_1", 1, 1),
        ("layers_2", 2, 2),
        ("layers_3", 4, 1),
    ]
    assert TransformerConfig(num_layers=5, dense_size=8, dense_layers=(1, 4)).num_sparse_layers == 3


REFUSED = [
    ({"num_experts": 4, "num_experts_per_token": 5}, "num_experts_per_token is 5, but a layer has only 4 experts"),
    ({"num_heads": 4, "num_kv_heads": 3}, r"num_heads \(4\) must be a multiple of num_kv_heads \(3\)"),
    ({"num_heads": 2, "num_kv_heads": 4}, r"num_heads \(2\) must be a multiple of num_kv_heads \(4\)"),
    ({"head_dim": 7}, "head_dim must be even for rotary positions, got 7"),
    ({"dtype": "float16"}, "^dtype must be one of .*bfloat16.*; got 'float16'"),
    ({"param_dtype": "float64"}, "^param_dtype must be one of .*bfloat16.*; got 'float64'"),
    ({"remat": "all"}, "^remat must be one of .*dots.*; got 'all'"),
    ({"router": "top_k"}, "^router must be one of .*sigmoid.*; got 'top_k'"),
    ({"activation": "gelu"}, "^activation must be one of .*clamped.*; got 'gelu'"),
    ({"attention_bias": "key"}, "^attention_bias must be one of .*qkv.*; got 'key'"),
    ({"query_key_norm": "all"}, "^query_key_norm must be one of .*projection.*; got 'all'"),
    ({"num_experts": 0}, "dense_size must be at least 1, got 0"),
    ({"dense_layers": (0,)}, "dense_size must be at least 1, got 0"),
    ({"dense_layers": (2,), "dense_size": 4}, r"dense_layers must be ascending, between 0 and 1; got \(2,\)"),
    ({"dense_layers": (1, 0), "dense_size": 4}, "dense_layers must be ascending"),
    ({"dense_layers": (1, 1), "dense_size": 4}, "dense_layers must be ascending"),
    ({"gate_shared_expert": True}, "gate_shared_expert needs a shared expert: set shared_expert_size"),
    ({"router_groups": 2}, "router_groups are for the sigmoid router, but router is 'softmax'"),
    (
        {"router": "sigmoid", "router_groups": 2, "router_groups_per_token": 3},
        "must be between 1 and router_groups",
    ),
    ({"router": "sigmoid", "router_groups": 3}, "8 experts in 3 groups, of which a token uses 1"),
    ({"router": "sigmoid", "router_groups": 8}, "8 experts in 8 groups, of which a token uses 1"),
    (
        {"router": "sigmoid", "router_groups": 4, "num_experts_per_token": 3},
        "groups must be of equal size, at least 2, and a token's groups must hold 3 experts",
    ),
    ({"sliding_window": 4}, "sliding_window and sliding_layers go together"),
    ({"sliding_layers": (0,)}, "sliding_window and sliding_layers go together"),
    ({"sliding_window": 4, "sliding_layers": (5,)}, "sliding_layers must be ascending, between 0 and 1"),
    ({**LATENT, "head_dim": 12}, r"latent attention needs head_dim = latent\.plain_dim \+ latent\.rotary_dim"),
    ({**LATENT, "num_kv_heads": 2}, "num_kv_heads = num_heads"),
    ({**LATENT, "query_key_norm": "head"}, "latent attention needs query_key_norm = 'none', got 'head'"),
    ({**LATENT, "attention_bias": "all"}, "latent attention needs attention_bias = 'none'"),
    ({**LATENT, "attention_sinks": True}, "latent attention needs attention_sinks = False"),
    ({**LATENT, "clip_qkv": 1.0}, "latent attention needs clip_qkv = 0.0"),
    (
        {**LATENT, "sliding_window": 2, "sliding_layers": (0,)},
        "latent attention needs sliding_window = 0, got 2",
    ),
]


def test_bad_values():
    for changes, message in REFUSED:
        refuse(message, **changes)


ALLOWED = [
    {"num_experts": 4, "num_experts_per_token": 4},
    {"num_experts": 1, "num_experts_per_token": 1},
    {"num_heads": 3, "num_kv_heads": 1, "head_dim": 2},
    {"num_heads": 4, "num_kv_heads": 4},
    {"dtype": "bfloat16", "param_dtype": "bfloat16", "remat": "full"},
    {"remat": "dots"},
    {"num_experts": 0, "dense_size": 1, "num_experts_per_token": 2},
    {"dense_layers": (0, 1), "dense_size": 1},
    {"sliding_window": 1, "sliding_layers": (0, 1)},
    {"router": "sigmoid", "router_groups": 4, "router_groups_per_token": 1},
    LATENT,
]


def test_values_at_the_limit():
    for changes in ALLOWED:
        config = TransformerConfig(**changes)
        assert {name: getattr(config, name) for name in changes} == changes


def test_equal_configurations_are_one_static_argument():
    assert TransformerConfig() == TransformerConfig() and hash(TransformerConfig()) == hash(TransformerConfig())
    assert TransformerConfig(num_layers=3) != TransformerConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        TransformerConfig().num_layers = 3  # pyright: ignore[reportAttributeAccessIssue]
