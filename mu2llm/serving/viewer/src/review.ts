/** The report sentence by sentence: each one kept, reworded or dropped. */

import { find } from "./dom";
import type { ReportPane } from "./report";

/** `kept`, `dropped`, or `=` and the words that stand instead. */
export type Mark = string | null;

export class Review {
  marks: Mark[] = [];
  private free = false;
  private closed = true;
  private readonly box = find("reword");
  private readonly words = find<HTMLTextAreaElement>("words");
  /** The report as the marks make it. */
  onChange: (text: string) => void = () => {};

  constructor(private readonly report: ReportPane) {
    find("keep").addEventListener("click", () => this.toggle("kept"));
    find("drop-sentence").addEventListener("click", () => this.toggle("dropped"));
    find("change").addEventListener("click", () => this.open());
    find("replace").addEventListener("click", () => this.replace());
    find("cancel").addEventListener("click", () => this.close());
  }

  /** Of a complete report; `marks` are of before a reload. */
  load(marks: Mark[] = []): void {
    this.marks = this.report.sentences.map((_, i) => marks[i] ?? null);
    [this.free, this.closed] = [false, false];
    this.draw();
  }

  clear(): void {
    [this.marks, this.closed] = [[], true];
    this.draw();
  }

  private get isOff(): boolean {
    return this.free || this.closed;
  }

  get isBegun(): boolean {
    return this.marks.some(Boolean);
  }

  /** The text was edited as a whole: where that is not what the marks make, they can be set no more. */
  compareWith(text: string, decided: boolean): void {
    this.free = text !== this.text;
    this.closed = decided;
    this.draw();
  }

  get text(): string {
    let [made, end, open] = ["", 0, false]; // open: the space before the next sentence is there
    for (const [i, { start, end: next, text }] of this.report.sentences.entries()) {
      const gap = this.report.whole.slice(end, start);
      const mark = this.marks[i];
      end = next;
      const lead = open ? (gap.trim() ? gap : "") : gap;
      if (open && gap.trim()) made = made.trimEnd();
      if (mark !== "dropped") {
        made += lead + (wordsOf(mark) ?? text);
        open = false;
      } else if (lead.trim()) {
        made += lead;
        open = true;
      } else open ||= made === "";
    }
    made += this.report.whole.slice(end);
    return this.marks.includes("dropped") ? made.trim() : made;
  }

  /** Of the selected sentence; then the next one is selected. */
  toggle(mark: "kept" | "dropped"): void {
    const at = this.report.selectedAt;
    if (at < 0 || this.isOff || find("panel-report").hidden) return;
    this.marks[at] = this.marks[at] === mark ? null : mark;
    this.changed();
    if (this.marks[at]) this.report.step(1);
  }

  /** A place to reword the selected sentence. */
  open(): void {
    const at = this.report.selectedAt;
    if (at < 0 || this.isOff || find("panel-report").hidden) return;
    this.words.value = wordsOf(this.marks[at]) ?? this.report.sentences[at]!.text;
    this.box.hidden = false;
    this.words.focus();
  }

  get isOpen(): boolean {
    return !this.box.hidden;
  }

  replace(): void {
    const at = this.report.selectedAt;
    const words = this.words.value.trim();
    if (at < 0 || !this.isOpen) return;
    if (!words) this.marks[at] = "dropped";
    else this.marks[at] = words === this.report.sentences[at]!.text ? "kept" : `=${words}`;
    this.close();
    this.changed();
  }

  close(): void {
    if (!this.isOpen) return;
    this.box.hidden = true;
    this.report.step(0);
  }

  selected(): void {
    this.box.hidden = true;
    this.draw();
  }

  private changed(): void {
    this.draw();
    this.onChange(this.text);
  }

  private draw(): void {
    for (const [i, mark] of this.marks.entries()) {
      const words = wordsOf(mark);
      this.report.mark(i, words === null ? mark : "edited", words);
    }
    find("sentence").hidden = this.closed || !this.marks.length;
    for (const id of ["keep", "change", "drop-sentence"]) {
      find<HTMLButtonElement>(id).disabled = this.isOff || this.report.selectedAt < 0;
    }
    const done = this.marks.filter(Boolean).length;
    find("reviewed").textContent = this.free
      ? "The text was edited as a whole; “Back to the draft” under Edit returns to its sentences."
      : `${done} of ${this.marks.length} sentences seen to`;
  }
}

function wordsOf(mark: Mark | undefined): string | null {
  return mark?.startsWith("=") ? mark.slice(1) : null;
}
