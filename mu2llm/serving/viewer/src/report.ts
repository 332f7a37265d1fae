/** The report as it grows: sentences that can be pointed at, the findings and the facts behind it. */

import type { Finding, Report, ScanFacts, SentenceSaliency } from "./api";
import { find, make } from "./dom";
import { sentences, utf16, type Sentence } from "./sentences";

const HEADING = /^(findings?|impressions?|conclusions?|comparison|technique|history)\s*:/i;

interface Shown extends Sentence {
  element: HTMLElement;
  nifti: string | null;
}

export class ReportPane {
  private text = "";
  private shown: Shown[] = [];
  private selectedIndex = -1;
  private readonly box = find("report");
  private readonly empty = find("empty");
  /** A sentence under the pointer or the focus, or null when it leaves. */
  onHover: (nifti: string | null) => void = () => {};
  onSelect: () => void = () => {};

  get selected(): Shown | null {
    return this.shown[this.selectedIndex] ?? null;
  }

  clear(): void {
    this.text = "";
    this.shown = [];
    this.selectedIndex = -1;
    this.box.replaceChildren();
    find("findings").replaceChildren();
    find("facts").replaceChildren();
    this.empty.hidden = true;
    this.box.setAttribute("aria-busy", "true");
  }

  /** More of the text; what is complete of it stays as it is on the page. */
  append(text: string): void {
    this.text += text;
    const found = sentences(this.text);
    const same = Math.max(0, this.shown.length - 1); // the last one may still have been growing
    this.draw(found, same);
  }

  finish(report: Report): void {
    this.box.removeAttribute("aria-busy");
    this.text = report.report;
    const looked = report.saliency?.sentences ?? [];
    const found = looked.length ? withGaps(report.report, looked) : sentences(report.report);
    this.draw(found, 0);
    for (const sentence of this.shown) {
      const match = looked.find((one) => utf16(report.report, one.start) === sentence.start);
      sentence.nifti = match?.nifti ?? null;
      sentence.element.classList.toggle("looked", sentence.nifti !== null);
    }
    find("findings").replaceChildren(...report.findings.map(chip));
    showFacts(report.scan, report);
  }

  /** What is there when the stream was broken off. */
  stop(): void {
    this.box.removeAttribute("aria-busy");
    this.empty.hidden = this.text !== "";
  }

  select(index: number): void {
    if (!this.shown.length) return;
    this.selectedIndex = Math.min(Math.max(index, 0), this.shown.length - 1);
    for (const [i, { element }] of this.shown.entries()) {
      element.setAttribute("aria-selected", String(i === this.selectedIndex));
      element.tabIndex = i === this.selectedIndex ? 0 : -1;
    }
    this.selected?.element.scrollIntoView({ block: "nearest" });
    this.onSelect();
  }

  step(by: number): void {
    this.select(this.selectedIndex < 0 ? (by > 0 ? 0 : this.shown.length - 1) : this.selectedIndex + by);
    this.selected?.element.focus();
  }

  private draw(found: Sentence[], from: number): void {
    for (const { element } of this.shown.splice(from)) element.remove();
    for (const [i, sentence] of found.entries()) {
      if (i >= from) this.shown.push({ ...sentence, nifti: null, element: this.element(sentence, i) });
    }
    if (this.selectedIndex >= this.shown.length) this.selectedIndex = -1;
  }

  private element({ text }: Sentence, index: number): HTMLElement {
    const heading = HEADING.exec(text)?.[0];
    const words = heading ? [make("b", {}, heading), text.slice(heading.length)] : [text];
    const element = make("span", { class: "sentence", "aria-selected": "false" }, ...words);
    element.setAttribute("role", "option");
    element.tabIndex = index === 0 ? 0 : -1;
    if (heading) element.classList.add("section");
    element.addEventListener("mouseenter", () => this.onHover(this.shown[index]?.nifti ?? null));
    element.addEventListener("mouseleave", () => this.onHover(null));
    element.addEventListener("click", () => this.select(index));
    this.box.append(element, " ");
    return element;
  }
}

/** The sentences that were looked at, and what stands between them. */
function withGaps(report: string, looked: SentenceSaliency[]): Sentence[] {
  const found: Sentence[] = [];
  const add = (start: number, end: number) => {
    const text = report.slice(start, end);
    if (text.trim()) found.push({ text, start, end });
  };
  let end = 0;
  for (const one of looked) {
    add(end, utf16(report, one.start));
    end = utf16(report, one.end);
    add(utf16(report, one.start), end);
  }
  add(end, report.length);
  return found;
}

function chip({ name, side, place, size_mm }: Finding): HTMLElement {
  const more = [side, place, size_mm ? `${Math.round(size_mm)} mm` : null].filter(Boolean).join(", ");
  return make("li", {}, name, ...(more ? [make("span", {}, more)] : []));
}

export function showFacts(scan: ScanFacts, report?: Report): void {
  const facts: [string, string][] = [];
  const numbers = (values: number[], digits: number) => values.map((v) => v.toFixed(digits)).join(" × ");
  if (scan.shape) facts.push(["Scan", `${numbers(scan.shape, 0)} voxels${scan.format ? `, ${scan.format}` : ""}`]);
  if (scan.spacing) facts.push(["Spacing", `${numbers(scan.spacing, 2)} mm`]);
  if (scan.orientation) facts.push(["Orientation", scan.orientation]);
  if (scan.warnings?.length) facts.push(["Set right", scan.warnings.map((w) => w.replaceAll("_", " ")).join(", ")]);
  if (report) {
    facts.push(["Model", report.model], ["Preprocessing", report.spec]);
    const seconds = Object.entries(report.seconds).map(([step, s]) => `${step.replaceAll("_", " ")} ${s.toFixed(2)} s`);
    if (seconds.length) facts.push(["Time", seconds.join(", ")]);
  }
  find("facts").replaceChildren(...facts.flatMap(([k, v]) => [make("dt", {}, k), make("dd", {}, v)]));
}
