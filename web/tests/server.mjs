// A real server for the tests, and a browser that tells whatever a page should not do.

import assert from "node:assert/strict";
import { execFileSync, spawn } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

import { chromium } from "playwright-core";

export const fixtures = fileURLToPath(new URL("../../tests/fixtures/tiny/", import.meta.url));
const binary = process.env.LORAMUX_BIN;
const AXE = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const ARGS = [
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
];

/** Makes a key in the file, with the options of `loramux keys new`, and gives it back. */
export const newKey = (file, id, ...options) => execFileSync(binary, ["keys", "new", file, id, ...options], { encoding: "utf8" }).trim();

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
export async function put(url, name, folder, config = {}, headers = {}) {
  const [configPath, weightsPath] = adapterFiles(folder);
  const changed = { ...JSON.parse(readFileSync(configPath, "utf8")), ...config };
  const form = new FormData();
  form.append("config", new Blob([JSON.stringify(changed)]), "adapter_config.json");
  form.append("weights", new Blob([readFileSync(weightsPath)]), "adapter_model.safetensors");
  const response = await fetch(`${url}/v1/adapters/${name}`, { method: "PUT", body: form, headers });
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

/** A page that is looked at and has no faults in the end but those expected, and so many refusals as the test says. */
export async function visit(browser, url, body, { refusals = 0, expected = null, ...options } = {}) {
  const visited = await open(browser, url, options);
  try {
    await body(visited.page);
    assert.deepEqual(visited.faults.filter((fault) => !expected?.test(fault)), []);
    assert.equal(visited.refusals(), refusals);
  } finally {
    await visited.close();
  }
}

/** The row of an adapter. */
export const row = (page, name) => page.getByRole("row").filter({ has: page.getByRole("rowheader", { name, exact: false }) });

/** Until `look` gives something true. */
export async function until(look, what) {
  for (let i = 0; i < 150; i += 1) {
    const seen = await look();
    if (seen) return seen;
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
  throw new Error(`never ${what}`);
}

/** What axe finds against the page as it is now. */
export async function axe(page) {
  await page.evaluate(AXE);
  const { violations } = await page.evaluate(() => globalThis.axe.run({ resultTypes: ["violations"] }));
  return violations.map((v) => `${v.id}: ${v.nodes.map((n) => n.html.slice(0, 160)).join(" | ")}`);
}
