/** What goes wrong, said plainly, and the question for a key. */

import { Problem } from "./api";
import { find, make } from "./dom";

export function message(error: unknown): string {
  return (error instanceof Error ? error.message : String(error)).replace(/\.$/, "");
}

/** `overrule` is called with the reason's code when the user lets a refused scan pass. */
export function showProblem(error: unknown, overrule?: (code: string) => void): void {
  const box = find("problem");
  if (error instanceof Problem) {
    const code = [error.status || "", error.code].filter(Boolean).join(" ");
    box.replaceChildren(make("strong", {}, error.title), make("code", {}, code), make("p", {}, error.detail));
    if (overrule && error.acceptable) {
      const button = make("button", {}, "Read it all the same");
      button.addEventListener("click", () => overrule(error.code));
      box.append(button);
    }
  } else {
    box.replaceChildren(make("strong", {}, "Something went wrong"), make("p", {}, message(error)));
  }
  box.hidden = false;
}

export function hideProblem(): void {
  find("problem").hidden = true;
}

let asking: Promise<string | null> | null = null;

/** The key, or null where the user gave up. One dialog, however many requests were refused at once. */
export function askForKey(reason: string): Promise<string | null> {
  asking ??= new Promise<string | null>((resolve) => {
    const [dialog, field] = [find<HTMLDialogElement>("key"), find<HTMLInputElement>("key-value")];
    find("key-reason").textContent = reason;
    field.value = "";
    dialog.returnValue = "cancel";
    const done = () => {
      asking = null;
      resolve(dialog.returnValue === "use" ? field.value.trim() : null);
    };
    dialog.addEventListener("close", done, { once: true });
    dialog.showModal();
  });
  return asking;
}
