/** The scan that is open, as a picture: the series that the model read, whose it is, and whether it is the same. */

import type { NVImage } from "@niivue/niivue";
import { sendScan, type ScanFacts } from "./api";
import type { Controls } from "./controls";
import { message } from "./dialogs";
import { find, make } from "./dom";
import { seriesIn, seriesRead, volumesOf, type Series } from "./scan";
import type { View } from "./view";
import { digestOfVoxels } from "./voxels";

/** What was dropped, sent once. */
export class Opened {
  readonly series: Promise<Series[]>;
  /** Its id, on the way or there; null where it could not be sent. */
  sent: Promise<string> | null = null;

  constructor(
    readonly files: File[],
    id?: string,
  ) {
    this.series = seriesIn(files);
    this.series.catch(() => {}); // it is told where the picture is made
    if (id) this.sent = Promise.resolve(id);
    else void this.send();
  }

  /** Under which the service keeps it; where it could not be sent, it is sent again. */
  id(): Promise<string> {
    return this.sent ?? this.send();
  }

  /** Again, when the service no longer has it. */
  send(): Promise<string> {
    const own = (this.sent = sendScan(this.files));
    own.catch(() => {
      if (this.sent === own) this.sent = null; // why is told to who asked for the id
    });
    return own;
  }
}

/** Set right by the service, so that the picture's own voxels are others. */
const RESAMPLED: Record<string, string> = {
  tilt_resampled: "it was straightened",
  gap_resampled: "slices were interpolated",
};

export class Picture {
  private opened: Opened | null = null;
  private shown: Series | null = null;
  private volumes: File[] = [];
  private image: NVImage | null = null;
  /** What the picture was last compared with. */
  private compared = "";
  private work: Promise<void> = Promise.resolve();
  view: View | null = null;

  constructor(
    private readonly canvas: HTMLCanvasElement,
    private readonly controls: Controls,
  ) {}

  /** Never an old picture beside a new report. What of several series the model reads is shown when that is known. */
  open(opened: Opened): void {
    this.opened = opened;
    [this.shown, this.image, this.volumes] = [null, null, []];
    this.view?.clear();
    find("whose").hidden = true;
    this.note("reading the scan…");
    this.later(opened, async () => {
      const all = await opened.series;
      if (all.length === 1) await this.show(opened, all, all[0]!);
      else this.note(`${all.length} series; the one that the model reads comes here as soon as it is known.`);
    });
  }

  /** What the model read; null where it read nothing. */
  read(facts: ScanFacts | null): void {
    const opened = this.opened;
    if (!opened) return;
    this.later(opened, async () => {
      const all = await opened.series;
      const read = facts ? seriesRead(all, facts.series_uid_sha256) : (this.shown ?? seriesRead(all, null));
      if (!isSame(read, this.shown)) await this.show(opened, all, read);
      if (facts) await this.compare(opened, facts);
    });
  }

  note(text: string): void {
    find("picture-note").textContent = text;
    find("picture-note").hidden = text === "";
  }

  /** One after the other, and nothing any more for a scan that another has replaced. */
  private later(opened: Opened, run: () => Promise<void>): void {
    this.work = this.work.then(async () => {
      if (opened !== this.opened) return;
      try {
        await run();
      } catch (error) {
        if (opened !== this.opened) return;
        this.canvas.setAttribute("aria-label", "The scan cannot be shown");
        this.note(`No picture: ${message(error)}. The report is written all the same.`);
      }
    });
  }

  private async show(opened: Opened, all: Series[], series: Series): Promise<void> {
    [this.shown, this.compared] = [series, ""];
    showWhose(all, series);
    if (!this.view) throw new Error("this browser has no WebGL 2");
    this.volumes = await volumesOf(series);
    await this.display(opened, this.volumes[0]!);
  }

  private async display(opened: Opened, file: File): Promise<void> {
    const image = await this.view!.load(file);
    if (opened !== this.opened) return;
    this.view!.show(image, this.controls.window);
    this.image = image;
    this.canvas.setAttribute("aria-label", "CT scan: axial, coronal, sagittal and 3-D");
    this.note("");
  }

  /** A series may hold several volumes: the one with the voxels that were read is shown. */
  private async compare(opened: Opened, facts: ScanFacts): Promise<void> {
    if (!this.image || opened !== this.opened || facts.sha256 === this.compared) return;
    this.compared = facts.sha256;
    showVerdict("comparing with what the model read…", "");
    if ((await digestOfVoxels(this.image)) === facts.sha256) return showSame(facts);
    for (const file of this.volumes.slice(1)) {
      if ((await digestOfVoxels(await this.view!.load(file))) !== facts.sha256) continue;
      await this.display(opened, file);
      return showSame(facts);
    }
    if (opened !== this.opened) return;
    const why = facts.warnings.map((code) => RESAMPLED[code]).filter(Boolean).join(", ");
    showVerdict(`not voxel by voxel what the model read${why ? `, for which ${why}` : ""}`, "differs");
  }
}

function isSame(one: Series, other: Series | null): boolean {
  return one.files.length === other?.files.length && one.files[0] === other.files[0];
}

function showSame({ series }: ScanFacts): void {
  const more = series > 1 ? ` (the first of ${series} series)` : "";
  showVerdict(`voxel by voxel what the model read${more}`, "same");
}

function showVerdict(text: string, state: string): void {
  const verdict = find("same");
  verdict.textContent = text;
  verdict.dataset.state = state;
}

/** The banner: whose scan it is, by its own header. */
function showWhose(all: Series[], { header }: Series): void {
  const patients = new Set(all.map(({ header: each }) => `${each?.id} ${each?.patient}`));
  const parts: (Node | string)[] = [];
  if (header) {
    const told = (label: string, text: string) => (text ? [make("span", {}, `${label} ${text}`)] : []);
    parts.push(make("strong", {}, header.patient || "no name"));
    parts.push(...told("ID", header.id), ...told("born", header.born));
    parts.push(...told("study", [header.studied, header.study].filter(Boolean).join(" ")));
    parts.push(...told("series", [header.number, header.series].filter(Boolean).join(" ")));
    if (all.length > 1) parts.push(make("span", {}, `1 of ${all.length} series`));
    if (patients.size > 1) parts.push(make("em", {}, `files of ${patients.size} patients`));
  } else parts.push(make("span", {}, "The file does not say whose scan this is."));
  find("patient").replaceChildren(...parts);
  showVerdict("", "");
  find("whose").hidden = false;
}
