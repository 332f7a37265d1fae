/** The reading room: ties the picture, the report, editing and comparing together. */

import "./style.css";
import * as api from "./api";
import { ComparePane } from "./compare";
import { Controls } from "./controls";
import { DecisionBar } from "./decide";
import { askForKey, hideProblem, message, showProblem } from "./dialogs";
import { find, make } from "./dom";
import { EditPane } from "./edit";
import { Influence } from "./influence";
import { bindKeys } from "./keys";
import { Opened, Picture } from "./picture";
import { keepUnsaved, place, setPlace, unsaved } from "./place";
import { ReportPane } from "./report";
import { Review } from "./review";
import { onDrop } from "./scan";
import type { Sentence } from "./sentences";
import { Tabs } from "./tabs";
import { View } from "./view";

const SERVICE_POLL_MS = 3000;
const HOVER_MS = 120;

const canvas = find<HTMLCanvasElement>("picture");
const opacity = find<HTMLInputElement>("opacity");
const fileInput = find<HTMLInputElement>("file");
const question = find<HTMLInputElement>("question");
const region = find<HTMLInputElement>("region");
const samples = find<HTMLSelectElement>("samples");
const controls = new Controls();
const tabs = new Tabs();
const report = new ReportPane();
const review = new Review(report);
const edit = new EditPane();
const decision = new DecisionBar();
const compare = new ComparePane();
const picture = new Picture(canvas, controls);
const prior = find<HTMLTextAreaElement>("prior");

let scan: Opened | null = null;
/** The draft that is shown. */
let draft = "";
let writing: AbortController | null = null;
/** Of the draft, as long as its scan is there. */
let influence: Influence | null = null;
/** Whether the selected sentence's overlay stays on. */
let looking = false;

// ---- the scan ----

async function open(files: File[], sample?: api.Sample): Promise<void> {
  if (!files.length || !leavesEdits()) return;
  if (scan) void forget(scan);
  prior.value = "";
  take(new Opened(files));
  compare.load(sample?.reference ?? "");
  samples.value = sample?.name ?? "";
  await write();
}

function take(opened: Opened): void {
  scan = opened;
  find("write").toggleAttribute("disabled", false);
  find("drop").hidden = true;
  picture.open(opened);
}

/** The service need not keep it any longer. */
async function forget({ sent }: Opened): Promise<void> {
  try {
    if (sent) await api.deleteScan(await sent);
  } catch (error) {
    if (!isGone(error)) console.warn(`the scan of before was not deleted: ${message(error)}`); // it has its time
  }
}

const isGone = (error: unknown) => error instanceof api.Problem && error.status === 404;

let sampleWanted = "";

async function openSample(sample: api.Sample): Promise<void> {
  sampleWanted = sample.id;
  try {
    const file = await api.sample(sample.id);
    if (sample.id === sampleWanted) await open([file], sample);
  } catch (error) {
    showProblem(error);
  }
}

// ---- the report ----

const leavesEdits = () => !edit.isUnsaved || confirm("Your correction of this report is not saved. Leave it?");

/** `accept` are reason codes that the user lets pass. */
async function write(accept: string[] = []): Promise<void> {
  if (!scan) return;
  writing?.abort();
  const [own, opened] = [(writing = new AbortController()), scan];
  begin();
  const asked = { question: question.value.trim(), region: region.value.trim(), accept };
  let read = false;
  const listener = {
    scan: (facts: api.ScanFacts) => {
      if (own !== writing) return;
      read = true;
      report.scan(facts);
      picture.read(facts);
    },
    token: (text: string) => own === writing && report.append(text),
  };
  try {
    const written = await withScan(opened, (id) => {
      if (opened === scan) setPlace({ draft: null, scan: id });
      return api.writeReport(id, asked, listener, own.signal);
    });
    if (own !== writing) return;
    report.finish(written);
    setPlace({ draft: written.id, scan: await opened.id() });
    show(written, null);
    letPoint(opened, accept);
  } catch (error) {
    if (own !== writing) return;
    report.stop();
    if (!read) picture.read(null);
    if (!own.signal.aborted) showProblem(error, (code) => void write([...accept, code]));
  } finally {
    if (own === writing) {
      writing = null;
      find("stop").hidden = true;
    }
  }
}

/** With the scan's id; where its time is over, the scan is sent again. */
async function withScan<T>(opened: Opened, ask: (id: string) => Promise<T>): Promise<T> {
  try {
    return await ask(await opened.id());
  } catch (error) {
    if (!isGone(error)) throw error;
    return ask(await opened.send());
  }
}

/** Nothing of an earlier report stays. */
function begin(): void {
  hideProblem();
  draft = "";
  report.clear();
  review.clear();
  edit.load(null);
  decision.load("", null);
  compare.clear();
  setLooking(false);
  picture.view?.forgetOverlays();
  letPoint(null);
  find("stop").hidden = false;
  tabs.show("report");
}

/** A report that is there, and what became of it; with what was not saved before a reload. */
function show({ id, report: text }: Pick<api.Report, "id" | "report">, told: api.Draft | null): void {
  const kept = unsaved(id);
  decision.load(id, told ?? { state: "generated", changed: null, changed_by: "" });
  review.load(kept?.marks);
  edit.load({ id, report: text }, told?.edited, kept?.text);
  if (kept) prior.value = kept.prior;
  if (decision.isDecided) edit.close();
  draft = id;
  changed();
}

/** What was written about the draft is kept for a reload until the service has it. */
function changed(): void {
  if (!draft) return;
  review.compareWith(edit.text, decision.isDecided);
  decision.update(edit.isEdited, edit.isUnsaved);
  const worth = edit.isUnsaved || review.isBegun || prior.value !== "";
  keepUnsaved(worth ? { draft, text: edit.text, marks: review.marks, prior: prior.value } : null);
}

/** After a reload: the draft by its id, and the scan as long as the service keeps it. */
async function restore(): Promise<void> {
  const known = place();
  if (!known.draft && !known.scan) return;
  try {
    const told = known.draft ? await api.draft(known.draft) : null;
    if (told) {
      report.restore(told);
      show(told, told);
    }
    const file = known.scan ? await api.sentScan(known.scan).catch(orGone) : null;
    if (file) {
      take(new Opened([file], known.scan!));
      if (told) {
        picture.read(told.scan);
        letPoint(scan!);
      } else await write();
    } else {
      find("drop").hidden = told !== null;
      if (told) picture.note("The service keeps this scan no longer; open it again to see it, and for another report.");
    }
  } catch (error) {
    if (isGone(error)) setPlace({ draft: null, scan: null });
    showProblem(error);
  }
}

function orGone(error: unknown): null {
  if (isGone(error)) return null;
  throw error;
}

// ---- what a sentence depended on ----

/** What the draft depended on can be asked for: its scan is there, let in by these codes. */
function letPoint(opened: Opened | null, accept: string[] = []): void {
  const own = draft;
  const ask = (id: string) => {
    if (own === draft && opened === scan) setPlace({ draft: own, scan: id });
    return api.influence(own, id, accept);
  };
  influence = opened && own ? new Influence(report.whole, () => withScan(opened, ask)) : null;
  find("overlay").hidden = influence === null;
  report.pointable(influence !== null);
}

let hover = 0;
report.onHover = (sentence) => {
  clearTimeout(hover);
  hover = window.setTimeout(() => void look(sentence ?? (looking ? report.selected : null)), HOVER_MS);
};
report.onSelect = () => {
  review.selected();
  if (looking) void look(report.selected, true);
};

let pointedAt: Sentence | null = null;

/** Overlays what a sentence depended on; `jump` moves the crosshair to where that is most. */
async function look(sentence: Sentence | null, jump = false): Promise<void> {
  pointedAt = sentence;
  const state = find("looking");
  try {
    if (sentence && influence) state.textContent = "being looked for…";
    const found = sentence && influence ? await influence.of(sentence) : null;
    if (pointedAt !== sentence) return;
    const nifti = found?.nifti ?? null;
    state.textContent = sentence && influence && !nifti ? "at no place in particular" : "";
    if (found) find("caveat").textContent = `${times(found.drop)} likelier with it, ${times(found.random)} with random places`;
    await picture.view?.look(nifti);
    if (jump && nifti) await picture.view?.goToPeak(nifti);
  } catch (error) {
    if (pointedAt !== sentence) return;
    state.textContent = "";
    showProblem(error);
  }
}

/** A fall of the log-probability in nats, as a factor. */
function times(nats: number): string {
  const factor = Math.exp(nats);
  return factor > 1000 ? "over 1000×" : `${factor.toFixed(factor < 10 ? 1 : 0)}×`;
}

function setLooking(on: boolean): void {
  looking = on;
  find("look").setAttribute("aria-pressed", String(on));
  void look(on ? report.selected : null, on);
}

function toggleLook(): void {
  if (find("overlay").hidden) return;
  if (!report.selected) report.select(0);
  setLooking(!looking);
}

function setOpacity(percent: number): void {
  opacity.value = String(percent);
  picture.view?.setOpacity(Number(opacity.value) / 100);
}

function stepSentence(by: number): void {
  if (tabs.current !== "report") tabs.show("report");
  report.step(by);
}

// ---- the service ----

async function watchService(): Promise<void> {
  const pill = find("service");
  for (;;) {
    const state = await api.readiness().catch(() => null);
    pill.dataset.state = state ? (state.ready ? "ready" : "waiting") : "gone";
    if (state?.ready) pill.textContent = `ready: ${state.model?.id ?? ""}`;
    else pill.textContent = state ? `not ready: ${state.why}` : "the service does not answer";
    await new Promise((resolve) => setTimeout(resolve, SERVICE_POLL_MS));
  }
}

async function listSamples(): Promise<void> {
  const found = await api.samples();
  for (const sample of found) {
    samples.append(make("option", { title: sample.description }, sample.name));
    const button = make("button", {}, make("b", {}, sample.name), make("span", {}, sample.description));
    button.addEventListener("click", () => void openSample(sample));
    find("sample-list").append(button);
  }
  samples.addEventListener("change", () => {
    const sample = found[samples.selectedIndex - 1];
    if (sample) void openSample(sample);
  });
  find("sample-list").prepend(make("p", { class: "quiet" }, "or read a sample"));
}

// ---- everything that the user can touch ----

function listen(): void {
  const clicks: Record<string, () => void> = {
    open: () => fileInput.click(),
    choose: () => fileInput.click(),
    look: toggleLook,
    stop: () => writing?.abort(),
    "help-button": showHelp,
  };
  for (const [id, run] of Object.entries(clicks)) find(id).addEventListener("click", run);
  opacity.addEventListener("input", () => setOpacity(Number(opacity.value)));
  fileInput.addEventListener("change", () => {
    const files = [...(fileInput.files ?? [])];
    fileInput.value = "";
    void open(files);
  });
  find("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    if (leavesEdits()) void write();
  });
  onDrop((files) => void files.then((dropped) => open(dropped), showProblem));
  window.addEventListener("beforeunload", (event) => edit.isUnsaved && event.preventDefault());
  tabs.onShow = (tab) => {
    if (tab === "edit") edit.focus();
    if (tab === "compare") compare.focus();
  };
  review.onChange = (text) => (edit.text = text);
  edit.onChange = changed;
  edit.onRevert = () => review.load();
  edit.onProblem = showProblem;
  prior.addEventListener("input", changed);
  decision.beforeAccept = () => edit.submit();
  decision.onDecided = () => edit.close();
  decision.onProblem = showProblem;
  compare.onProblem = showProblem;
  compare.candidate = () => ({ text: edit.text, name: edit.isEdited ? "your edited report" : "the draft" });
}

bindKeys([
  { key: "o", does: "open a scan", run: () => fileInput.click() },
  { key: "1", does: "lung window", run: () => controls.setWindow("lung") },
  { key: "2", does: "soft-tissue window", run: () => controls.setWindow("soft") },
  { key: "3", does: "bone window", run: () => controls.setWindow("bone") },
  { key: "4", does: "brain window", run: () => controls.setWindow("brain") },
  { key: "5", does: "liver window", run: () => controls.setWindow("liver") },
  { key: "6", does: "vessel window", run: () => controls.setWindow("vessel") },
  { key: "v", does: "all views", run: () => controls.setView("all") },
  { key: "a", does: "axial view, large", run: () => controls.setView("axial") },
  { key: "c", does: "coronal view, large", run: () => controls.setView("coronal") },
  { key: "g", does: "sagittal view, large", run: () => controls.setView("sagittal") },
  { key: "d", does: "3-D view, large", run: () => controls.setView("render") },
  { key: "ArrowUp", does: "one slice on (axial, or the large view)", run: () => controls.step(1) },
  { key: "ArrowDown", does: "one slice back", run: () => controls.step(-1) },
  { key: "PageUp", does: "ten slices on", run: () => controls.step(10) },
  { key: "PageDown", does: "ten slices back", run: () => controls.step(-10) },
  { key: "ArrowLeft", does: "crosshair to the patient’s right", run: () => controls.moveRight(1) },
  { key: "ArrowRight", does: "crosshair to the patient’s left", run: () => controls.moveRight(-1) },
  { key: " ", does: "cine: play the slices, and stop", run: () => controls.toggleCine() },
  { key: "m", does: "measure with the left button", run: () => controls.toggleTool("measure") },
  { key: "i", does: "ROI: mean HU in an ellipse", run: () => controls.toggleTool("roi") },
  { key: "r", does: "reset: middle, no zoom, no measurements", run: () => controls.reset() },
  { key: "j", does: "next sentence", run: () => stepSentence(1) },
  { key: "k", does: "previous sentence", run: () => stepSentence(-1) },
  { key: "y", does: "keep the sentence", run: () => review.toggle("kept") },
  { key: "t", does: "edit the sentence", run: () => review.open() },
  { key: "x", does: "drop the sentence", run: () => review.toggle("dropped") },
  { key: "s", does: "where it looked for this sentence, on and off", run: toggleLook },
  { key: "]", does: "overlay stronger", run: () => setOpacity(Number(opacity.value) + 10) },
  { key: "[", does: "overlay weaker", run: () => setOpacity(Number(opacity.value) - 10) },
  { key: "w", does: "back to the report", run: () => tabs.show("report") },
  { key: "e", does: "edit the report", run: () => tabs.show("edit") },
  { key: "p", does: "compare with a pasted reference", run: () => tabs.show("compare") },
  { key: "q", does: "ask a question", run: () => question.focus() },
  { key: "Enter", does: "save the correction, or compare", withControl: true, run: confirmTab },
  { key: "Escape", does: "stop writing, or leave a field", run: escape },
  { key: "?", does: "this help", run: showHelp },
]);

function confirmTab(): void {
  if (review.isOpen) review.replace();
  else if (tabs.current === "edit") void edit.submit();
  else if (tabs.current === "compare") void compare.submit();
}

function escape(): void {
  const focused = document.activeElement;
  if (focused === find("words")) review.close();
  else if (focused instanceof HTMLElement && focused.matches("input, textarea, select")) focused.blur();
  else writing?.abort();
}

function showHelp(): void {
  find<HTMLDialogElement>("help").showModal();
}

async function start(): Promise<void> {
  api.onUnauthorized(askForKey);
  listen();
  void watchService();
  listSamples().catch(showProblem);
  try {
    picture.view = await View.on(canvas);
    controls.attach(picture.view);
  } catch (error) {
    picture.note(`No picture: ${message(error)}. The report is written all the same.`);
  }
  await restore();
}

void start();
