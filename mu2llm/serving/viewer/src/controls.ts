/** The picture's toolbar and what stands below it: window, view, slices, measuring, place and HU. */

import { find, make } from "./dom";
import { View, WINDOWS, type Location, type Region, type ToolName, type ViewName, type Window, type WindowName } from "./view";

const CINE_MS = 100; // a slice

export class Controls {
  private shownWindow: Window = WINDOWS.soft;
  private viewName: ViewName = "all";
  private tool: ToolName = "none";
  private cine = 0;
  private region = "";
  private windowText = "";
  private place = "";
  private view: View | null = null;

  constructor() {
    for (const button of document.querySelectorAll<HTMLElement>("[data-window]")) {
      button.addEventListener("click", () => this.setWindow(button.dataset.window as WindowName));
    }
    for (const button of document.querySelectorAll<HTMLElement>("[data-view]")) {
      button.addEventListener("click", () => this.setView(button.dataset.view as ViewName));
    }
    for (const name of ["width", "level"]) find(name).addEventListener("change", () => this.setTyped());
    find("measure").addEventListener("click", () => this.toggleTool("measure"));
    find("roi").addEventListener("click", () => this.toggleTool("roi"));
    find("cine").addEventListener("click", () => this.toggleCine());
    find("reset").addEventListener("click", () => this.reset());
    this.showStrip();
  }

  attach(view: View): void {
    this.view = view;
    view.onWindow = (low, high) => this.showWindow(low, high);
    view.onLocation = (location) => this.showLocation(location);
    view.onOverlay = showLegend;
    view.onRegion = (region) => this.showRegion(region);
    view.setWindow(this.shownWindow);
  }

  get window(): Window {
    return this.shownWindow;
  }

  setWindow(name: WindowName): void {
    this.view?.setWindow(WINDOWS[name]);
  }

  private setTyped(): void {
    const [width, level] = ["width", "level"].map((name) => find<HTMLInputElement>(name).valueAsNumber) as [number, number];
    if (width >= 1 && Number.isFinite(level)) this.view?.setWindow({ width, level });
    else this.showTyped();
  }

  /** A view asked for again goes back to all of them. */
  setView(name: ViewName): void {
    this.viewName = name === this.viewName ? "all" : name;
    this.view?.setView(this.viewName);
    press("view", this.viewName);
  }

  /** Scrolls the large view, or the axial one where all are shown. */
  step(slices: number): void {
    const by = [0, 1, 2].map((axis) => (axis === this.axis ? slices : 0)) as [number, number, number];
    this.view?.move(...by);
  }

  moveRight(voxels: number): void {
    this.view?.move(voxels, 0, 0);
  }

  /** A tool asked for again is put away. */
  toggleTool(name: ToolName): void {
    this.tool = name === this.tool ? "none" : name;
    this.view?.use(this.tool);
    for (const id of ["measure", "roi"]) find(id).setAttribute("aria-pressed", String(id === this.tool));
    find("picture").classList.toggle("measuring", this.tool !== "none");
  }

  /** Plays the slices of the large view, or the axial ones, around and around. */
  toggleCine(): void {
    clearInterval(this.cine);
    this.cine = this.cine ? 0 : window.setInterval(() => this.view?.turn(this.axis), CINE_MS);
    find("cine").setAttribute("aria-pressed", String(this.cine !== 0));
  }

  private get axis(): 0 | 1 | 2 {
    return this.viewName === "coronal" ? 1 : this.viewName === "sagittal" ? 0 : 2;
  }

  reset(): void {
    this.view?.reset();
  }

  private showWindow(low: number, high: number): void {
    const [width, level] = [high - low, (low + high) / 2];
    this.shownWindow = { width, level };
    this.showTyped();
    const known = Object.entries(WINDOWS).find(([, window]) => window.width === width && window.level === level);
    press("window", known?.[0] ?? null);
    this.windowText = `W ${Math.round(width)} L ${Math.round(level)}`;
    this.showStrip();
  }

  private showLocation({ mm: [x, y, z], value }: Location): void {
    const axis = (v: number, plus: string, minus: string) => `${v >= 0 ? plus : minus} ${Math.abs(v).toFixed(0)}`;
    const mm = [axis(x, "R", "L"), axis(y, "A", "P"), axis(z, "S", "I")].join("  ");
    this.place = `${mm} mm   ${Number.isNaN(value) ? "" : `${Math.round(value)} HU`}`;
    this.showStrip();
  }

  private showTyped(): void {
    for (const name of ["width", "level"] as const) {
      find<HTMLInputElement>(name).value = String(Math.round(this.shownWindow[name]));
    }
  }

  private showRegion(region: Region | null): void {
    if (region) {
      const [mean, deviation, low, high] = [region.mean, region.deviation, region.low, region.high].map((n) => n.toFixed(0));
      this.region = `ROI mean ${mean} HU  SD ${deviation}  ${low} to ${high}  ${(region.mm2 / 100).toFixed(1)} cm²`;
    } else this.region = "";
    this.showStrip();
  }

  private showStrip(): void {
    const texts = ["the patient’s right is on the left", this.windowText, this.place, this.region].filter(Boolean);
    find("location").replaceChildren(...texts.map((text) => make("span", {}, text)));
  }
}

function press(attribute: "window" | "view", name: string | null): void {
  for (const button of document.querySelectorAll<HTMLElement>(`[data-${attribute}]`)) {
    button.setAttribute("aria-pressed", String(button.dataset[attribute] === name));
  }
}

function showLegend(shown: boolean): void {
  find("legend").hidden = !shown;
}
