"""Data sets as the library has them, of which some hang, raise, repeat themselves or depend on global state."""

import dataclasses
import random
import time


@dataclasses.dataclass
class Config:
    low: int = 0
    high: int = 1000
    words: tuple = ("plus", "minus")
    seed: int | None = None
    size: int = 500

    def validate(self):
        assert self.low <= self.high, "low must be <= high"


class Sums:
    """a + b, with a score of one half for an answer that is off by one."""

    def __init__(self, config):
        self.config = config

    def numbers(self, index):
        generator = random.Random(self.config.seed + index)
        return [generator.randint(self.config.low, self.config.high) for _ in range(2)]

    def __getitem__(self, index):
        assert 0 <= index < self.config.size
        first, second = self.numbers(index)
        return {"question": f"{first}+{second}=", "answer": str(first + second), "metadata": {("a", "b"): first}}

    def score_answer(self, answer, entry):
        if answer is None:
            return 0.0
        off = abs(int(answer) - int(entry["answer"]))
        return {0: 1.0, 1: 0.5}.get(off, 0.0)


class Global(Sums):
    """Problems from Python's global random numbers and from the order of a set of texts."""

    def numbers(self, index):
        order = list({f"{number} apples" for number in range(100)})
        return [random.randint(0, 10**9), int(order[index % 7].split()[0])]


class Unruly(Sums):
    """A verifier that hangs, ends its process or gives no number, as the answer says."""

    def score_answer(self, answer, entry):
        if answer == "hang":
            while True:
                time.sleep(0.01)
        if answer == "exit":
            raise SystemExit(1)
        return (
            {"nan": float("nan")}.get(answer, 0.25)
            if answer in ("nan", "quarter")
            else super().score_answer(answer, entry)
        )


class Unanswered(Sums):
    """Problems without an answer of the library's own."""

    def __getitem__(self, index):
        return super().__getitem__(index) | {"answer": None}

    def score_answer(self, answer, entry):
        return float(answer == "yes")


class Emoji(Sums):
    """Questions with characters that nobody has."""

    def __getitem__(self, index):
        entry = super().__getitem__(index)
        return entry | {"question": entry["question"] + "\N{GRINNING FACE}"}


class Broken(Sums):
    """A data set whose problems cannot be made."""

    def __getitem__(self, index):
        raise RuntimeError("no problem today")


class Evaluated(Sums):
    """A verifier that evaluates the answer, under the name of one of the library's that does."""

    def score_answer(self, answer, entry):
        return 0.01 if answer is None else float(eval(answer) == int(entry["answer"]))


class Attribute:
    def __init__(self, levels):
        self.levels = levels


class Curriculum:
    def __init__(self):
        self.attributes = {"top": Attribute([9, 99, 999])}
        self.level = 0

    def set_global_level(self, level):
        self.level = min(level, 2)

    def set_attr_level(self, name, level):
        self.level = level

    def generate_configuration(self, defaults=None):
        return Config(high=self.attributes["top"].levels[self.level], **(defaults or {}))


DATASETS = {
    "sums": (Sums, Config),
    "more_sums": (Sums, Config),
    "global": (Global, Config),
    "unruly": (Unruly, Config),
    "unanswered": (Unanswered, Config),
    "emoji": (Emoji, Config),
    "broken": (Broken, Config),
    "countdown": (Evaluated, Config),
    "composite": (Sums, Config),
}
CURRICULA = {"sums": Curriculum}


def create_dataset(name, **options):
    dataset, config = DATASETS[name]
    return dataset(config(**options))


def create_curriculum(name):
    return CURRICULA[name]()
