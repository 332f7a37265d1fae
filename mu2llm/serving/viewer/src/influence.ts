/** What the sentences of a draft depended on in its scan: asked for when somebody first points at one. */

import type { SentenceInfluence } from "./api";
import { utf16, type Sentence } from "./sentences";

export class Influence {
  private found: Promise<SentenceInfluence[]> | null = null;

  constructor(
    /** The report as it was generated. */
    private readonly text: string,
    private readonly ask: () => Promise<SentenceInfluence[]>,
  ) {}

  /** What the service tells of a sentence; null where that is nothing. What failed is asked again. */
  async of({ start, end }: Sentence): Promise<SentenceInfluence | null> {
    const own = (this.found ??= this.ask());
    try {
      return (await own).find((each) => this.at(each.start) < end && this.at(each.end) > start) ?? null;
    } catch (error) {
      if (this.found === own) this.found = null;
      throw error;
    }
  }

  private at(offset: number): number {
    return utf16(this.text, offset);
  }
}
