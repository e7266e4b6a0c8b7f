"""The images, the Compose file and the Kubernetes manifest agree with each other and with vLLM."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from dockerfile import Dockerfile

REPOSITORY = Path(__file__).parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
COMPOSE = yaml.safe_load((REPOSITORY / "docker" / "compose.yaml").read_text("utf-8"))
MANIFEST = {
    document["kind"]: document
    for document in yaml.safe_load_all((REPOSITORY / "deploy/kubernetes.yaml").read_text("utf-8"))
}
POD = MANIFEST["Deployment"]["spec"]["template"]
CONTAINER = POD["spec"]["containers"][0]
DOCKERFILES = ("Dockerfile", "Dockerfile.cpu")
SERVERS = ("gpu", "cpu")


def dockerfile(name: str) -> Dockerfile:
    return Dockerfile.read(REPOSITORY / "docker" / name)


def interpolated(word: str) -> str:
    """As Compose does where the variables are unset."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", word)


def arguments(of: str) -> list[str]:
    """What follows the image's entry point."""
    if of == "kubernetes":
        return [str(word) for word in CONTAINER["args"]]
    return [interpolated(word) for word in COMPOSE["services"][of]["command"]]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_dockerfile(name: str) -> None:
    parsed = dockerfile(name)
    assert parsed.entrypoint == ["steering", "serve"]
    assert parsed.all("EXPOSE") == ["8000"]
    # By number, or `runAsNonRoot` could not tell that it isn't root.
    assert parsed.all("USER") == ["2000:0"]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_base_image_is_pinned(name: str) -> None:
    (base,) = dockerfile(name).all("FROM")
    assert re.fullmatch(r"[a-z/-]+:v?\d+\.\d+[\w.-]*", base), base


def test_base_images_vllm_is_one_that_the_project_supports() -> None:
    (base,) = dockerfile("Dockerfile").all("FROM")
    (requirement,) = PROJECT["optional-dependencies"]["gpu"]
    assert base.partition(":v")[2] in Requirement(requirement).specifier


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_is_copied_is_there_and_not_ignored(name: str) -> None:
    ignored = (REPOSITORY / ".dockerignore").read_text("utf-8").splitlines()
    assert "*" in ignored
    for source in dockerfile(name).copied:
        assert (REPOSITORY / source).exists()
        assert f"!{source.rstrip('/')}" in ignored


def test_images_are_tagged_with_the_projects_version() -> None:
    version = PROJECT["version"]
    images = {name: service["image"] for name, service in COMPOSE["services"].items()}
    assert images["gpu"] == CONTAINER["image"] == f"steering-server:{version}"
    assert images["cpu"] == images["bundled-model"] == f"steering-server:{version}-cpu"


@pytest.mark.parametrize("name", SERVERS)
def test_compose_service(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["profiles"] == [name]
    assert service["ports"] == ["127.0.0.1:8000:8000"]
    build = service["build"]
    context = (REPOSITORY / "docker" / build["context"]).resolve()
    assert context == REPOSITORY
    assert (context / build["dockerfile"]).is_file()
    arguments_ = dockerfile(Path(build["dockerfile"]).name).all("ARG")
    assert set(build.get("args", ())) == set(arguments_)
    assert "/health" in service["healthcheck"]["test"][-1]
    assert service["volumes"] == ["cache:/home/vllm/.cache"]
    assert "cache" in COMPOSE["volumes"]


def test_compose_healthcheck_is_python() -> None:
    kind, *command = COMPOSE["services"]["cpu"]["healthcheck"]["test"]
    assert (kind, command[:2]) == ("CMD", ["python3", "-c"])
    compile(command[2], "healthcheck", "exec")


def test_compose_makes_the_model_that_it_serves() -> None:
    from steering_server import bundled_model

    model = COMPOSE["services"]["bundled-model"]
    assert model["entrypoint"] == ["python3", "-m", bundled_model.__name__]
    assert "bundled-model" in COMPOSE["services"]["cpu"]["depends_on"]
    # `default_cache()` of the image's user.
    folder = Path("/home/vllm/.cache/steering-server") / bundled_model.NAME
    assert arguments("cpu")[0] == str(folder)
    assert any(cache.endswith(":/home/vllm/.cache") for cache in model["volumes"])


@pytest.fixture(scope="module")
def parsed() -> dict[str, dict[str, Any]]:
    """The arguments of every server, as `steering serve` itself parses them."""
    code = """
import json, sys
from vllm.entrypoints.cli.serve import ServeSubcommand
from steering_server.cli.serve import serve
found = []
ServeSubcommand.validate = lambda self, args: None
ServeSubcommand.cmd = staticmethod(found.append)
for arguments in json.loads(sys.argv[1]):
    serve(arguments)
wanted = "model_tag port host additional_config shutdown_timeout".split()
parsed = [{k: getattr(args, k) for k in wanted} for args in found]
sys.stdout.write("\\n" + json.dumps(parsed, default=str))
"""
    servers = ("kubernetes", *SERVERS)
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps([arguments(of) for of in servers])],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(servers, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("of", ["kubernetes", *SERVERS])
def test_arguments_are_those_of_steering_serve(parsed: dict[str, dict[str, Any]], of: str) -> None:
    assert parsed[of]["model_tag"] == arguments(of)[0]
    assert "sentiment" in parsed[of]["additional_config"]["steering"]["planes"]
    assert str(parsed[of]["port"]) in dockerfile("Dockerfile").all("EXPOSE")
    # All interfaces: a container's loopback is its own.
    assert parsed[of]["host"] is None


@pytest.mark.parametrize("of", SERVERS)
def test_compose_waits_for_running_requests(parsed: dict[str, dict[str, Any]], of: str) -> None:
    assert COMPOSE["services"][of]["stop_grace_period"] == "1m"
    assert 0 < parsed[of]["shutdown_timeout"] < 60


def test_kubernetes_waits_for_running_requests(parsed: dict[str, dict[str, Any]]) -> None:
    grace = POD["spec"]["terminationGracePeriodSeconds"]
    assert 0 < parsed["kubernetes"]["shutdown_timeout"] < grace


def test_kubernetes_port_is_the_servers(parsed: dict[str, dict[str, Any]]) -> None:
    (port,) = CONTAINER["ports"]
    assert port["containerPort"] == parsed["kubernetes"]["port"]
    assert POD["metadata"]["annotations"] == {
        "prometheus.io/scrape": "true",
        "prometheus.io/port": str(port["containerPort"]),
        "prometheus.io/path": "/metrics",
    }
    (exposed,) = MANIFEST["Service"]["spec"]["ports"]
    assert exposed["targetPort"] == port["name"]


@pytest.mark.parametrize("probe", ["startupProbe", "readinessProbe", "livenessProbe"])
def test_kubernetes_probes(probe: str) -> None:
    assert CONTAINER[probe]["httpGet"] == {"path": "/health", "port": CONTAINER["ports"][0]["name"]}
    assert CONTAINER[probe]["timeoutSeconds"] > 1  # the default; a busy server needs longer


def test_kubernetes_lets_a_server_download_and_compile_before_it_restarts_it() -> None:
    probe = CONTAINER["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 15 * 60


def test_kubernetes_service_finds_the_pods() -> None:
    labels = POD["metadata"]["labels"]
    assert MANIFEST["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert MANIFEST["Service"]["spec"]["selector"] == labels


def test_kubernetes_volumes_are_mounted_and_the_plane_is_where_the_argument_says() -> None:
    volumes = {v["name"]: v for v in POD["spec"]["volumes"]}
    mounts = {m["name"]: m["mountPath"] for m in CONTAINER["volumeMounts"]}
    assert volumes.keys() == mounts.keys()
    assert f"sentiment={mounts['plane']}" in arguments("kubernetes")
    assert volumes["plane"]["configMap"]["name"] == "sentiment-plane"
    claim = MANIFEST["PersistentVolumeClaim"]["metadata"]["name"]
    assert volumes["cache"]["persistentVolumeClaim"]["claimName"] == claim
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"


def test_kubernetes_runs_as_the_images_user_without_privileges() -> None:
    (user,) = dockerfile("Dockerfile").all("USER")
    context = POD["spec"]["securityContext"]
    assert f"{context['runAsUser']}:{context['runAsGroup']}" == user
    assert context["runAsNonRoot"] is True
    assert CONTAINER["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }
    assert CONTAINER["resources"]["limits"]["nvidia.com/gpu"] == "1"
