/** What a user dropped → files to send, the series in them and, where this page can read them, volumes to show. */

import { unzip, type Unzipped } from "fflate";
import { headerOf, type Header } from "./dicom";
import { digestOfText } from "./voxels";

/** Calls `take` with the files of every drop on the page, and marks the page while something is over it. */
export function onDrop(take: (files: Promise<File[]>) => void): void {
  let depth = 0;
  const mark = (by: number) => document.body.classList.toggle("dropping", (depth += by) > 0);
  window.addEventListener("dragenter", () => mark(1));
  window.addEventListener("dragleave", () => mark(-1));
  window.addEventListener("dragover", (event) => event.preventDefault(), { capture: true });
  window.addEventListener(
    "drop",
    (event) => {
      event.preventDefault();
      mark(-depth);
      if (event.dataTransfer) take(droppedFiles(event.dataTransfer));
    },
    { capture: true },
  );
}

/** Those of dropped folders included. */
async function droppedFiles(transfer: DataTransfer): Promise<File[]> {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry()).filter((entry) => entry !== null);
  return entries.length ? (await Promise.all(entries.map(filesOf))).flat() : [...transfer.files];
}

async function filesOf(entry: FileSystemEntry): Promise<File[]> {
  if (entry.isFile) {
    return [await new Promise<File>((resolve, reject) => (entry as FileSystemFileEntry).file(resolve, reject))];
  }
  const reader = (entry as FileSystemDirectoryEntry).createReader();
  const files: File[] = [];
  for (;;) {
    const some = await new Promise<FileSystemEntry[]>((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) return files; // a directory is read a hundred entries at a time
    for (const child of some) files.push(...(await filesOf(child)));
  }
}

/** The files of one series; of no DICOM, the file. */
export interface Series {
  files: File[];
  isDicom: boolean;
  /** Of its first file; null where there is none. */
  header: Header | null;
}

/** The series in what was dropped. */
export async function seriesIn(scan: File[]): Promise<Series[]> {
  const [first] = scan;
  if (!first || scan.length > 1) return grouped(scan);
  const start = new Uint8Array(await first.slice(0, 132).arrayBuffer());
  if (start[0] === 0x50 && start[1] === 0x4b) return grouped(await unpacked(first));
  if (String.fromCharCode(...start.subarray(128, 132)) === "DICM") return grouped(scan);
  const named = new File(scan, `scan.${suffix(start)}`); // NiiVue chooses its reader by the name
  return [{ files: [named], isDicom: false, header: null }];
}

/** Images by their series; all files in one where no header can be read. */
async function grouped(files: File[]): Promise<Series[]> {
  const found = new Map<string, Series>();
  for (const file of files) {
    const header = headerOf(new Uint8Array(await file.arrayBuffer()));
    if (!header?.isImage) continue;
    const known = found.get(header.uid);
    if (known) known.files.push(file);
    else found.set(header.uid, { files: [file], isDicom: true, header });
  }
  return found.size ? [...found.values()] : [{ files, isDicom: true, header: null }];
}

/** The one that was read, by its UID's digest; without one, all of them together. */
export function seriesRead(all: Series[], digest: string | null): Series {
  const found = all.find(({ header }) => header && digestOfText(header.uid) === digest);
  const [first] = all;
  if (found || all.length === 1) return found ?? first!;
  return { files: all.flatMap(({ files }) => files), isDicom: first!.isDicom, header: first!.header };
}

function suffix(start: Uint8Array): string {
  const text = String.fromCharCode(...start);
  if (text.startsWith("NRRD")) return "nrrd";
  if (/^\s*(ObjectType|NDims|Comment)\s*=/.test(text)) return "mha";
  return start[0] === 0x1f && start[1] === 0x8b ? "nii.gz" : "nii";
}

async function unpacked(scan: File): Promise<File[]> {
  const bytes = new Uint8Array(await scan.arrayBuffer());
  const parts = await new Promise<Unzipped>((resolve, reject) =>
    unzip(bytes, (error, data) => (error ? reject(error) : resolve(data))),
  );
  return Object.values(parts)
    .filter((part) => part.length > 0)
    .map((part) => new File([part as Uint8Array<ArrayBuffer>], ""));
}

/** A series as NIfTI, MetaImage or NRRD, converted from DICOM in this page: what is in it, the likeliest first. */
export async function volumesOf({ files, isDicom }: Series): Promise<File[]> {
  if (!isDicom) return files;
  const { Dcm2niix } = await import("@niivue/dcm2niix"); // 1 MB that NIfTI needs not
  const slices = files.map((file, i) => new File([file], `${i}.dcm`)); // dropped folders may repeat a name
  const converter = new Dcm2niix();
  try {
    await converter.init();
    const made = await converter.input(slices).b("n").z("n").f("scan").run();
    const volumes = made.filter((file) => file.name.endsWith(".nii"));
    if (!volumes.length) throw new Error("dcm2niix found no volume in these files");
    // dcm2niix adds a straightened copy of a tilted scan, which is what the service reads as well
    const straight = (file: File) => Number(/_(Tilt|Eq)/.test(file.name));
    return volumes.sort((a, b) => straight(b) - straight(a) || b.size - a.size);
  } finally {
    converter.worker?.terminate();
  }
}
