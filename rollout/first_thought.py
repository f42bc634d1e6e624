"""First-thought prefix (arXiv 2505.17612, section 3.1): the first step of the teacher's chain-of-thought answer seeds
its first agent step, which keeps an instruction-tuned teacher's reasoning on the path that it was trained for.

One extra call with the chain-of-thought prompt; its first paragraph, behind `Thought: `, becomes the beginning of the
first assistant turn, which the policy then continues: `Completion.prefix_by` says how its endpoint was made to.

Example::

    completion = await complete(cot_messages("Think step by step.", question), first_thought_sampling(sampling))
    first_paragraph(completion.text)       # "There are 3 boxes of 12 eggs." or "" when nothing of use came
"""

from __future__ import annotations

import dataclasses
import re

from rollout.policy import Sampling
from rollout.trajectory import Message

_BLANK_LINE = re.compile(r"\n\s*\n")


def cot_messages(cot_prompt: str, question: str) -> list[Message]:
    """The extra call's: the chain-of-thought system prompt and the question as the episode shows it."""
    return [Message(role="system", content=cot_prompt), Message(role="user", content=question)]


def first_thought_sampling(sampling: Sampling) -> Sampling:
    """One answer up to the end of its first paragraph."""
    return dataclasses.replace(sampling, n=1, stop=("\n\n",), logprobs=False, top_logprobs=0)


def first_paragraph(text: str) -> str:
    """Up to the first blank line, or its first line where it is one block of steps; "" for an answer without a
    thought."""
    paragraph = _BLANK_LINE.split(text.strip(), maxsplit=1)[0]
    line = paragraph.splitlines()[0].strip() if paragraph else ""
    return "" if line.startswith("Answer:") else line
