/** What a reload finds again. Behind # in the address, which is sent to nobody: the ids of draft and scan. In this tab's
 * storage, which ends with the tab: what the radiologist wrote and has not saved. */

export interface Place {
  draft: string | null;
  scan: string | null;
}

/** Words that the service does not have yet. */
export interface Unsaved {
  draft: string;
  text: string;
  /** review.ts */
  marks: (string | null)[];
  prior: string;
}

const UNSAVED = "mu2llm-unsaved";

export function place(): Place {
  const told = new URLSearchParams(location.hash.slice(1));
  return { draft: told.get("draft"), scan: told.get("scan") };
}

export function setPlace({ draft, scan }: Place): void {
  const told = new URLSearchParams();
  if (draft) told.set("draft", draft);
  if (scan) told.set("scan", scan);
  history.replaceState(null, "", `#${told}`);
}

/** Null where nothing was written about this draft. */
export function unsaved(draft: string): Unsaved | null {
  const kept = JSON.parse(sessionStorage.getItem(UNSAVED) ?? "null") as Unsaved | null;
  return kept?.draft === draft ? kept : null;
}

export function keepUnsaved(kept: Unsaved | null): void {
  if (kept) sessionStorage.setItem(UNSAVED, JSON.stringify(kept));
  else sessionStorage.removeItem(UNSAVED);
}
