"""`check_env`: the executable contract of `envs.base.Env`, for any env, as Gymnasium's `check_env` is for its own.

It plays episodes and compares them; it does not look inside an env, and it does not judge whether answers are graded
well.

Example::

    check_env(lambda: MyEnv(), tasks=[task], actions=["x = 1", "print(x)", "final_answer(1)"])

Give actions that change the state, that read it, that fail, and that end the episode. Actions must behave the same
when they are repeated (no clock, no fresh randomness), or the env cannot be compared with itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from envs.base import Env, EnvError, Observation, ObservationKind, StepResult, Task

_LONGEST_EPISODE = 100
_UNREPEATABLE_INFO = ("wall_s",)


class ContractError(AssertionError):
    """An env broke a clause of the contract; the message begins with the clause."""


def check_env(make_env: Callable[[], Env], tasks: Sequence[Task], actions: Sequence[str]) -> None:
    """Raises `ContractError` that names the first broken clause; `ValueError` when there is nothing to check with."""
    if not tasks or not actions:
        raise ValueError("check_env needs at least one task and one action")
    _check_order(make_env, tasks[0], actions)
    for task in tasks:
        _check_episode(make_env, task, actions)
        for action in actions:
            _check_repeatable(make_env, task, action, actions)
        with _env(make_env) as env:
            can_preview, adds = env.can_preview, callable(getattr(env, "preview_more", None))
        if can_preview:
            _check_preview(make_env, task, actions)
            for index in range(len(actions)):
                _check_commit(make_env, task, actions, index)
            if adds:
                _check_preview_more(make_env, task, actions)
        else:
            _check_no_preview(make_env, task, actions)


def _check_order(make_env: Callable[[], Env], task: Task, actions: Sequence[str]) -> None:
    with _env(make_env) as env:
        _require(isinstance(env, Env), "an env has can_preview, reset, step, preview, commit and close", type(env))
        _require(isinstance(env.can_preview, bool), "can_preview is a bool", env.can_preview)
        _require_runtime_error("step() before reset() raises RuntimeError", lambda: env.step(actions[0]))
        if env.can_preview:
            _require_runtime_error("preview() before reset() raises RuntimeError", lambda: env.preview(actions[:1]))
            _require_runtime_error("commit() before reset() raises RuntimeError", lambda: env.commit(0))
            _reset(env, task)
            _require_runtime_error("commit() without a preview raises RuntimeError", lambda: env.commit(0))
        _reset(env, task)
        env.close()
        try:
            env.close()
        except Exception as error:
            raise ContractError(f"close() may be called twice: the second raised {error!r}") from error
        _require_runtime_error("step() after close() raises RuntimeError", lambda: env.step(actions[0]))


def _check_episode(make_env: Callable[[], Env], task: Task, actions: Sequence[str]) -> None:
    """Play to the end, whatever ends it, and once more in the same env."""
    with _env(make_env) as env:
        _reset(env, task)
        first = _step(env, actions[0])
        result, played = first, 1
        while not _ended(result) and played < _LONGEST_EPISODE:
            result, played = _step(env, actions[played % len(actions)]), played + 1
        if _ended(result):
            _require_runtime_error(
                "step() after the episode has ended raises RuntimeError", lambda: env.step(actions[0])
            )
        _reset(env, task)
        again = _step(env, actions[0])
        _require_same("reset() makes the env as new, after an episode has ended too", first, again)


def _check_repeatable(make_env: Callable[[], Env], task: Task, first: str, actions: Sequence[str]) -> None:
    one, two = (_play(make_env, task, [first, *actions]) for _ in range(2))
    _require(len(one) == len(two), "the same seed and actions give the same results", (len(one), len(two)))
    for left, right in zip(one, two, strict=True):
        _require_same("the same seed and actions give the same results", left, right)


def _check_preview(make_env: Callable[[], Env], task: Task, actions: Sequence[str]) -> None:
    with _env(make_env) as env:
        _reset(env, task)
        together = _preview(env, actions)
        for index, action in enumerate(actions):
            (alone,) = _preview(env, [action])
            _require_same("no previewed action sees another, nor an earlier preview", together[index], alone)
    for index, action in enumerate(actions):
        with _env(make_env) as env:
            _reset(env, task)
            (plain,) = _play(make_env, task, [action])
            _preview(env, actions)
            _require_same("preview() leaves the state as it was", plain, _step(env, action))
            _require_same("a preview shows what a step does", together[index], plain)


def _check_preview_more(make_env: Callable[[], Env], task: Task, actions: Sequence[str]) -> None:
    with _env(make_env) as env:
        _reset(env, task)
        together = _preview(env, actions)
    for split in range(1, len(actions)):
        with _env(make_env) as env:
            _reset(env, task)
            first = _preview(env, actions[:split])
            more = env.preview_more(actions[split:])  # type: ignore[attr-defined]
            _require(len(more) == len(actions) - split, "preview_more() returns the results of its own actions", more)
            for left, right in zip(together, [*first, *more], strict=True):
                _require_same("preview() and preview_more() together are one preview", left, right)
            clause = "after preview_more() commit() counts on behind the first preview"
            try:
                kept = env.commit(split)
            except Exception as error:
                raise ContractError(f"{clause}: commit({split}) raised {error!r}") from error
            _require(kept == more[0], clause, kept)
    with _env(make_env) as env:
        _reset(env, task)
        first = _preview(env, actions[:1])
        env.preview_more(actions[1:])  # type: ignore[attr-defined]
        _require(env.commit(0) == first[0], "preview_more() keeps what was previewed before", first[0])


def _check_commit(make_env: Callable[[], Env], task: Task, actions: Sequence[str], index: int) -> None:
    with _env(make_env) as env:
        _reset(env, task)
        previewed = _preview(env, actions)[index]
        committed = env.commit(index)
        _check_result(committed)
        # wall_s is compared, too: an action that was run again took another time
        _require(committed == previewed, "commit() returns the previewed result and does not run it again", committed)
        if _ended(committed):
            _require_runtime_error("commit() of a last step ends the episode", lambda: env.step(actions[0]))
            return
        _require_runtime_error("a second commit() without a new preview raises RuntimeError", lambda: env.commit(index))
    for probe in actions:
        with _env(make_env) as env:
            _reset(env, task)
            _preview(env, actions)
            env.commit(index)
            stepped = _play(make_env, task, [actions[index], probe])
            clause = "commit(i) leads to the state that step(actions[i]) leads to"
            _require_same(clause, stepped[1], _step(env, probe))


def _check_no_preview(make_env: Callable[[], Env], task: Task, actions: Sequence[str]) -> None:
    with _env(make_env) as env:
        _reset(env, task)
        clause = "preview() of an env that cannot preview raises RuntimeError"
        _require_runtime_error(clause, lambda: env.preview(actions))
        (plain,) = _play(make_env, task, actions[:1])
        _require_same("preview() of an env that cannot preview changes nothing", plain, _step(env, actions[0]))


@contextmanager
def _env(make_env: Callable[[], Env]) -> Iterator[Env]:
    env = make_env()
    try:
        yield env
    finally:
        env.close()


def _play(make_env: Callable[[], Env], task: Task, actions: Sequence[str]) -> list[StepResult]:
    """Results of the actions in a new env, up to the end of the episode."""
    results: list[StepResult] = []
    with _env(make_env) as env:
        _reset(env, task)
        for action in actions:
            results.append(_step(env, action))
            if _ended(results[-1]):
                break
    return results


def _reset(env: Env, task: Task) -> None:
    answer = env.reset(task, 7)
    _require(isinstance(answer, tuple) and len(answer) == 2, "reset() returns (observation, info)", answer)
    observation, info = answer
    _require(isinstance(observation, Observation), "reset() returns an Observation first", observation)
    _require(observation.text == task.question, "the first observation's text is the question", observation.text)
    _require(isinstance(info, dict), "reset() returns a dict second", info)


def _step(env: Env, action: str) -> StepResult:
    result = env.step(action)
    _check_result(result)
    return result


def _preview(env: Env, actions: Sequence[str]) -> list[StepResult]:
    results = env.preview(actions)
    _require(isinstance(results, list), "preview() returns a list", results)
    _require(len(results) == len(actions), "preview() returns one result per action", len(results))
    for result in results:
        _check_result(result)
    return results


def _check_result(result: Any) -> None:
    _require(isinstance(result, StepResult), "step(), preview() and commit() return StepResults", result)
    observation, reward, terminated, truncated, info = result
    _require(isinstance(observation, Observation), "a result's observation is an Observation", observation)
    _require(isinstance(observation.text, str), "an observation's text is a str", observation.text)
    _require(isinstance(observation.kind, ObservationKind), "an observation's kind is one", observation.kind)
    _require(isinstance(reward, float) and 0.0 <= reward <= 1.0, "reward is a float in [0, 1]", reward)
    _require(isinstance(terminated, bool) and isinstance(truncated, bool), "terminated and truncated are bools", result)
    _require(not (terminated and truncated), "an episode ends by itself or is cut off, not both", result)
    _require(isinstance(info, dict) and "final_answer" in info, "info has final_answer", info)
    final = info["final_answer"]
    _require(final is None or isinstance(final, str), "info['final_answer'] is a str or None", final)
    _require(terminated == (final is not None), "terminated if and only if there is a final answer", result)
    _require(
        (observation.kind is ObservationKind.FINAL) == terminated,
        "kind is FINAL if and only if terminated",
        observation,
    )
    _require(isinstance(info.get("tool_calls", 0), int), "info['tool_calls'] is an int", info)
    _require(isinstance(info.get("wall_s", 0.0), float), "info['wall_s'] is a float", info)


def _ended(result: StepResult) -> bool:
    return result.terminated or result.truncated


def _repeatable(result: StepResult) -> StepResult:
    info = {key: value for key, value in result.info.items() if key not in _UNREPEATABLE_INFO}
    return result._replace(info=info)


def _require_same(clause: str, left: StepResult, right: StepResult) -> None:
    left, right = _repeatable(left), _repeatable(right)
    _require(left == right, clause, f"{left} and then {right}")


def _require(kept: bool, clause: str, seen: object) -> None:
    if not kept:
        raise ContractError(f"{clause}: got {seen!r:.500}")


def _require_runtime_error(clause: str, act: Callable[[], object]) -> None:
    try:
        act()
    except EnvError as error:  # a RuntimeError, but it means a failure of ours, which this is not
        raise ContractError(f"{clause}: it raised {error!r}") from error
    except RuntimeError:
        return
    except Exception as error:
        raise ContractError(f"{clause}: it raised {error!r}") from error
    raise ContractError(f"{clause}: it raised nothing")
