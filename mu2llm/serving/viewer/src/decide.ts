/** What becomes of the draft: accepted or rejected, once. */

import { decide, type Draft } from "./api";
import { find } from "./dom";

type State = Pick<Draft, "state" | "changed" | "changed_by">;

export class DecisionBar {
  private id = "";
  private state: State | null = null;
  private unsaved = false;
  private busy = false;
  private corrected = false;
  private readonly accept = find<HTMLButtonElement>("accept");
  private readonly reject = find<HTMLButtonElement>("reject");
  /** Saves what is not saved yet; whether that went well. */
  beforeAccept: () => Promise<boolean> = async () => true;
  onDecided: () => void = () => {};
  onProblem: (error: unknown) => void = () => {};

  constructor() {
    this.accept.addEventListener("click", () => void this.submit("accepted"));
    this.reject.addEventListener("click", () => {
      if (confirm("Reject this draft? What is decided stays so.")) void this.submit("rejected");
    });
  }

  load(id: string, state: State | null): void {
    [this.id, this.state] = [id, state];
    this.update(false, false);
  }

  get isDecided(): boolean {
    return this.state?.state === "accepted" || this.state?.state === "rejected";
  }

  /** `corrected`: the text is not as it was generated; `unsaved`: nor as the service has it. */
  update(corrected: boolean, unsaved: boolean): void {
    [this.corrected, this.unsaved] = [corrected, unsaved];
    const open = this.state !== null && !this.isDecided;
    find("decision").hidden = this.state === null;
    this.accept.disabled = this.reject.disabled = !open || this.busy;
    this.accept.textContent = unsaved ? "Save and accept" : corrected ? "Accept as corrected" : "Accept as it is";
    const { state = "", changed = null, changed_by: by = "" } = this.state ?? {};
    const when = changed && this.isDecided ? ` ${new Date(changed).toLocaleString()}${by && ` by ${by}`}` : "";
    find("state").textContent = this.state ? `Draft: ${state}${when}` : "";
  }

  private async submit(decision: "accepted" | "rejected"): Promise<void> {
    const id = this.id;
    this.busy = true;
    this.update(this.corrected, this.unsaved);
    try {
      if (decision === "accepted" && this.unsaved && !(await this.beforeAccept())) return;
      const told = await decide(id, decision);
      if (id !== this.id) return;
      this.state = told;
      this.onDecided();
    } catch (error) {
      this.onProblem(error);
    } finally {
      this.busy = false;
      if (id === this.id) this.update(this.corrected, this.unsaved);
    }
  }
}
