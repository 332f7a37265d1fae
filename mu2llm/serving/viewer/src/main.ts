/** The reading room: ties the picture, the report, editing and comparing together. */

import "./style.css";
import * as api from "./api";
import { ComparePane } from "./compare";
import { Controls } from "./controls";
import { askForKey, hideProblem, message, showProblem } from "./dialogs";
import { find, make } from "./dom";
import { EditPane } from "./edit";
import { bindKeys } from "./keys";
import { ReportPane } from "./report";
import { asVolume, onDrop } from "./scan";
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
const edit = new EditPane();
const compare = new ComparePane();

let view: View | null = null;
let scan: File[] | null = null;
let writing: AbortController | null = null;
/** Whether the selected sentence's overlay stays on. */
let looking = false;

// ---- the scan ----

async function open(files: File[], sample?: api.Sample): Promise<void> {
  if (!files.length || !leavesEdits()) return;
  scan = files;
  find("write").toggleAttribute("disabled", false);
  find("drop").hidden = true;
  compare.load(sample?.reference ?? "");
  samples.value = sample?.name ?? "";
  await Promise.all([showPicture(files), write()]);
}

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

async function showPicture(files: File[]): Promise<void> {
  view?.clear(); // never an old picture beside a new report
  note("reading the scan…");
  try {
    if (!view) throw new Error("this browser has no WebGL 2");
    const volume = await view.load(await asVolume(files));
    if (scan !== files) return;
    view.show(volume, controls.window);
    canvas.setAttribute("aria-label", "CT scan: axial, coronal, sagittal and 3-D");
    note("");
  } catch (error) {
    if (scan !== files) return;
    canvas.setAttribute("aria-label", "The scan cannot be shown");
    note(`No picture: ${message(error)}. The report is written all the same.`);
  }
}

function note(text: string): void {
  find("picture-note").textContent = text;
  find("picture-note").hidden = text === "";
}

// ---- the report ----

const leavesEdits = () => !edit.isUnsaved || confirm("Your correction of this report is not saved. Leave it?");

/** `accept` are reason codes that the user lets pass. */
async function write(accept: string[] = []): Promise<void> {
  if (!scan) return;
  writing?.abort();
  const own = (writing = new AbortController());
  begin();
  const asked = { question: question.value.trim(), region: region.value.trim(), accept };
  const listener = {
    scan: (facts: api.ScanFacts) => own === writing && report.scan(facts),
    token: (text: string) => own === writing && report.append(text),
  };
  try {
    const written = await api.writeReport(scan, asked, listener, own.signal);
    if (own !== writing) return;
    report.finish(written);
    edit.load(written);
    find("overlay").hidden = !written.saliency?.sentences.length;
  } catch (error) {
    if (own !== writing) return;
    report.stop();
    if (!own.signal.aborted) showProblem(error, (code) => void write([...accept, code]));
  } finally {
    if (own === writing) {
      writing = null;
      find("stop").hidden = true;
    }
  }
}

/** Nothing of an earlier report stays. */
function begin(): void {
  hideProblem();
  report.clear();
  edit.load(null);
  compare.clear();
  setLooking(false);
  view?.forgetOverlays();
  find("overlay").hidden = true;
  find("stop").hidden = false;
  tabs.show("report");
}

// ---- where it looked ----

let hover = 0;
report.onHover = (nifti) => {
  clearTimeout(hover);
  hover = window.setTimeout(() => look(nifti ?? (looking ? selectedLook() : null)), HOVER_MS);
};
report.onSelect = () => {
  if (looking) lookAtSelected();
};

const selectedLook = () => report.selected?.nifti ?? null;

function look(nifti: string | null): void {
  view?.look(nifti).catch(showProblem);
}

function lookAtSelected(): void {
  const nifti = selectedLook();
  look(nifti);
  if (nifti) view?.goToPeak(nifti).catch(showProblem);
}

function setLooking(on: boolean): void {
  looking = on;
  find("look").setAttribute("aria-pressed", String(on));
  if (on) lookAtSelected();
  else look(null);
}

function toggleLook(): void {
  if (find("overlay").hidden) return;
  if (!report.selected) report.select(0);
  setLooking(!looking);
}

function setOpacity(percent: number): void {
  opacity.value = String(percent);
  view?.setOpacity(Number(opacity.value) / 100);
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
  edit.onProblem = showProblem;
  compare.onProblem = showProblem;
  compare.candidate = () => ({ text: edit.text, name: edit.isEdited ? "your edited report" : "the draft" });
}

bindKeys([
  { key: "o", does: "open a scan", run: () => fileInput.click() },
  { key: "1", does: "lung window", run: () => controls.setWindow("lung") },
  { key: "2", does: "soft-tissue window", run: () => controls.setWindow("soft") },
  { key: "3", does: "bone window", run: () => controls.setWindow("bone") },
  { key: "4", does: "brain window", run: () => controls.setWindow("brain") },
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
  { key: "m", does: "measure with the left button", run: () => controls.toggleMeasure() },
  { key: "r", does: "reset: middle, no zoom, no measurements", run: () => controls.reset() },
  { key: "j", does: "next sentence", run: () => stepSentence(1) },
  { key: "k", does: "previous sentence", run: () => stepSentence(-1) },
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
  if (tabs.current === "edit") void edit.submit();
  if (tabs.current === "compare") void compare.submit();
}

function escape(): void {
  const focused = document.activeElement;
  if (focused instanceof HTMLElement && focused.matches("input, textarea, select")) focused.blur();
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
    view = await View.on(canvas);
    controls.attach(view);
  } catch (error) {
    note(`No picture: ${message(error)}. The report is written all the same.`);
  }
}

void start();
