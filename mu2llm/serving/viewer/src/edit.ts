/** The report in the radiologist's hands: edit it, see what changed, save it as a correction. */

import { diffWordsWithSpace } from "diff";
import { saveCorrection, type Report } from "./api";
import { find, make } from "./dom";

export class EditPane {
  private report: Report | null = null;
  private saved = "";
  private readonly draft = find<HTMLTextAreaElement>("draft");
  private readonly save = find<HTMLButtonElement>("save");
  private readonly revert = find<HTMLButtonElement>("revert");
  private readonly status = find("saved");
  onProblem: (error: unknown) => void = () => {};

  constructor() {
    this.draft.addEventListener("input", () => this.update());
    this.save.addEventListener("click", () => void this.submit());
    this.revert.addEventListener("click", () => {
      this.draft.value = this.report?.report ?? "";
      this.update();
      this.draft.focus();
    });
  }

  get text(): string {
    return this.draft.value;
  }

  get isEdited(): boolean {
    return this.report !== null && this.text !== this.report.report;
  }

  /** Whether leaving now would lose what the user wrote. */
  get isUnsaved(): boolean {
    return this.isEdited && this.text !== this.saved;
  }

  load(report: Report | null): void {
    this.report = report;
    this.saved = "";
    this.draft.value = report?.report ?? "";
    this.draft.disabled = report === null;
    this.update();
  }

  focus(): void {
    this.draft.focus();
  }

  async submit(): Promise<void> {
    if (!this.report || !this.isUnsaved || this.save.disabled) return;
    const edited = this.text;
    this.save.disabled = true;
    this.status.textContent = "saving…";
    let done = "";
    try {
      const stored = await saveCorrection(this.report.id, edited);
      this.saved = edited;
      done = stored ? "Saved" : "Nothing to save: only white space differs";
    } catch (error) {
      this.onProblem(error);
    }
    this.update();
    this.status.textContent = done;
  }

  private update(): void {
    const parts = diffWordsWithSpace(this.report?.report ?? "", this.text);
    const words = (kind: "added" | "removed") =>
      parts.filter((part) => part[kind]).reduce((n, part) => n + (part.value.match(/\S+/g)?.length ?? 0), 0);
    find("diff").replaceChildren(
      ...parts.map(({ added, removed, value }) => (added ? make("ins", {}, value) : removed ? make("del", {}, value) : value)),
    );
    find("changes").textContent = this.isEdited ? `${words("added")} words in, ${words("removed")} out` : "none";
    this.save.disabled = !this.isUnsaved || !this.text.trim();
    this.revert.disabled = !this.isEdited;
    this.status.textContent = "";
  }
}
