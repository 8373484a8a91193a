"""What a model's shape may be, bad values one by one. Knows the configuration only."""

import dataclasses

import pytest

from models import TransformerConfig

COUNTS = [
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "num_experts",
    "num_experts_per_token",
    "expert_size",
]


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("name", COUNTS)
def test_every_count_is_at_least_one(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be at least 1, got {value}"):
        TransformerConfig(**{name: value})


def test_every_whole_number_of_the_configuration_is_tried_above():
    assert [field.name for field in dataclasses.fields(TransformerConfig) if type(field.default) is int] == COUNTS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 4, "num_experts_per_token": 5}, "num_experts_per_token is 5, but a layer has only 4 experts"),
        ({"num_heads": 4, "num_kv_heads": 3}, r"num_heads \(4\) must be a multiple of num_kv_heads \(3\)"),
        ({"num_heads": 2, "num_kv_heads": 4}, r"num_heads \(2\) must be a multiple of num_kv_heads \(4\)"),
        ({"head_dim": 7}, "head_dim must be even for rotary positions, got 7"),
        ({"dtype": "float16"}, "^dtype must be one of .*bfloat16.*, got 'float16'"),
        ({"param_dtype": "float64"}, "^param_dtype must be one of .*bfloat16.*, got 'float64'"),
        ({"remat": "all"}, "^remat must be one of .*dots.*, got 'all'"),
    ],
)
def test_bad_values(changes, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts": 4, "num_experts_per_token": 4},
        {"num_experts": 1, "num_experts_per_token": 1},
        {"num_heads": 3, "num_kv_heads": 1, "head_dim": 2},
        {"num_heads": 4, "num_kv_heads": 4},
        {"dtype": "bfloat16", "param_dtype": "bfloat16", "remat": "full"},
        {"remat": "dots"},
    ],
)
def test_values_at_the_limit(changes):
    config = TransformerConfig(**changes)
    assert {name: getattr(config, name) for name in changes} == changes


def test_equal_configurations_are_one_static_argument():
    assert TransformerConfig() == TransformerConfig() and hash(TransformerConfig()) == hash(TransformerConfig())
    assert TransformerConfig(num_layers=3) != TransformerConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        TransformerConfig().num_layers = 3  # pyright: ignore[reportAttributeAccessIssue]
