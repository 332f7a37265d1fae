/** A report → its sentences with their places in it, as the page shows and marks them. */

export interface Sentence {
  text: string;
  /** Offsets in JavaScript's UTF-16 units. */
  start: number;
  end: number;
}

// A stop ends a sentence where a space follows, but not within a number ("1. 5 cm") or an abbreviation
const BREAK = /(?<=[.!?]["”)\]]*)(?<!\b(?:dr|approx|e\.g|i\.e|vs|cf|fig)\.)\s+(?!\d)|\s*\n+\s*/gi;
export const HEADING = /(?:findings?|impressions?|conclusions?|results?|comparison|technique|history)\s*:\s*/i;
const LEADING_HEADING = new RegExp(`^${HEADING.source}`, "i");

/** Headings and the space between sentences belong to none. */
export function sentences(text: string): Sentence[] {
  const found: Sentence[] = [];
  const add = (from: number, end: number) => {
    const start = from + (LEADING_HEADING.exec(text.slice(from, end))?.[0].length ?? 0);
    if (text.slice(start, end).trim()) found.push({ text: text.slice(start, end), start, end });
  };
  let start = 0;
  for (const gap of text.matchAll(BREAK)) {
    add(start, gap.index);
    start = gap.index + gap[0].length;
  }
  add(start, text.length);
  return found;
}

/** Offsets that count characters (Python's way) → offsets in UTF-16 units. */
export function utf16(text: string, offset: number): number {
  return [...text].slice(0, offset).join("").length;
}
