// The page before a server with API keys.

import assert from "node:assert/strict";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";

import { adapterFiles, axe, launch, newKey, put, row, serve, until, visit as visitUrl } from "./server.mjs";

const ASKS = "This server asks for an API key";
const WRONG = "the API key is none of this server's";

let server;
let browser;
let folder;
let file;
let keys;
before(async () => {
  folder = mkdtempSync(join(tmpdir(), "loramux-page-"));
  file = join(folder, "keys.toml");
  keys = {
    ops: newKey(file, "ops", "--scopes", "infer,admin,metrics"),
    app: newKey(file, "app", "--scopes", "infer"),
    acme: newKey(file, "acme", "--scopes", "infer,admin,metrics", "--tenant", "acme"),
  };
  server = await serve("--keys", file);
  browser = await launch();
  assert.equal((await put(server.url, "shared", "llama/adapter_qv_r4", {}, as(keys.ops))).status, 201);
  assert.equal((await put(server.url, "mine", "llama/adapter_all_r8", {}, as(keys.acme))).status, 201);
});
after(async () => {
  await browser?.close();
  server?.stop();
  if (folder) rmSync(folder, { recursive: true });
});

const visit = (view, body, options) => visitUrl(browser, server.url, body, { view: `#${view}`, ...options });
const field = (page) => page.getByLabel("API key", { exact: true });
const as = (key) => ({ authorization: `Bearer ${key}` });
const goTo = (page, view) => page.getByRole("link", { name: view, exact: true }).click();

/** Opens a view, and the page with a key. */
const visitWith = (key, view, body, options = {}) =>
  visit(
    view,
    async (page) => {
      await field(page).fill(key);
      await page.getByRole("button", { name: "Use this key" }).click();
      await page.getByText(ASKS).waitFor({ state: "detached" });
      await body(page);
    },
    // The first look at the adapters, without a key.
    { ...options, refusals: 1 + (options.refusals ?? 0) },
  );

test("a key is asked for, stays in the tab alone, and is forgotten", async () => {
  await visit(
    "adapters",
    async (page) => {
      const shown = [];
      page.on("request", (request) => {
        assert.ok(!request.url().includes("lmx-"), "the key stands in an address");
        if (/\/(v1\/|metrics)/.test(request.url())) shown.push(request.headers()["authorization"]);
      });
      await page.getByText(ASKS).waitFor();
      assert.equal(await page.evaluate(() => document.activeElement.type), "password");
      await page.keyboard.type(`${keys.ops}x`);
      await page.keyboard.press("Enter");
      await page.getByText(WRONG, { exact: true }).waitFor();
      // Until there is another key nothing is asked, and typing is not disturbed.
      await page.waitForTimeout(4500);
      assert.deepEqual(shown, [`Bearer ${keys.ops}x`]);
      assert.equal(await field(page).inputValue(), `${keys.ops}x`);
      // As it is copied, with spaces around it.
      await field(page).fill(` ${keys.ops} `);
      await page.getByRole("button", { name: "Use this key" }).click();
      await row(page, "shared").waitFor();
      assert.equal(await page.getByText(ASKS).count(), 0);
      await until(() => shown.length > 4, "polled");
      assert.deepEqual([...new Set(shown.slice(1))], [`Bearer ${keys.ops}`]);
      const stored = () => page.evaluate(() => [{ ...localStorage }, { ...sessionStorage }, document.cookie, location.href].map((part) => JSON.stringify(part)));
      const places = (await stored()).map((part) => part.includes(keys.ops));
      assert.deepEqual(places, [false, true, false, false]);
      await page.reload();
      await row(page, "shared").waitFor();
      // Another tab does not have it.
      const other = await page.context().newPage();
      await other.goto(server.url);
      await other.getByText(ASKS).waitFor();
      assert.equal(await other.getByRole("button", { name: "Forget the API key" }).count(), 0);
      await other.close();
      await page.getByRole("button", { name: "Forget the API key" }).click();
      await page.getByText(ASKS).waitFor();
      assert.equal(await row(page, "shared").count(), 0);
      assert.ok(!(await stored()).join().includes("lmx-"));
    },
    { refusals: 3 },
  );
});

test("uploads, changes and generations show the key, and commands do not", async () => {
  await visitWith(keys.ops, "adapters", async (page) => {
    const form = page.locator("form.upload").first();
    await form.getByLabel("Files").setInputFiles(adapterFiles("llama/adapter_qv_r4"));
    await form.getByLabel("Name").fill("uploaded@acme");
    await form.getByRole("button", { name: /^Upload/ }).click();
    await form.getByText("uploaded@acme fits the base and is served").waitFor();
    await page.getByRole("button", { name: "Pin uploaded@acme" }).click();
    await row(page, "uploaded@acme").getByText("pinned").waitFor();
    await page.getByRole("button", { name: "Unpin uploaded@acme" }).click();
    await page.getByRole("button", { name: "Delete uploaded@acme" }).click();
    await page.getByRole("dialog").getByRole("button", { name: "Delete", exact: true }).click();
    await row(page, "uploaded@acme").waitFor({ state: "detached" });
    await goTo(page, "Playground");
    await page.getByRole("combobox", { name: "Adapter", exact: true }).selectOption("mine@acme");
    await page.getByLabel("Prompt", { exact: true }).last().fill("t5 t6");
    await page.getByRole("button", { name: "Generate" }).click();
    await page.getByRole("status").filter({ hasText: "ended by" }).waitFor();
    await page.getByText("As a command").click();
    const command = await page.locator(".command").textContent();
    assert.ok(command.endsWith(` -H "Authorization: Bearer $LORAMUX_API_KEY"`), command);
    assert.ok(!(await page.content()).includes(keys.ops));
    await goTo(page, "Live");
    await page.locator(".tiles dd", { hasText: / of \d/ }).waitFor();
    await page.locator("figure canvas").first().waitFor();
  });
});

test("what a key is not for the server says where it is missed, and the rest goes on", async () => {
  const lacks = (scope) => `key app is for infer; this needs the scope ${scope}`;
  await visitWith(
    keys.app,
    "adapters",
    async (page) => {
      await row(page, "shared").waitFor();
      const form = page.locator("form.upload").first();
      await form.getByLabel("Files").setInputFiles(adapterFiles("llama/adapter_qv_r4"));
      await form.getByLabel("Name").fill("no");
      await form.getByRole("button", { name: /^Upload/ }).click();
      await form.getByText(lacks("admin")).waitFor();
      await page.getByRole("button", { name: "Pin shared" }).click();
      await page.locator(".bar + div").getByText(lacks("admin")).first().waitFor();
      await goTo(page, "Playground");
      assert.equal(await page.getByText(lacks("metrics")).isVisible(), false);
      await page.getByLabel("Prompt", { exact: true }).last().fill("t5 t6");
      await page.getByRole("button", { name: "Generate" }).click();
      await page.getByRole("status").filter({ hasText: "ended by" }).waitFor();
      await goTo(page, "Live");
      await page.getByText(lacks("metrics")).waitFor();
      assert.equal(await page.locator("figure canvas:visible").count(), 0);
      assert.deepEqual((await page.locator(".facts dd").allTextContents()).slice(0, 2), ["–", "–"]);
      // It asks no more, and tells of no other trouble.
      await page.waitForTimeout(2500);
      assert.equal(await page.locator("main > div .alert").count(), 0);
    },
    { refusals: 3 },
  );
});

test("what a tenant is not told is a dash, and stays in order", async () => {
  await visitWith(keys.acme, "adapters", async (page) => {
    await row(page, "shared").waitFor();
    const names = () => page.locator("tbody .name").allTextContents();
    assert.deepEqual(await names(), ["mine", "shared"]);
    const cells = await row(page, "shared").getByRole("cell").allTextContents();
    const [tier, , , memory, requests, used, inFlight, , actions] = cells;
    assert.deepEqual([tier, memory, requests, used, inFlight, actions], [...Array(5).fill("–"), "everybody's"], String(cells));
    assert.match((await row(page, "mine").getByRole("cell").allTextContents()).join(), /^(memory|disk),8,.*,\d+,.*,\d+,/);
    await page.getByRole("button", { name: "Replace mine" }).waitFor();
    assert.equal(await row(page, "shared").getByRole("button").count(), 0);
    for (const column of ["Tier", "In memory", "Requests", "Last use", "In flight"]) {
      for (const direction of ["once", "twice"]) {
        await page.getByRole("button", { name: column, exact: true }).click();
        assert.deepEqual(await names(), ["mine", "shared"], `${column} ${direction}`);
      }
    }
    assert.equal(await page.locator(".facts dd").last().textContent(), "–");
    await goTo(page, "Playground");
    await page.getByRole("combobox", { name: "Adapter", exact: true }).selectOption("mine");
    await page.getByLabel("Prompt", { exact: true }).last().fill("t5 t6");
    await page.getByRole("button", { name: "Generate" }).click();
    await page.getByRole("status").filter({ hasText: "ended by" }).waitFor();
    await goTo(page, "Live");
    const tile = (name) => page.locator(".tiles div", { hasText: name }).locator("dd");
    await tile("Requests a second").waitFor();
    const body = JSON.stringify({ adapter: "mine", prompt: "t5", max_tokens: 20, ignore_eos: true });
    assert.ok((await fetch(`${server.url}/v1/generate`, { method: "POST", headers: as(keys.acme), body })).ok);
    await until(async () => /[1-9]/.test(await page.locator(".legend li", { hasText: "Generated" }).textContent()), "its own tokens");
    for (const name of ["Running", "Waiting", "Adapters in memory", "KV cache in use"]) assert.equal(await tile(name).textContent(), "–", name);
    // Charts of what it is not told would stay empty.
    assert.deepEqual(await page.locator("figure:visible h3").allTextContents(), ["Throughput"]);
    await page.getByText("of the tenant's adapters alone").waitFor();
    assert.doesNotMatch(await page.locator("body").innerText(), /NaN|undefined|null|Infinity/);
  });
});

test("a key that is taken back is asked for again, and nothing that was typed is lost", async () => {
  const guest = newKey(file, "guest", "--scopes", "infer,metrics");
  await until(async () => (await fetch(`${server.url}/v1/models`, { headers: as(guest) })).ok, "known");
  await visit(
    "playground",
    async (page) => {
      const unlock = async (key) => {
        await field(page).fill(key);
        await page.getByRole("button", { name: "Use this key" }).click();
        await page.getByText(ASKS).waitFor({ state: "detached" });
      };
      await unlock(guest);
      const prompt = page.getByLabel("Prompt", { exact: true }).last();
      await prompt.fill("t5 t6 t7");
      writeFileSync(file, readFileSync(file, "utf8").split("[keys.guest]")[0]);
      await page.getByText(WRONG, { exact: true }).waitFor();
      // Whoever types goes on where they are.
      assert.equal(await page.evaluate(() => document.activeElement.tagName), "TEXTAREA");
      await unlock(keys.ops);
      assert.equal(await prompt.inputValue(), "t5 t6 t7");
      await page.getByRole("button", { name: "Generate" }).click();
      await page.getByRole("status").filter({ hasText: "ended by" }).waitFor();
    },
    { refusals: 2 },
  );
});

for (const colorScheme of ["light", "dark"]) {
  test(`axe finds nothing against the question for a key in ${colorScheme}`, async () => {
    await visit(
      "adapters",
      async (page) => {
        await page.getByText(ASKS).waitFor();
        await field(page).fill("no");
        await page.getByRole("button", { name: "Use this key" }).click();
        await page.getByText(WRONG).waitFor();
        assert.deepEqual(await axe(page), []);
        await page.setViewportSize({ width: 420, height: 800 });
        const [wide, seen] = await page.evaluate(() => [document.documentElement.scrollWidth, innerWidth]);
        assert.ok(wide <= seen, `${wide} of ${seen}`);
      },
      { colorScheme, refusals: 2 },
    );
  });
}
