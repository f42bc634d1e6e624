"""What a run tells of itself: numbers that are right, in every place that was asked for, and nowhere else."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from learner_samples import ListSource, save_tiny_student, trajectory

from learner.base import Progress
from learner.config import ConfigError, LearnerConfig, LoraConfig, TrackingConfig
from learner.examples import Example, ExampleMaker
from learner.tracking import Tracker, check_installed, figures, record
from learner.tracking.flops import ModelFlops, peak_of_gpu
from learner.tracking.services import InBackground
from learner.tracking.sinks import ConsoleLines, JsonLines
from learner.trainer import Learner

ROWS = [trajectory(i) for i in range(12)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_student(tmp_path_factory.mktemp("student"))


def config_of(base: Path, out: Path, **changes: Any) -> LearnerConfig:
    settings: dict[str, Any] = {"epochs": 1, "tokens_per_step": 1500, "micro_batch_tokens": 600, "max_row_tokens": 512}
    return LearnerConfig(model_path=str(base), output_dir=str(out), **{**settings, **changes})


def at(step: int, **changes: Any) -> Progress:
    return Progress(step=step, loss=1.0 / step, loss_by_span={"code": 0.5}, accuracy=0.25, **changes)


# -- the numbers


@pytest.fixture(scope="module")
def one_step(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Progress:
    """A step of twelve rows, in float32."""
    config = config_of(base, tmp_path_factory.mktemp("run"), precision="fp32", tokens_per_step=100_000)
    steps: list[Progress] = []
    Learner(config, ListSource(ROWS), on_progress=steps.append).run()
    return steps[0]


def test_loss_and_accuracy_by_span_are_those_that_transformers_computes(base: Path, one_step: Progress) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    maker = ExampleMaker(AutoTokenizer.from_pretrained(base), max_row_tokens=512)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    hits: dict[str, list[float]] = {}
    losses: dict[str, list[float]] = {}
    for row in ROWS:
        made = maker.make(row)
        assert isinstance(made, Example)
        with torch.no_grad():
            logits = model(torch.tensor([made.token_ids])).logits[0]
        for i, (token, span, weight) in enumerate(zip(made.token_ids, made.span_types, made.loss_weights, strict=True)):
            if weight:
                losses.setdefault(span.value, []).append(-float(logits[i - 1].log_softmax(-1)[token]))
                hits.setdefault(span.value, []).append(float(logits[i - 1].argmax() == token))
    assert one_step.loss_by_span == pytest.approx({s: sum(v) / len(v) for s, v in losses.items()}, abs=1e-5)
    assert one_step.accuracy_by_span == pytest.approx({s: sum(v) / len(v) for s, v in hits.items()}, abs=1e-9)
    every = [hit for of_span in hits.values() for hit in of_span]
    assert one_step.accuracy == pytest.approx(sum(every) / len(every), abs=1e-9)


def test_speed_and_memory_are_of_this_machine(one_step: Progress) -> None:
    assert one_step.tokens_per_s == pytest.approx(one_step.tokens / one_step.train_s)
    assert one_step.step_s == one_step.train_s > 0
    assert one_step.mfu is not None and 0 < one_step.mfu < 1
    assert 100 < one_step.peak_memory_mb < 64 * 1024
    assert 0 <= one_step.stall_share < 1


def test_flops_of_a_row_are_those_counted_by_hand(base: Path) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base)
    flops = ModelFlops.of(config, lora=None)
    assert flops is not None
    # Two layers of width 64: q and o 64 x 64, k and v 64 x 32, gate, up and down 64 x 96; the head is 64 x 3072.
    matrices = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
    by_hand = 6 * matrices * 10 + 6 * 64 * 3072 * 4 + 2 * 6 * 64 * (6**2 + 4**2)
    assert flops.of_rows([6, 4], trained_tokens=4) == by_hand
    frozen = ModelFlops.of(config, lora=LoraConfig(rank=2, target="q_proj"))
    assert frozen is not None and frozen.per_token == 4 * matrices + 6 * 2 * 2 * (64 + 64)


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 311.8),
        ("NVIDIA L40S", 362.1),
        ("Tesla T4", None),
    ],
)
def test_a_gpus_peak_is_found_by_its_name_or_not_at_all(name: str, tera: float | None) -> None:
    assert peak_of_gpu(name) == (None if tera is None else tera * 1e12)


# -- where they go


def test_every_step_is_a_line_of_json_and_a_resumed_run_leaves_no_step_twice(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path, after_step=0)
    for step in (1, 2, 3):
        sink.write(at(step, grad_norm=math.nan if step == 2 else 1.0))
    sink.close()
    path.write_text(path.read_text() + '{"step": 4, "lo')
    again = JsonLines(path, after_step=2)
    again.write(at(3, accuracy_by_span={"code": 0.5}))
    again.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[1]["grad_norm"] is None and lines[2]["accuracy/code"] == lines[2]["loss/code"] == 0.5


def test_the_console_shows_a_line_now_and_then_and_the_last(tmp_path: Path) -> None:
    from rich.console import Console

    shown = io.StringIO()
    sink = ConsoleLines(every_s=1000.0, console=Console(file=shown, width=200))
    for step in (1, 2, 3):
        sink.write(at(step))
    sink.close()
    lines = shown.getvalue().splitlines()
    assert [line.partition(";")[0] for line in lines] == ["step 1", "step 3"]
    assert "loss 0.333; correct 25.0%" in lines[1]


def test_steps_between_records_are_left_out_but_not_the_last(tmp_path: Path) -> None:
    config = TrackingConfig(every_steps=3)
    with Tracker.start(config, folder=tmp_path, after_step=0, settings={}) as tracker:
        for step in range(1, 6):
            tracker.step(at(step))
        tracker.step(at(5), last=True)
        tracker.step(at(5), last=True)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3, 5]


def test_what_is_unknown_is_no_number_and_what_is_shown_is_finite_or_said() -> None:
    assert "validation_loss" not in record(at(1)) and "mfu" not in record(at(1))
    shown = figures(Progress(step=1, loss=math.nan, mfu=0.42, skipped_steps=2, peak_memory_mb=2048.0))
    assert (shown["loss"], shown["MFU"], shown["memory"], shown["skipped steps"]) == ("nan", "42.0%", "2.0 GiB", "2")


# -- services of others


@pytest.mark.parametrize(
    "asked", [{"tensorboard": True}, {"wandb_project": "p"}, {"mlflow_experiment": "e"}], ids=lambda asked: [*asked][0]
)
def test_a_service_that_is_not_installed_is_refused_before_the_run(
    base: Path, tmp_path: Path, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    package = {"tensorboard": "tensorboard", "wandb_project": "wandb", "mlflow_experiment": "mlflow"}[[*asked][0]]
    monkeypatch.setitem(sys.modules, package, None)  # how Python marks what cannot be imported
    config = TrackingConfig(**asked)
    with pytest.raises(ConfigError, match=f"pip install {package}"):
        Learner(config_of(base, tmp_path, tracking=config), ListSource(ROWS))


def test_by_default_nothing_leaves_the_machine() -> None:
    config = TrackingConfig()
    assert not (config.tensorboard or config.wandb_project or config.mlflow_experiment)
    check_installed(config)


WANDB = """
import json, pathlib
import os
class _Run:
    def __init__(self, said): self.path = pathlib.Path(said["dir"]) / "told.jsonl"; self._say(init=said)
    def _say(self, **what):
        with open(self.path, "a") as file: file.write(json.dumps(what) + "\\n")
    def define_metric(self, name, step_metric=None): self._say(metric=[name, step_metric])
    def log(self, numbers): self._say(log=numbers)
    def finish(self): self._say(finish=True)
def init(**said): return _Run(said | {"reports": os.environ["WANDB_ERROR_REPORTING"]})
"""
MLFLOW = """
import json, os, pathlib
class MlflowClient:
    def __init__(self, tracking_uri):
        self.path = pathlib.Path(tracking_uri.removeprefix("sqlite:///")).parent / "told.jsonl"
    def _say(self, **what):
        with open(self.path, "a") as file: file.write(json.dumps(what) + "\\n")
    def get_experiment_by_name(self, name): return None
    def create_experiment(self, name): self._say(experiment=name); return "7"
    def create_run(self, number, run_name):
        self._say(run=[number, run_name], quiet=os.environ["MLFLOW_DISABLE_TELEMETRY"])
        return type("Run", (), {"info": type("Info", (), {"run_id": "r1"})})
    def log_param(self, run_id, key, value): self._say(param=[key, value])
    def log_batch(self, run_id, metrics): self._say(log=[[m.key, m.value, m.step] for m in metrics])
    def set_terminated(self, run_id): self._say(finish=run_id)
"""
ENTITIES = """
class Metric:
    def __init__(self, key, value, timestamp, step): self.key, self.value, self.step = key, value, step
"""


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Packages that write down what they are told, in the place of wandb and mlflow, which are not installed here: they
    follow their documented interfaces, and prove what we call, not what those do."""
    packages = tmp_path / "packages"
    for name, text in {
        "wandb/__init__.py": WANDB,
        "mlflow/__init__.py": "",
        "mlflow/tracking.py": MLFLOW,
        "mlflow/entities.py": ENTITIES,
    }.items():
        (packages / name).parent.mkdir(parents=True, exist_ok=True)
        (packages / name).write_text(text)
    monkeypatch.syspath_prepend(str(packages))
    for name in [name for name in sys.modules if name.partition(".")[0] in ("wandb", "mlflow")]:
        monkeypatch.delitem(sys.modules, name)
    for variable in ("MLFLOW_TRACKING_URI", "MLFLOW_DISABLE_TELEMETRY", "WANDB_ERROR_REPORTING"):
        monkeypatch.setenv(variable, "")  # so that it is put back after the test
        monkeypatch.delenv(variable)
    folder = tmp_path / "run" / "learner"
    folder.mkdir(parents=True)
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] in ("wandb", "mlflow")]:
        del sys.modules[name]


def told(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "told.jsonl").read_text().splitlines()]


def track(config: TrackingConfig, folder: Path, *steps: int) -> None:
    with Tracker.start(config, folder=folder, after_step=steps[0] - 1, settings={"lr": 0.1}) as tracker:
        for step in steps:
            tracker.step(at(step))


def test_weights_and_biases_is_told_every_step_and_a_resumed_run_is_the_same_run(stand_ins: Path) -> None:
    config = TrackingConfig(wandb_project="agents")
    track(config, stand_ins, 1, 2)
    track(config, stand_ins, 3)
    said = told(stand_ins)
    first, second = (line["init"] for line in said if "init" in line)
    assert first["reports"] == "false"
    assert (first["project"], first["name"], first["config"]) == ("agents", "run", {"lr": 0.1})
    assert first["id"] == second["id"] and first["resume"] == "allow"
    logged = [line["log"] for line in said if "log" in line]
    assert [numbers["step"] for numbers in logged] == [1, 2, 3] and logged[0]["loss/code"] == 0.5
    assert said[-1] == {"finish": True}


def test_mlflow_writes_beside_the_run_unless_told_otherwise(stand_ins: Path) -> None:
    config = TrackingConfig(mlflow_experiment="agents", run_name="mine")
    track(config, stand_ins, 1)
    track(config, stand_ins, 2)
    said = told(stand_ins)
    assert [line["run"] for line in said if "run" in line] == [["7", "mine"]]
    assert [line["quiet"] for line in said if "run" in line] == ["true"]
    assert {"param": ["lr", "0.1"]} in said and said[-1] == {"finish": "r1"}
    assert [line["log"][0] for line in said if "log" in line] == [["loss", 1.0, 1], ["loss", 0.5, 2]]


def test_a_service_that_fails_is_a_warning_and_not_the_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Broken:
        def write(self, progress: Progress) -> None:
            raise ConnectionError("quota exceeded")

        def close(self) -> None:
            raise AssertionError("it was given up")

    sink = InBackground("Somewhere", Broken)
    for step in range(1, 2000):  # more than may wait
        sink.write(at(step))
    sink.close()
    assert "warning: tracking with Somewhere: given up: ConnectionError: quota exceeded" in capfd.readouterr().err


def test_tensorboard_gets_event_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import (  # pyright: ignore[reportMissingImports]
        EventAccumulator,
    )

    config = TrackingConfig(tensorboard=True)
    track(config, tmp_path, 1, 2)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss/code")] == [1, 2]
