/** The keyboard: one table that binds the keys and writes the help. */

import { find, make } from "./dom";

export interface Binding {
  /** As KeyboardEvent.key tells it, letters in lower case. */
  key: string;
  does: string;
  run: () => void;
  /** Also while the user types, with Ctrl or Cmd held. */
  withControl?: boolean;
}

const NAMES: Record<string, string> = {
  ArrowUp: "↑",
  ArrowDown: "↓",
  ArrowLeft: "←",
  ArrowRight: "→",
  PageUp: "Page ↑",
  PageDown: "Page ↓",
  Enter: "⏎",
  Escape: "Esc",
  " ": "Space",
};

const OFF = "mu2llm-keys-off"; // how this browser's user works; nothing of a scan

/** Whether keys that type a character are shortcuts: who dictates, or hits keys by accident, turns them off. */
let single = localStorage.getItem(OFF) === null;

function setSingle(on: boolean): void {
  single = on;
  if (on) localStorage.removeItem(OFF);
  else localStorage.setItem(OFF, "1");
  document.body.classList.toggle("no-keys", !on);
}

export function bindKeys(bindings: Binding[]): void {
  const box = find<HTMLInputElement>("single-keys");
  box.checked = single;
  box.addEventListener("change", () => setSingle(box.checked));
  setSingle(single);
  // before anyone else, because NiiVue binds letters and arrows on its canvas
  document.addEventListener("keydown", (event) => dispatch(event, bindings), { capture: true });
  find("bindings").append(
    ...bindings.map(({ key, does, withControl }) => {
      const shown = `${withControl ? "Ctrl " : ""}${NAMES[key] ?? key.toUpperCase()}`;
      return make("div", {}, make("dt", {}, make("kbd", {}, shown)), make("dd", {}, does));
    }),
  );
}

function dispatch(event: KeyboardEvent, bindings: Binding[]): void {
  const target = event.target as HTMLElement;
  const control = event.ctrlKey || event.metaKey;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const binding = bindings.find((one) => one.key === key && Boolean(one.withControl) === control);
  const open = document.querySelector("dialog[open]");
  const typing = target.matches("textarea, select, input:not([type=range], [type=checkbox])");
  if (target instanceof HTMLCanvasElement && key !== "Tab") event.stopPropagation();
  if (!binding || open || event.altKey) return;
  if (key.length === 1 && !control && !single) return;
  if (key === " " && target.matches("button, summary, [role=tab]")) return; // it presses those
  if (typing && !control && key !== "Escape") return;
  // arrows belong to the control that has the focus, where it has a use for them
  if (target.matches("[role=tab], input[type=range]") && key.startsWith("Arrow")) return;
  event.preventDefault();
  event.stopPropagation();
  binding.run();
}
