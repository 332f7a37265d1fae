"""Roll-outs: who is answered by a canary, what a shadow is compared with, and that neither costs a client an answer."""

import asyncio
import json
import time
from dataclasses import replace
from types import SimpleNamespace

import httpx
import pytest
import ray
from ray.serve.exceptions import DeploymentUnavailableError
from small_service import GUARD_S, PLAIN, post, wait_for
from small_writer import FIRST, QUESTION, SECOND, experiment, write_checkpoint
from test_parts import SCAN, WRITTEN, FakeStream, Handle, Streams, known
from test_robustness import replica, reports, write
from typer.testing import CliRunner

from mu2llm import config
from mu2llm.cli import app as cli
from mu2llm.ct import phantom
from mu2llm.errors import UserError
from mu2llm.serving import decoder, rollouts
from mu2llm.serving.app import Settings, build, cpus, deployments
from mu2llm.serving.calls import Calls
from mu2llm.serving.exchange import Status
from mu2llm.serving.problems import Problem
from mu2llm.serving.refusal import Refusal
from mu2llm.serving.rollouts import AT_ONCE, Canary, Shadow, check, share
from mu2llm.serving.running import deploy
from mu2llm.serving.schemas import ReportOptions
from mu2llm.serving.service import Upload
from mu2llm.settings.serving import ServingConfig

SPEC = experiment().data.spec
FRACTION = 0.5
SECONDLY = Handle(WRITTEN)


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    """A checkpoint of the same preprocessing that writes another report."""
    return write_checkpoint(str(tmp_path_factory.mktemp("rollouts") / "second"), SECOND)


# ---- what is refused at the start


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["serving.canary=there"], "serving.canary needs serving.canary_fraction"),
        (["serving.canary_fraction=0.1"], "serving.canary_fraction needs serving.canary"),
        (["serving.canary=there", "serving.canary_fraction=1.1"], "canary_fraction"),
        (["serving.canary=there", "serving.canary_fraction=-0.1"], "canary_fraction"),
        (["serving.shadow=there", "serving.shadow_fraction=2"], "shadow_fraction"),
    ],
)
def test_what_cannot_be_a_roll_out(given, told):
    with pytest.raises(UserError, match=told):
        config.load("demo", given)


@pytest.mark.parametrize("role", ["canary", "shadow"])
def test_the_checkpoint_that_is_served_is_no_roll_out(checkpoint, role):
    serving = ServingConfig(**{role: checkpoint}, canary_fraction=0.1 if role == "canary" else None)
    with pytest.raises(UserError, match=rf"serving.{role}=.* has the weights of .*, which is served"):
        check(checkpoint, serving)


def test_a_cluster_is_told_when_the_config_is_deployed(checkpoint):
    serving = ServingConfig(shadow=checkpoint)
    with pytest.raises(UserError, match="which is served"):
        build(Settings(checkpoint=checkpoint, serving=serving))


def test_other_preprocessing_is_named_key_by_key(checkpoint, tmp_path, second):
    other = write_checkpoint(str(tmp_path / "other"), SECOND, fit="isotropic")
    with pytest.raises(UserError, match=r"data.spec.fit is isotropic, not stretch; .*mu2llm promote"):
        check(checkpoint, ServingConfig(canary=other, canary_fraction=0.1))
    check(checkpoint, ServingConfig(canary=second, canary_fraction=0.1, shadow=second))


def test_each_roll_out_is_a_deployment_of_its_own():
    """That begins with one replica, whatever the served model has, and scales as far."""
    generator = {"min_replicas": 3, "max_replicas": 5}
    serving = ServingConfig(canary="a", canary_fraction=0.1, shadow="b", generator=generator)
    made = deployments(Settings(serving=serving))
    assert set(deployments(Settings())) == {"Ingress", "VolumeReader", "ReportGenerator", "GreenScorer"}
    assert set(made) == {*deployments(Settings()), "CanaryGenerator", "ShadowGenerator"}
    for name, uri in (("CanaryGenerator", "a"), ("ShadowGenerator", "b")):
        told = made[name]._deployment_config
        assert made[name].user_config == {"checkpoint": uri}
        scaling = told.autoscaling_config
        assert (scaling.min_replicas, scaling.initial_replicas, scaling.max_replicas) == (1, 1, 5)


@pytest.mark.parametrize(
    "rolled_out", [{}, {"canary": "a", "canary_fraction": 0.1}, {"canary": "a", "canary_fraction": 0.1, "shadow": "b"}]
)
def test_a_laptops_own_ray_has_room_for_every_replica(rolled_out):
    """With four CPUs the ingress waited for ever behind a canary and a shadow."""
    serving = ServingConfig(**rolled_out)
    made = deployments(Settings(serving=serving)).values()
    most = [
        each.ray_actor_options["num_cpus"] * each._deployment_config.autoscaling_config.max_replicas for each in made
    ]
    assert sum(most) <= cpus(serving) < sum(most) + 1


# ---- one ingress, without Ray


def test_a_fraction_of_the_scans_is_that_of_their_keys():
    places = [share("canary", str(n)) for n in range(2000)]
    assert all(0 <= place < 1 for place in places) and share("canary", "7") == places[7] != share("shadow", "7")
    assert abs(sum(place < 0.1 for place in places) / 2000 - 0.1) < 0.02  # three standard deviations


def with_roll_out(tmp_path, kind, handle, generator=SECONDLY):
    """A service with one roll-out that is there and takes every scan."""
    service = known(tmp_path, generator)
    given = (service.store,) if kind is Shadow else ()
    rollout = kind(Calls(kind.role, handle, service.metrics.retries), 1.0, service.metrics, *given)
    rollout.status = Status(True, spec=SimpleNamespace(hash=SCAN.spec_hash))
    setattr(service, kind.role, rollout)
    service._look = lambda: asyncio.sleep(0)
    return service


def made_by(service):
    async def go():
        return await service.report(service.begin(Upload((b"x",)), ReportOptions()))

    return asyncio.run(go()).report.report


CANARY = replace(WRITTEN, text="A cyst.", checkpoint="canary")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (CANARY, "A cyst."),
        *((Refusal(reason), "A nodule.") for reason in ("not_ready", "wrong_spec", "too_long", "broken")),
    ],
)
def test_what_a_canary_cannot_answer_the_served_model_does(tmp_path, answer, expected):
    assert made_by(with_roll_out(tmp_path, Canary, Handle(answer))) == expected


def streamed_by(service):
    async def go():
        work = service.begin(Upload((b"x",)), ReportOptions())
        return [part async for part in service.stream(work, await service.read(work))]

    *pieces, made = asyncio.run(go())
    return "".join(pieces), made.report.report


@pytest.mark.parametrize(
    ("pieces", "text"), [(["A ", "cyst.", CANARY], "A cyst."), ([Refusal("wrong_spec")], "A nodule.")]
)
def test_a_canarys_stream_is_its_own_or_the_served_models(tmp_path, pieces, text):
    service = with_roll_out(tmp_path, Canary, Streams(FakeStream(pieces)), Streams(FakeStream(["A nodule.", WRITTEN])))
    assert streamed_by(service) == (text, text)


def test_two_models_write_no_text_together(tmp_path):
    canary = Streams(FakeStream(["A ", Refusal("broken")]))
    service = with_roll_out(tmp_path, Canary, canary, Streams(FakeStream(["A nodule.", WRITTEN])))
    with pytest.raises(Problem, match="ask again"):
        streamed_by(service)


class Never:
    """A handle that never answers."""

    def __init__(self):
        self.asked = 0

    def __getattr__(self, method):
        return self

    def remote(self, *_):
        self.asked += 1
        return asyncio.get_running_loop().create_future()


class Raises(Never):
    def remote(self, *_):
        raise RuntimeError("Zweistein has a nodule")


@pytest.mark.parametrize("kind", [Canary, Shadow])
@pytest.mark.parametrize("handle", [Raises(), Handle(Refusal("broken"))])
def test_a_roll_out_that_fails_is_told_of_without_what_was_sent(tmp_path, caplog, kind, handle):
    service = with_roll_out(tmp_path, kind, handle)

    async def go():
        made = await service.report(service.begin(Upload((b"x",)), ReportOptions()))
        for task in list(getattr(service.shadow, "_tasks", ())):
            await task
        return made.report.report

    assert asyncio.run(go()) == "A nodule."
    assert f"the {kind.role} wrote no report" in caplog.text and "Zweistein" not in caplog.text


def test_a_shadow_holds_nobody_up(tmp_path):
    service = with_roll_out(tmp_path, Shadow, Never())
    assert made_by(service) == "A nodule."
    assert not (tmp_path / "shadow").exists()


def test_a_canary_without_replicas_is_not_waited_for(tmp_path):
    served = Streams(FakeStream(["A nodule.", WRITTEN]))
    assert streamed_by(with_roll_out(tmp_path, Canary, Streams(Unavailable()), served)) == ("A nodule.",) * 2
    without = known(tmp_path, Streams(Unavailable()))
    with pytest.raises(Problem) as told:
        streamed_by(without)
    assert (told.value.status, told.value.code) == (503, "generator_down")


def test_a_canary_that_hangs_leaves_time_for_the_served_model(tmp_path, monkeypatch):
    """It kept the request until its end, and the client got a 503."""
    assert time.monotonic() < rollouts.halfway(time.monotonic() + 1000) < time.monotonic() + 999
    monkeypatch.setattr(rollouts, "halfway", lambda _: time.monotonic())
    service = with_roll_out(tmp_path, Canary, Never())
    streaming = with_roll_out(tmp_path, Canary, Streams(Hangs([])), Streams(FakeStream(["A nodule.", WRITTEN])))
    assert made_by(service) == "A nodule."
    assert streamed_by(streaming) == ("A nodule.",) * 2


class Hangs(FakeStream):
    async def __anext__(self):
        await asyncio.Event().wait()


class Unavailable(FakeStream):
    """What Serve answers where a deployment has failed."""

    def __init__(self):
        super().__init__([])

    async def __anext__(self):
        raise DeploymentUnavailableError("ReportGenerator")


def test_a_shadow_that_is_slow_reads_no_more_than_it_can(tmp_path):
    service = with_roll_out(tmp_path, Shadow, slow := Never())

    async def go():
        for _ in range(AT_ONCE + 3):
            await service.report(service.begin(Upload((b"x",)), ReportOptions()))
            await asyncio.sleep(0)
        service.shadow.stop()

    asyncio.run(go())
    assert slow.asked == AT_ONCE


def test_what_shadows_said_is_summed_up_by_a_command(tmp_path):
    service = with_roll_out(
        tmp_path, Shadow, Handle(replace(WRITTEN, text="No nodule. A cyst.", checkpoint="new", tokens=5))
    )

    async def go():
        for _ in range(3):
            await service.report(service.begin(Upload((b"x",)), ReportOptions()))
            for task in list(service.shadow._tasks):
                await task

    asyncio.run(go())
    said = CliRunner().invoke(cli, ["shadow", "--state", str(tmp_path), "--json"])
    (told,) = [json.loads(line) for line in said.stdout.splitlines()]
    assert (told["shadow"], told["reports"]) == ("new", 3)
    assert told["green"] == {"value": 0.0, "low": 0.0, "high": 0.0, "n": 3}
    assert told["tokens_more"]["value"] == 2 and told["findings of the shown alone"] == {"lung nodule": 3}
    none = CliRunner().invoke(cli, ["shadow", "--state", str(tmp_path / "none")])
    assert none.exit_code and "nothing of a shadow" in str(none.exception)


# ---- over HTTP


@pytest.fixture(scope="module")
def rolled(service, settings, second, phantom):
    """The service with a canary and a shadow; when this module is done, as it was."""
    serving = settings.serving.model_copy(
        update={"canary": second, "canary_fraction": FRACTION, "shadow": second, "shadow_fraction": 1.0}
    )
    deploy(settings.model_copy(update={"serving": serving}))
    wait_for(lambda: [each.get("ready", True) for each in models(service)] == [True] * 3, "both roll-outs")
    yield service
    deploy(settings)
    wait_for(
        lambda: len(models(service)) == 1 and write(service, phantom).get("report") == FIRST, "the service as it was"
    )


def models(url):
    answer = httpx.get(f"{url}/v1/models", verify=PLAIN, timeout=GUARD_S)
    return answer.json()["data"] if answer.status_code == 200 else []


def scans():
    """Phantoms of both sides of the fraction: whether the canary's → (bytes, …)."""
    sides = {True: [], False: []}
    for seed in range(40):
        data = phantom.make(seed, 1).nifti()
        key = decoder.read(decoder.Reading([data], SPEC), max_slices=2500).key
        sides[share("canary", key) < FRACTION].append(data)
        if min(map(len, sides.values())) == 2:
            return {side: found[:2] for side, found in sides.items()}
    raise AssertionError("no scans of both sides")


@pytest.mark.slow
def test_a_scan_is_always_answered_by_the_same_checkpoint(rolled):
    ids = {each["role"]: each["id"] for each in models(rolled)}
    assert ids["canary"] == ids["shadow"] != ids["served"]
    for side, found in scans().items():
        for data in found:
            for asked in ({}, {"question": QUESTION, "max_new_tokens": 200}):
                told = write(rolled, data, **asked)
                assert told["report"] == (SECOND if side else FIRST)
                assert told["model"]["id"] == ids["canary" if side else "served"]
            form = {"files": {"scan": ("a.nii.gz", data)}, "data": {"stream": "true"}}
            last = post(f"{rolled}/v1/reports", **form).text.strip().rpartition("data: ")[2]
            assert json.loads(last)["report"] == (SECOND if side else FIRST)


@pytest.mark.slow
def test_what_a_canary_wrote_is_asked_of_the_canary(rolled):
    for found in scans().values():
        sent = post(f"{rolled}/v1/scans", files={"scan": ("a.nii.gz", found[0])}).json()["id"]
        draft = post(f"{rolled}/v1/reports", json={"scan": sent}).json()["id"]
        answer = post(f"{rolled}/v1/drafts/{draft}/influence", json={"scan": sent})
        assert answer.status_code == 200 and answer.json()["sentences"], answer.text


@pytest.mark.slow
def test_what_a_shadow_says_otherwise_is_kept_without_its_words(rolled, places):
    told = write(rolled, scans()[False][0])
    kept = places / "state" / "shadow" / f"{told['id']}.json"
    wait_for(kept.exists, "the comparison")
    compared = json.loads(kept.read_text())
    assert 0 <= compared["green"] < 1
    assert "pleural effusion" in compared["shown_alone"] and compared["shadow_alone"]
    assert compared["shadow"].endswith("/second") and compared["shown_tokens"] == told["tokens"]
    assert not {FIRST, SECOND} & {str(value) for value in compared.values()} and SECOND[:20] not in kept.read_text()
    deleted = httpx.delete(f"{rolled}/v1/drafts/{told['id']}", verify=PLAIN, timeout=GUARD_S)
    assert deleted.status_code == 204 and not kept.exists()


@pytest.mark.slow
def test_a_canary_and_a_shadow_that_die_fail_nobody(rolled):
    data = scans()[True][0]
    with reports(rolled, data, clients=2) as load:
        for name in ("CanaryGenerator", "ShadowGenerator"):
            ray.kill(replica(name))
        load.wait_for(4)
        load.wait_for(2, told=SECOND)  # it is back
    assert {status for status, _ in load.answers} == {200} and not load.broken
    assert {report for _, report in load.answers} <= {FIRST, SECOND}
