/** The report as it grows: sentences that can be pointed at, the findings and the facts behind it. */

import type { Draft, Finding, Report, ScanFacts } from "./api";
import { find, make } from "./dom";
import { HEADING, sentences, type Sentence } from "./sentences";

interface Shown extends Sentence {
  /** What stands before the sentence (a heading, a space, a new line), and the sentence. */
  gap: HTMLElement;
  element: HTMLElement;
}

export class ReportPane {
  private text = "";
  private shown: Shown[] = [];
  private selectedIndex = -1;
  private readonly box = find("report");
  private readonly progress = find("progress");
  /** A sentence under the pointer, or null when it leaves. */
  onHover: (sentence: Sentence | null) => void = () => {};
  onSelect: () => void = () => {};

  get selected(): Shown | null {
    return this.shown[this.selectedIndex] ?? null;
  }

  /** −1 where none is. */
  get selectedAt(): number {
    return this.selectedIndex;
  }

  get sentences(): readonly Sentence[] {
    return this.shown;
  }

  /** All of the text as it was generated. */
  get whole(): string {
    return this.text;
  }

  /** Shows what was decided about a sentence: `kept`, `dropped` or `edited` into other words. */
  mark(index: number, mark: string | null, words: string | null): void {
    const { element, text } = this.shown[index]!;
    if (mark) element.dataset.mark = mark;
    else delete element.dataset.mark;
    element.textContent = words ?? text;
    if (mark) element.setAttribute("aria-label", `${mark}: ${words ?? text}`);
    else element.removeAttribute("aria-label");
  }

  clear(): void {
    this.text = "";
    this.draw([], 0);
    this.selectedIndex = -1;
    find("findings").replaceChildren();
    find("facts").replaceChildren();
    this.box.setAttribute("aria-busy", "true");
    this.progress.classList.remove("unlike");
    this.progress.textContent = "The scan is sent and read…";
  }

  /** The scan has been read; the words come next. */
  scan(facts: ScanFacts): void {
    showFacts(facts);
    this.progress.textContent = "The model looks at the scan…";
  }

  /** More of the text; what is complete of it stays as it is on the page. */
  append(text: string): void {
    this.text += text;
    this.progress.textContent = "";
    this.draw(sentences(this.text), this.shown.length - 1); // the last one may still have been growing
  }

  finish(report: Report): void {
    this.text = report.report;
    this.draw(sentences(this.text), 0);
    this.box.removeAttribute("aria-busy");
    const cutOff = report.finished ? "" : " It was cut off at the length limit.";
    const unlike = report.familiarity?.unlike ?? false;
    const warning = unlike ? `Unlike the training scans: do not rely on this report. ` : "";
    this.progress.textContent = `${warning}Written: ${this.shown.length} sentences.${cutOff}`;
    this.progress.classList.toggle("unlike", unlike);
    find("findings").replaceChildren(...report.findings.map(chip));
    showFacts(report.scan, report);
  }

  /** Whether the sentences answer to being pointed at. */
  pointable(on: boolean): void {
    this.box.classList.toggle("pointable", on);
  }

  /** A draft of before, by its id: without what is told with the report alone. */
  restore(draft: Draft): void {
    this.clear();
    this.text = draft.report;
    this.draw(sentences(this.text), 0);
    this.box.removeAttribute("aria-busy");
    this.progress.textContent = `Written ${new Date(draft.made).toLocaleString()}: ${this.shown.length} sentences.`;
    find("findings").replaceChildren(...draft.findings.map(chip));
    if (draft.scan) showFacts(draft.scan);
  }

  /** The stream was broken off; what came of it stays. */
  stop(): void {
    this.box.removeAttribute("aria-busy");
    this.progress.textContent = "Not finished.";
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
    this.select(this.selectedIndex < 0 ? 0 : this.selectedIndex + by);
    this.selected?.element.focus();
  }

  /** Draws the sentences anew from number `from` on. */
  private draw(found: Sentence[], from: number): void {
    const first = Math.max(0, from);
    for (const { gap, element } of this.shown.splice(first)) {
      gap.remove();
      element.remove();
    }
    for (const [i, sentence] of found.entries()) if (i >= first) this.add(sentence, i);
    const end = this.shown.at(-1)?.end ?? 0;
    find("rest").textContent = this.text.slice(end);
  }

  private add(sentence: Sentence, index: number): void {
    const before = this.text.slice(this.shown.at(-1)?.end ?? 0, sentence.start);
    const gap = make("span", { class: "gap" });
    const heading = HEADING.exec(before);
    if (heading) {
      const newLine = index > 0 && !before.includes("\n") ? "\n" : "";
      gap.append(before.slice(0, heading.index), newLine, make("b", {}, heading[0]));
    } else gap.append(before);
    const element = make("span", { class: "sentence", "aria-selected": "false" }, sentence.text);
    element.setAttribute("role", "option");
    element.tabIndex = index === 0 ? 0 : -1;
    element.addEventListener("mouseenter", () => this.onHover(this.shown[index] ?? null));
    element.addEventListener("mouseleave", () => this.onHover(null));
    element.addEventListener("click", () => this.select(index));
    find("rest").before(gap, element);
    this.shown.push({ ...sentence, gap, element });
  }
}

function chip({ name, side, place, size_mm }: Finding): HTMLElement {
  const more = [side, place, size_mm ? `${Math.round(size_mm)} mm` : null].filter(Boolean).join(", ");
  return make("li", {}, name, ...(more ? [make("span", {}, more)] : []));
}

/** Findings of 5 % and more, the likeliest first. */
function likely(probabilities: Record<string, number>): string {
  const found = Object.entries(probabilities).filter(([, p]) => p >= 0.05).sort(([, a], [, b]) => b - a);
  return found.map(([name, p]) => `${name} ${Math.round(100 * p)} %`).join(", ") || "no finding of 5 % or more";
}

function showFacts(scan: ScanFacts, report?: Report): void {
  const facts: [string, string][] = [];
  const numbers = (values: number[], digits: number) => values.map((v) => v.toFixed(digits)).join(" × ");
  facts.push(["Scan", `${numbers(scan.shape, 0)} voxels of ${numbers(scan.spacing, 2)} mm, ${scan.format}`]);
  facts.push(["Orientation", scan.orientation]);
  if (scan.warnings.length) facts.push(["Warnings", scan.warnings.map((w) => w.replaceAll("_", " ")).join(", ")]);
  if (report) {
    const { model, spec, seconds } = report;
    facts.push(["Model", [model.id, model.stage, model.checkpoint].filter(Boolean).join(", ")]);
    const far = report.familiarity;
    const told = far ? `farther from the training scans than ${far.percentile} % of them` : "not known for this model";
    facts.push(["Familiarity", told]);
    const probabilities = report.finding_probabilities;
    if (probabilities) facts.push(["Diagnostic prior", likely(probabilities)]);
    facts.push(["Preprocessing", `${spec.name} ${spec.hash}`]);
    facts.push(["Seconds", Object.entries(seconds).map(([step, s]) => `${step} ${s.toFixed(2)}`).join(", ")]);
  }
  find("facts").replaceChildren(...facts.flatMap(([k, v]) => [make("dt", {}, k), make("dd", {}, v)]));
}
