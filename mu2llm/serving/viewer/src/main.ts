/** The reading room: ties the picture, the report, editing and comparing together. */

import "./style.css";
import * as api from "./api";
import { ComparePane } from "./compare";
import { find, make } from "./dom";
import { EditPane } from "./edit";
import { bindKeys } from "./keys";
import { ReportPane } from "./report";
import { asNifti, droppedFiles } from "./scan";
import { View, WINDOWS, type ViewName, type WindowName } from "./view";

const SERVICE_POLL_MS = 3000;
const HOVER_MS = 120;

const canvas = find<HTMLCanvasElement>("picture");
const report = new ReportPane();
const edit = new EditPane();
const compare = new ComparePane();

let view: View | null = null;
let scan: File[] | null = null;
let writing: AbortController | null = null;
let windowName: WindowName = "soft";
let viewName: ViewName = "all";
let measuring = false;
/** Whether the selected sentence's overlay stays on. */
let looking = false;

// ---- the scan ----

async function open(files: File[], reference = ""): Promise<void> {
  if (!files.length || !leavesEdits()) return;
  scan = files;
  find("write").toggleAttribute("disabled", false);
  find("drop").hidden = true;
  compare.load(reference);
  await Promise.all([showPicture(files), write()]);
}

async function openSample({ id, reference }: api.Sample): Promise<void> {
  try {
    await open([await api.sample(id)], reference);
  } catch (error) {
    showProblem(error);
  }
}

async function showPicture(files: File[]): Promise<void> {
  note("reading the scan…");
  try {
    const nifti = await asNifti(files);
    if (!view) throw new Error("this browser has no WebGL 2");
    if (scan !== files) return;
    await view.show(nifti, windowName);
    canvas.setAttribute("aria-label", "CT scan: axial, coronal, sagittal and 3-D");
    note("");
  } catch (error) {
    if (scan !== files) return;
    view?.clear();
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

/** `accept` is a reason code that the user lets pass. */
async function write(accept = ""): Promise<void> {
  if (!scan) return;
  writing?.abort();
  const own = (writing = new AbortController());
  const asked = { question: input("question").value.trim(), region: input("region").value.trim(), accept };
  hideProblem();
  report.clear();
  edit.load(null);
  compare.clear();
  setLooking(false);
  view?.forgetOverlays();
  find("overlay").hidden = true;
  showTab("report");
  find("stop").hidden = false;
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
    if (!own.signal.aborted) showProblem(error);
  } finally {
    if (own === writing) {
      writing = null;
      find("stop").hidden = true;
    }
  }
}

function stopWriting(): void {
  writing?.abort();
}

// ---- where it looked ----

let hover = 0;
report.onHover = (nifti) => {
  clearTimeout(hover);
  hover = window.setTimeout(() => void view?.look(nifti ?? (looking ? selectedLook() : null)), HOVER_MS);
};
report.onSelect = () => {
  if (looking) showLook();
};

const selectedLook = () => report.selected?.nifti ?? null;

function showLook(): void {
  const nifti = selectedLook();
  void view?.look(nifti);
  if (nifti) void view?.goToPeak(nifti);
}

function setLooking(on: boolean): void {
  looking = on;
  find("look").setAttribute("aria-pressed", String(on));
  if (on) showLook();
  else void view?.look(null);
}

function toggleLook(): void {
  if (find("overlay").hidden) return;
  if (!report.selected) report.select(0);
  setLooking(!looking);
}

function stepOpacity(by: number): void {
  const slider = input("opacity");
  slider.value = String(Number(slider.value) + by);
  view?.setOpacity(Number(slider.value) / 100);
}

// ---- window, view, slices, tools ----

function setWindow(name: WindowName): void {
  windowName = name;
  view?.setWindow(name);
}

/** A view asked for again goes back to all of them. */
function setView(name: ViewName): void {
  viewName = name === viewName ? "all" : name;
  view?.setView(viewName);
  press("view", viewName);
}

function press(attribute: "window" | "view", name: string | null): void {
  for (const button of document.querySelectorAll<HTMLElement>(`[data-${attribute}]`)) {
    button.setAttribute("aria-pressed", String(button.dataset[attribute] === name));
  }
}

function step(slices: number): void {
  if (viewName === "coronal") view?.move(0, slices, 0);
  else if (viewName === "sagittal") view?.move(slices, 0, 0);
  else view?.move(0, 0, slices);
}

function toggleMeasure(): void {
  measuring = !measuring;
  view?.measure(measuring);
  find("measure").setAttribute("aria-pressed", String(measuring));
  canvas.classList.toggle("measuring", measuring);
}

let windowText = "";
let locationText = "";
function showStrip(): void {
  find("location").replaceChildren(
    make("span", {}, "R on the left"),
    make("span", {}, windowText),
    make("span", {}, locationText),
  );
}

// ---- tabs, problems, dialogs ----

const TABS = ["report", "edit", "compare"] as const;
type Tab = (typeof TABS)[number];

function showTab(shown: Tab): void {
  for (const name of TABS) {
    const tab = find(`tab-${name}`);
    tab.setAttribute("aria-selected", String(name === shown));
    tab.tabIndex = name === shown ? 0 : -1;
    find(`panel-${name}`).hidden = name !== shown;
  }
  if (shown === "edit") edit.focus();
  if (shown === "compare") compare.focus();
}

const currentTab = () => TABS.find((name) => !find(`panel-${name}`).hidden) ?? "report";

function message(error: unknown): string {
  return (error instanceof Error ? error.message : String(error)).replace(/\.$/, "");
}

/** Reasons of the service against a scan that a reader may overrule. */
const ACCEPTABLE = ["not_hu", "unknown_orientation"];

function showProblem(error: unknown): void {
  const box = find("problem");
  if (error instanceof api.Problem) {
    const code = [error.status || "", error.code].filter(Boolean).join(" ");
    box.replaceChildren(make("strong", {}, error.title), make("code", {}, code), make("p", {}, error.detail));
    if (ACCEPTABLE.includes(error.code)) {
      const button = make("button", {}, "Read it all the same");
      button.addEventListener("click", () => void write(error.code));
      box.append(button);
    }
  } else {
    box.replaceChildren(make("strong", {}, "Something went wrong"), make("p", {}, message(error)));
  }
  box.hidden = false;
}

function hideProblem(): void {
  find("problem").hidden = true;
}

function input(id: string): HTMLInputElement {
  return find<HTMLInputElement>(id);
}

let asking: Promise<string | null> | null = null;

/** One dialog, however many requests were refused at once. */
function askForKey(reason: string): Promise<string | null> {
  asking ??= new Promise<string | null>((resolve) => {
    const dialog = find<HTMLDialogElement>("key");
    find("key-reason").textContent = reason;
    input("key-value").value = "";
    dialog.returnValue = "cancel";
    const done = () => {
      asking = null;
      resolve(dialog.returnValue === "use" ? input("key-value").value.trim() : null);
    };
    dialog.addEventListener("close", done, { once: true });
    dialog.showModal();
  });
  return asking;
}

// ---- the service ----

async function watchService(): Promise<void> {
  const pill = find("service");
  for (;;) {
    const state = await api.readiness().catch(() => null);
    pill.dataset.state = state ? (state.ready ? "ready" : "waiting") : "gone";
    if (state?.ready) {
      pill.textContent = `ready: ${state.model?.id ?? ""}`;
      return;
    }
    pill.textContent = state ? `not ready: ${state.why}` : "the service does not answer";
    await new Promise((resolve) => setTimeout(resolve, SERVICE_POLL_MS));
  }
}

async function listSamples(): Promise<void> {
  const found = await api.samples().catch((error: unknown) => {
    showProblem(error);
    return [];
  });
  const select = find<HTMLSelectElement>("samples");
  for (const sample of found) {
    select.append(make("option", { title: sample.description }, sample.name));
    const button = make("button", {}, make("b", {}, sample.name), make("span", {}, sample.description));
    button.addEventListener("click", () => void openSample(sample));
    find("sample-list").append(button);
  }
  select.addEventListener("change", () => {
    const sample = found[select.selectedIndex - 1];
    if (sample) void openSample(sample);
  });
  if (found.length) find("sample-list").prepend(make("p", { class: "quiet" }, "or read a sample"));
  else find("samples").toggleAttribute("disabled", true);
}

// ---- everything that the user can touch ----

function listen(): void {
  for (const button of document.querySelectorAll<HTMLElement>("[data-window]")) {
    button.addEventListener("click", () => setWindow(button.dataset.window as WindowName));
  }
  for (const button of document.querySelectorAll<HTMLElement>("[data-view]")) {
    button.addEventListener("click", () => setView(button.dataset.view as ViewName));
  }
  const clicks: Record<string, () => void> = {
    open: () => input("file").click(),
    choose: () => input("file").click(),
    measure: toggleMeasure,
    reset: () => view?.reset(),
    look: toggleLook,
    stop: stopWriting,
    "help-button": () => find<HTMLDialogElement>("help").showModal(),
  };
  for (const [id, run] of Object.entries(clicks)) find(id).addEventListener("click", run);
  for (const name of TABS) find(`tab-${name}`).addEventListener("click", () => showTab(name));
  document.querySelector("[role=tablist]")?.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[(event as KeyboardEvent).key];
    if (!by) return;
    const next = TABS[(TABS.indexOf(currentTab()) + by + TABS.length) % TABS.length] ?? "report";
    showTab(next);
    find(`tab-${next}`).focus();
  });
  input("opacity").addEventListener("input", () => view?.setOpacity(Number(input("opacity").value) / 100));
  input("file").addEventListener("change", () => {
    const files = [...(input("file").files ?? [])];
    input("file").value = "";
    void open(files);
  });
  find("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    if (leavesEdits()) void write();
  });
  listenToDrops();
  window.addEventListener("beforeunload", (event) => edit.isUnsaved && event.preventDefault());
  edit.onProblem = showProblem;
  compare.onProblem = showProblem;
  compare.candidate = () => ({ text: edit.text, name: edit.isEdited ? "your edited report" : "the draft" });
}

function listenToDrops(): void {
  let depth = 0;
  const mark = (by: number) => document.body.classList.toggle("dropping", (depth += by) > 0);
  window.addEventListener("dragenter", () => mark(1));
  window.addEventListener("dragleave", () => mark(-1));
  window.addEventListener("dragover", (event) => event.preventDefault(), { capture: true });
  window.addEventListener(
    "drop",
    (event) => {
      event.preventDefault();
      mark(-depth);
      if (event.dataTransfer) void droppedFiles(event.dataTransfer).then((files) => open(files), showProblem);
    },
    { capture: true },
  );
}

bindKeys([
  { key: "o", does: "open a scan", run: () => input("file").click() },
  { key: "1", does: "lung window", run: () => setWindow("lung") },
  { key: "2", does: "soft-tissue window", run: () => setWindow("soft") },
  { key: "3", does: "bone window", run: () => setWindow("bone") },
  { key: "4", does: "brain window", run: () => setWindow("brain") },
  { key: "v", does: "all views", run: () => setView("all") },
  { key: "a", does: "axial view, large", run: () => setView("axial") },
  { key: "c", does: "coronal view, large", run: () => setView("coronal") },
  { key: "g", does: "sagittal view, large", run: () => setView("sagittal") },
  { key: "d", does: "3-D view, large", run: () => setView("render") },
  { key: "ArrowUp", does: "one slice on (axial, or the large view)", run: () => step(1) },
  { key: "ArrowDown", does: "one slice back", run: () => step(-1) },
  { key: "PageUp", does: "ten slices on", run: () => step(10) },
  { key: "PageDown", does: "ten slices back", run: () => step(-10) },
  { key: "ArrowLeft", does: "crosshair to the patient’s right", run: () => view?.move(1, 0, 0) },
  { key: "ArrowRight", does: "crosshair to the patient’s left", run: () => view?.move(-1, 0, 0) },
  { key: "m", does: "measure with the left button", run: toggleMeasure },
  { key: "r", does: "reset: middle, no zoom, no measurements", run: () => view?.reset() },
  { key: "j", does: "next sentence", run: () => report.step(1) },
  { key: "k", does: "previous sentence", run: () => report.step(-1) },
  { key: "s", does: "where it looked for this sentence, on and off", run: toggleLook },
  { key: "]", does: "overlay stronger", run: () => stepOpacity(10) },
  { key: "[", does: "overlay weaker", run: () => stepOpacity(-10) },
  { key: "w", does: "back to the report", run: () => showTab("report") },
  { key: "e", does: "edit the report", run: () => showTab("edit") },
  { key: "p", does: "compare with a pasted reference", run: () => showTab("compare") },
  { key: "q", does: "ask a question", run: () => input("question").focus() },
  { key: "Enter", does: "save the correction, or compare", withControl: true, run: confirmTab },
  { key: "Escape", does: "stop writing, or leave a field", run: escape },
  { key: "?", does: "this help", run: () => find<HTMLDialogElement>("help").showModal() },
]);

function confirmTab(): void {
  if (currentTab() === "edit") void edit.submit();
  if (currentTab() === "compare") void compare.submit();
}

function escape(): void {
  if (document.activeElement instanceof HTMLElement && document.activeElement.matches("input, textarea, select")) {
    document.activeElement.blur();
  } else stopWriting();
}

async function start(): Promise<void> {
  api.onUnauthorized(askForKey);
  listen();
  showStrip();
  void listSamples().then(watchService);
  try {
    view = await View.on(canvas);
  } catch (error) {
    note(`No picture: ${message(error)}. The report is written all the same.`);
    return;
  }
  view.onWindow = (low, high) => {
    const known = Object.entries(WINDOWS).find(([, w]) => w.level - w.width / 2 === low && w.level + w.width / 2 === high);
    press("window", known?.[0] ?? null);
    windowText = `W ${Math.round(high - low)} L ${Math.round((low + high) / 2)}`;
    showStrip();
  };
  view.onOverlay = (shown, flat) => {
    find("legend").hidden = !shown;
    find("caveat").textContent = flat
      ? "the whole scan counted almost alike"
      : "this is no proof that the sentence is right";
  };
  view.onLocation = ({ mm: [x, y, z], value }) => {
    const axis = (v: number, plus: string, minus: string) => `${v >= 0 ? plus : minus} ${Math.abs(v).toFixed(0)}`;
    const place = [axis(x, "R", "L"), axis(y, "A", "P"), axis(z, "S", "I")].join("  ");
    locationText = `${place} mm   ${Number.isNaN(value) ? "" : `${Math.round(value)} HU`}`;
    showStrip();
  };
  view.setWindow(windowName);
}

void start();
