/** The service's HTTP API as this page uses it. */

import { createParser } from "eventsource-parser";

export interface Finding {
  name: string;
  side?: string | null;
  place?: string | null;
  size_mm?: number | null;
}

/** The scan as the model read it; of several series, the first one's. */
export interface ScanFacts {
  /** Of its HU, rounded to int16 (voxels.ts). */
  sha256: string;
  /** How many series the report is about. */
  series: number;
  /** Of the SeriesInstanceUID that was read; null where there is none. */
  series_uid_sha256: string | null;
  shape: number[];
  spacing: number[];
  orientation: string;
  warnings: string[];
  format: string;
}

export interface ModelFacts {
  id: string;
  stage: string;
  checkpoint: string;
}

/** What one sentence depended on in the scan; `start` and `end` count characters of the report as it was generated. */
export interface SentenceInfluence {
  text: string;
  start: number;
  end: number;
  /** By how much its log-probability falls where the region that it hangs on most is taken away, in nats. */
  drop: number;
  /** The same of random regions of its size, on the mean. */
  random: number;
  /** The region; null where random ones cost as much. */
  nifti: string | null;
}

export interface Report {
  id: string;
  report: string;
  findings: Finding[];
  model: ModelFacts;
  spec: { name: string; hash: string };
  scan: ScanFacts;
  /** False where the length limit cut the report off. */
  finished: boolean;
  seconds: Record<string, number>;
  /** How unlike the training scans this one is; null where the checkpoint keeps nothing of them. */
  familiarity?: { percentile: number; unlike: boolean } | null;
  /** How likely each finding is by the model's diagnostic prior; null where it has none. */
  finding_probabilities?: Record<string, number> | null;
}

/** A report by its id, and what became of it. */
export interface Draft {
  id: string;
  state: "generated" | "edited" | "accepted" | "rejected";
  report: string;
  edited: string | null;
  question: string;
  made: string;
  changed: string | null;
  changed_by: string;
  findings: Finding[];
  model: ModelFacts | null;
  scan: ScanFacts | null;
}

/** One judgement of GREEN: counts of the error categories a to f, and what the judge named by category. */
export interface Judgement {
  valid: boolean;
  score: number | null;
  significant: number[];
  insignificant: number[];
  matched: number;
  why: string;
  judge: string;
  sentences: {
    significant: Record<string, string[]>;
    insignificant: Record<string, string[]>;
    matched: string[];
  };
}

export interface Sample {
  id: string;
  name: string;
  description: string;
  /** Its true report. */
  reference: string;
}

/** An answer that is no success, as problem+json tells it. */
export class Problem extends Error {
  constructor(
    readonly status: number,
    readonly code: string,
    readonly title: string,
    readonly detail: string,
    /** Whether a reader may overrule the service, by its code. */
    readonly acceptable = false,
  ) {
    super(detail || title);
  }
}

const KEY = "mu2llm-key";

/** The address that `mu2llm serve` prints ends in the token, behind # so that it is sent to nobody. */
function takeToken(): void {
  const given = new URLSearchParams(location.hash.slice(1));
  const token = given.get("token");
  if (!token) return;
  sessionStorage.setItem(KEY, token);
  given.delete("token");
  history.replaceState(null, "", `#${given}`);
}
takeToken();

let askForKey: (reason: string) => Promise<string | null> = async () => null;

/** `ask` is called on 401 with what the service said; it answers the key, or null to give up. */
export function onUnauthorized(ask: typeof askForKey): void {
  askForKey = ask;
}

async function request(path: string, init: RequestInit = {}): Promise<Response> {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = new Headers(init.headers);
    if (key) headers.set("Authorization", `Bearer ${key}`);
    const response = await send(path, { ...init, headers });
    if (response.ok) return response;
    const problem = await readProblem(response);
    if (response.status !== 401) throw problem;
    const given = await askForKey(key ? `${problem.message} (the key given before was refused)` : problem.message);
    if (!given) throw problem;
    sessionStorage.setItem(KEY, given);
  }
}

async function send(path: string, init: RequestInit): Promise<Response> {
  try {
    return await fetch(path, init);
  } catch (error) {
    if (error instanceof DOMException && error.name === "AbortError") throw error;
    throw new Problem(0, "unreachable", "The service does not answer", "Is it running? Try again in a moment.");
  }
}

async function readProblem(response: Response): Promise<Problem> {
  const text = await response.text();
  try {
    return asProblem(JSON.parse(text), response.status);
  } catch {
    return new Problem(response.status, "", response.statusText || `HTTP ${response.status}`, text.slice(0, 300));
  }
}

function asProblem(body: Record<string, unknown>, status = 0): Problem {
  const word = (name: string) => (typeof body[name] === "string" ? body[name] : "");
  const told = typeof body.status === "number" ? body.status : status;
  return new Problem(told, word("code"), word("title") || "The service refused", word("detail"), body.acceptable === true);
}

async function json<T>(path: string, init: RequestInit = {}): Promise<T> {
  return (await (await request(path, init)).json()) as T;
}

function post(body: unknown): RequestInit & { headers: Record<string, string> } {
  return { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
}

/** Whether a report can be written now and by which model, or why not yet; needs no key. */
export async function readiness(): Promise<{ ready: boolean; why: string; model: ModelFacts | null }> {
  return (await (await fetch("readyz")).json()) as { ready: boolean; why: string; model: ModelFacts | null };
}

export const samples = () => json<Sample[]>("v1/samples");

export async function sample(id: string): Promise<File> {
  const response = await request(`v1/samples/${encodeURIComponent(id)}`);
  const blob = await response.blob();
  const magic = new Uint8Array(await blob.slice(0, 2).arrayBuffer());
  const packed = magic[0] === 0x1f && magic[1] === 0x8b;
  return new File([blob], `${id}.nii${packed ? ".gz" : ""}`);
}

export interface Asked {
  question: string;
  region: string;
  /** Reason codes for which the service refused the scan and which the user lets pass. */
  accept: string[];
}

export interface Listener {
  scan: (facts: ScanFacts) => void;
  token: (text: string) => void;
}

/** Sends a scan (one file, or the files of DICOM series), once: the id that names it for a while. */
export async function sendScan(files: File[]): Promise<string> {
  const form = new FormData();
  for (const [i, file] of files.entries()) form.append("scan", file, `scan-${i}`); // their names may name the patient
  return (await json<{ id: string }>("v1/scans", { method: "POST", body: form })).id;
}

/** A scan that was sent, as it was sent. */
export async function sentScan(id: string): Promise<File> {
  return new File([await (await request(`v1/scans/${encodeURIComponent(id)}`)).blob()], "");
}

export async function deleteScan(id: string): Promise<void> {
  await request(`v1/scans/${encodeURIComponent(id)}`, { method: "DELETE" });
}

/** Streams the report of a scan that was sent: `listener` hears it grow; the complete answer is returned. */
export async function writeReport(
  scan: string,
  { question, region, accept }: Asked,
  listener: Listener,
  signal: AbortSignal,
): Promise<Report> {
  const asked = { scan, accept, question: question || null, region: region || null, stream: true };
  const { headers, ...body } = post(asked);
  const response = await request("v1/reports", { ...body, headers: { ...headers, Accept: "text/event-stream" }, signal });
  return readEvents(response, listener);
}

async function readEvents(response: Response, listener: Listener): Promise<Report> {
  let report: Report | null = null;
  const parser = createParser({
    onEvent({ event, data }) {
      if (event === "scan") listener.scan(JSON.parse(data) as ScanFacts);
      else if (event === "token") listener.token((JSON.parse(data) as { text: string }).text);
      else if (event === "report") report = JSON.parse(data) as Report;
      else if (event === "error") throw asProblem(JSON.parse(data) as Record<string, unknown>);
    },
  });
  if (!response.body) throw new Problem(0, "no_body", "The answer is empty", "");
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (let part = await reader.read(); !part.done; part = await reader.read()) parser.feed(part.value);
  } finally {
    reader.releaseLock();
  }
  if (!report) throw new Problem(0, "incomplete", "The report broke off", "The stream ended early; write it again.");
  return report;
}

export async function green(reference: string, candidate: string): Promise<Judgement> {
  const answer = await json<{ results: Judgement[] }>("v1/green", post({ pairs: [{ reference, candidate }] }));
  const judgement = answer.results[0];
  if (!judgement) throw new Problem(0, "incomplete", "The judge gave no answer", "");
  return judgement;
}

/** Whether there was anything to prefer: a correction that changes only white space is none. */
export async function saveCorrection(id: string, edited: string): Promise<boolean> {
  return (await json<{ pair: boolean }>("v1/corrections", post({ id, edited }))).pair;
}

export const draft = (id: string) => json<Draft>(`v1/drafts/${encodeURIComponent(id)}`);

/** What each sentence of a draft depended on, of the scan that it was made of. */
export async function influence(draft: string, scan: string, accept: string[]): Promise<SentenceInfluence[]> {
  const path = `v1/drafts/${encodeURIComponent(draft)}/influence`;
  return (await json<{ sentences: SentenceInfluence[] }>(path, post({ scan, accept }))).sentences;
}

/** What is decided stays so. */
export const decide = (id: string, decision: "accepted" | "rejected") =>
  json<Draft>("v1/decisions", post({ id, decision }));
