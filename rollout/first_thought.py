"""First-thought prefix (arXiv 2505.17612, section 3.1): the first step of the teacher's chain-of-thought answer seeds
its first agent step, which keeps an instruction-tuned teacher's reasoning on the path that it was trained for.

One extra call with the chain-of-thought prompt; its first paragraph, behind `Thought: `, becomes the beginning of the
first assistant turn, which the policy then continues. """

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from rollout.dialects import Dialect
from rollout.policy import Policy, Sampling
from rollout.trajectory import Message


async def first_thought(policy: Policy, question: str, cot: Dialect, sampling: Sampling) -> str:
    """The first paragraph of the policy's chain-of-thought answer to `question`; raises `PolicyError`."""
    messages: Sequence[Message] = (
        Message(role="system", content=cot.system_prompt),
        Message(role="user", content=question),
    )
    once = dataclasses.replace(sampling, n=1, stop=("\n\n",), logprobs=False)
    [completion] = await policy.complete(messages, once)
    return first_paragraph(completion.text)


def first_paragraph(text: str) -> str:
    """Up to the first blank line (or the whole, or its first line if it is one block of steps)."""
    paragraph = re.split(r"\n\s*\n", text.strip(), maxsplit=1)[0]
    return paragraph.splitlines()[0].strip() if paragraph else ""
