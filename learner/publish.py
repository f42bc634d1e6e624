"""Handing the student's weights on; the folder that is written for it is `learner.export`'s."""

from learner.export import export_student, write_card

__all__ = ["export_student", "write_card"]
