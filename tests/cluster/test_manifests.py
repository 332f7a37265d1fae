"""What cluster/ holds, rendered as it is applied and held against the schemas, the code and the packages."""

import json
import re
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml
from packaging.specifiers import SpecifierSet
from ray.runtime_env import RuntimeEnv
from ray.serve.schema import ServeDeploySchema

import mu2llm
from mu2llm import config
from mu2llm.cluster import capacity, doctor, submission

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
OVERLAYS = ("kind", "eks", "gke")
WITH_GPUS = ("eks", "gke")
SECRETS = (
    r"AKIA[0-9A-Z]{16}|hf_[A-Za-z0-9]{30}|BEGIN [A-Z ]*PRIVATE KEY",
    r"(?i)(password|secret_access_key|token)\s*[:=]\s*['\"]?[A-Za-z0-9+/]{16,}",
)
CODE = "/home/ray/mu2llm/"


@cache
def rendered(overlay: str, *components: str) -> list[dict]:
    """The documents of an overlay, also with further components, as `kubectl apply -k` would send them."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not here to render the overlays")
    folder = CLUSTER / "overlays" / overlay
    if components:
        folder = _with(overlay, components)
    try:
        done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True)
    finally:
        if components:
            shutil.rmtree(folder)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def _with(overlay: str, components: tuple[str, ...]) -> Path:
    """A copy of the overlay beside it with its commented components turned on."""
    folder = CLUSTER / "overlays" / f".{overlay}-with-{'-'.join(components)}"
    shutil.copytree(CLUSTER / "overlays" / overlay, folder)
    text = (folder / "kustomization.yaml").read_text()
    for component in components:
        line = f"# - ../../components/{component}"
        assert line in text
        text = text.replace(line, line.removeprefix("# "))
    (folder / "kustomization.yaml").write_text(text)
    return folder


def one(documents: list[dict], kind: str, name: str | None = None) -> dict:
    found = [each for each in documents if each["kind"] == kind and name in (None, each["metadata"]["name"])]
    assert len(found) == 1, (kind, name, [each["metadata"]["name"] for each in found])
    return found[0]


def cluster_specs(documents: list[dict]) -> dict[str, dict]:
    """Every RayCluster spec, wherever it is nested."""
    return {
        "RayCluster": one(documents, "RayCluster")["spec"],
        "RayJob": one(documents, "RayJob")["spec"]["rayClusterSpec"],
        "RayCronJob": one(documents, "RayCronJob")["spec"]["jobTemplate"]["rayClusterSpec"],
        "RayService": one(documents, "RayService")["spec"]["rayClusterConfig"],
    }


def pods(documents: list[dict]) -> list[dict]:
    """Every pod's spec."""
    found = []
    for spec in cluster_specs(documents).values():
        found += [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
    kinds = ("Deployment", "StatefulSet")
    return found + [each["spec"]["template"]["spec"] for each in documents if each["kind"] in kinds]


def amount(text: str) -> float:
    """A Kubernetes quantity → cores or GiB."""
    for unit, factor in {"m": 1e-3, "Mi": 2**-10, "Gi": 1.0}.items():
        if str(text).endswith(unit):
            return float(str(text).removesuffix(unit)) * factor
    return float(text)


def requests_of(group: dict) -> dict[str, float]:
    """CPUs and GPUs that Ray counts of a group's pod: its limits, but for what rayStartParams says."""
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    cpus = group["rayStartParams"].get("num-cpus", limits["cpu"])
    return {"CPU": amount(cpus), "GPU": amount(limits.get("nvidia.com/gpu", 0))}


def together(groups: list[dict], count: str) -> dict[str, float]:
    """CPUs and GPUs of all pods of the groups, as many as `count` says."""
    return {name: sum(group[count] * requests_of(group)[name] for group in groups) for name in ("CPU", "GPU")}


# ---- schemas


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlays_pass_the_strict_schemas_of_kuberay(overlay, shared):
    check_schemas(rendered(overlay), shared)


@pytest.mark.parametrize("overlay", WITH_GPUS)
def test_so_they_do_with_redis_and_queue(overlay, shared):
    documents = rendered(overlay, "gcs-ft", "kueue")
    check_schemas(documents, shared)
    for name, spec in cluster_specs(documents).items():
        assert spec["gcsFaultToleranceOptions"]["redisAddress"] == "redis:6379", name
    job = one(documents, "RayJob")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "mu2llm"
    assert job["spec"]["suspend"] is True
    have = {
        name: sum(
            group["replicas"] * requests_of(group)[name] for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        )
        for name in ("CPU", "GPU")
    }
    assert not capacity.lacks(capacity.needs(config.load("paper"), "pipeline"), have)


def check_schemas(documents: list[dict], shared: Path) -> None:
    checked = set()
    for document in documents:
        if document["apiVersion"] == "ray.io/v1":
            schema = json.loads((shared / "kuberay-crds" / f"{document['kind']}.v1.schema.json").read_text())
            errors = list(jsonschema.Draft202012Validator(schema).iter_errors(document))
            assert not errors, [f"{document['kind']} {error.json_path}: {error.message}" for error in errors]
            checked.add(document["kind"])
    assert checked == {"RayCluster", "RayJob", "RayCronJob", "RayService"}


def test_the_schemas_refuse_what_is_not_known(shared):
    document = json.loads(json.dumps(one(rendered("kind"), "RayCluster")))
    document["spec"]["headGroupSpec"]["replcas"] = 1
    schema = json.loads((shared / "kuberay-crds" / "RayCluster.v1.schema.json").read_text())
    assert list(jsonschema.Draft202012Validator(schema).iter_errors(document))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_the_operator_refuses_beyond_the_schema(overlay):
    """The rules of KubeRay's own validation that this folder comes near."""
    documents = rendered(overlay)
    for name, spec in cluster_specs(documents).items():
        assert spec["enableInTreeAutoscaling"] and spec["autoscalerOptions"]["version"] == "v2", name
        assert spec["authOptions"] == {"mode": "token"}, name
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            assert group["template"]["spec"]["restartPolicy"] == "Never", name
        for group in spec["workerGroupSpecs"]:
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"], name
    for job in (one(documents, "RayJob")["spec"], one(documents, "RayCronJob")["spec"]["jobTemplate"]):
        assert job["submissionMode"] == "SidecarMode" and "submitterPodTemplate" not in job
        assert job["shutdownAfterJobFinishes"] and job["ttlSecondsAfterFinished"] >= 0
        RuntimeEnv(**yaml.safe_load(job["runtimeEnvYAML"]))


# ---- what belongs together


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_versions_and_images_are_those_of_the_project(overlay):
    documents = rendered(overlay)
    for name, spec in cluster_specs(documents).items():
        assert spec["rayVersion"] == pinned()["ray"] == ray.__version__, name
    images = {container["image"] for pod in pods(documents) for container in pod["containers"]}
    for image in images:
        assert re.fullmatch(rf"(\S+/)?mu2llm:{re.escape(mu2llm.__version__)}-(cpu|cuda)", image), image
    for pod in pods(documents):
        wants_gpu = "nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"]
        assert pod["containers"][0]["image"].endswith("-cuda" if wants_gpu else "-cpu")
    assert overlay in WITH_GPUS or not any(image.endswith("-cuda") for image in images)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_run_as_nobody_in_particular(overlay):
    for pod in pods(rendered(overlay)):
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            resources = container["resources"]
            assert resources["limits"]["memory"] == resources["requests"]["memory"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_references_lead_somewhere(overlay):
    documents = rendered(overlay)
    there = {(each["kind"], each["metadata"]["name"]) for each in documents}
    for pod in pods(documents):
        if "serviceAccountName" in pod:
            assert ("ServiceAccount", pod["serviceAccountName"]) in there
        for volume in pod.get("volumes", []):
            if claim := volume.get("persistentVolumeClaim"):
                assert ("PersistentVolumeClaim", claim["claimName"]) in there
        for source in (each for container in pod["containers"] for each in container.get("envFrom", [])):
            if "configMapRef" in source:
                assert ("ConfigMap", source["configMapRef"]["name"]) in there
            else:  # made by hand, never from this folder
                assert source["secretRef"]["name"] == "mu2llm-secrets"
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        mounts = {mount["name"] for container in pod["containers"] for mount in container.get("volumeMounts", [])}
        assert mounts <= volumes | {"data"}
    settings = one(documents, "ConfigMap", "mu2llm-settings")["data"]
    port = one(documents, "Service", "mlflow")["spec"]["ports"][0]["port"]
    assert settings["MLFLOW_TRACKING_URI"] == f"http://mlflow:{port}"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_jobs_start_with_options_that_they_know(overlay):
    documents = rendered(overlay)
    job, cron = one(documents, "RayJob")["spec"], one(documents, "RayCronJob")["spec"]["jobTemplate"]
    experiments = {}
    for spec in (job, cron):
        words = shlex.split(spec["entrypoint"])
        if words[:2] == ["sh", "-c"]:
            words = shlex.split(words[2])
        start = words.index("python")
        name, arguments = words[start + 1].removeprefix(f"{CODE}ray_jobs/").removesuffix(".py"), words[start + 2 :]
        given = submission.options(ROOT, name, arguments)
        experiments[name] = config.load(given["preset"], given["set_"])
        have = together(spec["rayClusterSpec"]["workerGroupSpecs"], "maxReplicas")
        have["CPU"] -= spec["entrypointNumCpus"]
        assert not capacity.lacks(capacity.needs(experiments[name], name), have)
    assert set(experiments) == {"pipeline", "evaluate"}


@pytest.mark.parametrize("overlay", WITH_GPUS)
def test_a_training_worker_fits_a_pod(overlay):
    settings = config.load("paper").sft
    groups = one(rendered(overlay), "RayCluster")["spec"]["workerGroupSpecs"]
    gpu = [group for group in groups if requests_of(group)["GPU"]]
    assert [group["groupName"] for group in gpu] == ["gpu-spot", "gpu-on-demand"]
    for group in gpu:
        assert requests_of(group)["GPU"] >= settings.gpus_per_worker
        assert requests_of(group)["CPU"] >= settings.cpus_per_worker
        # each group by itself holds all workers: a mixed one would lose two nodes at once
        assert group["maxReplicas"] >= settings.workers
    spot, demand = gpu
    assert spot["priority"] > demand["priority"]
    assert spot["labels"]["ray.io/market-type"] == "spot"
    assert spot["template"]["spec"]["nodeSelector"] != demand["template"]["spec"]["nodeSelector"]


# ---- the service


def options_of(folder: Path) -> list[str]:
    """Those of the `mu2llm serve-config` that stands in a kustomization beside what it prints."""
    lines = [
        line.strip().removeprefix("#").strip() for line in (folder / "kustomization.yaml").read_text().splitlines()
    ]
    start = next(number for number, line in enumerate(lines) if "mu2llm serve-config" in line)
    end = next(number for number in range(start, len(lines)) if not lines[number].endswith("\\")) + 1
    return shlex.split(" ".join(line.removesuffix("\\") for line in lines[start:end]))[3:]


@pytest.mark.parametrize(
    ("overlay", "folder"), [("eks", "base"), ("gke", "overlays/gke/nodes"), ("kind", "overlays/kind/nodes")]
)
def test_the_service_is_what_the_command_prints(overlay, folder, monkeypatch):
    """`cluster/serve.sh` writes it anew where the application has changed."""
    from typer.testing import CliRunner

    from mu2llm import cli

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    made = CliRunner().invoke(cli.app, ["serve-config", *options_of(CLUSTER / folder)])
    assert made.exit_code == 0, made.output
    service = one(rendered(overlay), "RayService")["spec"]
    told = yaml.safe_load(service["serveConfigV2"])
    assert told == yaml.safe_load(made.stdout)
    ServeDeploySchema.model_validate(told)
    check_replicas_fit(told, service["rayClusterConfig"])


def check_replicas_fit(told: dict, spec: dict) -> None:
    pods_of = [requests_of(group) for group in spec["workerGroupSpecs"]]
    wanted = {"CPU": 0.0, "GPU": 0.0}
    for deployment in told["applications"][0]["deployments"]:
        each = {kind: deployment["ray_actor_options"][f"num_{kind.lower()}s"] for kind in ("CPU", "GPU")}
        assert any(all(each[kind] <= pod[kind] for kind in each) for pod in pods_of), deployment["name"]
        for kind in wanted:
            wanted[kind] += each[kind] * deployment["autoscaling_config"]["max_replicas"]
    assert not capacity.lacks(wanted, together(spec["workerGroupSpecs"], "maxReplicas"))
    ports = {port["containerPort"] for group in spec["workerGroupSpecs"] for port in _ports(group)}
    assert told["http_options"]["port"] in ports


def _ports(group: dict) -> list[dict]:
    return group["template"]["spec"]["containers"][0]["ports"]


# ---- virtual machines


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_launcher_files_pass_rays_schema(cloud):
    from ray.autoscaler._private.util import prepare_config, validate_config

    path = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    values = yaml.safe_load((CLUSTER / f"{cloud}.yaml").read_text())
    jsonschema.validate(values, json.loads(path.read_text()))
    validate_config(prepare_config(json.loads(json.dumps(values))))
    assert values["max_workers"] <= sum(kind.get("max_workers", 0) for kind in values["available_node_types"].values())
    types = values["available_node_types"]
    assert types["head"]["resources"]["CPU"] == 0
    for image in (values["docker"]["image"], types["gpu-spot"]["docker"]["worker_image"]):
        assert f"mu2llm:{mu2llm.__version__}-" in image
    need = capacity.needs(config.load("paper"), "pipeline")
    for name in ("gpu-spot", "gpu-on-demand"):
        gpu = types[name]
        assert not capacity.lacks(need, {kind: gpu["max_workers"] * gpu["resources"][kind] for kind in ("CPU", "GPU")})
    assert types["gpu-spot"]["priority"] > types["gpu-on-demand"]["priority"]
    for commands in (values["head_start_ray_commands"], values["worker_start_ray_commands"]):
        assert "RAY_AUTH_MODE=token" in commands[-1] and "MLFLOW_TRACKING_URI" in commands[-1]
    assert "--dashboard-host=127.0.0.1" in values["head_start_ray_commands"][-1]


# ---- the image


def pinned(path: str = "cluster/constraints.txt") -> dict[str, str]:
    lines = [line for line in (ROOT / path).read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def test_the_images_packages_are_those_of_pyproject_and_of_the_tests():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    image = pinned()  # a package of pyproject that it lacks: run cluster/lock.py
    for text in doctor.requirements():
        requirement = Requirement(text)
        assert requirement.specifier.contains(image[canonicalize_name(requirement.name)], prereleases=True), text
    for name, version in pinned("constraints.txt").items():
        assert image[canonicalize_name(name)] == version


def test_the_dockerfile():
    text = (CLUSTER / "Dockerfile").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    python = re.search(r"ARG PYTHON=([\d.]+)-", text)[1]
    assert SpecifierSet(re.search(r'requires-python = "(.+)"', project)[1]).contains(python)
    assert re.findall(r"^FROM .+ AS (\S+)$", text, re.M)[-2:] == ["cpu", "cuda"]
    assert "USER 1000" in text and "HEALTHCHECK" in text and ":latest" not in text
    for sources in re.findall(r"^COPY --chown=ray:ray (.+) \S+$", text, re.M):
        for source in sources.split():
            assert (ROOT / source).exists(), source
    kept = [line.removeprefix("!").removesuffix("/**") for line in dockerignore() if line.startswith("!")]
    assert all((ROOT / name).exists() for name in kept) and "*" in dockerignore()
    assert not any(name in ("tests", ".git", "cluster") for name in kept)
    if shutil.which("hadolint"):
        subprocess.run(["hadolint", CLUSTER / "Dockerfile"], check=True)


def dockerignore() -> list[str]:
    return (ROOT / ".dockerignore").read_text().splitlines()


# ---- secrets


def test_no_secret_lies_in_the_folder():
    documents = [document for overlay in OVERLAYS for document in rendered(overlay)]
    assert not [each for each in documents if each["kind"] == "Secret"]
    for path in CLUSTER.rglob("*"):
        if path.is_file():
            text = path.read_text()
            assert not re.search(r"AKIA[0-9A-Z]{16}|hf_[A-Za-z0-9]{30}|BEGIN [A-Z ]*PRIVATE KEY", text), path
            assert not re.search(r"(?i)(password|secret_access_key|token)\s*[:=]\s*['\"]?[A-Za-z0-9+/]{16,}", text), (
                path
            )
