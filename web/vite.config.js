import { defineConfig } from "vite";

// The server that `npm run dev` talks to.
const server = process.env.LORAMUX ?? "http://127.0.0.1:8080";

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
      output: { entryFileNames: "assets/app.js", assetFileNames: "assets/app.[ext]" },
    },
  },
  server: { proxy: { "/v1": server, "/metrics": server, "/health": server, "/openapi.json": server } },
});
