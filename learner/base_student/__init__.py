"""The base student: a two-million-parameter model that can copy, look up and write plain Python, and cannot act.

It is the pretrained model that the embedded run distils into, in the place that a real user fills with, say, a small
Qwen. It is not a student yet: its pretraining text (`generic_text`) holds no tools, no agent's turns and nothing of any
task.
Rebuild it with `python -m learner.base_student.pretrain`; the folder's README.md is the model card.

    >>> AutoModelForCausalLM.from_pretrained(BASE_STUDENT_FOLDER)
"""

from pathlib import Path

BASE_STUDENT_FOLDER = Path(__file__).parent / "checkpoint"

__all__ = ["BASE_STUDENT_FOLDER"]
