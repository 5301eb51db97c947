import { readFileSync } from "node:fs";

import { defineConfig } from "vite";

// The server that `npm run dev` talks to.
const server = process.env.LORAMUX ?? "http://127.0.0.1:8080";
// What the page is put together from has to say whose it is.
const licences = ["preact", "uplot"].map(
  (name) => `${name}\n\n${readFileSync(new URL(`node_modules/${name}/LICENSE`, import.meta.url), "utf8").trim()}`,
);

export default defineConfig({
  base: "./",
  build: {
    outDir: "../src/server/page",
    emptyOutDir: true,
    target: ["chrome123", "firefox120", "safari17.5"],
    modulePreload: { polyfill: false },
    // The server's policy refuses what is inline.
    assetsInlineLimit: 0,
    rolldownOptions: {
      output: {
        entryFileNames: "assets/app.js",
        assetFileNames: "assets/app.[ext]",
        postBanner: `/*!\n${licences.join("\n\n")}\n*/`,
      },
    },
  },
  server: { proxy: { "/v1": server, "/metrics": server, "/health": server, "/openapi.json": server } },
});
