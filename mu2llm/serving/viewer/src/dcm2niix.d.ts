declare module "@niivue/dcm2niix" {
  interface Run {
    b(value: "y" | "n"): Run;
    z(value: "y" | "n"): Run;
    f(name: string): Run;
    run(): Promise<File[]>;
  }
  export class Dcm2niix {
    worker: Worker | null;
    init(): Promise<boolean>;
    input(files: File[]): Run;
  }
}
