"""The families against what transformers computed (`tests/hf_golden_live.py`), and their configurations there and back.

The weights are made from the tensors' names, so that the golden files hold only what transformers said.
"""

import itertools
import json
import pathlib
import shutil

import hf_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import models
from models.hugging_face.config_json import read_config_json
from models.hugging_face.families import family_for, family_of
from rspo_jax.types import ModelOutput

GOLDEN = pathlib.Path(__file__).parent / "hf_golden"
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    made = {}

    def folder(case):
        if case not in made:
            made[case] = tmp_path_factory.mktemp(case)
            shutil.copy(GOLDEN / case / "config.json", made[case])
            shapes = json.loads((GOLDEN / case / "tensors.json").read_text())
            tensors = {name: hf_cases.weight(name, tuple(shape)) for name, shape in shapes.items()}
            safetensors.numpy.save_file(tensors, made[case] / "model.safetensors")
        return made[case]

    return folder


def golden(case):
    arrays = np.load(GOLDEN / case / "outputs.npz")
    return [
        (arrays[f"logits_{number}"], arrays.get(f"router_logits_{number}")) for number in range(len(hf_cases.LENGTHS))
    ]


def compare(case, folder):
    """Runs a folder's model on the two sequences, packed in one row, padded, and through a cache."""
    config, params = models.load_hf(folder)
    model = models.Transformer(config)
    sequences = hf_cases.sequences()
    longest, total = max(hf_cases.LENGTHS), sum(hf_cases.LENGTHS)
    tokens = np.zeros((3, total + 2), np.int32)  # the last two places are padding
    segments = np.zeros_like(tokens)
    places = []
    for number, sequence in enumerate(sequences):
        start = sum(hf_cases.LENGTHS[:number])
        packed = (0, slice(start, start + len(sequence)))
        padded = (1 + number, slice(total + 2 - len(sequence), None))
        places.append({"packed": packed, "padded": padded})
        for place, segment in ((packed, number + 1), (padded, 1)):
            tokens[place], segments[place] = sequence, segment
    step = jax.jit(lambda cache, *inputs: model.apply({"params": params}, inputs[0], None, inputs[1], cache))
    whole = step(None, tokens, segments)
    cached = decode(step, model.init_cache(2, longest), tokens[1:, -longest:], segments[1:, -longest:])
    for number, (logits, router_logits) in enumerate(golden(case)):
        for name, (row, columns) in places[number].items():
            check(name, whole, (row, columns), logits, router_logits)
        check("cached", cached, (number, slice(longest - len(logits), None)), logits, router_logits)


def decode(step, cache, tokens, segments):
    """Some tokens at once, the others one by one."""
    bounds = [0, tokens.shape[1] - 4, *range(tokens.shape[1] - 3, tokens.shape[1] + 1)]
    outputs = []
    for start, stop in itertools.pairwise(bounds):
        outputs.append(step(cache, tokens[:, start:stop], segments[:, start:stop]))
        cache = outputs[-1].cache
    logits = jnp.concatenate([output.logits for output in outputs], axis=1)
    if outputs[0].router_logits is None:
        return ModelOutput(logits, None)
    return ModelOutput(logits, jnp.concatenate([output.router_logits for output in outputs], axis=2))


def check(name, output, place, logits, router_logits):
    row, columns = place
    assert np.max(np.abs(output.logits[row, columns] - logits)) <= TOLERANCE, name
    assert (output.router_logits is None) == (router_logits is None), name
    if router_logits is not None:
        assert np.max(np.abs(output.router_logits[:, row, columns] - router_logits)) <= TOLERANCE, name


@pytest.mark.parametrize("case", hf_cases.CASES)
def test_a_model_computes_what_transformers_says(case, folder_of):
    compare(case, folder_of(case))


@pytest.mark.parametrize("case", hf_cases.CASES)
def test_a_configuration_goes_there_and_back(case):
    values = read_config_json(GOLDEN / case)
    family = family_of(values["model_type"])
    config = family.config_of(values)
    assert family_for(config) is family
    assert family.config_of(json.loads(json.dumps(family.fields_of(config)))) == config
