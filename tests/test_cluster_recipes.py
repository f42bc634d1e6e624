"""The recipes in launch/clusters/: right by the schema of the tool that reads them, and in step with the lock files."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from launch.config_reading import load_config
from launch.runtime_env import pins, runtime_env
from tests.conftest import ROOT

CLUSTERS = ROOT / "launch" / "clusters"
SCRIPTS = sorted([*CLUSTERS.glob("*.sh"), *CLUSTERS.glob("*.sbatch")])


def locked(package: str) -> str:
    versions = {
        re.search(rf"^{package}==([\w.]+)", (ROOT / f"requirements-{build}.lock").read_text(), re.M)[1]
        for build in ("cpu", "gpu")
    }
    assert len(versions) == 1, f"the lock files disagree on {package}: {versions}"
    return versions.pop()


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTERS / name).read_text())


def pod_specs(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = manifest["spec"]["rayClusterSpec"]
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def commands() -> list[tuple[str, list[str]]]:
    """(file, overrides) of every distill.py that a recipe names."""
    found = []
    for path in sorted(CLUSTERS.iterdir()):
        text = re.sub(r"\\\n[#\s]*", " ", path.read_text()) if path.is_file() else ""
        for words in re.findall(r"(?:distill\.py|slurm\.sbatch|one_node\.sh) ((?:[\w.]+=\S+ ?\n?\s*)+)", text):
            found.append((path.name, words.split()))
    return found


# -- versions


def test_images_and_clusters_have_the_ray_of_the_lock_files() -> None:
    ray = locked("ray")
    manifest = read("rayjob.yaml")
    assert manifest["spec"]["rayClusterSpec"]["rayVersion"] == ray
    images = [read("aws.yaml")["docker"]["image"], *[spec["containers"][0]["image"] for spec in pod_specs(manifest)]]
    assert {image.rpartition(":")[2] for image in images} == {ray}
    assert f"-t apprentice:{ray} " in (CLUSTERS / "Dockerfile").read_text()


def test_the_image_has_a_python_that_the_project_runs_on() -> None:
    version = re.search(r"^FROM python:(\d+\.\d+)-", (CLUSTERS / "Dockerfile").read_text(), re.M)[1]
    wanted = re.search(r'^requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert version == wanted, "the GPU lock file is resolved for this Python alone"


def test_what_is_installed_on_nodes_are_the_pins_of_the_lock_file() -> None:
    packages = runtime_env("gpu")["pip"]["packages"]
    assert f"ray=={locked('ray')}" in {re.sub(r"\[.*?\]", "", package) for package in packages}
    for build in ("cpu", "gpu"):
        requirements = [Requirement(pin) for pin in pins(ROOT / f"requirements-{build}.lock")]
        assert len(requirements) > 100
        assert all(str(each.specifier).startswith("==") for each in requirements)


# -- Ray


def test_ray_takes_the_runtime_environments() -> None:
    from ray.runtime_env import RuntimeEnv

    for described in (runtime_env(), runtime_env("cpu"), runtime_env("gpu")):
        # A folder is made into a package when it is submitted; what is left is what the class checks.
        checked = RuntimeEnv(**{key: value for key, value in described.items() if key != "working_dir"})
        assert json.loads(checked.serialize())["env_vars"]["RAY_USAGE_STATS_ENABLED"] == "0"


def test_rays_launcher_takes_the_cluster_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = read("aws.yaml")
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    types = config["available_node_types"].values()
    assert prepared["max_workers"] >= sum(each.get("max_workers", 0) for each in types)
    with pytest.raises(Exception, match="max_wokers"):
        validate_config(prepare_config({**config, "max_wokers": 3}))


def test_the_cluster_has_the_resources_that_its_configuration_asks_for() -> None:
    config = load_config(["recipe=paper", "cluster=cloud", "run_dir=s3://bucket/x"])
    (name,) = config.cluster.roles.envs.resources
    assert name in read("aws.yaml")["available_node_types"]["envs"]["resources"]
    groups = {group["groupName"]: group for group in read("rayjob.yaml")["spec"]["rayClusterSpec"]["workerGroupSpecs"]}
    assert json.loads(json.loads(groups["envs"]["rayStartParams"]["resources"])) == {name: 1}


# -- Kubernetes


def test_of_each_pod_requests_are_limits_and_every_mount_has_its_volume() -> None:
    for spec in pod_specs(read("rayjob.yaml")):
        (container,) = spec["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in spec["volumes"]}


def test_the_gpus_that_ray_is_told_of_are_those_that_its_pod_has() -> None:
    for group in read("rayjob.yaml")["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert group["rayStartParams"].get("num-gpus") == limits.get("nvidia.com/gpu")
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_jobs_own_runtime_environment_is_yaml_that_ray_takes() -> None:
    from ray.runtime_env import RuntimeEnv

    described = yaml.safe_load(read("rayjob.yaml")["spec"]["runtimeEnvYAML"])
    assert described.pop("working_dir") == re.search(r"^WORKDIR (\S+)", (CLUSTERS / "Dockerfile").read_text(), re.M)[1]
    RuntimeEnv(**described)


# -- the image


def test_the_image_copies_what_is_there_and_all_that_runs() -> None:
    lines = re.findall(r"^COPY (.+) (\S+)$", (CLUSTERS / "Dockerfile").read_text(), re.M)
    copied = {name for names, _ in lines for name in names.split()}
    assert all((ROOT / name).exists() for name in copied)
    assert {"envs", "rollout", "learner", "launch", "configs", "requirements-gpu.lock"} <= copied


# -- scripts and commands


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_right_for_bash_and_shellcheck(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert script.read_text().startswith("#!/usr/bin/env bash\n") and "set -euo pipefail" in script.read_text()
    assert script.suffix == ".sbatch" or os.access(script, os.X_OK)
    if shutil.which("shellcheck") is None:
        pytest.skip("the rest needs shellcheck")
    done = subprocess.run(["shellcheck", "--severity=style", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_command_that_a_recipe_names_composes() -> None:
    named = commands()
    assert {file for file, _ in named} >= {"aws.yaml", "rayjob.yaml", "slurm.sbatch", "one_node.sh", "runtime_env.yaml"}
    for _, words in named:
        if not any(word.startswith("out=") for word in words):
            load_config(words)


STANDINS = {
    "scontrol": 'if [ "$1" = show ]; then printf "%s\\n" $SLURM_JOB_NODELIST; else echo "scontrol $*" >>"$CALLS"; fi',
    "srun": 'while [[ $1 == --* ]]; do shift; done; echo "srun $*" >>"$CALLS"; exec "$@"',
    "hostname": "echo 127.0.0.1",
    "ray": 'echo "ray $*" >>"$CALLS"; sleep 300 & trap "kill $!; exit 0" TERM; wait',
    "python": (
        'if [ "$1" = -c ]; then echo token; exit 0; fi; echo "python $*" >>"$CALLS"; '
        "trap 'echo stopped >>\"$CALLS\"; kill $! 2>/dev/null; exit 130' TERM; "
        'until [ "$(grep -c "^ray start" "$CALLS")" = 2 ]; do sleep 0.05; done; sleep "${WORKS_S:-0}" & wait'
    ),
}
"""Stand-ins for what the script of Slurm calls; each writes down how it was called."""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    for name, body in STANDINS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    return {
        **os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"),
        "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "77", "SLURM_CPUS_ON_NODE": "8", "SLURM_GPUS_ON_NODE": "2",
        "SLURM_JOB_NODELIST": "n1 n2 n3", "TMPDIR": str(tmp_path),
    }  # fmt: skip


def test_the_script_for_slurm_starts_a_head_and_workers_and_ends_them(slurm: dict[str, str]) -> None:
    script = str(CLUSTERS / "slurm.sbatch")
    subprocess.run(["bash", script, "seed=1"], env=slurm, check=True, timeout=30)
    calls = Path(slurm["CALLS"]).read_text()
    head, worker = re.findall(r"^ray (start .*)$", calls, re.M)
    if "--address" in head:
        head, worker = worker, head
    assert "--head --block --node-ip-address=127.0.0.1 --port=20077" in head
    assert "--num-cpus=8 --num-gpus=2" in head and "--address=127.0.0.1:20077" in worker
    assert "python launch/distill.py cluster.address=127.0.0.1:20077 seed=1" in calls
    assert "requeue" not in calls


def test_a_slurm_job_that_is_out_of_time_is_interrupted_and_comes_back(slurm: dict[str, str]) -> None:
    job = subprocess.Popen(["bash", str(CLUSTERS / "slurm.sbatch")], env={**slurm, "WORKS_S": "60"})
    calls = Path(slurm["CALLS"])
    for _ in range(200):
        if calls.exists() and "python launch" in calls.read_text():
            break
        time.sleep(0.05)
    time.sleep(0.2)
    job.terminate()
    assert job.wait(20) == 130
    assert "stopped\n" in calls.read_text() and "scontrol requeue 77" in calls.read_text()


_LAUNCH = """
import boto3, json, sys, yaml
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config
iam = boto3.client("iam", region_name="us-east-1")
iam.create_instance_profile(InstanceProfileName="apprentice-nodes")
config = prepare_config(yaml.safe_load(open(sys.argv[1])))
validate_config(config)
config = bootstrap_aws(config)
provider = AWSNodeProvider(config["provider"], config["cluster_name"])
started = {}
for name, each in config["available_node_types"].items():
    kind = "head" if name == config["head_node_type"] else "worker"
    tags = {"ray-node-type": kind, "ray-user-node-type": name, "ray-node-name": name}
    for node in provider.create_node(each["node_config"], tags, 1).values():
        started[name] = node.instance_type
print(json.dumps(started))
"""


@pytest.mark.slow
def test_rays_aws_provider_starts_every_kind_of_node(s3_endpoint: str, tmp_path: Path) -> None:
    """On a stand-in for AWS: moto's server."""
    environment = {
        **os.environ, "HOME": str(tmp_path), "AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "not-a-real-key",
        "AWS_ENDPOINT_URL": s3_endpoint, "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    (tmp_path / ".ssh").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", _LAUNCH, str(CLUSTERS / "aws.yaml")],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    started = json.loads(done.stdout.splitlines()[-1])
    types = read("aws.yaml")["available_node_types"]
    assert started == {name: each["node_config"]["InstanceType"] for name, each in types.items()}


def test_a_slurm_job_whose_head_dies_ends_with_it(slurm: dict[str, str]) -> None:
    ray = Path(slurm["PATH"].split(":")[0]) / "ray"
    ray.write_text('#!/usr/bin/env bash\necho "ray $*" >>"$CALLS"; sleep 2; exit 7\n')
    said = Path(slurm["CALLS"]).with_name("said")
    with open(said, "w") as file:
        done = subprocess.run(
            ["bash", str(CLUSTERS / "slurm.sbatch")], env={**slurm, "WORKS_S": "30"}, stderr=file, timeout=60
        )
    assert done.returncode == 1 and "Ray's head ended (exit code 7), and the job with it" in said.read_text()
    assert "stopped\n" in Path(slurm["CALLS"]).read_text()
