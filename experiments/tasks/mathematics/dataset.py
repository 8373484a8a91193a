"""Problems from files and from TensorFlow Datasets, split into train, validation and test."""

from experiments.tasks.mathematics.config import MathConfig
from experiments.tasks.mathematics.problems import SETS, SPLITS, Problem, draw, problem_of, read_problems


def load_problems(config: MathConfig, split: str) -> list[Problem]:
    """Read the problems of one split.

    The validation problems are drawn from the training problems by a hash of each question and the seed. The draw
    depends neither on the order of the problems nor on where they are read from.

    Args:
        config: the settings of the task.
        split: "train", "validation" or "test".

    Returns:
        The problems, in the order of their source.

    Raises:
        ValueError: if the config or the split is wrong, if the set has no such split, if fewer problems are found
            than asked for, or if they cannot be read.
    """
    config.check()
    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r}; choose one of {', '.join(SPLITS)}")
    if split == "test":
        return _first(_source(config, "test", config.test_path), config.test, "test")
    if split == "validation" and config.validation == 0:
        return []
    rest, drawn = draw(_source(config, "train", config.train_path), config.validation, config.seed)
    return drawn if split == "validation" else _first(rest, config.train, "train")


def _first(problems: list[Problem], count: int | None, split: str) -> list[Problem]:
    if count is not None and count > len(problems):
        raise ValueError(f"{split} is {count}, but there are only {len(problems)} such problems; lower {split}")
    return problems[:count]


def _source(config: MathConfig, split: str, path: str | None) -> list[Problem]:
    if path is not None:
        return read_problems(path, config.name)
    layout = SETS[config.name]
    if not layout.builder:
        raise ValueError(f"{config.name} has no {split} problems: give a file of them as {split}_path")
    from experiments.tasks.mathematics.builders import read_records  # slow, and not needed for files

    problems = []
    for index, record in enumerate(read_records(layout.builder, split, config.data_dir)):
        try:
            problems.append(problem_of(record, layout))
        except ValueError as error:
            raise ValueError(f"{split} record {index} of {layout.builder} is not a problem: {error}") from error
    return problems
