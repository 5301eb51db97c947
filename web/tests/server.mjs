// A real server for the tests, and a browser that tells whatever a page should not do.

import { spawn } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

import { chromium } from "playwright-core";

export const fixtures = fileURLToPath(new URL("../../tests/fixtures/tiny/", import.meta.url));
const binary = process.env.LORAMUX_BIN;
const ARGS = [
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
];

/** `loramux serve` on the tiny model, with an empty store. */
export async function serve(...extra) {
  if (!binary) throw new Error("LORAMUX_BIN names no server");
  const folder = mkdtempSync(join(tmpdir(), "loramux-page-"));
  const args = ["serve", "--model", join(fixtures, "llama/base"), "--listen", "127.0.0.1:0", "--store", join(folder, "store")];
  const child = spawn(binary, [...args, ...extra], { stdio: ["ignore", "ignore", "pipe"] });
  const url = await new Promise((resolve, reject) => {
    let log = "";
    child.stderr.on("data", (data) => {
      log += data;
      const found = /listening on (http:\S+)/.exec(log);
      if (found) resolve(found[1]);
    });
    child.on("exit", () => reject(new Error(`the server has ended: ${log}`)));
  });
  while (!(await fetch(`${url}/health/ready`)).ok) await new Promise((resolve) => setTimeout(resolve, 50));
  const stop = () => {
    child.removeAllListeners("exit");
    child.kill();
    rmSync(folder, { recursive: true });
  };
  return { url, stop };
}

export const adapterFiles = (folder) =>
  ["adapter_config.json", "adapter_model.safetensors"].map((name) => join(fixtures, folder, name));

/** Puts the files of an adapter under a name, as a client beside the page. */
export async function put(url, name, folder, config = {}) {
  const [configPath, weightsPath] = adapterFiles(folder);
  const changed = { ...JSON.parse(readFileSync(configPath, "utf8")), ...config };
  const form = new FormData();
  form.append("config", new Blob([JSON.stringify(changed)]), "adapter_config.json");
  form.append("weights", new Blob([readFileSync(weightsPath)]), "adapter_model.safetensors");
  const response = await fetch(`${url}/v1/adapters/${name}`, { method: "PUT", body: form });
  return { status: response.status, body: await response.json() };
}

export const launch = () => chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: ARGS });

/**
 * A fresh page. `faults` collects errors in the console, exceptions and requests to others. Refusals that a test provokes
 * are no faults: `refusals` counts what the browser says of them.
 */
export async function open(browser, url, options = {}) {
  const context = await browser.newContext({ viewport: { width: 1400, height: 900 }, ...options });
  const page = await context.newPage();
  const faults = [];
  let refusals = 0;
  page.on("console", (message) => {
    if (/^Failed to load resource.*status of 4\d\d/.test(message.text())) refusals += 1;
    else if (["error", "warning"].includes(message.type())) faults.push(message.text());
  });
  page.on("pageerror", (error) => faults.push(String(error)));
  page.on("request", (request) => {
    if (!request.url().startsWith(`${url}/`)) faults.push(`a request to ${request.url()}`);
  });
  page.setDefaultTimeout(15_000);
  await page.goto(`${url}/${options.view ?? ""}`);
  await page.getByRole("heading", { name: "loramux" }).waitFor();
  return { page, faults, refusals: () => refusals, close: () => context.close() };
}
