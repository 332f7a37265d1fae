/** The picture's toolbar and what stands below it: window, view, slices, measuring, place and HU. */

import { find, make } from "./dom";
import { View, WINDOWS, type Location, type ViewName, type WindowName } from "./view";

export class Controls {
  private windowName: WindowName = "soft";
  private viewName: ViewName = "all";
  private measuring = false;
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
    find("measure").addEventListener("click", () => this.toggleMeasure());
    find("reset").addEventListener("click", () => this.reset());
    this.showStrip();
  }

  attach(view: View): void {
    this.view = view;
    view.onWindow = (low, high) => this.showWindow(low, high);
    view.onLocation = (location) => this.showLocation(location);
    view.onOverlay = showLegend;
    view.setWindow(this.windowName);
  }

  get window(): WindowName {
    return this.windowName;
  }

  setWindow(name: WindowName): void {
    this.windowName = name;
    this.view?.setWindow(name);
  }

  /** A view asked for again goes back to all of them. */
  setView(name: ViewName): void {
    this.viewName = name === this.viewName ? "all" : name;
    this.view?.setView(this.viewName);
    press("view", this.viewName);
  }

  /** Scrolls the large view, or the axial one where all are shown. */
  step(slices: number): void {
    if (this.viewName === "coronal") this.view?.move(0, slices, 0);
    else if (this.viewName === "sagittal") this.view?.move(slices, 0, 0);
    else this.view?.move(0, 0, slices);
  }

  moveRight(voxels: number): void {
    this.view?.move(voxels, 0, 0);
  }

  toggleMeasure(): void {
    this.measuring = !this.measuring;
    this.view?.measure(this.measuring);
    find("measure").setAttribute("aria-pressed", String(this.measuring));
    find("picture").classList.toggle("measuring", this.measuring);
  }

  reset(): void {
    this.view?.reset();
  }

  private showWindow(low: number, high: number): void {
    const [width, level] = [high - low, (low + high) / 2];
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

  private showStrip(): void {
    const texts = ["the patient’s right is on the left", this.windowText, this.place];
    find("location").replaceChildren(...texts.map((text) => make("span", {}, text)));
  }
}

function press(attribute: "window" | "view", name: string | null): void {
  for (const button of document.querySelectorAll<HTMLElement>(`[data-${attribute}]`)) {
    button.setAttribute("aria-pressed", String(button.dataset[attribute] === name));
  }
}

function showLegend(shown: boolean, flat: boolean): void {
  find("legend").hidden = !shown;
  find("caveat").textContent = flat
    ? "the whole scan counted almost alike"
    : "this is no proof that the sentence is right";
}
