"""Training from Python: the run of a config in a folder, and the model that comes out of it."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

import models
from experiments import train
from experiments.config import RUNS, FolderRun
from experiments.errors import UserError
from rspo_jax.records import FilePath, as_path
from rspo_jax.records.lock import RunLock
from rspo_jax.records.trackers import check_trackers
from rspo_jax.rollouts import SamplerConfig, sample_texts
from rspo_jax.sharding import make_mesh
from rspo_jax.training import sampling_params
from rspo_jax.types import Params


@dataclass(frozen=True)
class Trained:
    """A trained model."""

    run: FolderRun
    """The configuration that it was trained with."""
    run_dir: FilePath
    """The folder of the run: metrics, curves, checkpoints."""
    params: Params
    """The parameters, as `models.Transformer` takes them."""

    @property
    def summary(self) -> dict[str, Any]:
        """The contents of `summary.json`: results on the test prompts before and after."""
        return json.loads((as_path(self.run_dir) / "summary.json").read_text())

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the model as a Hugging Face folder, with its tokenizer, for transformers, vLLM and the next run.

        Raises:
          FileExistsError: if the folder holds something.
        """
        model = self.run.architecture()
        with jax.set_mesh(make_mesh(self.run.trainer.mesh)):
            models.save_hf(folder, model, self.params, self.run.model, model.dtype)

    def sample(
        self, prompts: Sequence[str | Sequence[dict[str, str]]], temperature: float = 1.0, seed: int = 0
    ) -> list[str]:
        """Return a response to each prompt, as long as in training at most.

        Args:
          prompts: texts, which the model reads as they are, or chats as lists of messages.
          temperature: 0 for the likeliest token at every place.
          seed: decides the responses.
        """
        tokenizer = self.run.tokenizer()
        texts = [tokenizer.plain(one) if isinstance(one, str) else tokenizer.chat(one) for one in prompts]
        sampler = SamplerConfig(self.run.trainer.sampler.max_new_tokens, temperature)
        policy, key = models.Transformer(self.run.architecture()), jax.random.key(seed)
        with jax.set_mesh(make_mesh(self.run.trainer.mesh)):
            params = sampling_params(policy, self.params, self.run.trainer)
            return sample_texts(policy, params, tokenizer, texts, key, sampler)


def train_run(
    run: FolderRun, run_dir: str | os.PathLike[str], resume: bool = False, trackers: Sequence[str] = ()
) -> Trained:
    """Train in a folder, and return the model.

    Args:
      run: the configuration.
      run_dir: the folder, absent or empty, or its address in a bucket.
      resume: if True, go on with the run in the folder, or start it if there is none.
      trackers: places to show the run in, `rspo_jax.records.trackers.TRACKERS`.

    Raises:
      UserError: for a mistake in the configuration, the data or the folder, before anything is compiled.
      Stopped: after SIGTERM or an interrupt, once the state is saved.
    """
    name, place = next(name for name, run_type in RUNS.items() if type(run) is run_type), as_path(run_dir)
    try:
        run.check()
        check_trackers(trackers)
    except ValueError as error:
        raise UserError(str(error)) from error
    folder = train.Folder(place, resume=resume and (place / "config.json").exists(), trackers=tuple(trackers))
    problems = train.check_data(run)
    train.check_devices(run, problems)
    folder = train.agree_on_flags(name, run, folder)
    with RunLock(place):
        place = train.agree_on_folder(name, run, folder)
        return Trained(run, place, train.train_to_the_end(place, run, problems, folder))
