/** The picture: NiiVue in radiological convention, windows, views, slices, measuring, where the model looked. */

import { cmapper, DRAG_MODE, MULTIPLANAR_TYPE, Niivue, NVImage, SHOW_RENDER, SLICE_TYPE } from "@niivue/niivue";
import { finer, type Grid } from "./finer";

/** In HU. */
export interface Window {
  level: number;
  width: number;
}

export const WINDOWS = {
  lung: { level: -600, width: 1500 },
  soft: { level: 40, width: 400 },
  bone: { level: 480, width: 2500 },
  brain: { level: 40, width: 80 },
  liver: { level: 30, width: 150 },
  vessel: { level: 200, width: 600 },
} satisfies Record<string, Window>;
export type WindowName = keyof typeof WINDOWS;

export const VIEWS = {
  all: SLICE_TYPE.MULTIPLANAR,
  axial: SLICE_TYPE.AXIAL,
  coronal: SLICE_TYPE.CORONAL,
  sagittal: SLICE_TYPE.SAGITTAL,
  render: SLICE_TYPE.RENDER,
} satisfies Record<string, SLICE_TYPE>;
export type ViewName = keyof typeof VIEWS;

/** Of the ellipse that is drawn, by its value. */
const REGION = { R: [0, 255], G: [0, 212], B: [0, 77], A: [0, 255], I: [0, 1] };
/** Clear at the low end, so that the overlay has no hard edge. */
const COLOURS = { R: [200, 255, 255], G: [60, 130, 235], B: [0, 20, 60], A: [0, 130, 230], I: [0, 96, 255] };

/** What the left button does when it is dragged. */
export const TOOLS = {
  none: DRAG_MODE.crosshair,
  measure: DRAG_MODE.measurement,
  roi: DRAG_MODE.roiSelection,
} satisfies Record<string, DRAG_MODE>;
export type ToolName = keyof typeof TOOLS;

/** The HU of the voxels in an ellipse on one slice, and its area. */
export interface Region {
  mean: number;
  deviation: number;
  low: number;
  high: number;
  mm2: number;
}

export interface Location {
  mm: [number, number, number];
  value: number;
}

export class View {
  private nv: Niivue;
  private overlays = new Map<string, Promise<Overlay>>();
  private wanted: string | null = null;
  private opacityOfOverlay = 0.6;
  onLocation: (location: Location) => void = () => {};
  onWindow: (low: number, high: number) => void = () => {};
  onRegion: (region: Region | null) => void = () => {};
  onOverlay: (shown: boolean) => void = () => {};

  private constructor() {
    this.nv = new Niivue({
      backColor: [0, 0, 0, 1],
      crosshairColor: [0.56, 0.72, 0.85, 0.75],
      crosshairWidth: 0.2,
      crosshairWidthUnit: "percent",
      crosshairGap: 12,
      fontColor: [0.75, 0.8, 0.85, 1],
      fontMinPx: 12,
      fontSizeScaling: 0.1,
      isRadiologicalConvention: true,
      sagittalNoseLeft: true,
      isOrientationTextVisible: true,
      isCornerOrientationText: false,
      multiplanarLayout: MULTIPLANAR_TYPE.GRID,
      multiplanarShowRender: SHOW_RENDER.ALWAYS,
      multiplanarPadPixels: 4,
      sliceType: SLICE_TYPE.MULTIPLANAR,
      dragMode: DRAG_MODE.windowing,
      dragModePrimary: DRAG_MODE.crosshair,
      dragAndDropEnabled: false,
      // keys are ours (keys.ts)
      viewModeHotKey: "",
      clipPlaneHotKey: "",
      cycleClipPlaneHotKey: "",
      measureLineColor: [1, 0.83, 0.3, 1],
      measureTextColor: [1, 0.83, 0.3, 1],
      measureTextHeight: 0.07,
      selectionBoxColor: [1, 0.83, 0.3, 1],
      rulerColor: [1, 0.83, 0.3, 1],
      loadingText: "",
      logLevel: "error",
    });
  }

  static async on(canvas: HTMLCanvasElement): Promise<View> {
    const view = new View();
    view.nv.onLocationChange = (told) => {
      const { mm, values } = told as { mm: Float32Array; values: { value: number }[] };
      view.onLocation({ mm: [mm[0] ?? 0, mm[1] ?? 0, mm[2] ?? 0], value: values[0]?.value ?? NaN });
    };
    view.nv.onIntensityChange = (volume) => view.onWindow(volume.cal_min ?? 0, volume.cal_max ?? 0);
    view.nv.onDragRelease = ({ voxStart, voxEnd, tileIdx }) => {
      if (view.nv.opts.dragModePrimary === TOOLS.roi && tileIdx >= 0) view.mark(voxStart, voxEnd);
    };
    await view.nv.attachToCanvas(canvas);
    view.nv.addColormap("looked", COLOURS);
    view.nv.drawLut = cmapper.makeDrawLut(REGION);
    view.nv.drawOpacity = 0.4;
    // without it, the 3-D view of the lung window is a box: air is within that window
    await view.nv.setVolumeRenderIllumination(0.5);
    await view.nv.setGradientOpacity(0.7);
    return view;
  }

  get isEmpty(): boolean {
    return this.nv.volumes.length === 0;
  }

  clear(): void {
    this.forgetOverlays();
    this.unmark();
    for (const volume of [...this.nv.volumes].reverse()) this.nv.removeVolume(volume);
    this.nv.clearAllMeasurements();
    this.nv.drawScene();
  }

  /** A file as it can be shown; an Error says why it cannot. */
  async load(scan: File): Promise<NVImage> {
    const [low, high] = range(WINDOWS.soft);
    return NVImage.loadFromFile({ file: scan, name: scan.name, cal_min: low, cal_max: high });
  }

  show(volume: NVImage, window: Window): void {
    this.clear();
    this.nv.addVolume(volume);
    this.reset();
    this.setWindow(window);
  }

  setWindow(window: Window): void {
    const [low, high] = range(window);
    const volume = this.nv.volumes[0];
    if (volume) {
      volume.cal_min = low;
      volume.cal_max = high;
      this.nv.refreshLayers(volume, 0);
      this.nv.drawScene();
    }
    this.onWindow(low, high);
  }

  setView(name: ViewName): void {
    this.nv.setSliceType(VIEWS[name]);
  }

  /** Back to the middle of the scan, no zoom, no measurements. */
  reset(): void {
    this.unmark();
    this.nv.clearAllMeasurements();
    this.nv.scene.pan2Dxyzmm = [0, 0, 0, 1];
    this.nv.setScale(1);
    this.nv.setRenderAzimuthElevation(160, 10);
    this.nv.scene.crosshairPos = [0.5, 0.5, 0.5];
    this.nv.createOnLocationChange();
    this.nv.drawScene();
  }

  /** Moves the crosshair by whole voxels in the scan's closest canonical axes (right, anterior, superior). */
  move(right: number, anterior: number, superior: number): void {
    if (!this.isEmpty) this.nv.moveCrosshairInVox(right, anterior, superior);
  }

  use(tool: ToolName): void {
    this.nv.opts.dragModePrimary = TOOLS[tool];
  }

  /** One slice on along an axis (0 to the right, 1 to the front, 2 up); behind the last one comes the first. */
  turn(axis: 0 | 1 | 2): void {
    const size = this.nv.volumes[0]?.dimsRAS?.[axis + 1];
    if (!size) return;
    const at = Math.round(this.nv.frac2vox(this.nv.scene.crosshairPos)[axis]!);
    const by = [0, 0, 0] as [number, number, number];
    by[axis] = at + 1 < size ? 1 : -at;
    this.move(...by);
  }

  /** Draws the ellipse between two opposite corners (voxels, RAS) and tells its HU. One at a time. */
  private mark(from: ArrayLike<number>, to: ArrayLike<number>): void {
    const volume = this.nv.volumes[0];
    const [, nx = 0, ny = 0, nz = 0] = volume?.dimsRAS ?? [];
    if (!volume || !nx) return;
    const low = [0, 1, 2].map((i) => Math.max(0, Math.min(from[i]!, to[i]!)));
    const high = [nx, ny, nz].map((n, i) => Math.min(n - 1, Math.max(from[i]!, to[i]!)));
    const flat = [0, 1, 2].filter((i) => high[i] === low[i]);
    if (flat.length !== 1) return; // a line, or a click
    this.nv.createEmptyDrawing();
    const drawn = this.nv.drawBitmap!;
    const values: number[] = [];
    for (let z = low[2]!; z <= high[2]!; z++)
      for (let y = low[1]!; y <= high[1]!; y++)
        for (let x = low[0]!; x <= high[0]!; x++) {
          const off = [x, y, z].map((at, i) => (2 * at - low[i]! - high[i]!) / (high[i]! - low[i]! + 1));
          if (off.reduce((sum, each) => sum + each * each, 0) > 1) continue;
          drawn[x + nx * (y + ny * z)] = 1;
          values.push(volume.getValue(x, y, z));
        }
    this.nv.refreshDrawing(true);
    const sizes = [1, 2, 3].filter((i) => i !== flat[0]! + 1).map((i) => volume.pixDimsRAS![i]!);
    this.onRegion(regionOf(values, sizes[0]! * sizes[1]!));
  }

  private unmark(): void {
    if (this.nv.drawBitmap) this.nv.closeDrawing();
    this.onRegion(null);
  }

  /** The overlay of a base64 NIfTI (0–255 in the scan's own coordinates); null takes it away. */
  async look(nifti: string | null): Promise<void> {
    this.wanted = nifti;
    const shown = this.nv.volumes[1];
    if (nifti === null) {
      if (shown) this.repaint(shown, 0);
      this.onOverlay(false);
      return;
    }
    const { image } = await this.overlay(nifti);
    if (this.wanted !== nifti || this.isEmpty) return; // another sentence came meanwhile
    if (this.nv.volumes.length === 1) this.nv.addVolume(image);
    // only the overlay's texture is made anew: uploading a whole scan at each hover would be felt
    this.nv.volumes[1] = image;
    this.nv.overlays = [image];
    this.repaint(image, this.opacityOfOverlay);
    this.onOverlay(true);
  }

  setOpacity(opacity: number): void {
    this.opacityOfOverlay = opacity;
    const shown = this.nv.volumes[1];
    if (shown && this.wanted) this.repaint(shown, opacity);
  }

  /** Moves the crosshair to where a sentence's overlay is strongest. */
  async goToPeak(nifti: string): Promise<void> {
    const { grid } = await this.overlay(nifti);
    if (this.isEmpty) return;
    this.nv.scene.crosshairPos = this.nv.mm2frac(peak(grid));
    this.nv.createOnLocationChange();
    this.nv.drawScene();
  }

  forgetOverlays(): void {
    this.wanted = null;
    this.overlays.clear();
    const shown = this.nv.volumes[1];
    if (shown) this.nv.removeVolume(shown);
    this.onOverlay(false);
  }

  private overlay(base64: string): Promise<Overlay> {
    const known = this.overlays.get(base64);
    if (known) return known;
    const loading = loadOverlay(base64);
    this.overlays.set(base64, loading);
    return loading;
  }

  private repaint(overlay: NVImage, opacity: number): void {
    overlay.opacity = opacity;
    this.nv.refreshLayers(overlay, 1);
    this.nv.drawScene();
  }
}

/** As it came, and as it is shown. */
interface Overlay {
  grid: Grid;
  image: NVImage;
}

async function loadOverlay(base64: string): Promise<Overlay> {
  const { img, hdr } = await NVImage.loadFromBase64({ base64, name: "looked.nii" });
  if (!(img instanceof Uint8Array) || !hdr) throw new Error("the overlay is no NIfTI of bytes");
  const [, x = 1, y = 1, z = 1] = hdr.dims;
  const grid = { values: img, shape: [x, y, z] as const, affine: hdr.affine };
  const { values, shape, affine } = finer(grid);
  const sizes = [0, 1, 2].map((i) => Math.hypot(...affine.slice(0, 3).map((row) => row[i] ?? 0)));
  const bytes = NVImage.createNiftiArray([...shape], sizes, affine.flat(), 2, values);
  const image = await NVImage.loadFromFile({
    file: new File([bytes as Uint8Array<ArrayBuffer>], "looked.nii"),
    name: "looked.nii",
    colormap: "looked",
    cal_min: 0,
    cal_max: 255, // of the highest cell; what is not shown is 0
  });
  return { grid, image };
}

/** Of the highest voxels, the one nearest to their middle, in mm. */
function peak({ values, shape: [nx, ny], affine }: Grid): [number, number, number] {
  const highest = values.reduce((a, b) => Math.max(a, b), 0);
  const places = [...values.keys()]
    .filter((i) => values[i] === highest)
    .map((i) => [i % nx, Math.floor(i / nx) % ny, Math.floor(i / (nx * ny))] as const);
  const middle = [0, 1, 2].map((axis) => places.reduce((sum, place) => sum + place[axis]!, 0) / places.length);
  const distance = (place: readonly number[]) => Math.hypot(...place.map((at, axis) => at - middle[axis]!));
  const [x, y, z] = places.reduce((a, b) => (distance(b) < distance(a) ? b : a));
  const [right, anterior, superior] = affine.map((row) => row[0]! * x + row[1]! * y + row[2]! * z + row[3]!);
  return [right!, anterior!, superior!];
}

function regionOf(values: number[], mm2: number): Region {
  const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
  const squares = values.reduce((sum, value) => sum + (value - mean) ** 2, 0);
  return {
    mean,
    deviation: Math.sqrt(squares / Math.max(1, values.length - 1)),
    low: values.reduce((a, b) => Math.min(a, b)),
    high: values.reduce((a, b) => Math.max(a, b)),
    mm2: mm2 * values.length,
  };
}

function range({ level, width }: Window): [number, number] {
  return [level - width / 2, level + width / 2];
}
