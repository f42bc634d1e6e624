"""The ways in which a policy is evaluated, and which of them a policy and an env can do.

| mode | env | what |
|---|---|---|
| `agent` | the agent's | acts with its tools, greedily |
| `agent_sc` | the agent's | self-consistent actions: `evaluate.candidates` a step, and a vote |
| `whole_run_vote` | the agent's | `evaluate.candidates` whole runs of a task, and a vote on their answers |
| `cot` | answer | chain of thought, no tools |
| `cot_rag` | answer | the same with the `passages` found for the question in front of it |
| `direct` | answer | the answer at once, no reasoning |

A mode is an env, a dialect and how turns are sampled; everything else is the configuration's. With several samples a
task all modes sample at `evaluate.temperature`: greedy runs would be the same. `greedy` and `self_consistent`, as older
ledgers and the main job call them, are `agent` and `agent_sc`. Where the configured env is "answer", `whole_run_vote`
is the self-consistency of chains of thought (arXiv 2203.11171).

Example::

    refuse("agent_sc", env="code", policy=PolicySpec(kind="expert"), samples=1)    # ValueError: always acts the same
    mode_env("cot_rag", config.env, passages=3)                                     # EnvSpec(name="answer", ...)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

from envs.pool import EnvSpec
from launch.config import DIALECT_OF_ENV, EvaluateConfig
from rollout.early_exit import EarlyExit
from rollout.episode import EpisodeSettings
from rollout.policy_spec import PolicySpec

Mode = Literal["agent", "agent_sc", "whole_run_vote", "cot", "cot_rag", "direct"]
MODES: tuple[str, ...] = get_args(Mode)
OLD_NAMES = {"greedy": "agent", "self_consistent": "agent_sc"}
AGENT_ENVS = ("code", "tool", "search")
DIRECT_TOKENS = 128
"""Enough for any answer, and too few for much reasoning."""


def mode_env(mode: str, env: EnvSpec, *, passages: int) -> EnvSpec:
    """The env of a mode, made of the configured one. `passages`: how many `cot_rag` is shown."""
    if mode in ("agent", "agent_sc", "whole_run_vote"):
        return env
    context = passages if mode == "cot_rag" else 0
    return replace(env, name="answer", max_steps=1, context_passages=context, mcp_servers=())


def mode_settings(
    mode: str,
    episode: EpisodeSettings,
    evaluate: EvaluateConfig,
    *,
    env: EnvSpec,
    prompt: Literal["student", "teacher"] = "student",
    samples: int = 1,
) -> EpisodeSettings:
    """How episodes are run in `mode`; `env` is the mode's own. Without guides and first thoughts, which are for making
    training data."""
    dialect = "direct" if mode == "direct" else DIALECT_OF_ENV[env.name]
    greedy = samples == 1 and mode not in ("agent_sc", "whole_run_vote")
    return replace(
        episode,
        dialect=dialect,
        max_steps=1 if env.name == "answer" else episode.max_steps,
        first_thought=False,
        guide="none",
        prompt=prompt,
        max_tokens=min(evaluate.max_tokens, DIRECT_TOKENS) if mode == "direct" else evaluate.max_tokens,
        early_exit=EarlyExit(unparsed_turns=evaluate.fruitless_steps),
        candidates=evaluate.candidates if mode == "agent_sc" else 1,
        temperature=0.0 if greedy else evaluate.temperature,
        top_p=1.0 if greedy else evaluate.top_p,
        top_k=0 if greedy else evaluate.top_k,
    )


def runs_of(mode: str, evaluate: EvaluateConfig, samples: int) -> int:
    """How many whole runs of each task a mode takes."""
    return evaluate.candidates if mode == "whole_run_vote" else samples


def refuse(mode: str, *, env: EnvSpec, policy: PolicySpec, samples: int, retrieval: str) -> None:
    """Raises `ValueError` for a mode that the configured `env` or the policy cannot do. `retrieval`: its kind."""
    if mode not in MODES:
        raise ValueError(f"modes: {mode!r} is unknown; there are {', '.join(MODES)}")
    if mode in ("agent", "agent_sc") and env.name not in AGENT_ENVS:
        raise ValueError(f"mode {mode!r} needs an env to act in ({', '.join(AGENT_ENVS)}), not env.name {env.name!r}")
    if mode == "whole_run_vote" and samples > 1:
        raise ValueError(
            f"mode 'whole_run_vote' makes evaluate.candidates runs of each task; samples={samples} is for other modes"
        )
    if mode == "cot_rag" and retrieval == "none":
        raise ValueError("mode 'cot_rag' needs something to search: set retrieval.kind to bm25, dense or hybrid")
    if policy.kind != "expert":
        return
    if mode == "direct":
        raise ValueError("mode 'direct': the built-in expert cannot answer without working an answer out")
    if mode in ("agent_sc", "whole_run_vote") or samples > 1:
        what = f"mode {mode!r}" if mode in ("agent_sc", "whole_run_vote") else f"samples={samples}"
        raise ValueError(f"{what}: the built-in expert always acts the same, so that there is nothing to vote on")
    if mode == "agent" and env.name != "code":
        raise ValueError(f"mode 'agent': the built-in expert acts in the env 'code', not {env.name!r}")
