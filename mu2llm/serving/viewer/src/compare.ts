/** The draft beside a reference report: GREEN's errors and matches, marked in both texts. */

import { green, type Judgement } from "./api";
import { find, make } from "./dom";
import { sentences, type Sentence } from "./sentences";

/** GREEN's six kinds of error, and in which of the two texts each one stands. */
const CATEGORIES = [
  { letter: "a", name: "False finding", reference: false, candidate: true },
  { letter: "b", name: "Missing finding", reference: true, candidate: false },
  { letter: "c", name: "Wrong location", reference: true, candidate: true },
  { letter: "d", name: "Wrong severity", reference: true, candidate: true },
  { letter: "e", name: "Comparison that the reference has not", reference: false, candidate: true },
  { letter: "f", name: "Comparison left out", reference: true, candidate: false },
] as const;

interface Remark {
  kind: "match" | "significant" | "insignificant";
  letter: string;
  title: string;
  /** What the judge named, and what to look for in each text (null: it does not stand there). */
  sentence: string;
  reference: string | null;
  candidate: string | null;
}

export class ComparePane {
  private readonly reference = find<HTMLTextAreaElement>("reference");
  private readonly button = find<HTMLButtonElement>("compare");
  private readonly result = find("judgement");
  /** The text to judge and what it is called. */
  candidate: () => { text: string; name: string } = () => ({ text: "", name: "" });
  onProblem: (error: unknown) => void = () => {};

  constructor() {
    this.button.addEventListener("click", () => void this.submit());
  }

  clear(): void {
    this.result.replaceChildren();
  }

  /** A reference that came with the scan. */
  load(reference: string): void {
    this.reference.value = reference;
  }

  focus(): void {
    find("candidate").textContent = this.candidate().text ? `against ${this.candidate().name}` : "";
    this.reference.focus();
  }

  async submit(): Promise<void> {
    const { text, name } = this.candidate();
    if (this.button.disabled) return;
    if (!text.trim() || !this.reference.value.trim()) {
      this.result.replaceChildren(
        make("p", { class: "quiet" }, text.trim() ? "Paste the reference first." : "There is no report to compare yet."),
      );
      return;
    }
    this.button.disabled = true;
    this.result.replaceChildren(make("p", { class: "quiet" }, "The judge reads…"));
    try {
      this.show(this.reference.value, text, name, await green(this.reference.value, text));
    } catch (error) {
      this.result.replaceChildren();
      this.onProblem(error);
    } finally {
      this.button.disabled = false;
    }
  }

  private show(reference: string, candidate: string, name: string, judgement: Judgement): void {
    const remarks = remarksOf(judgement);
    this.result.replaceChildren(
      verdict(judgement),
      make(
        "div",
        { class: "pair" },
        ...[
          { title: "Reference", text: reference, side: "reference" as const },
          { title: name[0]?.toUpperCase() + name.slice(1), text: candidate, side: "candidate" as const },
        ].map(({ title, text, side }) =>
          make("section", { "aria-label": title }, make("h3", {}, title), marked(text, remarks, side)),
        ),
      ),
      list(remarks),
    );
  }
}

function verdict({ valid, score, matched, significant, insignificant, why, judge }: Judgement): HTMLElement {
  const sum = (counts: number[]) => counts.reduce((a, b) => a + b, 0);
  const by = make("span", { class: "quiet" }, `judge ${judge}`);
  if (!valid || score === null) {
    return make("p", { class: "verdict" }, make("strong", {}, "No score"), ` ${why || "the judge gave none"} `, by);
  }
  return make(
    "p",
    { class: "verdict" },
    make("strong", {}, `GREEN ${score.toFixed(2)}`),
    ` ${matched} matched, ${sum(significant)} significant and ${sum(insignificant)} insignificant errors `,
    by,
  );
}

function remarksOf({ sentences: named }: Judgement): Remark[] {
  const matches = named.matched.map((sentence) => ({
    kind: "match" as const,
    letter: "✓",
    title: "Matched",
    sentence,
    reference: sentence,
    candidate: sentence,
  }));
  const errors = (kind: "significant" | "insignificant") =>
    CATEGORIES.flatMap((category) =>
      (named[kind][category.letter] ?? []).map((sentence) => {
        // of a wrong finding the rules say both: "theirs instead of ours"
        const [theirs, ours] = sentence.split(" instead of ");
        return {
          kind,
          letter: category.letter,
          title: `${category.name}${kind === "insignificant" ? " (insignificant)" : ""}`,
          sentence,
          reference: category.reference || ours ? (ours ?? sentence) : null,
          candidate: category.candidate || ours ? (theirs ?? sentence) : null,
        };
      }),
    );
  return [
    ...errors("significant"),
    ...errors("insignificant"),
    ...matches,
  ];
}

/** The text with the sentences that the judge named marked by kind and letter. */
function marked(text: string, remarks: Remark[], side: "reference" | "candidate"): HTMLElement {
  const parts = sentences(text);
  const named = new Map<Sentence, Remark[]>();
  for (const remark of remarks) {
    const sentence = remark[side] === null ? null : closest(remark[side], parts);
    if (sentence) named.set(sentence, [...(named.get(sentence) ?? []), remark]);
  }
  const box = make("div", { class: "text" });
  let end = 0;
  for (const part of parts) {
    box.append(text.slice(end, part.start), mark(part, named.get(part) ?? []));
    end = part.end;
  }
  return box;
}

function mark(sentence: Sentence, remarks: Remark[]): Node | string {
  const [first] = remarks;
  if (!first) return sentence.text;
  const title = remarks.map((remark) => `${remark.title}: ${remark.sentence}`).join("\n");
  const letters = [...new Set(remarks.map((remark) => remark.letter))].join("");
  return make("mark", { class: first.kind, title }, sentence.text, make("sup", {}, letters));
}

/** The sentence that holds these words, or most of them (the rules name findings in words of their own). */
function closest(named: string, parts: Sentence[]): Sentence | null {
  const plain = (text: string) => text.toLowerCase().replace(/\s+/g, " ").replace(/[\s.]+$/, "").trim();
  const exact = parts.find((part) => plain(part.text).includes(plain(named)));
  if (exact) return exact;
  const words = (text: string) => new Set(plain(text).match(/[\p{L}\d.]+/gu)?.map((word) => word.replace(/s$|\.$/, "")));
  const wanted = words(named);
  let best: { part: Sentence; share: number } | null = null;
  for (const part of parts) {
    const there = words(part.text);
    const share = [...wanted].filter((word) => there.has(word)).length / wanted.size;
    if (share >= 0.5 && share > (best?.share ?? 0)) best = { part, share };
  }
  return best?.part ?? null;
}

function list(remarks: Remark[]): HTMLElement {
  return make(
    "ul",
    { class: "remarks" },
    ...remarks.map(({ kind, letter, title, sentence }) =>
      make("li", { class: kind }, make("b", {}, letter), make("span", { class: "quiet" }, title), ` ${sentence}`),
    ),
  );
}
