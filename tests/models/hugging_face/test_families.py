"""Models of every family against the outputs of transformers, and their configurations there and back.

`tests/support/hf_golden_live.py` recorded those outputs. Weights are made from the tensors' names, so the golden files
need not hold them. One case of each family runs by default, the one with most that is peculiar to it.
"""

import json

import pytest
from support import hf_cases, hf_comparison

import models
from models.hugging_face.config_json import read_config_json
from models.hugging_face.families import FAMILIES, family_for, family_of

BY_DEFAULT = {
    "qwen3_moe",
    "qwen2_moe_sliding",
    "olmoe",
    "mixtral_sliding",
    "gpt_oss",
    "deepseek_v3_yarn",
    "qwen3",
    "qwen2",
}


def test_each_family_is_tried_by_default():
    assert {hf_cases.CASES[case][0] for case in BY_DEFAULT} == set(FAMILIES)


@pytest.mark.parametrize(
    "case",
    [case if case in BY_DEFAULT else pytest.param(case, marks=pytest.mark.slow) for case in hf_cases.CASES],
)
def test_a_model_computes_what_transformers_says(case, tmp_path):
    hf_cases.write_golden_folder(case, tmp_path)
    hf_comparison.compare(*models.load_hf(tmp_path), hf_cases.golden(case))


@pytest.mark.parametrize("case", hf_cases.CASES)
def test_a_configuration_goes_there_and_back(case):
    values = read_config_json(hf_cases.GOLDEN / case)
    family = family_of(values["model_type"])
    config = family.config_of(values)
    assert family_for(config) is family
    assert family.config_of(json.loads(json.dumps(family.fields_of(config)))) == config
