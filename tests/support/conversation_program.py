"""The program of `test_conversation_devices.py`: conversations on all devices of all processes, printed as JSON.

Its arguments are the number of the process, of all processes, and a port; none for a single process.
"""

import json
import sys
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from rspo_jax.rollouts import (
    ConversationConfig,
    FirstTurns,
    SamplerConfig,
    assemble,
    converse,
    encode_prompts,
    judge,
    limits_of,
    sample_in_chunks,
)
from rspo_jax.sharding import MeshConfig, fetch, make_mesh
from rspo_jax.types import Judgement, ModelOutput
from support.policies import StatelessPolicy
from support.tasks import Characters


class Echo:
    """The environment says the last turn again, for as long as it is no "c"."""

    tokenizer = Characters("abc?")

    def prompt(self, problem):
        return problem

    def respond(self, problem, conversation):
        return None if conversation[-1].endswith("c") else f"?{conversation[-1]}"

    def judge(self, problems, responses):
        return [Judgement(len(turns) / 8, True) for turns in responses]

    def problems(self, split):
        raise NotImplementedError

    def solution(self, problem):
        raise NotImplementedError


@dataclass(frozen=True)
class Babbles(StatelessPolicy):
    """The next token depends on the last one, and on no other row."""

    def apply(self, variables, tokens, positions=None, segment_ids=None, cache=None):
        table = 2 * np.random.default_rng(0).normal(size=(6, 6)).astype(np.float32)
        table[:, 0] = -1e9
        return ModelOutput(jnp.asarray(table)[tokens], None, cache)


def conversations():
    """Everything that a rollout of 16 conversations holds, the same in each process."""
    task, problems, sampler = Echo(), ["a", "b?", "c", "ab"] * 4, SamplerConfig(max_new_tokens=3)
    policy, limits = Babbles(), limits_of(task, sampler, ConversationConfig(max_turns=4, max_tokens=17))
    with jax.set_mesh(make_mesh(MeshConfig())):
        prompts, keys = encode_prompts(task, problems, 2), jax.random.split(jax.random.key(1), 16)
        samples = sample_in_chunks(policy, None, prompts, keys, sampler, task.tokenizer, 2)
        ended = list(converse(policy, None, task, problems, FirstTurns(prompts, keys, samples), sampler, limits))
        judged, rollout = judge(task, problems, ended), assemble(prompts, [chunk.samples for chunk in ended])
        found = {name: fetch(getattr(rollout, name)) for name in ("tokens", "mask", "segment_ids", "sampler_log_probs")}
        found |= {"rewards": judged.rewards, "lengths": judged.lengths, "turns": judged.turns.counts}
        return {name: np.asarray(array).tolist() for name, array in found.items()}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        process, processes, port = map(int, sys.argv[1:])
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", num_processes=processes, process_id=process)
    print(json.dumps([jax.process_count(), jax.device_count(), conversations()]))
