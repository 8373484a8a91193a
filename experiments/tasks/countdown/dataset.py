"""Countdown problems as a TensorFlow Datasets builder, so that they are generated once and then read.

Data is written as ArrayRecord and read by random access, for which TensorFlow Datasets needs no TensorFlow.
"""

import contextlib
import dataclasses
import io
import itertools
import logging
import os
import random
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import constants

from experiments.tasks.countdown.problems import (
    SPLITS,
    CountdownConfig,
    Problem,
    generate_problems,
)

_COMPARED = 8
"""Number of problems of a split that are drawn again, to notice files that were exchanged."""


@dataclasses.dataclass(eq=False)
class CountdownBuilderConfig(tfds.core.BuilderConfig):
    """A `CountdownConfig` for the builder, and the name of the folder of its data.

    Attributes:
        problems: the problems to generate.
        name: derived from `problems`; readable, and different for configs of different problems.
    """

    name: str = dataclasses.field(init=False)
    problems: CountdownConfig = dataclasses.field(default_factory=CountdownConfig)

    def __post_init__(self) -> None:
        config = self.problems
        self.name = (
            f"numbers{config.numbers_min}to{config.numbers_max}_values{config.low}to{config.high}"
            f"_target{config.target_max}_seed{config.seed}"
            f"_train{config.train}_validation{config.validation}_test{config.test}"
        )


class _LocalDatasetInfo(tfds.core.DatasetInfo):
    def initialize_from_bucket(self) -> None:
        """Do nothing: no published copy of these problems exists, so the network need not be asked."""


class Countdown(tfds.core.GeneratorBasedBuilder):
    """The builder of Countdown problems; `as_data_source` keeps the order of `generate_problems`.

    An example has the features "numbers" (int32 [count]), "target" (int32 scalar) and "solution"
    (bytes). A split of size 0 is not written.
    """

    # Raise this whenever `generate_problems` returns other problems for the same config; otherwise old data is read.
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar[list[tfds.core.BuilderConfig]] = [CountdownBuilderConfig()]
    # Nothing is downloaded, so there are no checksums. The inherited search for them imports
    # importlib_resources, which TensorFlow Datasets 4.9.10 does not install.
    url_infos = None

    def _info(self) -> tfds.core.DatasetInfo:
        return _LocalDatasetInfo(
            builder=self,
            description="Reach a target by arithmetic on a few numbers, each used once.",
            features=tfds.features.FeaturesDict(
                {
                    "numbers": tfds.features.Sequence(np.int32),
                    "target": np.int32,
                    "solution": tfds.features.Text(),
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded
        builder_config = self.builder_config
        if not isinstance(builder_config, CountdownBuilderConfig):
            kind = type(builder_config).__name__
            raise TypeError(f"Countdown was given a {kind}; pass a CountdownBuilderConfig.")
        config = builder_config.problems
        return {
            split: self._generate_examples(config, split)
            for split in SPLITS
            if getattr(config, split) > 0  # the writer refuses a split without examples
        }

    def _generate_examples(self, config: CountdownConfig, split: str) -> Iterator[tuple[int, Any]]:
        for index, problem in enumerate(generate_problems(config, split)):
            yield index, problem._asdict()


def load_problems(
    config: CountdownConfig,
    split: str,
    data_dir: str | None = None,
) -> list[Problem]:
    """Read the problems of one split, after writing all splits if no earlier call has.

    Several processes may call this at the same time, and a call that is killed while it writes does not disturb the
    next one. The progress bars of TensorFlow Datasets stay off afterwards.

    Args:
        config: the problems; each config has a folder of its own.
        split: "train", "validation" or "test".
        data_dir: the folder of all data sets. None: that of TensorFlow Datasets, which is the environment variable
            TFDS_DATA_DIR or else ~/tensorflow_datasets.

    Returns:
        The problems, in the order of `generate_problems`.

    Raises:
        ValueError: if the config or the split is wrong, if fewer problems are found than asked for, or if the files on
            disk cannot be read or hold other problems.
        OSError: if problems cannot be written.
    """
    config.check()
    if split not in SPLITS:
        raise ValueError(f"There is no split {split!r}; choose one of {', '.join(SPLITS)}.")
    wanted = getattr(config, split)
    if wanted == 0:
        return []
    with _quiet():
        builder = _prepared_builder(config, data_dir)
        try:
            # Decorators in TensorFlow Datasets hide the arguments from type checkers.
            source = builder.as_data_source(split)  # pyright: ignore[reportCallIssue]
            examples = source.__getitems__(range(wanted))
        except Exception as error:  # damaged files make the reader raise errors of any type
            raise _damaged(builder.data_dir, f"cannot be read ({error})") from error
    problems = [
        Problem(
            numbers=tuple(int(number) for number in example["numbers"]),
            target=int(example["target"]),
            solution=example["solution"].decode(),
        )
        for example in examples
    ]
    # Checksums do not notice that a sound file has the name of another.
    expected = list(itertools.islice(generate_problems(config, split), _COMPARED))
    if problems[:_COMPARED] != expected:
        raise _damaged(builder.data_dir, f"are not those of the split {split!r}")
    return problems


def _damaged(folder: object, what: str) -> ValueError:
    return ValueError(
        f"The problems in {folder} {what}; if they are damaged, delete that folder, and they are generated again."
    )


def _prepared_builder(config: CountdownConfig, data_dir: str | None) -> Countdown:
    # The builder accepts its own default config only as None: another of the same name is an error.
    is_default = config == CountdownConfig()
    builder_config = None if is_default else CountdownBuilderConfig(problems=config)
    try:
        builder = Countdown(data_dir=data_dir, config=builder_config)
    except Exception as error:  # a damaged dataset_info.json raises errors of any type, here and not when it is read
        root, name = data_dir or constants.DATA_DIR, CountdownBuilderConfig(problems=config).name
        folder = os.path.join(root, Countdown.name, name, str(Countdown.VERSION))
        raise _damaged(folder, f"cannot be read ({error})") from error
    if builder.is_prepared():
        return builder
    try:
        with _unseeded_random():
            builder.download_and_prepare(
                file_format="array_record",
                download_config=tfds.download.DownloadConfig(try_download_gcs=False),
            )
    except OSError:
        # Data is written to a temporary folder that is renamed at the end. That fails if another process, with the same
        # data, was faster.
        if not builder.is_prepared():
            raise
    return Countdown(data_dir=data_dir, config=builder_config)


@contextlib.contextmanager
def _unseeded_random() -> Iterator[None]:
    """Seed Python's global generator anew, and restore the caller's state afterwards.

    TensorFlow Datasets takes the name of its temporary folder from that generator: two processes with the same seed
    would write to the same folder.
    """
    state = random.getstate()
    random.seed()
    try:
        yield
    finally:
        random.setstate(state)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the messages of TensorFlow Datasets about downloads and custom configs."""
    tfds.disable_progress_bar()
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
