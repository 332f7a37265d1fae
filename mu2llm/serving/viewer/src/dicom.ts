/** What a DICOM file says of itself: whose it is and of which series. It stays in the page. */

import { parseDicom, type DataSet } from "dicom-parser";

export interface Header {
  patient: string;
  id: string;
  born: string;
  studied: string;
  study: string;
  /** The SeriesInstanceUID. */
  uid: string;
  number: string;
  series: string;
  isImage: boolean;
}

// Specific Character Set, its last value (the one that names are extended by) → as browsers call it
const CHARACTERS: Record<string, string> = {
  "ISO_IR 192": "utf-8",
  GB18030: "gb18030",
  GBK: "gbk",
  "ISO_IR 101": "iso-8859-2",
  "ISO_IR 109": "iso-8859-3",
  "ISO_IR 110": "iso-8859-4",
  "ISO_IR 144": "iso-8859-5",
  "ISO_IR 127": "iso-8859-6",
  "ISO_IR 126": "iso-8859-7",
  "ISO_IR 138": "iso-8859-8",
  "ISO_IR 148": "windows-1254",
  "ISO_IR 166": "windows-874",
  "ISO_IR 13": "shift_jis",
  "ISO_IR 87": "iso-2022-jp",
  "ISO_IR 149": "euc-kr",
  "ISO_IR 58": "gb18030",
};

/** Null where the file is no DICOM, or cannot be parsed here. */
export function headerOf(file: Uint8Array): Header | null {
  let told: DataSet;
  try {
    told = parseDicom(file, { untilTag: "x7fe00010" });
  } catch {
    return null; // the service says what it thinks of it
  }
  const set = (told.string("x00080005") ?? "").split("\\").at(-1)!.trim().replace("2022 IR", "IR").replace("ISO IR", "ISO_IR");
  const characters = new TextDecoder(CHARACTERS[set] ?? "windows-1252");
  const text = (tag: string) => {
    const element = told.elements[tag];
    if (!element) return "";
    const bytes = file.subarray(element.dataOffset, element.dataOffset + element.length);
    return characters.decode(bytes).replace(/[\0\s]+$/, "").trim();
  };
  return {
    patient: name(text("x00100010")),
    id: text("x00100020"),
    born: date(text("x00100030")),
    studied: date(text("x00080020")),
    study: text("x00081030"),
    uid: text("x0020000e"),
    number: text("x00200011"),
    series: text("x0008103e"),
    isImage: (told.uint16("x00280010") ?? 0) > 0,
  };
}

/** "Family^Given^Middle=…" → "Family, Given Middle". */
function name(told: string): string {
  const [family = "", ...given] = (told.split("=").find(Boolean) ?? "").split("^");
  return [family, given.filter(Boolean).join(" ")].filter(Boolean).join(", ");
}

function date(told: string): string {
  return told.replace(/^(\d{4})(\d{2})(\d{2})$/, "$1-$2-$3");
}
