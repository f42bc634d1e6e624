"""What a job leaves for people: tables, the picture of its learning curve, and one page that shows it whole.

`python -m launch.report RUN_OR_LEDGER` makes the page again.
"""

from launch.report.learning_curve import draw_learning_curve
from launch.report.scores import ROW_TITLES, Scores, score_table, scores_to_json

__all__ = ["ROW_TITLES", "Scores", "draw_learning_curve", "score_table", "scores_to_json"]
