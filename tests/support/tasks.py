"""Tasks and a tokenizer for tests that need some problems and a judge."""

from collections.abc import Mapping, Sequence

from rspo_jax.types import Judgement


class Characters:
    """A tokenizer of one id for each character of an alphabet; 0 is padding and 1 ends a response."""

    pad_id, eos_id, stop_ids = 0, 1, (1,)

    def __init__(self, alphabet: str) -> None:
        self.alphabet = alphabet

    @property
    def vocabulary_size(self) -> int:
        return 2 + len(self.alphabet)

    def encode(self, text: str) -> list[int]:
        return [2 + self.alphabet.index(character) for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.alphabet[token - 2] for token in ids if 2 <= token < self.vocabulary_size)


class ChatCharacters:
    """A tokenizer of one id for each character there is, which marks the messages of a chat by their roles."""

    pad_id, eos_id, stop_ids, vocabulary_size = 0, 1, (1,), 2 + 0x110000

    def encode(self, text: str) -> list[int]:
        return [2 + ord(character) for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(token - 2) for token in ids if token > 1)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        return "".join(f"<{message['role']}>{message['content']}" for message in messages) + "<assistant>"


class ExactTask:
    """A task whose prompts are its problems, and whose judge wants the worked solution and nothing else.

    A subclass defines `tokenizer`, `problems` and `solution`.
    """

    def prompt(self, problem: str) -> str:
        return problem

    def judge(self, problems, responses):
        correct = [response == self.solution(problem) for problem, response in zip(problems, responses, strict=True)]
        return [Judgement(self.reward(*pair), pair[1]) for pair in zip(problems, correct, strict=True)]

    def reward(self, problem: str, correct: bool) -> float:
        return float(correct)
