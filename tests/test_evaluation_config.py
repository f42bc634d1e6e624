"""The configuration of `launch/evaluate.py`: what a run, a group and the command line bring, and what is refused at
once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from envs.base import Task, TaskError
from envs.pool import EnvSpec
from launch.config import EvaluateConfig, RetrievalConfig, TasksConfig
from launch.config_reading import CONFIG_FOLDER, load_config, to_plain
from launch.evaluate import main
from launch.evaluation.config import EvaluationConfig
from launch.evaluation.folder import EvaluationFolder, RowRecord, fingerprint, safe_name
from launch.evaluation.modes import MODES
from launch.evaluation.reading import load_evaluation, parse_evaluation
from launch.evaluation.tasks import load_tasks_of
from launch.run_folder import RunFolderError, write_json
from learner.base_student import BASE_STUDENT_FOLDER
from learner.config import ConfigError
from rollout.dialects import DIRECT
from rollout.policy_spec import PolicySpec

ROOT = Path(__file__).resolve().parent.parent
EXPERT = PolicySpec(kind="expert")
PAPER8 = ROOT / "tests" / "data" / "paper8"
API = ["policy=openai", "policy.model=m", "policy.base_url=http://127.0.0.1:9/v1"]
STUDENT = "policy.model=base_student"
FILES = ["benchmark=paper8", f"benchmark.folder={PAPER8}", f"retrieval.corpus={PAPER8 / 'passages.jsonl'}"]


@pytest.fixture
def run(tmp_path) -> Path:
    """What a finished run of the main job leaves of its configuration."""
    folder = tmp_path / "run"
    (folder / "learner" / "student").mkdir(parents=True)
    (folder / "learner" / "student" / "config.json").write_text("{}")
    config = load_config(["seed=3", "tasks.test_count=7", "evaluate.max_tokens=99", f"run_dir={folder}"])
    write_json(folder / "config.json", to_plain(config))
    return folder


@pytest.fixture(scope="module")
def student() -> EvaluationConfig:
    return load_evaluation([STUDENT])


@pytest.fixture(scope="module")
def benchmark() -> EvaluationConfig:
    return load_evaluation([STUDENT, *FILES, "benchmark.factual=exact"])


# -- what it is made of


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIG_FOLDER / "policy").glob("*.yaml")))
def test_every_policy_composes_and_survives_a_round_trip(name, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "m/n"}')
    needs = {
        "student": ["policy.model=m/n"],
        "adapter": [f"policy.adapter={tmp_path}"],
        "openai": API[1:],
        "vllm_server": API[1:],
    }
    config = load_evaluation([f"policy={name}", *needs.get(name, [])])
    assert parse_evaluation(json.loads(json.dumps(to_plain(config)))) == config


def test_every_mode_is_a_job_of_its_own_env_and_dialect(student):
    config = replace(student, modes=MODES, passages=4)
    jobs = {mode: config.job(mode) for mode in MODES}
    told = {
        mode: (
            job.env.name,
            job.env.context_passages,
            job.episode.dialect,
            job.episode.candidates,
            job.episode.max_steps,
        )
        for mode, job in jobs.items()
    }
    assert told == {
        "agent": ("code", 0, "code", 1, 5),
        "agent_sc": ("code", 0, "code", 8, 5),
        "whole_run_vote": ("code", 0, "code", 1, 5),
        "cot": ("answer", 0, "cot", 1, 1),
        "cot_rag": ("answer", 4, "cot", 1, 1),
        "direct": ("answer", 0, "direct", 1, 1),
    }
    sampled = {mode for mode, job in jobs.items() if job.episode.temperature > 0}
    assert sampled == {"agent_sc", "whole_run_vote"}
    assert {mode: config.runs(mode) for mode in ("agent", "whole_run_vote")} == {"agent": 1, "whole_run_vote": 8}


def test_several_samples_are_sampled(student):
    config = replace(student, samples=4, modes=("agent", "cot"))
    assert all(config.settings(mode).temperature == config.evaluate.temperature > 0 for mode in config.modes)
    assert config.runs("agent") == 4


def test_a_run_brings_its_world_its_settings_and_its_student(run):
    config = load_evaluation([f"run={run}"])
    assert (config.seed, config.tasks.seed, config.tasks.test_count, config.evaluate.max_tokens) == (3, 3, 7, 99)
    assert (config.policy.model, config.policy.policy_name) == (str(run / "learner" / "student"), "student")
    assert config.out == f"{run}/scores/starter"


def test_the_command_line_has_the_last_word_over_a_run(run):
    config = load_evaluation([f"run={run}", "tasks.test_count=2", "evaluate.max_tokens=50", "modes=agent,agent_sc"])
    assert (config.tasks.test_count, config.evaluate.max_tokens, config.modes) == (2, 50, ("agent", "agent_sc"))


def test_a_benchmark_takes_the_place_of_a_runs_tasks(run):
    config = load_evaluation([f"run={run}", *FILES])
    assert (config.label, config.benchmark.name, config.evaluate.max_tokens) == ("paper8", "paper8", 99)
    assert config.out == f"{run}/scores/paper8"
    assert config.env.judge is not None and config.env.judge.model == "gpt-4o-mini"


def test_a_run_of_chains_of_thought_is_evaluated_by_them(run):
    config = load_config(["recipe=cot_rag", f"run_dir={run}"])
    write_json(run / "config.json", to_plain(config))
    assert load_evaluation([f"run={run}"]).modes == ("cot_rag",)
    with pytest.raises(ConfigError, match="mode 'agent' needs an env to act in"):
        load_evaluation([f"run={run}", "modes=[agent]"])


def test_several_samples_are_a_row_of_their_own_that_more_of_them_go_on_with(student):
    greedy, four, eight = (RowRecord.of(replace(student, samples=n), "agent") for n in (1, 4, 8))
    assert (greedy.name, four.name, eight.name) == ("base_student, agent", *["base_student, agent sampled"] * 2)
    folder = EvaluationFolder("out")
    assert folder.ledger(greedy) != folder.ledger(four) == folder.ledger(eight)
    assert greedy.key("t", 0) != four.key("t", 0) == eight.key("t", 0)


def test_the_old_names_of_modes_are_known():
    assert load_evaluation([STUDENT, "modes=[greedy,self_consistent]"]).modes == ("agent", "agent_sc")


def test_one_file_of_tasks_is_named_on_the_command_line():
    config = load_evaluation([STUDENT, "tasks=data/my-questions.jsonl"])
    [task_set] = config.tasks.test
    assert (task_set.path, task_set.kind, config.label) == ("data/my-questions.jsonl", "my_questions", "my_questions")


def test_an_adapter_brings_its_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "m/n"}')
    spec = load_evaluation(["policy=adapter", f"policy.adapter={tmp_path}"]).policy
    assert (spec.model, spec.adapter, spec.policy_name) == ("m/n", str(tmp_path), tmp_path.name)


def test_the_packaged_student_has_a_name(student):
    spec = student.policy
    assert (spec.model, spec.policy_name) == (str(BASE_STUDENT_FOLDER), "base_student")


# -- what is refused in the first second


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"modes": ()}, "modes names none"),
        ({"modes": ("cot", "cot")}, "modes names one twice"),
        ({"samples": 0}, "samples=0 must be at least 1"),
        (
            {"env": EnvSpec(name="answer"), "modes": ("agent",)},
            r"mode 'agent' needs an env to act in \(code, tool, search",
        ),
        (
            {"modes": ("cot_rag",), "retrieval": RetrievalConfig(kind="none")},
            "mode 'cot_rag' needs something to search",
        ),
        ({"modes": ("whole_run_vote",), "samples": 3}, "samples=3 is for other modes"),
        ({"modes": ("agent_sc",), "evaluate": EvaluateConfig(candidates=100)}, "the sandbox previews at most 64"),
        ({"policy": EXPERT, "modes": ("agent_sc",)}, "mode 'agent_sc': the built-in expert always acts the same"),
        ({"policy": EXPERT, "modes": ("whole_run_vote",)}, "mode 'whole_run_vote': the built-in expert always acts"),
        ({"policy": EXPERT, "samples": 2}, "samples=2: the built-in expert always acts the same"),
        ({"policy": EXPERT, "modes": ("direct",)}, "mode 'direct': the built-in expert cannot answer without"),
        ({"policy": EXPERT, "env": EnvSpec(name="tool")}, "acts in the env 'code', not 'tool'"),
    ],
)
def test_a_mode_that_a_policy_or_an_env_cannot_do_is_refused(change, complaint, student):
    with pytest.raises(ValueError, match=complaint):
        replace(student, **change)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ([], "config policy.model: Missing mandatory value"),
        ([STUDENT, "modes=[agent,chess]", "moeds=1"], "config moeds: unknown key; did you mean 'modes'?"),
        ([STUDENT, "modes=[agent,chess]"], "config modes.1: Input should be 'agent', 'agent_sc'"),
        (["policy=expert", "benchmark=paper8"], "knows the starter world alone, not benchmark 'paper8'"),
        (["policy=adapter", "policy.adapter=/no/such"], "'/no/such' is no PEFT adapter"),
        ([*API, "policy.adapter=/a"], "adapter='/a' is for a policy of kind 'vllm', not 'openai'"),
        (["run=/no/such"], "config run: '/no/such' holds no run"),
        (["policy.model=/no/such"], "'/no/such' is no Hugging Face folder"),
        ([STUDENT, "benchmark=paper8", "benchmark.folder=/no/such"], "benchmark.folder '/no/such' is no folder"),
        ([STUDENT, *FILES], "the variable NO_SUCH_KEY is not set; it holds the key of the judge"),
        ([STUDENT, *FILES[:2], "benchmark.factual=f1"], "retrieval.corpus is empty"),
        ([*API, "spend.usd=5"], "config policy.prices: spend.usd=5 is a cap in money"),
    ],
)
def test_it_refuses_in_one_line_before_anything_starts(overrides, complaint, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    judge = ["env.judge.api_key_env=NO_SUCH_KEY"] if any("benchmark" in text for text in overrides) else []
    out = tmp_path / "out"
    assert main([*overrides, *judge, f"out={out}"]) == 2
    said = capsys.readouterr().err
    assert complaint in said and said.startswith("error: ") and len(said.strip().splitlines()) == 1, said
    assert not out.exists()


def test_the_configuration_is_printed_and_nothing_else_is_done(tmp_path, capsys):
    assert main(["policy=expert", "--cfg", f"out={tmp_path / 'out'}"]) == 0
    assert "kind: expert" in capsys.readouterr().out and not (tmp_path / "out").exists()


# -- the eight sets


def test_the_papers_eight_sets_load_from_files_of_its_form(tmp_path, benchmark):
    world = load_tasks_of(replace(benchmark, modes=("agent", "cot", "cot_rag")), tmp_path)
    assert world.kinds == ["hotpotqa", "math500", "bamboogle", "musique", "2wiki", "gsm_hard", "aime", "olymmath"]
    assert {kind for kind, domain in world.domains.items() if domain == "in"} == {"hotpotqa", "math500"}
    assert {task.kind: task.grader for task in world.tasks} == {
        **dict.fromkeys(("hotpotqa", "bamboogle", "musique", "2wiki"), "exact"),
        **dict.fromkeys(("math500", "gsm_hard", "aime", "olymmath"), "math"),
    }
    assert len({task.id for task in world.tasks}) == len(world.tasks) == 32
    assert "427564.3125" in [task.answer for task in world.tasks]
    assert all(job.env.judge is None for job in world.jobs.values())
    assert {mode: found is not None for mode, found in world.retrievers.items()} == {
        "agent": True, "cot": False, "cot_rag": True
    }  # fmt: skip
    assert world.notes == [
        "fewer questions than the benchmark has: hotpotqa 4 of 500, math500 4 of 500, bamboogle 4 of 125, "
        "musique 4 of 500, 2wiki 4 of 500, gsm_hard 4 of 500, aime 4 of 90, olymmath 4 of 200"
    ]


def at(benchmark: EvaluationConfig, folder: Path, **more: object) -> EvaluationConfig:
    return replace(benchmark, benchmark=replace(benchmark.benchmark, folder=str(folder), **more))  # type: ignore[arg-type]


def test_files_that_are_missing_are_all_named(tmp_path, benchmark):
    folder = tmp_path / "files"
    folder.mkdir()
    for path in PAPER8.rglob("*.json"):
        if "aime" not in path.name and "musique" not in path.name:
            (folder / path.name).write_bytes(path.read_bytes())
    with pytest.raises(TaskError, match=r"lacks musique_500\*\.json, aime_90\*\.json$"):
        load_tasks_of(at(benchmark, folder), tmp_path)


def test_two_files_for_one_set_are_refused(tmp_path, benchmark):
    for name in ("a", "b"):
        (tmp_path / "two" / name).mkdir(parents=True)
        for path in PAPER8.rglob("*.json"):
            (tmp_path / "two" / name / path.name).write_bytes(path.read_bytes())
    with pytest.raises(TaskError, match="holds 2 files that may be hotpotqa: a/hotpotqa"):
        load_tasks_of(at(benchmark, tmp_path / "two"), tmp_path)


def test_sets_that_number_their_tasks_alike_keep_them_apart(tmp_path, benchmark):
    for name in ("aime_90.json", "olymath_200.json"):
        rows = [{"id": "0", "question": f"What is {name}?", "answer": "1"}]
        (tmp_path / name).write_text(json.dumps({"metadata": {}, "examples": rows}))
    sets = tuple(each for each in benchmark.benchmark.sets if each.kind in ("aime", "olymmath"))
    world = load_tasks_of(at(benchmark, tmp_path, sets=sets), tmp_path)
    assert [task.id for task in world.tasks] == ["aime/0", "olymmath/0"]


def test_fewer_questions_of_each_set_may_be_asked_for(tmp_path, benchmark):
    assert len(load_tasks_of(at(benchmark, PAPER8, count=2), tmp_path).tasks) == 16


# -- the folder


def test_rows_are_known_by_the_keys_that_episodes_have(student):
    config = replace(student, modes=("agent_sc",))
    task = Task(id="t", question="q", answer="a", kind="k")
    record = RowRecord.of(config, "agent_sc")
    assert record.key(task.id, 2) == config.settings("agent_sc").key(task, "base_student", 2)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"tasks": TasksConfig(seed=1)}, "there tasks.seed is 0, here it is 1"),
        ({"env": EnvSpec(search_results=5)}, "there env.search_results is 2, here it is 5"),
        ({"passages": 9}, "there passages is 3, here it is 9"),
        ({"retrieval": RetrievalConfig(kind="bm25")}, "there retrieval.kind is 'hybrid', here it is 'bm25'"),
    ],
)
def test_a_folder_keeps_to_its_world(change, complaint, tmp_path, student):
    config = replace(student, env=EnvSpec(), retrieval=RetrievalConfig())
    folder = EvaluationFolder(tmp_path / "out")
    with folder.claim(config):
        pass
    with pytest.raises(RunFolderError, match=complaint):
        folder.check(replace(config, **change))


def test_a_folder_takes_other_modes_samples_and_counts(tmp_path, student):
    folder = EvaluationFolder(tmp_path / "out")
    with folder.claim(student):
        pass
    more = replace(student, tasks=replace(student.tasks, test_count=3), modes=("cot",), samples=4)
    with folder.claim(more) as found:
        assert found


def test_another_model_of_the_same_name_is_refused(tmp_path, student):
    models = []
    for name in ("a", "b"):
        weights = tmp_path / name / "student" / "model.safetensors"
        weights.parent.mkdir(parents=True)
        weights.write_bytes(name.encode() * 1000)
        spec = replace(student.policy, name="student", model=str(weights.parent))
        models.append(replace(student, policy=spec))
    folder = EvaluationFolder(tmp_path / "out")
    with folder.claim(models[0]):
        folder.begin(models[0], RowRecord.of(models[0], "agent"), unix_s=0.0)
    folder.check(models[0])
    with pytest.raises(RunFolderError, match=r"another policy 'student': .*a policy\.name of its own"):
        folder.check(models[1])


def test_weights_that_were_trained_on_have_another_fingerprint(tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(1 << 20))
    before = fingerprint(tmp_path)
    weights.write_bytes(bytes((1 << 20) - 1) + b"\x01")
    assert fingerprint(tmp_path) != before and fingerprint(tmp_path / "none") == ""


def test_names_that_would_share_a_folder_are_kept_apart():
    assert safe_name("student") == "student"
    assert len({safe_name(name) for name in ("a/b", "a_b", "a b", "..")}) == 4
    assert "/" not in safe_name("../../x") and not safe_name("..").startswith(".")


# -- the direct dialect


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("42", "42"),
        ("\n  Paris \nbecause it is", "Paris"),
        ("Answer: $\\frac{1}{2}$\nLet me check.", "$\\frac{1}{2}$"),
        ("Answer:\n7", "7"),
        ("Answer:", None),
        (" \n", None),
        ("", None),
    ],
)
def test_a_direct_answer_is_the_first_line_that_says_something(text, answer):
    turn = DIRECT.parse(text)
    assert turn.action == answer
    assert "".join(text[span.start : span.end] for span in turn.spans) == text
