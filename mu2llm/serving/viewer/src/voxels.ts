/** The SHA-256 of a picture's voxels, as the service tells that of what the model read. */

import type { NVImage } from "@niivue/niivue";
import { sha256 } from "@noble/hashes/sha2.js";
import { bytesToHex } from "@noble/hashes/utils.js";

const AIR_HU = -1024;
const SLABS = 16; // between two breaths of the page

/** Of HU, none below −1024, rounded to int16 (half to even, little-endian), in the closest canonical axes (RAS+) with
 * the last one fastest. (The browser's own digest is there over https alone, and wants all of it at once.) */
export async function digestOfVoxels({ hdr, img, dimsRAS, img2RASstep, img2RASstart }: NVImage): Promise<string> {
  if (!hdr || !img || !dimsRAS || !img2RASstep || !img2RASstart) throw new Error("the picture has no voxels");
  const [slope, shift] = [hdr.scl_slope || 1, hdr.scl_inter || 0];
  const [, nx, ny, nz] = dimsRAS as [number, number, number, number];
  const [dx, dy, dz] = img2RASstep as [number, number, number];
  const origin = img2RASstart.reduce((sum, start) => sum + start, 0);
  const digest = sha256.create();
  const slab = new DataView(new ArrayBuffer(2 * ny * nz));
  for (let x = 0; x < nx; x++) {
    let to = 0;
    for (let y = 0; y < ny; y++) {
      let from = origin + x * dx + y * dy;
      for (let z = 0; z < nz; z++, from += dz, to += 2) slab.setInt16(to, hu(img[from]! * slope + shift), true);
    }
    digest.update(new Uint8Array(slab.buffer));
    if (x % SLABS === 0) await new Promise((resolve) => setTimeout(resolve));
  }
  return bytesToHex(digest.digest());
}

export function digestOfText(text: string): string {
  return bytesToHex(sha256(new TextEncoder().encode(text)));
}

function hu(value: number): number {
  if (!(value > AIR_HU) || value === Infinity) return AIR_HU;
  const low = Math.floor(value);
  const rest = value - low;
  const rounded = rest > 0.5 || (rest === 0.5 && low % 2 !== 0) ? low + 1 : low;
  return Math.min(rounded, 32767);
}
