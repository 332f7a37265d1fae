/** Coarse overlays made fine: NiiVue draws overlays voxel by voxel, and a model's patch is some centimetres wide. */

export interface Grid {
  /** x runs fastest. */
  values: Uint8Array;
  shape: readonly [number, number, number];
  /** 4 × 4, indexes to mm. */
  affine: number[][];
}

const MOST = 160; // voxels along an axis

/** The same field, trilinear between the voxels' centres and constant beyond the outermost ones. */
export function finer({ values, shape, affine }: Grid): Grid {
  const times = shape.map((n) => Math.max(1, Math.min(8, Math.floor(MOST / n)))) as [number, number, number];
  let [fine, size]: [Float32Array, [number, number, number]] = [Float32Array.from(values), [...shape]];
  for (const axis of [0, 1, 2] as const) {
    fine = along(axis, fine, size, times[axis]);
    size[axis] *= times[axis];
  }
  // voxel i of the fine grid has its centre at (i + ½) / times − ½ of the coarse one
  const moved = affine.map((row) => {
    const scaled = times.map((k, i) => (row[i] ?? 0) / k);
    const shift = times.reduce((sum, k, i) => sum + (row[i] ?? 0) * (0.5 / k - 0.5), 0);
    return [...scaled, (row[3] ?? 0) + shift];
  });
  return { values: Uint8Array.from(fine, Math.round), shape: size, affine: moved };
}

function along(axis: 0 | 1 | 2, values: Float32Array, size: [number, number, number], times: number): Float32Array {
  const n = size[axis];
  const stride = [1, size[0], size[0] * size[1]][axis] ?? 1;
  const out = new Float32Array(values.length * times);
  for (let line = 0; line < values.length / n; line++) {
    const inner = line % stride;
    const from = Math.floor(line / stride) * stride * n + inner;
    const to = Math.floor(line / stride) * stride * n * times + inner;
    for (let i = 0; i < n * times; i++) {
      const place = Math.min(n - 1, Math.max(0, (i + 0.5) / times - 0.5));
      const low = Math.min(Math.floor(place), n - 2 < 0 ? 0 : n - 2);
      const share = place - low;
      const high = Math.min(low + 1, n - 1);
      out[to + i * stride] = values[from + low * stride]! * (1 - share) + values[from + high * stride]! * share;
    }
  }
  return out;
}
