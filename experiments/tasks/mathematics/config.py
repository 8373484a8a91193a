"""The settings of a mathematics task, checked in one place."""

import dataclasses
import math
import os

from experiments.tasks.mathematics.problems import SETS, Layout, layout_of
from experiments.tasks.splits import check_shares

BOX = "\\boxed"
DEFAULT_PROMPT = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{}."


@dataclasses.dataclass(frozen=True)
class MathConfig:
    """The settings of a mathematics task: problems, prompts, rewards and the judge's limits.

    Attributes:
        name: the set whose layout the files have, a key of `experiments.tasks.mathematics.problems.SETS`.
        prompt_field: the field of the question in files of another layout, a text or chat messages. It, or
            answer_field, takes the place of name. "prompt", or else "messages", where only answer_field is given.
        answer_field: the field of the right answer in such files, or of a list of answers any of which is right.
            "answer" where only prompt_field is given.
        train_path: file of the training problems: JSON lines, a JSON array, Parquet, or a folder that
            datasets.save_to_disk wrote (the part "train" of several). docs/data.md shows each.
        validation_path: file of the validation problems. When absent, they are drawn from the training problems.
        test_path: file of the test problems. Where the path of training or test problems is absent, TensorFlow Datasets
            provides them, if it has the set, which is true of gsm8k.
        data_dir: the folder of TensorFlow Datasets; its own when absent.
        validation: number of problems drawn from the training problems for the split "validation".
        validation_share: in place of that number, the share of the training problems' prompts.
        test_share: in place of test_path, the share of the training problems' prompts in the split "test".
        seed: determines the problems drawn.
        train: number of problems in the split "train", from the first on. None: all that are left.
        test: number of problems in the split "test", from the first on. None: all.
        prompt: the user's message, with {problem} in place of the question; of a chat, the user's last message.
        system: the system message before it; none if empty. Chats that bring their own are refused if there is one.
        must_be_boxed: if True, only an answer in a \\boxed{} counts. Otherwise a response without a box is searched for
            its last formula or number.
        judge_after: only what follows the last occurrence of this text is judged, such as "</think>"; a response
            without it counts as unanswered. Empty: all of a response is judged.
        correct_reward: reward of a right answer.
        wrong_reward: reward of an answer that is not right.
        unanswered_reward: reward of a response without an answer, or one that cannot be judged within the limits.
        time_limit: seconds of CPU time for judging one response.
        wall_limit: seconds of wall time for it, larger, so that a busy host fails no right answer.
        workers: number of processes that judge. None: one less than there are cores, at most 16.
        memory_limit: GiB of address space of each of these processes.
    """

    name: str = "gsm8k"
    prompt_field: str | None = None
    answer_field: str | None = None
    train_path: str | None = None
    validation_path: str | None = None
    test_path: str | None = None
    data_dir: str | None = None
    validation: int = 500
    validation_share: float = 0.0
    test_share: float = 0.0
    seed: int = 0
    train: int | None = None
    test: int | None = None
    prompt: str = DEFAULT_PROMPT
    system: str = ""
    must_be_boxed: bool = True
    judge_after: str = ""
    correct_reward: float = 1.0
    wrong_reward: float = 0.0
    unanswered_reward: float = 0.0
    time_limit: float = 5.0
    wall_limit: float = 60.0
    workers: int | None = None
    memory_limit: float = 4.0

    def check(self) -> None:
        """Raise ValueError, naming the mistake and the way out, if a setting is impossible."""
        if not self.names_fields and self.name not in SETS:
            raise ValueError(f"there is no set {self.name!r}; choose one of {', '.join(SETS)}")
        if not self.layout().builder and self.train_path is None and self.test_path is None:
            what = "problems of your own" if self.names_fields else self.name
            raise ValueError(f"TensorFlow Datasets has no {what}: give their file as test_path or train_path")
        if self.prompt.count("{problem}") != 1:
            raise ValueError(
                f"prompt contains {{problem}} {self.prompt.count('{problem}')} times; write it exactly once, where the "
                "question goes"
            )
        # Prompts in files of another layout may ask for themselves; those are looked at when they are read.
        if self.must_be_boxed and not self.names_fields and BOX not in self.prompt + self.system:
            raise ValueError(
                "answers must be boxed, but neither prompt nor system asks for \\boxed{}; ask, or clear must_be_boxed"
            )
        check_shares(self.validation_share, self.test_share)
        for split in ("validation", "test"):
            if getattr(self, f"{split}_path") is not None and getattr(self, f"{split}_share"):
                raise ValueError(f"{split}_path and {split}_share are both given; leave one of them out")
        if self.validation < 0:
            raise ValueError(f"validation is {self.validation}; set it to 0 or more")
        for field in ("train", "test", "workers"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field} is {value}; set it to 1 or more, or leave it out")
        for field in ("time_limit", "wall_limit", "memory_limit"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{field} is {value}; set it to a number above 0")
        if self.wall_limit < self.time_limit:
            raise ValueError(
                f"wall_limit ({self.wall_limit}) is below time_limit ({self.time_limit}), but no process computes for "
                "longer than it lives; raise wall_limit"
            )
        rewards = (self.correct_reward, self.wrong_reward, self.unanswered_reward)
        if not all(map(math.isfinite, rewards)) or not rewards[0] > rewards[1] >= rewards[2]:
            raise ValueError(
                f"rewards are {rewards[0]} (right), {rewards[1]} (wrong) and {rewards[2]} (unanswered), but a right "
                "answer has to earn more than a wrong one, and a wrong one no less than none"
            )

    @property
    def names_fields(self) -> bool:
        """True if the files have a layout of their own."""
        return self.prompt_field is not None or self.answer_field is not None

    def layout(self) -> Layout:
        """Return the layout of the files' records."""
        return layout_of(self.name, self.prompt_field, self.answer_field)

    def worker_count(self) -> int:
        """Return the number of processes that judge."""
        if self.workers is not None:
            return self.workers
        affinity = getattr(os, "sched_getaffinity", None)
        cores = len(affinity(0)) if affinity else os.cpu_count() or 1
        return min(16, max(1, cores - 1))
