"""What deploy/ holds is what the tools that read it accept: Ray's schema, Kubernetes' schemas, our own settings."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvbank.cluster.cli import _parser
from kvbank.cluster.config import load
from kvbank.errors import ConfigError
from kvbank.kvstore.tiers.embedded_redis import find_server

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
CLUSTERS = sorted(DEPLOY.glob("ray-cluster*.yaml"))
NOBODY = 10001
KUBE_RAY = {                                                     # github.com/ray-project/kuberay, docs/reference/api.md
    "spec": {"suspend", "managedBy", "autoscalerOptions", "headServiceAnnotations", "enableInTreeAutoscaling", "authOptions",
             "gcsFaultToleranceOptions", "headGroupSpec", "rayVersion", "workerGroupSpecs"},
    "head": {"template", "headService", "enableIngress", "rayStartParams", "serviceType"},
    "worker": {"suspend", "groupName", "replicas", "minReplicas", "maxReplicas", "idleTimeoutSeconds", "rayStartParams",
               "template", "scaleStrategy", "numOfHosts"},
}


def read(name: str) -> list[Any]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


# -- Ray ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.name)
def test_ray_accepts_the_cluster_file(path: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load(path.read_text()))
    validate_config(config)
    assert config["head_start_ray_commands"] and config["provider"]["type"] == {
        "ray-cluster": "local", "ray-cluster-aws": "aws", "ray-cluster-gcp": "gcp"}[path.stem]


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.name)
def test_every_cluster_file_starts_ray_as_the_one_that_was_run(path: Path) -> None:
    config, run = yaml.safe_load(path.read_text()), read("ray-cluster.yaml")[0]
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert config["setup_commands"][1:] == run["setup_commands"][1:]             # path, RAY_AUTH_MODE, mode of the token
    head, worker = config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]
    for flag in ("--port=6380", "--include-dashboard=false", "--autoscaling-config=~/ray_bootstrap_config.yaml"):
        assert flag in head.split()
    assert "--address=$RAY_HEAD_IP:6380" in worker.split()
    there = re.compile(r"--node-ip-address=\$\(hostname -I \| cut -d' ' -f1\) ")    # a cloud's machines know their address
    for mine, theirs in ((head, run["head_start_ray_commands"][-1]), (worker, run["worker_start_ray_commands"][-1])):
        assert there.sub("", mine.replace("\n", " ")).split() == there.sub("", theirs.replace("\n", " ")).split()


def test_the_settings_file_is_one() -> None:
    with pytest.raises(ConfigError, match="replace-this-key"):       # which everybody can read there
        load(DEPLOY / "kvbank.yaml", environ={})
    settings = load(DEPLOY / "kvbank.yaml", environ={"KVBANK__HTTP__API_KEYS": '{"a-key-of-my-own": "default"}'})
    assert settings.cluster.bind_host == "node" and settings.cluster.allow_public and settings.cluster.machines == 3
    nodes = read("ray-cluster.yaml")[0]["provider"]
    assert settings.cluster.machines == 1 + len(nodes["worker_ips"])


# -- containers --------------------------------------------------------------------------------------------------------

def test_the_image_has_a_cpu_and_a_cuda_stage_runs_as_nobody_and_copies_what_exists() -> None:
    lines = re.sub(r"\\\n", " ", (DEPLOY / "Dockerfile").read_text()).splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    stages: dict[str, list[list[str]]] = {}
    for word, rest in steps:
        if word == "FROM":
            stages[rest.split()[-1]] = []
        list(stages.values())[-1].append([word, rest])
    assert set(stages) == {"base", "cpu", "cuda"}
    for name in ("cpu", "cuda"):
        users = [at for at, (word, rest) in enumerate(stages[name]) if (word, rest) == ("USER", str(NOBODY))]
        assert users and not [step for step in stages[name][users[0]:] if step[0] in ("RUN", "COPY", "ADD")]
    copied = [source for word, rest in stages["base"] if word == "COPY" for source in rest.split()[:-1]]
    assert all((ROOT / source).exists() for source in copied)
    assert {"kvbank", "proto", "kernels", "kvstore", "workers", "cluster", "pyproject.toml"} <= set(copied)
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert not set(ignored) & set(copied) and ".git" in ignored


def test_the_composition_is_whole_and_its_settings_and_flags_are_ours() -> None:
    (compose,) = read("compose.yaml")
    services = compose["services"]
    assert set(services) == {"redis", "kvbank"}
    for service in services.values():
        assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["user"] not in ("root", "0")
        assert "no-new-privileges:true" in service["security_opt"] and service["healthcheck"]["test"]
        assert set(service["networks"]) <= set(compose["networks"])
        mounted = [volume.split(":")[0] for volume in service.get("volumes", ())]
        assert all(name in compose["volumes"] or name.startswith("${") for name in mounted)
        for name, need in service.get("depends_on", {}).items():
            assert name in services and (need["condition"] != "service_healthy" or "healthcheck" in services[name])
    ours = services["kvbank"]
    build = (DEPLOY / ours["build"]["context"]).resolve()
    assert build == ROOT and (build / ours["build"]["dockerfile"]).is_file()
    assert all(port.startswith("127.0.0.1:") for port in ours["ports"]) and "ports" not in services["redis"]
    values = {"REDIS_PASSWORD": "word", "KVBANK_API_KEY": "key", "MODEL": "/m"}
    environ = {name: interpolated(text, values) for name, text in ours["environment"].items()}
    args = _parser().parse_args(ours["command"])
    settings = load(None, environ=environ, overrides={"host": args.host, "port": args.port, "launcher": args.launcher})
    assert settings.tiers.redis == "redis://:word@redis:6379/0" and settings.http.api_keys == {"key": "default"}
    assert settings.tiers.redis_bytes < 1200 << 20                               # our budget is inside the server's
    with pytest.raises(KeyError):
        interpolated(ours["environment"]["KVBANK__TIERS__REDIS"], {})            # refused without the .env


def interpolated(text: str, values: dict[str, str]) -> str:
    """As compose does `${NAME:?reason}`, `${NAME}` and `$$`."""
    return re.sub(r"\$\{(\w+)(?::\?[^}]*)?\}|\$\$", lambda found: values[found[1]] if found[1] else "$", text)


def test_a_real_redis_accepts_the_flags_of_the_composition(tmp_path: Path) -> None:
    command = read("compose.yaml")[0]["services"]["redis"]["command"][-1].replace("$$", "$")
    path = tmp_path / "sock"
    words = command.replace("exec redis-server", f"exec {find_server()}") + f" --port 0 --unixsocket {path}"
    import redis

    with subprocess.Popen(["sh", "-c", words], env={"REDIS_PASSWORD": "word"}, stdout=subprocess.PIPE, text=True,
                          cwd=tmp_path) as server:
        try:
            assert server.stdout is not None
            for line in server.stdout:
                if "ready to accept" in line.lower():
                    break
            with redis.Redis(unix_socket_path=str(path), password="word", socket_timeout=5) as client:
                assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "allkeys-lru"}
                assert client.config_get("save") == {"save": ""}
                assert client.config_get("maxmemory") == {"maxmemory": str(1200 << 20)}
        finally:
            server.kill()


# -- Kubernetes --------------------------------------------------------------------------------------------------------

def ray_cluster() -> dict[str, Any]:
    (made,) = read("k8s/raycluster.yaml")
    return dict(made)


def templates() -> Iterator[dict[str, Any]]:
    spec = ray_cluster()["spec"]
    yield spec["headGroupSpec"]["template"]
    yield from (group["template"] for group in spec["workerGroupSpecs"])


def test_kubernetes_accepts_what_is_of_its_own_kinds() -> None:
    import kubernetes_validate

    documents = [*read("k8s/kvbank.yaml"), *({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **pod}
                                            for pod in templates())]
    assert [document["kind"] for document in documents] == ["ConfigMap", "Service", "NetworkPolicy", "Pod", "Pod"]
    for document in documents:
        kubernetes_validate.validate(document, "1.31", strict=True)
        wrong = {**document, "spek": {}}
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(wrong, "1.31", strict=True)


def test_the_ray_cluster_uses_only_fields_that_kuberay_documents() -> None:
    made = ray_cluster()
    assert (made["apiVersion"], made["kind"]) == ("ray.io/v1", "RayCluster")
    head, workers = made["spec"]["headGroupSpec"], made["spec"]["workerGroupSpecs"]
    assert set(made["spec"]) <= KUBE_RAY["spec"] and set(head) <= KUBE_RAY["head"]
    assert all(set(group) <= KUBE_RAY["worker"] for group in workers)
    for group in (head, *workers):                               # they become flags: texts only
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    assert made["spec"]["rayVersion"] in (ROOT / "constraints.txt").read_text()


def test_pods_run_as_nobody_and_every_secret_comes_from_a_secret() -> None:
    config = read("k8s/kvbank.yaml")[0]["data"]["kvbank.yaml"]
    for pod in templates():
        assert pod["spec"]["securityContext"]["runAsNonRoot"] and pod["spec"]["securityContext"]["runAsUser"] == NOBODY
        volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
        for container in pod["spec"]["containers"]:
            assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            env = {entry["name"]: entry for entry in container["env"]}
            assert env["RAY_AUTH_MODE"]["value"] == "token"
            for name in ("RAY_AUTH_TOKEN", "KVBANK__HTTP__API_KEYS", "KVBANK__TIERS__CACHE_SECRET"):
                assert "secretKeyRef" in env.get(name, {"valueFrom": {"secretKeyRef": 1}})["valueFrom"]
    environ = {"KVBANK__HTTP__API_KEYS": "key=default", "KVBANK__TIERS__CACHE_SECRET": "ab" * 32}
    settings = load(yaml.safe_load(config), environ=environ)
    replicas = sum(group["replicas"] for group in ray_cluster()["spec"]["workerGroupSpecs"])
    assert settings.cluster.machines == 1 + replicas and "key" not in config.replace("api-keys", "")


@pytest.mark.skipif(shutil.which("docker") is None, reason="no docker on this machine")
def test_docker_compose_itself_reads_the_file(tmp_path: Path) -> None:
    if subprocess.run(["docker", "compose", "version"], capture_output=True, timeout=30, check=False).returncode:
        pytest.skip("docker has no compose plugin on this machine")
    (tmp_path / ".env").write_text("REDIS_PASSWORD=word\nKVBANK_API_KEY=key\nMODEL=/m\n")
    words = ["docker", "compose", "-f", str(DEPLOY / "compose.yaml"), "--env-file", str(tmp_path / ".env"), "config", "-q"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
