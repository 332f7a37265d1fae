import { defineConfig } from "vite";

export default defineConfig({
  base: "./", // the page works under any prefix
  worker: { format: "es" },
  build: {
    target: "es2022",
    assetsInlineLimit: 0, // the page's security policy loads scripts and wasm from files only
    chunkSizeWarningLimit: 4000, // NiiVue
  },
});
