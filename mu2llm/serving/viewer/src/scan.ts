/** What a user dropped → one file to send and, where this page can read it, one NIfTI to show. */

import { unzip, zip, type Unzipped } from "fflate";

/** The files of a drop, those of dropped folders included. */
export async function droppedFiles(transfer: DataTransfer): Promise<File[]> {
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

/** One file as it is; several (a DICOM series) as one zip, names as numbers: paths may name the patient. */
export async function asOneFile(files: File[]): Promise<File> {
  const [only] = files;
  if (!only) throw new Error("nothing was dropped; drop a NIfTI file, or DICOM as a zip or a folder");
  if (files.length === 1) return only;
  const parts: Record<string, Uint8Array> = {};
  for (const [i, file] of files.entries()) parts[`${i}.dcm`] = new Uint8Array(await file.arrayBuffer());
  const bytes = await new Promise<Uint8Array>((resolve, reject) =>
    zip(parts, { level: 0 }, (error, data) => (error ? reject(error) : resolve(data))),
  );
  return new File([bytes as Uint8Array<ArrayBuffer>], "series.zip", { type: "application/zip" });
}

/** The scan as NIfTI, converted from DICOM in this page where it must be. */
export async function asNifti(scan: File): Promise<File> {
  const start = new Uint8Array(await scan.slice(0, 132).arrayBuffer());
  if (start[0] === 0x50 && start[1] === 0x4b) return convert(await unpacked(scan));
  if (String.fromCharCode(...start.subarray(128, 132)) === "DICM") return convert([scan]);
  const packed = start[0] === 0x1f && start[1] === 0x8b;
  // NiiVue chooses its reader by the name
  return new File([scan], `scan.nii${packed ? ".gz" : ""}`);
}

async function unpacked(scan: File): Promise<File[]> {
  const bytes = new Uint8Array(await scan.arrayBuffer());
  const parts = await new Promise<Unzipped>((resolve, reject) =>
    unzip(bytes, (error, data) => (error ? reject(error) : resolve(data))),
  );
  return Object.values(parts)
    .filter((part) => part.length > 0)
    .map((part, i) => new File([part as Uint8Array<ArrayBuffer>], `${i}.dcm`));
}

async function convert(files: File[]): Promise<File> {
  const { Dcm2niix } = await import("@niivue/dcm2niix"); // 1 MB that NIfTI needs not
  const converter = new Dcm2niix();
  try {
    await converter.init();
    const made = await converter.input(files).b("n").z("n").f("scan").run();
    const volumes = made.filter((file) => file.name.endsWith(".nii"));
    // dcm2niix adds a straightened copy of a tilted scan, which is what the service reads as well
    const straight = volumes.filter((file) => /_(Tilt|Eq)/.test(file.name));
    const [largest] = (straight.length ? straight : volumes).sort((a, b) => b.size - a.size);
    if (!largest) throw new Error("dcm2niix found no volume in these files");
    return largest;
  } finally {
    converter.worker?.terminate();
  }
}
