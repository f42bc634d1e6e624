"""Which scores a run's rows get, and whether its objective has those that it needs: said before anything starts.

Example::

    scorer = configured_scorer(config)                   # StoredScores | None; ConfigError for a folder without scores
    refuse_missing_scores(config, objective, scorer)     # ConfigError: every row would be refused
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from learner.config import ConfigError, LearnerConfig

if TYPE_CHECKING:
    from learner.examples import Scorer
    from learner.objectives import Objective


def configured_scorer(config: LearnerConfig) -> Scorer | None:
    """What `config.scores` names. Raises `ConfigError`."""
    if not config.scores:
        return None
    from learner.stored_scores import StoredScores, StoredScoresError

    try:
        return StoredScores(config.scores)
    except StoredScoresError as error:
        raise ConfigError(f"scores: {error}") from None


def refuse_missing_scores(config: LearnerConfig, objective: Objective, scorer: Scorer | None) -> None:
    """Raises `ConfigError` where no row can have what the objective needs. A policy's own log-probabilities come with
    its rollouts."""
    needed = objective.needs - {"behaviour"}
    if scorer is None and needed and not objective.falls_back:
        raise ConfigError(
            f"objective {config.objective!r} needs {' and '.join(sorted(needed))} scores of every row; name a folder "
            "of them in learner.scores (see python -m launch.score), or hand the learner a scorer"
        )
