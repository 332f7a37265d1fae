/** The three tabs beside the picture. */

import { find } from "./dom";

const TABS = ["report", "edit", "compare"] as const;
export type Tab = (typeof TABS)[number];

export class Tabs {
  /** Called when a tab is brought up, to put the focus where its work begins. */
  onShow: (tab: Tab) => void = () => {};

  constructor() {
    for (const name of TABS) find(`tab-${name}`).addEventListener("click", () => this.show(name));
    find("tabs").addEventListener("keydown", (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (by) this.step(by);
    });
  }

  get current(): Tab {
    return TABS.find((name) => !find(`panel-${name}`).hidden) ?? "report";
  }

  show(shown: Tab): void {
    for (const name of TABS) {
      const tab = find(`tab-${name}`);
      tab.setAttribute("aria-selected", String(name === shown));
      tab.tabIndex = name === shown ? 0 : -1;
      find(`panel-${name}`).hidden = name !== shown;
    }
    this.onShow(shown);
  }

  private step(by: number): void {
    const next = TABS[(TABS.indexOf(this.current) + by + TABS.length) % TABS.length] ?? "report";
    this.show(next);
    find(`tab-${next}`).focus();
  }
}
