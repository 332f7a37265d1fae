"""The reading room in headless Chromium, on the running service. Pictures of it lie in build/screenshots: for the docs
with PICTURE_SCALE=1, which takes more than twice as long where there is no GPU.
"""

import base64
import io
import itertools
import json
import os
import shutil
from pathlib import Path
from urllib.parse import urlsplit

import nibabel as nib
import numpy as np
import pytest
from ct_scans import AFFINE, chest, slices, to_bytes, zipped
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from small_service import PATIENT, PATIENT_ID

from mu2llm import storage
from mu2llm.records import Correction

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
VIEWER = ROOT / "mu2llm" / "serving" / "viewer"
PICTURES = ROOT / "build" / "screenshots"
WITHOUT_GPU = ("--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist")
WAIT_MS = 60_000
SCALE = float(os.environ.get("PICTURE_SCALE", "0.5"))
SEEN = 0.004  # the share of the picture that an overlay covers at least


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    if not (VIEWER / "dist" / "index.html").is_file():
        pytest.skip("the reading room is not built (make viewer)")
    PICTURES.mkdir(parents=True, exist_ok=True)
    expect.set_options(timeout=WAIT_MS)
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", *WITHOUT_GPU])


# Chromium forgets the body of a stream that has ended, so the page keeps a copy
KEEP_STREAMS = """
window.streams = [];
const fetched = window.fetch;
window.fetch = async (...asked) => {
  const answer = await fetched(...asked);
  if (answer.url.endsWith('/v1/reports')) window.streams.push(answer.clone().text());
  return answer;
};"""


@pytest.fixture
def page(browser, service):
    """The page, open; in the end, it has talked to nobody but its service and has raised no error."""
    context = browser.new_context(viewport={"width": 1360, "height": 820}, device_scale_factor=SCALE)
    opened = context.new_page()
    opened.set_default_timeout(WAIT_MS)
    asked, broken = [], []
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("pageerror", lambda error: broken.append(str(error)))
    opened.add_init_script(KEEP_STREAMS)
    opened.goto(service)
    yield opened
    context.close()
    assert broken == []
    elsewhere = [url for url in asked if urlsplit(url).scheme not in ("data", "blob") and not url.startswith(service)]
    assert elsewhere == []


def read_sample(page, number=0):
    page.locator("#sample-list button").nth(number).click()
    written(page)


def written(page):
    expect(page.locator("#progress")).to_contain_text("Written:", timeout=WAIT_MS)
    expect(page.locator("#picture-note")).to_be_hidden(timeout=WAIT_MS)


def same(page, state="same"):
    """What is said of the picture and of what the model read."""
    expect(page.locator("#same")).to_have_attribute("data-state", state, timeout=WAIT_MS)


def overlaid(page, shown=True):
    expect(page.locator("#legend")).to_be_visible(visible=shown, timeout=WAIT_MS)


def pixels(page):
    """What the canvas shows, (height, width, 3), once it no longer changes."""
    stage, last = page.locator("#stage"), None
    for _ in range(20):
        now = np.asarray(
            Image.open(io.BytesIO(stage.screenshot(style="#legend { visibility: hidden }"))).convert("RGB")
        ).astype(int)
        if last is not None and np.array_equal(now, last):
            return now
        last = now
        page.wait_for_timeout(150)
    raise AssertionError("the picture does not come to rest")


def changed(before, after):
    """The share of pixels that differ visibly."""
    return float((np.abs(after - before).max(-1) > 8).mean())


def warm(picture):
    """The share of pixels that are orange or yellow, which only the overlay is."""
    return float(((picture[..., 0] - picture[..., 2]) > 40).mean())


def keep(page, name):
    page.screenshot(path=PICTURES / f"{name}.png")


def test_a_sample_is_shown_and_read(page):
    page.evaluate(
        """() => { window.seen = [];
        new MutationObserver(records => records.forEach(({addedNodes}) => addedNodes.forEach(node =>
          node.className === 'sentence' && window.seen.push(node.textContent))))
          .observe(document.querySelector('#report'), {childList: true}); }"""
    )
    keep(page, "empty")
    assert "Research use only; not a medical device." in page.locator("header").inner_text()
    read_sample(page)
    picture = pixels(page)
    assert len(np.unique(picture[..., 0])) > 50  # grey levels of a body, not a blank canvas
    stream = page.evaluate("window.streams[0]")
    report = report_of(stream)
    assert page.locator("#report").inner_text().split() == report["report"].split()
    assert stream.count("event: token") > 1
    whole, seen = page.locator(".sentence").all_inner_texts(), page.evaluate("window.seen")
    assert any(text.startswith(part) and part != text for text in whole for part in seen)  # it grew
    facts = page.locator("#facts").inner_text()
    assert report["spec"]["hash"] in facts and " × ".join(map(str, report["scan"]["shape"])) in facts
    assert report["model"]["id"] in page.locator("#service").inner_text()
    same(page)
    assert "does not say whose" in page.locator("#patient").inner_text()
    keep(page, "report")


def looks(page, centre):
    """From here on the service tells a place of every sentence, which the tests' model, that has learnt its report by
    heart, does not have: its answer comes all the same, and the place lies about `centre` (mm)."""
    asked = []

    def with_place(route):
        answer = route.fetch()
        told = answer.json()
        asked.append(answer.status)
        cells = np.zeros((8, 8, 8), np.uint8)
        cells[3:6, 3:6, 3:6] = 200
        cells[4, 4, 4] = 255
        affine = np.diag([30.0, 30, 30, 1])
        affine[:3, 3] = np.array(centre) - 4 * 30
        place = base64.b64encode(nib.Nifti1Image(cells, affine).to_bytes()).decode()
        for sentence in told["sentences"]:
            sentence |= {"nifti": place, "drop": 1.5, "random": 0.1}
        route.fulfill(response=answer, json=told)

    page.route("**/influence", with_place)
    return asked


def test_where_it_looked_is_asked_for_and_overlaid(page):
    """Behind the report, by who points at a sentence, once."""
    asked = looks(page, (0, 0, -76))
    read_sample(page)
    assert asked == []
    plain = pixels(page)
    assert warm(plain) == 0
    sentence = page.locator(".sentence").first
    sentence.hover()
    overlaid(page)
    assert "4.5× likelier with it, 1.1× with random places" in page.locator("#legend").inner_text()
    assert warm(pixels(page)) > SEEN
    page.mouse.move(5, 5)
    overlaid(page, False)
    assert changed(plain, pixels(page)) == 0
    page.keyboard.press("j")
    page.keyboard.press("s")
    assert page.locator("#look").get_attribute("aria-pressed") == "true"
    assert sentence.get_attribute("aria-selected") == "true"
    overlaid(page)
    strong = pixels(page)
    assert warm(strong) > SEEN
    keep(page, "where-it-looked")
    for _ in range(5):
        page.keyboard.press("[")
    assert page.locator("#opacity").input_value() == "10"
    assert warm(pixels(page)) < warm(strong)
    page.keyboard.press("s")
    overlaid(page, False)
    assert warm(pixels(page)) == 0
    assert asked == [200]


def test_a_sentence_that_hangs_on_no_place_is_shown_nowhere(page):
    """The tests' model writes the same of any scan; and a draft that came back is asked about as well."""
    read_sample(page)
    page.reload()
    expect(page.locator("#progress")).to_contain_text("Written", timeout=WAIT_MS)
    same(page)
    page.keyboard.press("j")
    page.keyboard.press("s")
    expect(page.locator("#looking")).to_have_text("at no place in particular", timeout=WAIT_MS)
    overlaid(page, False)
    assert address(page).keys() == {"draft", "scan"}


def test_keys_turn_the_picture(page):
    read_sample(page)
    strip = page.locator("#location")
    page.keyboard.press("a")
    pictures = [pixels(page)]
    windows = {"1": "W 1500 L -600", "3": "W 2500 L 480", "4": "W 80 L 40", "6": "W 600 L 200", "5": "W 150 L 30"}
    for key, window in (windows | {"2": "W 400 L 40"}).items():
        page.keyboard.press(key)
        assert window in strip.inner_text()
        pictures.append(pixels(page))
    assert all(changed(a, b) > 0.02 for a, b in itertools.pairwise(pictures))
    assert changed(pictures[0], pictures[-1]) == 0
    place = strip.inner_text()
    page.keyboard.press("ArrowUp")
    assert strip.inner_text() != place
    page.locator("#picture").hover(position={"x": 200, "y": 200})
    before = strip.inner_text()
    page.mouse.wheel(0, 120)
    assert strip.inner_text() != before
    assert page.locator("[data-view=axial]").get_attribute("aria-pressed") == "true"
    axial = pixels(page)
    page.keyboard.press("m")
    box = page.locator("#picture").bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(middle[0] - 120, middle[1] - 90)
    page.mouse.down()
    page.mouse.move(middle[0], middle[1] - 90, steps=3)
    page.mouse.move(middle[0] + 120, middle[1] - 90, steps=3)
    page.mouse.up()
    assert warm(pixels(page)) > warm(axial)  # the ruler's colour
    keep(page, "measured")
    page.keyboard.press("r")
    page.keyboard.press("?")
    assert "soft-tissue window" in page.locator("#help").inner_text()
    keep(page, "help")
    page.keyboard.press("Escape")
    assert not page.locator("#help").is_visible()


def test_a_correction_is_stored(page, settings):
    read_sample(page, 1)
    draft = report_of(page.evaluate("window.streams[0]"))
    page.keyboard.press("e")
    page.keyboard.press("Control+Home")
    page.keyboard.type("Small left pleural effusion. ")
    assert page.locator("#diff ins").inner_text().strip() == "Small left pleural effusion."
    assert page.locator("#changes").inner_text() == "4 words in, 0 out"
    keep(page, "edited")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#saved")).to_have_text("Saved", timeout=WAIT_MS)
    folder = storage.join(settings.serving.state, "corrections")
    stored = [
        Correction.model_validate_json(storage.read_bytes(storage.join(folder, info.base_name)))
        for info in storage.list_files(folder)
    ]
    (correction,) = [each for each in stored if each.report_id == draft["id"]]
    assert correction.rejected == draft["report"]
    assert correction.chosen == f"Small left pleural effusion. {draft['report']}"


def state_of(page, service):
    """Of the draft that the address names."""
    return page.request.get(f"{service}/v1/drafts/{address(page)['draft']}").json()


def address(page):
    """What stands behind # in it."""
    return dict(part.split("=") for part in urlsplit(page.url).fragment.split("&"))


def test_a_report_is_seen_to_sentence_by_sentence_and_nothing_is_lost(page, service):
    """Kept, dropped and reworded; reloaded; accepted as corrected."""
    read_sample(page)
    first, second, third, *others = [each.inner_text() for each in page.locator(".sentence").all()]
    for key in ("j", "y", "x", "t"):
        page.keyboard.press(key)
    page.locator("#words").fill("A small nodule.")
    page.keyboard.press("Control+Enter")
    marks = "all => all.map(each => each.dataset.mark ?? null)"
    wanted = ["kept", "dropped", "edited", *[None] * len(others)]
    assert page.locator(".sentence").evaluate_all(marks) == wanted
    page.locator("#before summary").click()
    page.locator("#prior").fill("No effusion a year ago.")
    keep(page, "sentences")
    page.reload()
    expect(page.locator("#progress")).to_contain_text("Written", timeout=WAIT_MS)
    same(page)
    assert page.locator(".sentence").evaluate_all(marks) == wanted
    assert page.locator("#prior").input_value() == "No effusion a year ago."
    assert page.evaluate("[sessionStorage.length, localStorage.length]") == [1, 0]
    page.locator("#tab-edit").click()
    text = page.locator("#draft").input_value()
    told = state_of(page, service)
    assert text == told["report"].replace(f" {second}", "").replace(third, "A small nodule.") and first in text
    assert told["state"] == "generated"
    page.locator("#accept").click()
    expect(page.locator("#state")).to_contain_text("accepted", timeout=WAIT_MS)
    told = state_of(page, service)
    assert (told["state"], told["edited"]) == ("accepted", text)
    assert not page.locator("#draft").is_editable() and page.locator("#accept").is_disabled()


def test_a_scan_is_sent_once_and_a_draft_accepted_as_it_is(page, service):
    sent = []
    page.on(
        "request", lambda each: sent.append((each.method, urlsplit(each.url).path, len(each.post_data_buffer or b"")))
    )
    read_sample(page)
    scan = address(page)["scan"]
    page.locator("#question").fill("Is there an effusion?")
    page.keyboard.press("Enter")
    expect(page.locator("#accept")).to_be_enabled(timeout=WAIT_MS)
    posts = [(path, size) for method, path, size in sent if method == "POST"]
    assert [path for path, _ in posts] == ["/v1/scans", "/v1/reports", "/v1/reports"]
    assert max(size for path, size in posts if path == "/v1/reports") < 1000
    page.locator("#accept").click()
    expect(page.locator("#state")).to_contain_text("Draft: accepted", timeout=WAIT_MS)
    told = state_of(page, service)
    assert (told["state"], told["edited"], told["question"]) == ("accepted", None, "Is there an effusion?")
    assert page.request.delete(f"{service}/v1/scans/{scan}").status == 204  # as if its time were over
    page.locator("#question").fill("")
    page.locator("#write").click()
    expect(page.locator("#accept")).to_be_enabled(timeout=WAIT_MS)
    again = address(page)["scan"]
    assert again != scan
    page.locator("#samples").select_option(index=2)
    expect(page.locator("#progress")).not_to_contain_text("Written", timeout=WAIT_MS)
    written(page)
    assert page.request.get(f"{service}/v1/scans/{again}").status == 404  # nobody needs it any more
    page.once("dialog", lambda dialog: dialog.accept())
    page.locator("#reject").click()
    expect(page.locator("#state")).to_contain_text("Draft: rejected", timeout=WAIT_MS)
    assert state_of(page, service)["state"] == "rejected"


def test_errors_and_matches_are_marked_in_both_texts(page):
    read_sample(page)
    page.keyboard.press("e")
    page.locator("#draft").fill("Findings: Large right pleural effusion. There is a liver lesion. The heart is normal.")
    page.keyboard.press("Escape")
    page.keyboard.press("p")
    assert page.locator("#reference").input_value()  # the sample's true report
    page.locator("#reference").fill("Findings: Large right pleural effusion. A 12 mm nodule in the left upper lobe.")
    page.keyboard.press("Control+Enter")
    page.locator(".verdict").wait_for()
    assert "1 matched, 2 significant" in page.locator(".verdict").inner_text()
    reference, candidate = page.locator(".pair .text").all()
    assert reference.locator("mark.match").inner_text() == "Large right pleural effusion.✓"
    assert candidate.locator("mark.match").inner_text() == "Large right pleural effusion.✓"
    assert reference.locator("mark.significant").inner_text() == "A 12 mm nodule in the left upper lobe.b"
    assert candidate.locator("mark.significant").inner_text() == "There is a liver lesion.a"
    keep(page, "compared")


def dropped(page, packed):
    """A zip onto the page."""
    page.evaluate(
        """(base64) => { const transfer = new DataTransfer();
        transfer.items.add(new File([Uint8Array.from(atob(base64), c => c.charCodeAt(0))], 'series.zip'));
        window.dispatchEvent(new DragEvent('drop', {dataTransfer: transfer, bubbles: true, cancelable: true})); }""",
        base64.b64encode(packed).decode(),
    )


def examination():
    """A zip of two series of a patient: an axial one, and a coronal one of more voxels that the model does not read."""
    coronal = AFFINE[:, [0, 2, 1, 3]] * [0.5, 1, 0.5, 1]
    larger = slices(chest((48, 16, 40)), coronal, SeriesInstanceUID="1.2.9", SeriesDescription="MPR")
    axial = slices(chest(), SeriesDescription="Lunge weich", SeriesNumber=3, StudyDate="20240131")
    for dataset in (*larger, *axial):
        dataset.SpecificCharacterSet = "ISO_IR 100"
        dataset.PatientName, dataset.PatientID = f"{PATIENT}-Ü", PATIENT_ID
    for number, dataset in enumerate(larger):
        dataset.SOPInstanceUID = f"1.2.9.{number}"
    return zipped({f"{number}": to_bytes(each) for number, each in enumerate((*larger, *axial))})


def test_the_series_that_the_model_read_is_shown_and_whose_it_is(page):
    """The page showed the largest volume of all, the model reads the largest axial one."""
    dropped(page, examination())
    written(page)
    same(page)
    banner = page.locator("#patient").inner_text()
    for told in ("Mustermann, Erika-Ü", PATIENT_ID, "2024-01-31", "3 Lunge weich", "1 of 2 series"):
        assert told in banner
    kept = page.evaluate("JSON.stringify([sessionStorage, localStorage, location.href, document.cookie])")
    assert "Erika" not in kept and PATIENT_ID not in kept
    shape = report_of(page.evaluate("window.streams[0]"))["scan"]["shape"]
    assert shape == [24, 20, 16]
    keep(page, "whose")


def test_a_picture_that_is_not_what_the_model_read_is_called_so(page):
    def another(route):
        answer = route.fetch()
        facts = next(line for line in answer.text().splitlines() if line.startswith("data: "))
        digest = json.loads(facts.removeprefix("data: "))["sha256"]
        route.fulfill(response=answer, body=answer.text().replace(digest, "0" * 64))

    page.route("**/v1/reports", another)
    read_sample(page)
    same(page, "differs")
    assert "not voxel by voxel" in page.locator("#same").inner_text()


def test_a_region_is_measured_a_window_typed_and_slices_play(page):
    """The voxels lie in the file as LPS: half of the patient is 100 HU, the right one −700."""
    hu = np.full((40, 40, 20), 100, np.int16)
    hu[:20] = -700  # x runs to the left in this file
    scan = nib.Nifti1Image(hu, np.diag([-4.0, -4, 4, 1])).to_bytes()
    page.locator("#file").set_input_files({"name": "a.nii", "mimeType": "", "buffer": scan})
    written(page)
    same(page)
    page.keyboard.press("a")
    page.locator("#width").fill("900")
    page.locator("#level").fill("-300")
    page.keyboard.press("Enter")
    strip = page.locator("#location")
    assert "W 900 L -300" in strip.inner_text()
    page.locator("#picture").click(position={"x": 5, "y": 5})
    page.keyboard.press("i")
    before = pixels(page)
    box = page.locator("#picture").bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    for side, mean in ((-1, "-700"), (1, "100")):  # the patient's right is on the left
        page.mouse.move(middle[0] + side * 120, middle[1] - 60)
        page.mouse.down()
        page.mouse.move(middle[0] + side * 80, middle[1], steps=3)
        page.mouse.move(middle[0] + side * 40, middle[1] + 60, steps=3)
        page.mouse.up()
        expect(strip).to_contain_text(f"ROI mean {mean} HU  SD 0  {mean} to {mean}", use_inner_text=True)
    assert warm(pixels(page)) > warm(before)
    keep(page, "region")
    page.keyboard.press("i")
    page.keyboard.press("r")
    assert "ROI" not in strip.inner_text()
    place = strip.inner_text()
    page.keyboard.press(" ")
    expect(strip).not_to_have_text(place, use_inner_text=True)
    page.keyboard.press(" ")
    assert page.locator("#cine").get_attribute("aria-pressed") == "false"


def test_keys_of_one_character_can_be_turned_off(page):
    page.keyboard.press("?")
    page.locator("#single-keys").uncheck()
    page.keyboard.press("Escape")
    page.keyboard.press("1")
    assert page.locator("[data-window=soft]").get_attribute("aria-pressed") == "true"
    page.reload()
    page.keyboard.press("?")
    assert not page.locator("#help").is_visible()
    page.locator("#help-button").click()
    page.locator("#single-keys").check()
    page.keyboard.press("Escape")
    page.keyboard.press("1")
    assert page.locator("[data-window=lung]").get_attribute("aria-pressed") == "true"


def test_a_real_series_is_converted_and_shown(page, shared):
    """A dropped DICOM series (JPEG 2000) in a zip: the page converts it, the service reads it."""
    files = sorted((shared / "data" / "ct" / "totalseg_dicom").iterdir())
    dropped(page, zipped({file.name: file.read_bytes() for file in files}))
    written(page)
    same(page)
    keep(page, "real-series")
    page.keyboard.press("a")
    assert len(np.unique(pixels(page)[..., 0])) > 50
    assert "DICOM" in page.locator("#facts").inner_text()


def test_a_real_scan_is_shown_with_its_overlay(page, shared):
    looks(page, (-19, 178, 660))
    page.locator("#file").set_input_files(shared / "data" / "ct" / "totalseg" / "pulmonary_ct_cropped.nii.gz")
    written(page)
    same(page)
    page.keyboard.press("1")
    plain = pixels(page)
    page.keyboard.press("s")
    overlaid(page)
    assert warm(pixels(page)) > warm(plain) + SEEN
    keep(page, "real-scan")


def test_what_the_service_refuses_is_said_and_may_be_overruled(page, shared):
    page.locator("#file").set_input_files(shared / "data" / "ct" / "totalseg" / "NEGATIVE_example_mr_sm.nii.gz")
    problem = page.locator("#problem")
    problem.wait_for()
    assert "422 not_hu" in problem.inner_text()
    keep(page, "refused")
    problem.get_by_role("button", name="Read it all the same").click()
    written(page)
    assert not problem.is_visible()
    page.locator("#file").set_input_files({"name": "a.nii", "mimeType": "", "buffer": b"no scan at all"})
    problem.wait_for()
    assert "No picture" in page.locator("#picture-note").inner_text()


def test_a_key_is_asked_for_and_kept_in_the_tab(page, service):
    given = []

    def only_with_key(route):
        given.append(route.request.headers.get("authorization"))
        if given[-1] == "Bearer sesame":
            return route.continue_()
        told = {"type": "about:blank", "title": "No valid API key", "status": 401, "code": "no_key", "detail": "no key"}
        return route.fulfill(status=401, content_type="application/problem+json", body=json.dumps(told))

    page.route("**/v1/**", only_with_key)
    page.goto(service)
    for key in ("wrong", "sesame"):
        page.locator("#key-value").fill(key)
        page.keyboard.press("Enter")
    page.locator("#sample-list button").first.wait_for()
    assert given == [None, "Bearer wrong", "Bearer sesame"]
    read_sample(page)
    assert set(given[3:]) == {"Bearer sesame"}
    assert page.evaluate("[sessionStorage.length, localStorage.length]") == [1, 0]


def test_the_pill_tells_when_the_service_goes_and_comes(page, service):
    """It looked no further once the service had been ready."""
    pill = page.locator("#service")
    expect(pill).to_have_attribute("data-state", "ready")
    page.route("**/readyz", lambda route: route.abort())
    expect(pill).to_have_attribute("data-state", "gone", timeout=15_000)
    page.unroute("**/readyz")
    expect(pill).to_have_attribute("data-state", "ready", timeout=15_000)


def test_it_is_accessible_and_fits_a_tablet(page):
    """axe finds nothing against WCAG 2 A and AA, in each of the three tabs and the help, with a prior report beside; on
    a tablet either way, picture and text are in sight together."""
    axe = (VIEWER / "node_modules" / "axe-core" / "axe.min.js").read_text()
    page.evaluate(axe)
    read_sample(page)
    same(page)
    page.keyboard.press("j")
    page.keyboard.press("y")
    page.locator("#before summary").click()
    for key in ("w", "e", "p", "?"):
        page.keyboard.press("Escape")
        page.keyboard.press(key)
        assert violations(page) == []
    page.keyboard.press("Escape")
    page.keyboard.press("w")
    keep(page, "prior")
    page.locator("#before summary").click()
    for width, height in ((768, 1024), (1024, 768)):
        page.set_viewport_size({"width": width, "height": height})
        for place, least in (("#stage", 300), ("#panel-report", 200), ("#decision", 30)):
            box = page.locator(place).bounding_box()
            assert box["height"] >= least and box["y"] + box["height"] <= height, (place, box)
            assert box["width"] >= 300 and box["x"] + box["width"] <= width, (place, box)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator(".sentence").first.is_visible()
        keep(page, f"tablet-{width}")
    assert violations(page) == []


def violations(page):
    found = page.evaluate("axe.run({runOnly: ['wcag2a', 'wcag2aa', 'wcag21aa']}).then(result => result.violations)")
    return [(each["id"], [node["html"] for node in each["nodes"]]) for each in found]


def report_of(stream):
    """The complete answer at the end of a stream."""
    events = stream.split("\n\n")
    return json.loads(next(event for event in events if event.startswith("event: report")).partition("data: ")[2])
