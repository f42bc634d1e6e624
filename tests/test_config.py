"""Configuration: every recipe composes and is valid, and every mistake ends in one line that names it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import distill
from launch.config import DIALECT_OF_ENV, CollectConfig, DistillConfig
from launch.config_reading import CONFIG_FOLDER, NOT_COLLECTED, compose, load_config, parse_config, to_plain
from launch.run_folder import RunFolder, RunFolderError
from launch.world import load_world
from learner.config import ConfigError

RECIPES = sorted(path.stem for path in (CONFIG_FOLDER / "recipe").glob("*.yaml"))
NO_FILE = "[{path: /no/such.jsonl, kind: k}]"
ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("schema", [DistillConfig, CollectConfig], ids=lambda schema: schema.__name__)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_valid_and_survives_a_round_trip(recipe, schema):
    config = load_config([f"recipe={recipe}"], schema)
    assert config.recipe == recipe
    assert parse_config(json.loads(json.dumps(to_plain(config))), schema) == config


@pytest.mark.parametrize(
    "group", [f"{path.parent.name}={path.stem}" for path in sorted(CONFIG_FOLDER.glob("*/*.yaml"))]
)
def test_every_group_file_composes(group):
    needs = {
        "teacher=vllm": ["teacher.model=m/n"],
        "teacher=openai": ["teacher.model=m", "teacher.base_url=http://127.0.0.1:1/v1"],
        "student=hf": ["learner.model_path=m/n"],
        "teacher=vllm_server": ["teacher.model=m", "teacher.base_url=http://127.0.0.1:1/v1"],
        "env=tool": ["teacher=vllm", "teacher.model=m/n"],
        "env=search": ["teacher=vllm", "teacher.model=m/n"],
        "tasks=files": ["tasks.train=[{path: a.jsonl, kind: k}]", "tasks.test=[{path: b.jsonl, kind: k}]"],
    }
    overrides = [group, *needs.get(group, [])]
    if group.partition("=")[0] in ("policy", "benchmark"):  # tests/test_evaluation_config.py has them
        return
    load_config(overrides)
    if group.partition("=")[0] not in NOT_COLLECTED:
        load_config(overrides, CollectConfig)


def test_paper_recipe_has_the_papers_values():
    config = load_config(["recipe=paper"])
    assert config.teacher.model == "Qwen/Qwen2.5-32B-Instruct"
    assert config.learner.model_path == "Qwen/Qwen2.5-1.5B-Instruct"
    lora = config.learner.lora
    assert lora is not None
    assert (lora.rank, lora.alpha, lora.dropout, lora.target) == (64, 128.0, 0.05, "all-linear")
    learner = config.learner
    assert (learner.lr, learner.epochs, learner.max_row_tokens, learner.optimizer) == (2e-4, 2, 10240, "adamw")
    assert learner.rows_per_step == 8
    assert (config.episode.max_steps, config.episode.first_thought, config.rollout.samples) == (5, True, 1)
    assert config.episode.prompt == "teacher"  # with tools and examples; the student's is one line
    assert (config.retrieval.encoder, config.env.search_results) == ("intfloat/e5-base-v2", 3)
    assert (config.retrieval.query_prefix, config.retrieval.passage_prefix) == ("query: ", "passage: ")
    evaluate = config.evaluate
    assert (evaluate.candidates, evaluate.temperature, evaluate.top_p) == (8, 0.4, 0.8)
    assert config.env.judge is not None and config.env.judge.model == "gpt-4o-mini"
    assert {task_set.grader for task_set in config.tasks.test} == {"judge", "math"}
    counts = {task_set.kind: task_set.count for task_set in config.tasks.test}
    assert list(counts.values()) == [500, 125, 500, 500, 500, 500, 90, 200]


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["learner.epoch=3"], "config learner.epoch: unknown key; did you mean 'epochs'?"),
        (["epochs=3"], "config epochs: unknown key"),
        (["learner.epochs=many"], r"config learner.epochs: .*valid integer.*'many'"),
        (["learner.lr=-1"], "lr is -1.0; it must be above 0"),
        (["recipe=none_such"], "none_such"),
        (["teacher=openai"], "teacher.model: Missing mandatory value"),
        (["teacher.kind=magic"], "policy kind 'magic' is unknown; there are expert, vllm, openai, vllm_server"),
        (["env=answer", "episode.dialect=code"], "env.name 'answer' does not go with episode.dialect 'code'"),
        (["tasks=files"], "needs at least one file in both"),
        (["tasks.test_count=0"], "must be at least 1"),
        (["evaluate.kv_cache_mb=big"], "config evaluate.kv_cache_mb"),
        (["env.limits.wall=3"], "config env.limits.wall: unknown key; did you mean 'wall_s'?"),
        (["seed"], "seed"),
    ],
)
def test_mistakes_are_named_in_one_line(overrides, complaint):
    with pytest.raises(ConfigError, match=complaint) as caught:
        load_config(overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("env", DIALECT_OF_ENV)
def test_an_env_brings_the_dialect_that_it_is_spoken_to_in(env):
    config = load_config([f"env={env}", "teacher=vllm", "teacher.model=m/n"])
    assert config.episode.dialect == DIALECT_OF_ENV[env]


def test_chain_of_thought_may_be_given_passages():
    config = load_config(["recipe=cot_rag"])
    assert (config.env.name, config.env.context_passages, config.episode.max_steps) == ("answer", 3, 1)
    assert load_world(config, Path("unused")).retriever is not None
    assert load_world(load_config(["recipe=cot"]), Path("unused")).retriever is None


def test_parallel_engines_are_configured_like_any_value():
    sizes = ["tensor_parallel_size=4", "pipeline_parallel_size=2", "data_parallel_size=3"]
    teacher = load_config(["recipe=paper", *(f"teacher.{size}" for size in sizes)]).teacher
    assert (teacher.tensor_parallel_size, teacher.pipeline_parallel_size, teacher.data_parallel_size) == (4, 2, 3)


@pytest.mark.parametrize(
    "change",
    [
        ["spend.usd=5"],
        ["teacher.base_url=http://other:8000/v1"],
        ["teacher.prices={prompt_usd_per_million: 1, completion_usd_per_million: 2}"],
        ["rollout.concurrency=7"],
        ["rollout.retry_quarantined=true"],
    ],
)
def test_where_a_teacher_runs_and_what_it_costs_may_change_between_two_jobs(change, tmp_path):
    teacher = ["teacher=openai", "teacher.model=m", "teacher.base_url=http://one:8000/v1"]
    for overrides in (teacher, [*teacher, *change]):
        with RunFolder(tmp_path / "run").claim(load_config(overrides)):
            pass


def test_another_teacher_is_another_run(tmp_path):
    with RunFolder(tmp_path / "run").claim(load_config()):
        pass
    config = load_config(["teacher=vllm", "teacher.model=m/n"])
    with pytest.raises(RunFolderError, match="there teacher.kind is 'expert', here it is 'vllm'"):
        with RunFolder(tmp_path / "run").claim(config):
            pass


def test_overrides_reach_fields_that_no_yaml_names():
    assert load_config(["learner.warmup_steps=7"]).learner.warmup_steps == 7
    assert compose(["seed=4"])["run_dir"] == "runs/starter-seed4"


@pytest.fixture
def refused(capsys, signals_kept) -> Callable[..., str]:
    """Runs, in this process, a job that is refused before anything starts; returns what it says."""

    def run(*arguments: str) -> str:
        assert distill.main(arguments) == 2
        said = capsys.readouterr()
        assert said.out == ""
        return said.err

    return run


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["learner.epoch=3"], "learner.epoch: unknown key"),
        (
            ["tasks=files", f"tasks.train={NO_FILE}", f"tasks.test={NO_FILE}"],
            "task file '/no/such.jsonl' does not exist",
        ),
        (["learner.model_path=/no/such/student"], "'/no/such/student' is no Hugging Face folder"),
        (["learner.objective=magic"], "'magic' is unknown; there are"),
        (["learner.objective=opd"], "objective 'opd' needs teacher scores of every row"),
        (["learner=span", "learner.scores=/no/such"], "scores: /no/such holds no scores"),
        (["learner.lora={export: adapter}"], "'adapter' is no student that can be scored alone"),
        (
            ["teacher=openai", "teacher.model=m", "teacher.base_url=http://127.0.0.1:9/v1"],
            "teacher endpoint http://127.0.0.1:9/v1 does not answer",
        ),
    ],
)
def test_the_job_refuses_in_one_line_before_anything_starts(arguments, complaint, tmp_path, refused):
    run_dir = tmp_path / "run"
    said = refused(f"run_dir={run_dir}", *arguments)
    assert complaint in said and said.startswith("error: ")
    assert len(said.strip().splitlines()) == 1, said
    assert not run_dir.exists()


def test_the_job_names_file_and_line_of_a_malformed_task(tmp_path, refused):
    train = tmp_path / "train.jsonl"
    train.write_text('{"question": "1+1?", "answer": "2"}\n{"question": "2+2?"}\n')
    sets = [f"tasks.{split}=[{{path: {train}, kind: mine}}]" for split in ("train", "test")]
    said = refused("tasks=files", *sets, f"run_dir={tmp_path / 'run'}")
    assert f"{train}:2: 'answer' must be a non-empty string" in said


def test_the_job_asks_for_a_judge_before_it_starts(tmp_path, refused):
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"question": "Who wrote The Silver Harbor?", "answer": "Ada"}\n')
    sets = [f"tasks.{split}=[{{path: {tasks}, kind: mine, grader: judge}}]" for split in ("train", "test")]
    assert "env.judge.model must be set" in refused("tasks=files", *sets, f"run_dir={tmp_path / 'run'}")


def test_the_job_refuses_a_folder_of_another_run(tmp_path, refused):
    with RunFolder(tmp_path / "run").claim(load_config(["seed=1"])):
        pass
    said = refused(f"run_dir={tmp_path / 'run'}", "seed=2")
    assert "belongs to another run" in said and "seed" in said


def test_the_job_refuses_a_folder_that_is_no_run(tmp_path, refused):
    (tmp_path / "thesis.txt").write_text("precious")
    assert "is not empty and holds no run" in refused(f"run_dir={tmp_path}")


def job(*arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess:
    command = [sys.executable, "launch/distill.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)


def test_the_command_refuses_with_its_exit_code(tmp_path):
    result = job(f"run_dir={tmp_path / 'run'}", "learner.epoch=3")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: config learner.epoch: unknown key")
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr


def test_help_and_cfg_answer_without_heavy_imports():
    result = job("--help", timeout_s=20)
    assert result.returncode == 0 and "recipe=paper" in result.stdout
    result = job("recipe=paper", "--cfg")
    assert result.returncode == 0 and "Qwen/Qwen2.5-32B-Instruct" in result.stdout
