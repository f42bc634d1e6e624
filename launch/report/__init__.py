"""What a job leaves for people: tables, the picture of its learning curve, and one page that shows it whole.

`python -m launch.report RUN_OR_LEDGER` makes the page again.
"""

from launch.report.learning_curve import draw_learning_curve
from launch.report.scores import ROW_TITLES, Scores, score_table, scores_to_json
from launch.report.writing import REPORT, ReportError, leave_report, reported, write_report

__all__ = [
    "REPORT",
    "ROW_TITLES",
    "ReportError",
    "Scores",
    "draw_learning_curve",
    "leave_report",
    "reported",
    "score_table",
    "scores_to_json",
    "write_report",
]
