"""The library's helpers for the texts of chat models."""

import re

SYSTEM_PROMPTS = {"default": "Put the answer between <answer> and </answer>.", "direct": "Only <answer> the answer."}


def extract_answer(completion):
    found = re.findall(r"<answer>\s?(.*?)\s?</answer>", completion, flags=re.DOTALL)
    return found[-1].strip() if found else None
