/** The report in the radiologist's hands: edit it, see what changed, save it as a correction. */

import { diffWordsWithSpace } from "diff";
import { saveCorrection, type Report } from "./api";
import { find, make } from "./dom";

export class EditPane {
  private report: Pick<Report, "id" | "report"> | null = null;
  /** What the service has. */
  private stored = "";
  private readonly draft = find<HTMLTextAreaElement>("draft");
  private readonly save = find<HTMLButtonElement>("save");
  private readonly revert = find<HTMLButtonElement>("revert");
  private readonly status = find("saved");
  onProblem: (error: unknown) => void = () => {};
  /** The text is another, by whatever hand, or is saved. */
  onChange: () => void = () => {};
  onRevert: () => void = () => {};

  constructor() {
    this.draft.addEventListener("input", () => this.update());
    this.save.addEventListener("click", () => void this.submit());
    this.revert.addEventListener("click", () => {
      this.onRevert();
      this.text = this.report?.report ?? "";
      this.draft.focus();
    });
  }

  get text(): string {
    return this.draft.value;
  }

  set text(text: string) {
    this.draft.value = text;
    this.update();
  }

  get isEdited(): boolean {
    return this.report !== null && this.text !== this.report.report;
  }

  /** Whether leaving now would lose what the user wrote. */
  get isUnsaved(): boolean {
    return this.report !== null && this.text !== this.stored;
  }

  /** `edited` is what was saved before, `unsaved` what was not. */
  load(report: Pick<Report, "id" | "report"> | null, edited?: string | null, unsaved?: string): void {
    this.report = report;
    this.stored = edited ?? report?.report ?? "";
    this.draft.disabled = report === null;
    this.draft.readOnly = false;
    this.text = unsaved ?? this.stored;
  }

  /** It is decided. */
  close(): void {
    this.draft.readOnly = true;
    this.update();
  }

  focus(): void {
    this.draft.focus();
  }

  /** Whether the service has the text now. */
  async submit(): Promise<boolean> {
    if (!this.report || !this.isUnsaved || this.save.disabled) return !this.isUnsaved;
    const edited = this.text;
    this.save.disabled = true;
    this.status.textContent = "saving…";
    let done = "";
    try {
      const pair = await saveCorrection(this.report.id, edited);
      this.stored = edited;
      done = pair ? "Saved" : "Saved: the words are those of the draft";
    } catch (error) {
      this.onProblem(error);
    }
    this.update();
    this.status.textContent = done;
    return done !== "";
  }

  private update(): void {
    const parts = diffWordsWithSpace(this.report?.report ?? "", this.text);
    const words = (kind: "added" | "removed") =>
      parts.filter((part) => part[kind]).reduce((n, part) => n + (part.value.match(/\S+/g)?.length ?? 0), 0);
    find("diff").replaceChildren(
      ...parts.map(({ added, removed, value }) => (added ? make("ins", {}, value) : removed ? make("del", {}, value) : value)),
    );
    find("changes").textContent = this.isEdited ? `${words("added")} words in, ${words("removed")} out` : "none";
    this.save.disabled = !this.isUnsaved || !this.text.trim() || this.draft.readOnly;
    this.revert.disabled = !this.isEdited || this.draft.readOnly;
    this.status.textContent = "";
    this.onChange();
  }
}
