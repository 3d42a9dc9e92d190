"""The cluster's files: Ray's own validation and what it misses; pins, doors, tokens; commands that may run twice."""

import argparse
import contextlib
import copy
import os
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffex import submit

ROOT = Path(__file__).resolve().parents[1]
AWS, LOCAL, KUBE = "cluster.yaml", "cluster.local.yaml", "kuberay.yaml"
GUIDE = "docs/cluster.md"


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def prepared(name: str) -> dict[str, Any]:
    """The file as `ray up` understands it before it reaches for any host."""
    from ray.autoscaler._private.util import prepare_config

    config: dict[str, Any] = prepare_config(copy.deepcopy(yaml.safe_load(text(name))))
    return config


COMMANDS = (
    "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
    "head_start_ray_commands", "worker_start_ray_commands",
)  # fmt: skip


def commands(name: str, *kinds: str) -> list[str]:
    config = yaml.safe_load(text(name))
    return [command for kind in kinds or COMMANDS for command in config.get(kind, [])]


# ----------------------------------------------------------------------------------------------------------------------
# Both files of `ray up`


@pytest.mark.parametrize("name", [AWS, LOCAL])
def test_rays_own_schema_takes_the_file(name: str) -> None:
    from ray.autoscaler._private.util import validate_config

    validate_config(prepared(name))


def test_rays_own_schema_would_refuse_a_misspelt_key() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(text(AWS)) | {"max_worker": 3}
    with pytest.raises(Exception, match="max_worker"):
        validate_config(prepare_config(config))


def test_no_node_type_may_have_more_workers_than_the_cluster_and_all_may_go() -> None:
    config = prepared(AWS)
    for name, kind in config["available_node_types"].items():
        assert 0 <= kind["max_workers"] <= config["max_workers"], name
        assert kind["min_workers"] == 0, name
    assert config["available_node_types"][config["head_node_type"]]["max_workers"] == 0
    assert config["idle_timeout_minutes"] > 0


def test_gpu_workers_are_spot_and_every_node_has_a_profile_for_the_bucket() -> None:
    config = prepared(AWS)
    kinds = config["available_node_types"]
    assert kinds["gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    profiles = {name: kind["node_config"]["IamInstanceProfile"]["Name"] for name, kind in kinds.items()}
    assert len(set(profiles.values())) == 2  # workers may not start machines


def test_the_region_is_the_same_wherever_it_stands() -> None:
    config = prepared(AWS)
    region = config["provider"]["region"]
    assert all(zone.startswith(region) for zone in config["provider"]["availability_zone"].split(","))
    assert set(re.findall(r"[a-z]{2}-[a-z]+-\d\b", text(AWS))) == {region}


@pytest.mark.parametrize("name", [AWS, LOCAL])
def test_every_command_is_shell_that_parses(name: str) -> None:
    for command in commands(name):
        done = subprocess.run(["bash", "-n", "-c", f"({command})"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, command + done.stderr


@pytest.mark.parametrize("name", [AWS, LOCAL, KUBE, GUIDE])
def test_nothing_ends_processes_that_are_not_ours(name: str) -> None:
    # Ray's own start commands begin by ending every Ray on the machine; what ends processes by name is no better.
    found = re.search(r"\bray\W{1,3}stop\b|\b(?:p|s)kill\b|\bkill(?:all|5)\b", text(name))
    assert found is None, found


@pytest.mark.parametrize("name", [AWS, LOCAL])
def test_what_the_installation_needs_is_mounted_from_here(name: str) -> None:
    config = prepared(name)
    home = f"/home/{config['auth']['ssh_user']}"
    mounts = config["file_mounts"]
    assert all(remote.startswith(f"{home}/") for remote in mounts)
    own = {Path(local) for local in mounts.values() if not local.startswith("~")}
    assert all((ROOT / local).exists() for local in own)
    project = tomllib.loads(text("pyproject.toml"))
    needed = {"pyproject.toml", "constraints.txt", project["project"]["readme"], *project["project"]["license-files"]}
    needed |= set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
    assert {str(local) for local in own} == needed


# ----------------------------------------------------------------------------------------------------------------------
# Doors and tokens


@pytest.mark.parametrize("name", [AWS, LOCAL])
def test_dashboard_and_mlflow_listen_on_loopback_alone(name: str) -> None:
    start = commands(name, "head_start_ray_commands")
    head, server = (next(c for c in start if what in c) for what in ("ray start", "mlflow server"))
    assert re.findall(r"--dashboard-host[= ](\S+)", head) == ["127.0.0.1"]
    assert re.findall(r"--host[= ](\S+)", server) == ["127.0.0.1"]
    assert "0.0.0.0" not in "".join(commands(name))


def test_the_security_group_opens_no_port_to_the_world_but_ssh() -> None:
    rules = prepared(AWS)["provider"]["security_group"].get("IpPermissions", [])
    public = []
    for rule in rules:
        sources = [
            s.get("CidrIp") or s.get("CidrIpv6") for s in (*rule.get("IpRanges", ()), *rule.get("Ipv6Ranges", ()))
        ]
        public += [rule] if any(str(source).endswith("/0") for source in sources) else []
    assert all((rule["FromPort"], rule["ToPort"]) == (22, 22) for rule in public)


@pytest.mark.parametrize("name", [AWS, LOCAL])
def test_every_node_runs_in_token_mode_with_the_token_of_the_one_who_starts_it(name: str) -> None:
    config = prepared(name)
    # As Ray's guide "Token authentication" has it: a mounted file, and the mode in every shell.
    assert config["file_mounts"][f"/home/{config['auth']['ssh_user']}/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("RAY_AUTH_MODE=token" in command for command in config["initialization_commands"])
    assert not re.search(r"RAY_AUTH_TOKEN\s*[=:]|RAY_AUTH_MODE=disabled", text(name))


# ----------------------------------------------------------------------------------------------------------------------
# Versions


def pinned() -> dict[str, str]:
    lines = (line for line in text("constraints.txt").splitlines() if "==" in line)
    return dict(line.split("==") for line in lines)


@pytest.mark.parametrize("name", [AWS, LOCAL, KUBE, GUIDE])
def test_versions_are_those_of_the_constraints(name: str) -> None:
    pins = pinned()
    named = re.findall(r"\b([A-Za-z][\w.-]*)==([\w.]+)", text(name))
    assert {(what, version) for what, version in named if what in pins and pins[what] != version} == set()
    assert set(re.findall(r"\bray[:-](\d+\.\d+\.\d+)", text(name))) <= {pins["ray"]}


@pytest.mark.parametrize("name", [AWS, LOCAL])
def test_every_package_that_a_node_installs_is_pinned(name: str) -> None:
    installs = [command for command in commands(name) if " pip install " in command]
    assert installs
    for command in installs:
        words = shlex.split(command.split(" pip install ")[1])
        takes_value = {"-p", "-c", "-e", "--index-url"}
        free = [w for i, w in enumerate(words) if not w.startswith("-") and (i == 0 or words[i - 1] not in takes_value)]
        assert all("==" in word for word in free), command
        assert "-c" in words or free == [f"torch=={pinned()['torch']}"], command


# ----------------------------------------------------------------------------------------------------------------------
# Commands that may run twice


class Node:
    """A home on which commands of a file run, with stand-ins for programs that only tell that they were called."""

    def __init__(self, place: Path) -> None:
        self.home, self.calls = place / "home", place / "calls"
        for folder in (self.home / "bin", self.home / ".ssh", self.home / ".ray"):
            folder.mkdir(parents=True)
        self.calls.touch()

    def stand_in(self, name: str, then: str = "exit 0") -> None:
        program = self.home / "bin" / name
        program.write_text(f'#!/bin/sh\necho "{name} $*" >> {self.calls}\n{then}\n')
        program.chmod(0o755)

    def run(self, command: str, **environ: str) -> None:
        # What belongs to a machine is moved into this home.
        command = command.replace("/tmp/keep-", f"{self.home}/keep-").replace("/home/ubuntu", str(self.home))
        env = {"HOME": str(self.home), "USER": "ubuntu", "PATH": f"{self.home}/bin:{os.environ['PATH']}", **environ}
        done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, command + done.stderr

    def called(self, name: str) -> list[str]:
        return [line for line in self.calls.read_text().splitlines() if line.startswith(f"{name} ")]

    def wait_for(self, name: str, times: int) -> list[str]:
        for _ in range(100):
            if len(self.called(name)) >= times:
                break
            time.sleep(0.05)
        return self.called(name)

    def kept(self) -> list[int]:
        return [int(note.read_text()) for note in self.home.glob("keep-*.pid")]

    def end(self) -> None:
        for pid in self.kept():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # `keep` gave each a session, and so a group, of its own


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    made.end()


def keep_on(node: Node, name: str) -> None:
    node.run(next(c for c in commands(name, "setup_commands") if "bin/keep" in c))


@pytest.mark.parametrize("name", [AWS, LOCAL])
@pytest.mark.parametrize("kind", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_start_commands_start_nothing_twice_and_start_again_what_died(node: Node, name: str, kind: str) -> None:
    keep_on(node, name)
    node.stand_in("ray", '[ "$1" = status ] || exec sleep 60')
    node.stand_in("mlflow", "exec sleep 60")
    node.stand_in("ssh", "exec sleep 60")
    started = "mlflow" if kind.startswith("head") else "ssh"
    for _ in range(2):
        for command in commands(name, kind):
            node.run(command, RAY_HEAD_IP="10.0.0.1")
        assert len(node.wait_for("ray start", 1)) == 1
        assert len(node.wait_for(started, 1)) == 1
    pids = node.kept()
    ray = int(next(node.home.glob("keep-*-ray.pid")).read_text())
    os.kill(ray, signal.SIGKILL)
    for command in commands(name, kind):
        node.run(command, RAY_HEAD_IP="10.0.0.1")
    assert len(node.wait_for("ray start", 2)) == 2
    assert len(node.called(started)) == 1
    assert len(set(node.kept()) - set(pids)) == 1


@pytest.mark.parametrize("name", [AWS, LOCAL])
def test_workers_join_the_head_and_reach_mlflow_at_the_address_that_the_head_uses(node: Node, name: str) -> None:
    keep_on(node, name)
    node.stand_in("ray", "exec sleep 60")
    node.stand_in("ssh", "exec sleep 60")
    for command in commands(name, "worker_start_ray_commands"):
        node.run(command, RAY_HEAD_IP="10.0.0.1")
    assert "--address=10.0.0.1:6379" in node.wait_for("ray start", 1)[0]
    tunnel = node.wait_for("ssh", 1)[0].split()
    assert tunnel[tunnel.index("-L") + 1] == "127.0.0.1:5000:127.0.0.1:5000"
    assert tunnel[-1] == "ubuntu@10.0.0.1"


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no ssh-keygen here")
@pytest.mark.parametrize("name", [AWS, LOCAL])
def test_the_tunnels_key_opens_mlflow_and_no_shell_and_is_made_once(node: Node, name: str) -> None:
    command = next(c for c in commands(name, "head_setup_commands") if "ssh-keygen" in c)
    for _ in range(2):
        node.run(command)
    (line,) = (node.home / ".ssh" / "authorized_keys").read_text().splitlines()
    rights, kind, *_ = line.split(" ")
    assert rights == 'restrict,port-forwarding,permitopen="127.0.0.1:5000",command="/bin/false"'
    assert kind == "ssh-ed25519"
    (key,) = prepared(name)["cluster_synced_files"]
    assert key.replace("/home/ubuntu", str(node.home)) == str(node.home / ".ssh" / "mlflow_tunnel")
    assert Path(key.replace("/home/ubuntu", str(node.home))).stat().st_mode & 0o077 == 0


def test_the_heads_backup_copies_a_database_in_use_and_sends_it(node: Node) -> None:
    node.stand_in("aws")
    (node.home / "bin" / "python").symlink_to(sys.executable)
    node.run(next(c for c in commands(AWS, "head_setup_commands") if "bin/backup" in c))
    with sqlite3.connect(node.home / "mlflow" / "mlflow.db") as database:
        database.execute("create table runs (name)")
        database.execute("insert into runs values ('a')")
        database.commit()
        node.run("backup")
    database.close()
    copy_ = sqlite3.connect(node.home / "mlflow" / "copy.db")
    assert copy_.execute("select name from runs").fetchall() == [("a",)]
    copy_.close()
    sent = node.called("aws")
    assert any("copy.db s3://FILL-BUCKET/mlflow/mlflow.db" in call for call in sent)
    assert any("sync" in call and "s3://FILL-BUCKET/results" in call for call in sent)


@pytest.mark.parametrize("name", [AWS, LOCAL])
def test_the_shells_environment_is_set_once(node: Node, name: str) -> None:
    for _ in range(2):
        for command in commands(name, "initialization_commands"):
            node.run(command)
    lines = (node.home / ".bashrc").read_text().splitlines()
    assert len(lines) == len(set(lines))
    done = subprocess.run(
        ["bash", "-c", "source ~/.bashrc; echo $RAY_AUTH_MODE $PATH"],
        env={"HOME": str(node.home), "PATH": os.environ["PATH"]}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith(f"token {node.home}/bin:{node.home}/venv/bin:")


# ----------------------------------------------------------------------------------------------------------------------
# Kubernetes

# The fields that KubeRay 1.6.2 knows, from its generated API reference (ray.io/v1).  The file's other kinds and the pod
# templates were checked once against Kubernetes 1.29's schemas with `kubernetes-validate --strict`.
FIELDS = yaml.safe_load("""
cluster: [upgradeStrategy, authOptions, suspend, managedBy, autoscalerOptions, headServiceAnnotations, headGroupSpec,
          enableInTreeAutoscaling, gcsFaultToleranceOptions, rayVersion, workerGroupSpecs]
auth: [enableK8sTokenAuth, secretName, mode]
autoscaler: [resources, image, imagePullPolicy, securityContext, idleTimeoutSeconds, upscalingMode, version, env,
             envFrom, volumeMounts]
head: [template, headService, enableIngress, resources, labels, rayStartParams, serviceType]
workers: [suspend, groupName, replicas, minReplicas, maxReplicas, idleTimeoutSeconds, resources, labels, numOfHosts,
          rayStartParams, template, scaleStrategy]
job: [activeDeadlineSeconds, backoffLimit, rayClusterSpec, submitterPodTemplate, metadata, clusterSelector, entrypoint,
      submitterConfig, managedBy, deletionStrategy, runtimeEnvYAML, jobId, submissionMode, entrypointResources,
      suspend, entrypointNumCpus, entrypointNumGpus, ttlSecondsAfterFinished, preRunningDeadlineSeconds,
      shutdownAfterJobFinishes]
""")


@pytest.fixture(scope="module")
def objects() -> dict[str, dict[str, Any]]:
    return {f"{o['kind']}/{o['metadata']['name']}": o for o in yaml.safe_load_all(text(KUBE))}


def test_kuberays_objects_have_fields_that_kuberay_knows_and_those_it_needs(objects: dict[str, Any]) -> None:
    cluster, job = objects["RayCluster/diffex"], objects["RayJob/lambda-sweep"]
    assert cluster["apiVersion"] == job["apiVersion"] == "ray.io/v1"
    spec = cluster["spec"]
    assert set(spec) <= set(FIELDS["cluster"])
    assert set(spec["authOptions"]) <= set(FIELDS["auth"])
    assert set(spec["autoscalerOptions"]) <= set(FIELDS["autoscaler"])
    assert set(spec["headGroupSpec"]) <= set(FIELDS["head"])
    assert {"template", "rayStartParams"} <= set(spec["headGroupSpec"])
    for group in spec["workerGroupSpecs"]:
        assert set(group) <= set(FIELDS["workers"])
        assert {"groupName", "template", "rayStartParams", "minReplicas", "maxReplicas"} <= set(group)
    for params in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in params["rayStartParams"].values())
    assert set(job["spec"]) <= set(FIELDS["job"])
    assert job["spec"]["submissionMode"] in ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")


def test_the_kubernetes_cluster_scales_gpus_from_none_and_asks_for_a_token(objects: dict[str, Any]) -> None:
    spec = objects["RayCluster/diffex"]["spec"]
    assert spec["authOptions"]["mode"] == "token"
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (group,) = spec["workerGroupSpecs"]
    assert (group["minReplicas"], group["replicas"]) == (0, 0)
    assert group["maxReplicas"] > 0
    (worker,) = group["template"]["spec"]["containers"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == worker["resources"]["requests"]["nvidia.com/gpu"] == 1
    for pods in (spec["headGroupSpec"], group):
        assert pods["template"]["spec"]["restartPolicy"] == "Never"


def test_nothing_on_kubernetes_is_reachable_from_outside(objects: dict[str, Any]) -> None:
    services = [o["spec"].get("type") for o in objects.values() if o["kind"] == "Service"]
    assert services == ["ClusterIP"]
    assert objects["RayCluster/diffex"]["spec"]["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert not {o["kind"] for o in objects.values()} & {"Ingress", "Gateway", "HTTPRoute"}
    (rule,) = objects["NetworkPolicy/mlflow"]["spec"]["ingress"]
    assert rule["from"] == [{"podSelector": {"matchLabels": {"ray.io/cluster": "diffex"}}}]


def test_names_that_kubernetes_objects_call_each_other_by_exist(objects: dict[str, Any]) -> None:
    whole = yaml.safe_dump_all(objects.values())
    claims = set(re.findall(r"claimName: (\S+)", whole))
    assert {f"PersistentVolumeClaim/{claim}" for claim in claims} == {k for k in objects if k.startswith("Pers")}
    job = objects["RayJob/lambda-sweep"]["spec"]
    assert job["clusterSelector"] == {"ray.io/cluster": objects["RayCluster/diffex"]["metadata"]["name"]}
    assert "http://mlflow:5000" in job["entrypoint"]
    server = objects["Deployment/mlflow"]["spec"]["template"]["spec"]["containers"][0]["command"]
    assert "mlflow:5000" in server[server.index("--allowed-hosts") + 1].split(",")
    assert {o["metadata"]["labels"]["diffex"] for o in objects.values()} == {"platform", "sweep"}
    assert len(set(re.findall(r"image: (\S+)", whole))) == 1


# ----------------------------------------------------------------------------------------------------------------------
# The guide


def shown(first: str) -> list[list[str]]:
    """Commands of the guide that begin with a word, their continued lines joined, without comments."""
    blocks = re.findall(r"```sh\n(.*?)```", text(GUIDE), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True)) and words[0] == first]


def test_every_submission_of_the_guide_parses_and_names_a_script_that_exists() -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    submit.add_options(parser)
    found = [words[2:] for words in shown("diffex") if words[1] == "submit"]
    assert len(found) >= 3
    for argv in found:
        options = parser.parse_args(argv)
        assert (ROOT / options.script).is_file(), argv
    for words in shown("ray"):
        if words[1:3] == ["job", "submit"]:
            assert (ROOT / words[words.index("--") + 2]).is_file(), words


def test_every_option_that_the_guide_gives_a_sweep_is_one_of_its(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    submit.add_options(parser)
    given: set[str] = set()
    for words in shown("diffex"):
        if words[1] == "submit" and parser.parse_args(words[2:]).script == "sweeps/lambda_sweep.py":
            given |= {word for word in parser.parse_args(words[2:]).arguments if word.startswith("--") and word != "--"}
    entry = yaml.safe_load_all(text(KUBE))
    job = next(o for o in entry if o["kind"] == "RayJob")["spec"]["entrypoint"]
    given |= {word for word in shlex.split(job) if word.startswith("--")}
    done = subprocess.run(
        [sys.executable, "sweeps/lambda_sweep.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert given
    assert given <= set(re.findall(r"--[a-z-]+", done.stdout))


def test_the_guide_names_files_of_this_repository_that_exist() -> None:
    for name in re.findall(r"\]\(([^)#:]+)\)", text(GUIDE)):
        assert (ROOT / "docs" / name).exists(), name
