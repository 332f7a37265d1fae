"""The service with its language model behind vLLM's API (a fake of it): the same reports, and honest answers where it
fails."""

import asyncio
import json
from contextlib import ExitStack

import httpx
import pytest
from fake_vllm import FakeVllm, serving
from small_service import GUARD_S, PLAIN, free_port, post, wait_for
from small_writer import FIRST, SECOND, write_checkpoint
from test_generator import scan, with_generator
from test_robustness import replica, write

from mu2llm import config
from mu2llm.errors import Failure, UserError
from mu2llm.evaluation.exports.language_model import language_model
from mu2llm.serving.exchange import InfluenceRequest, ReportRequest, Written
from mu2llm.serving.loaded import LoadedModel
from mu2llm.serving.refusal import Refusal
from mu2llm.serving.running import deploy
from mu2llm.settings.serving import ServingConfig, VllmConfig


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    """What `mu2llm export lm` writes of the checkpoint, and the checkpoint's id."""
    out = tmp_path_factory.mktemp("vllm") / "lm"
    language_model(checkpoint, str(out))
    return out, LoadedModel(checkpoint, ServingConfig()).facts["id"]


@pytest.fixture(scope="module")
def server(exported):
    fake = FakeVllm(*exported)
    with serving(fake, free_port()) as url:
        yield fake, url


@pytest.fixture
def fake(server):
    fake, _ = server
    fake.asked, fake.mode, fake.modes, fake.left = [], None, [], 0
    return fake


def engine(url, **values):
    return {"engine": "vllm", "vllm": {"url": url, **values}}


def vllm(server):
    return engine(server[1])


def test_reports_are_those_of_our_own_engine(checkpoint, tmp_path, server, fake):
    async def use(generator):
        async def stream():
            return [part async for part in generator.stream(ReportRequest("a", scan(0)))]

        others = [generator.write(ReportRequest(str(n), scan(n))) for n in range(1, 4)]
        cut = generator.write(ReportRequest("c", scan(0), max_new_tokens=5))
        stopped = generator.write(ReportRequest("s", scan(0), stop=(" The liver",)))
        return await asyncio.gather(stream(), cut, stopped, *others)

    asked = [ReportRequest("a", scan(0)), ReportRequest("c", scan(0), max_new_tokens=5)]

    async def own(generator):
        return [await generator.write(each) for each in asked]

    parts, cut, stopped, *whole = with_generator(checkpoint, tmp_path, use, **vllm(server))
    ours = with_generator(checkpoint, tmp_path, own)
    assert "".join(parts[:-1]) == parts[-1].text == FIRST and {each.text for each in whole} == {FIRST}
    assert [(each.text, each.tokens, each.finished) for each in (parts[-1], cut)] == [
        (each.text, each.tokens, each.finished) for each in ours
    ]
    assert stopped.text == FIRST[: FIRST.index(" The liver")] and stopped.finished
    assert len(fake.asked) >= 6


def test_what_a_sentence_depended_on_is_still_told(checkpoint, tmp_path, server, fake):
    async def use(generator):
        return await generator.influence(InfluenceRequest(scan(0), "", FIRST, generator.loaded.facts["id"]))

    assert len(with_generator(checkpoint, tmp_path, use, **vllm(server))) == 4


@pytest.mark.parametrize(
    ("mode", "reason"),
    [(503, "engine_down"), ("early", "engine_down"), ("error", "engine_down"), (404, "engine_refused")],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_one_that_the_server_does_not_write_fails_alone(checkpoint, tmp_path, server, fake, mode, reason, streamed):
    async def use(generator):
        fake.modes = [mode]
        if streamed:
            *_, refused = [part async for part in generator.stream(ReportRequest("a", scan(0)))]
        else:
            refused = await generator.write(ReportRequest("a", scan(0)))
        return refused, await generator.write(ReportRequest("b", scan(1)))

    refused, written = with_generator(checkpoint, tmp_path, use, **vllm(server))
    assert isinstance(refused, Refusal) and refused.reason == reason
    assert isinstance(written, Written) and written.text == FIRST


def test_a_silent_server_holds_nobody_for_ever(checkpoint, tmp_path, server, fake):
    async def use(generator):
        fake.modes = ["silent"]
        return await generator.write(ReportRequest("a", scan(0)))

    refused = with_generator(checkpoint, tmp_path, use, **engine(server[1], silent_seconds=1))
    assert refused == Refusal("engine_down", "ReadTimeout")


def test_a_server_of_another_language_model_is_not_written_with(tmp_path, server, fake):
    """After a swap it would be given what another model's tokenizer made of the scan."""
    other = write_checkpoint(str(tmp_path / "other"), SECOND)
    with pytest.raises(Failure, match=r"could not be loaded \(EndpointFault\)"):
        with_generator(other, tmp_path, None, alone=False, **vllm(server))

    async def use(generator):
        return await generator.status()

    named = with_generator(other, tmp_path, use, **engine(server[1], model=fake.name))
    assert named.ready  # who gives the name answers for it, and the log says that it writes other tokens


def test_the_tokens_of_another_language_model_are_told(tmp_path, server, fake, caplog):
    other = write_checkpoint(str(tmp_path / "other"), SECOND)
    with_generator(other, tmp_path, lambda generator: generator.status(), **engine(server[1], model=fake.name))
    assert "writes other tokens than" in caplog.text


def test_readiness_says_that_the_server_is_gone(checkpoint, tmp_path, exported):
    async def use(generator):
        before = await generator.status()
        running.close()
        while (status := await generator.status()).ready:
            await asyncio.sleep(0.1)
        return before.ready, status.why

    with ExitStack() as running:
        url = running.enter_context(serving(FakeVllm(*exported), free_port()))
        ready, why = with_generator(checkpoint, tmp_path, use, **engine(url))
    assert ready and why == "the server of the language model cannot write"


def test_the_key_lies_in_the_environment(checkpoint, exported, monkeypatch):
    with serving(FakeVllm(*exported, key="secret"), free_port()) as url:
        keyed = ServingConfig(engine="vllm", vllm=VllmConfig(url=url, key_variable="VLLM_KEY"))
        with pytest.raises(UserError, match="VLLM_KEY: the nodes' environment has no such variable"):
            LoadedModel(checkpoint, keyed)
        monkeypatch.setenv("VLLM_KEY", "secret")
        assert LoadedModel(checkpoint, keyed).warm_up() > 0


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["serving.engine=vllm"], "needs serving.vllm.url"),
        (["serving.vllm.url=vllm:8001"], r"expected http\(s\)://"),
        (["serving.vllm.url=http://me:secret@vllm:8001/v1"], "serving.vllm.key_variable"),
        (
            ["serving.engine=vllm", "serving.vllm.url=http://a/v1", "serving.vllm.model=m", "serving.shadow=s"],
            "serving.vllm.model names one language model",
        ),
    ],
)
def test_an_engine_that_cannot_be(given, told):
    with pytest.raises(UserError, match=told) as error:
        config.load("demo", given)
    assert "secret@" not in str(error.value)


# ---- over HTTP


@pytest.fixture(scope="module")
def behind(service, settings, phantom, server):
    """The service with its language model behind the fake; when this module is done, as it was."""
    fake, _ = server
    deploy(settings.model_copy(update={"serving": settings.serving.model_copy(update=_parsed(vllm(server)))}))
    wait_until(service, phantom, fake, written_there=True)
    yield service
    deploy(settings)
    wait_until(service, phantom, fake, written_there=False)


def wait_until(url, phantom, fake, written_there):
    """Until reports are written by the server, or by our own engine; what wrote before is gone then."""

    def written():
        fake.asked = []
        return write(url, phantom).get("report") == FIRST and bool(fake.asked) == written_there

    wait_for(written, "a report by the other engine")
    replica("ReportGenerator")
    wait_for(written, "a report by it")


def _parsed(values):
    return {"engine": values["engine"], "vllm": VllmConfig(**values["vllm"])}


@pytest.mark.slow
def test_a_report_over_http_is_written_by_the_server(behind, phantom, fake):
    told = write(behind, phantom)
    assert told["report"] == FIRST and told["finished"] and len(fake.asked) == 1
    form = {"files": {"scan": ("a.nii.gz", phantom)}, "data": {"stream": "true"}}
    last = post(f"{behind}/v1/reports", **form).text.strip().rpartition("data: ")[2]
    assert json.loads(last)["report"] == FIRST


@pytest.mark.slow
def test_a_fault_of_the_server_is_tried_once_more_and_then_said(behind, phantom, fake):
    def asked():
        return post(f"{behind}/v1/reports", files={"scan": ("a.nii.gz", phantom)})

    fake.modes = ["early"]
    assert asked().json()["report"] == FIRST
    fake.mode = 500
    down = asked()
    assert (down.status_code, down.json()["code"]) == (503, "engine_down") and int(down.headers["retry-after"]) > 0
    fake.mode = 400
    refused = asked()
    assert (refused.status_code, refused.json()["code"]) == (503, "engine_refused")
    fake.mode = None
    assert asked().json()["report"] == FIRST


@pytest.mark.slow
def test_a_client_that_leaves_is_written_for_no_further_there(behind, phantom, fake):
    fake.mode = "silent"
    form = {"files": {"scan": ("a.nii.gz", phantom)}, "data": {"stream": "true"}}
    with httpx.stream("POST", f"{behind}/v1/reports", **form, verify=PLAIN, timeout=GUARD_S) as answer:
        lines = answer.iter_lines()
        assert any(line == "event: scan" for line in lines)
        wait_for(lambda: fake.asked, "the request")
    wait_for(lambda: fake.left == 1, "its end")
