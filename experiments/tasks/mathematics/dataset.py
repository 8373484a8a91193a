"""Problems from files and from TensorFlow Datasets, split into train, validation and test."""

from experiments.tasks.chats import text_of
from experiments.tasks.mathematics.config import BOX, MathConfig
from experiments.tasks.mathematics.problems import Problem, problems_of
from experiments.tasks.records import Record, read_records
from experiments.tasks.splits import check_split, draw, split_of


def load_problems(config: MathConfig, split: str) -> list[Problem]:
    """Read the problems of one split.

    A split without a file is drawn from the training problems by a hash of each question and the seed: by its share,
    or the validation problems by their number. The draw depends neither on the order of the problems nor on where they
    are read from.

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
    check_split(split)
    if split == "validation" and config.validation_path is not None:
        return _source(config, "validation", config.validation_path)
    if split == "test" and not config.test_share:
        return _first(_source(config, "test", config.test_path), config.test, "test")
    if split == "validation" and not config.validation_share and config.validation == 0:
        return []
    shares = {"validation": config.validation_share, "test": config.test_share}
    parts: dict[str, list[Problem]] = {"train": [], "validation": [], "test": []}
    for problem in _source(config, "train", config.train_path):
        parts[split_of(problem.question, **shares, seed=config.seed)].append(problem)
    if config.validation_path is None and not config.validation_share:
        parts["train"], parts["validation"] = draw(
            parts["train"], lambda problem: problem.question, config.validation, config.seed
        )
    if not parts[split]:
        raise ValueError(
            f"{split} is left without problems by its share of so few: give more problems, or other shares"
        )
    return parts[split] if split == "validation" else _first(parts[split], getattr(config, split), split)


def _first(problems: list[Problem], count: int | None, split: str) -> list[Problem]:
    if count is not None and count > len(problems):
        raise ValueError(f"{split} is {count}, but there are only {len(problems)} such problems; lower {split}")
    return problems[:count]


def _source(config: MathConfig, split: str, path: str | None) -> list[Problem]:
    layout = config.layout()
    if path is not None:
        records = read_records(path, split)
    elif layout.builder:
        from experiments.tasks.mathematics.builders import read_records_of  # slow, and not needed for files

        found = read_records_of(layout.builder, split, config.data_dir)
        records = [Record(f"{split} record {index} of {layout.builder}", {**one}) for index, one in enumerate(found)]
    else:
        name = "the task" if config.names_fields else config.name
        raise ValueError(f"{name} has no {split} problems: give a file of them as {split}_path")
    problems = problems_of(records, layout, config.system)
    if config.must_be_boxed and BOX not in config.prompt + config.system:
        silent = [
            record.place for record, one in zip(records, problems, strict=True) if BOX not in text_of(one.question)
        ]
        if silent:
            raise ValueError(
                f"answers must be boxed, but neither prompt nor system asks for \\boxed{{}}, and {len(silent)} of "
                f"{len(records)} problems do not either, the first of them {silent[0]}; ask, or clear must_be_boxed"
            )
    return problems
