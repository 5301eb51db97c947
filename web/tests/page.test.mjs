// The page in a browser, against a real server on the tiny model.

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";

import { adapterFiles, axe, fixtures, launch, put, row, serve, until, visit as visitUrl } from "./server.mjs";

const VIEWS = ["adapters", "playground", "live", "hosting"];
const EVIL = '<img src=x onerror="document.title=1">';

let server;
let browser;
let folder;
before(async () => {
  server = await serve("--allow-uploaded-templates");
  browser = await launch();
  folder = mkdtempSync(join(tmpdir(), "loramux-page-"));
});
after(async () => {
  await browser?.close();
  server?.stop();
  if (folder) rmSync(folder, { recursive: true });
});

const visit = (view, body, options) => visitUrl(browser, server.url, body, { view: `#${view}`, ...options });

const list = async () => (await (await fetch(`${server.url}/v1/adapters`)).json()).adapters;
const adapter = async (name) => (await list()).find((a) => a.name === name);
const choice = (page, name) => page.getByRole("combobox", { name, exact: true });
const uploadForm = (page) => page.locator("form.upload").first();

/** Makes answers come slowly enough to look at them. */
async function slowly(page, bytesPerSecond) {
  const session = await page.context().newCDPSession(page);
  await session.send("Network.enable");
  await session.send("Network.emulateNetworkConditions", {
    offline: false,
    latency: 0,
    downloadThroughput: bytesPerSecond,
    uploadThroughput: -1,
  });
}

test("the server's policy lets nothing in from elsewhere, and no markup from texts", async () => {
  const response = await fetch(server.url);
  const policy = response.headers.get("content-security-policy");
  assert.match(policy, /default-src 'none'; script-src 'self'; style-src 'self';/);
  assert.doesNotMatch(policy, /unsafe|https?:|\*/);
  await visit("adapters", async (page) => {
    const refused = await page.evaluate(() => {
      try {
        document.createElement("p").innerHTML = "<b>x</b>";
        return false;
      } catch {
        return true;
      }
    });
    assert.ok(refused, "markup was made of a text");
  }, { expected: /requires 'TrustedHTML' assignment/ });
});

test("an adapter is uploaded from its files and shown with what the server tells", async () => {
  await visit("adapters", async (page) => {
    await page.getByText("No adapters yet").waitFor();
    const form = uploadForm(page);
    await form.getByLabel("Files").setInputFiles(adapterFiles("llama/adapter_qv_r4"));
    await form.getByLabel("Name").fill("first");
    await form.getByRole("button", { name: /^Upload/ }).click();
    await form.getByText("first fits the base and is served: rank 4").waitFor();
    const info = await adapter("first");
    const cells = await row(page, "first").getByRole("cell").allTextContents();
    assert.deepEqual(cells.slice(1, 2), ["4"]);
    assert.ok(cells.includes(info.generation.slice(0, 12)), String(cells));
    await row(page, "first").getByTitle(`${info.bytes.toLocaleString("en-GB")} bytes`).waitFor();
    // Uses are counted.
    await fetch(`${server.url}/v1/generate`, { method: "POST", body: JSON.stringify({ adapter: "first", prompt: "t5" }) });
    await row(page, "first").getByRole("cell", { name: "1", exact: true }).waitFor();
    await row(page, "first").getByText(/just now|s ago/).waitFor();
  });
});

test("an archive is dropped onto the page", async () => {
  const archive = join(folder, "dropped.tar.gz");
  execFileSync("tar", ["czf", archive, "-C", join(fixtures, "llama/adapter_all_r8"), "."]);
  await visit("adapters", async (page) => {
    const transfer = await page.evaluateHandle((base64) => {
      const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
      const transfer = new DataTransfer();
      transfer.items.add(new File([bytes], "dropped.tar.gz"));
      return transfer;
    }, readFileSync(archive).toString("base64"));
    const drop = page.locator(".drop").first();
    await drop.dispatchEvent("dragover", { dataTransfer: transfer });
    await drop.dispatchEvent("drop", { dataTransfer: transfer });
    const form = uploadForm(page);
    await form.getByText("dropped.tar.gz").waitFor();
    assert.equal(await form.getByLabel("Name").inputValue(), "dropped");
    await form.getByRole("button", { name: /^Upload/ }).click();
    await form.getByText("dropped fits the base").waitFor();
    assert.equal((await adapter("dropped")).rank, 8);
  });
});

test("what the server has against an upload is shown word for word", async () => {
  const refused = await put(server.url, "bad", "mistral_window/adapter_qv_r4", { target_modules: EVIL });
  const wrong = join(folder, "adapter_config.json");
  const [config, weights] = adapterFiles("llama/adapter_qv_r4");
  writeFileSync(wrong, JSON.stringify({ ...JSON.parse(readFileSync(config, "utf8")), peft_type: EVIL }));
  await visit(
    "adapters",
    async (page) => {
      const form = uploadForm(page);
      const send = async (files, name) => {
        await form.getByLabel("Files").setInputFiles(files);
        await form.getByLabel("Name").fill(name);
        await form.getByRole("button", { name: /^Upload/ }).click();
      };
      const answered = page.waitForResponse((r) => r.request().method() === "PUT");
      await send([wrong, weights], "bad");
      const { error } = await (await answered).json();
      assert.ok(error.message.includes("<img"), error.message);
      assert.equal(await form.locator(".alert.bad").textContent(), error.message);
      assert.equal(await page.locator(".alert img").count(), 0);
      // A name that is taken is not replaced by chance.
      await send(adapterFiles("llama/adapter_qv_r4"), "first");
      await form.getByText('adapter "first" is there already').waitFor();
    },
    { refusals: 2 },
  );
  assert.equal(refused.status, 422);
  assert.equal(await adapter("bad"), undefined);
});

test("texts of adapters are texts", async () => {
  const { status } = await put(server.url, "labels", "llama/adapter_seqcls", {
    id2label: { 0: EVIL, 1: "<script>1</script>", 2: "plain" },
  });
  assert.equal(status, 201);
  await visit("adapters", async (page) => {
    await row(page, "labels").getByText(EVIL).waitFor();
    assert.equal(await page.locator("table img, table script").count(), 0);
    assert.equal(await page.title(), "Adapters · loramux");
  });
});

test("a replacement is of the generation that was shown", async () => {
  await put(server.url, "swap", "llama/adapter_qv_r4");
  await visit(
    "adapters",
    async (page) => {
      await page.getByRole("button", { name: "Replace swap" }).click();
      const dialog = page.getByRole("dialog");
      await dialog.getByText((await adapter("swap")).generation.slice(0, 12)).waitFor();
      // Somebody else is faster.
      await put(server.url, "swap", "llama/adapter_qv_r4", { revision: "theirs" });
      const theirs = (await adapter("swap")).generation;
      await dialog.getByLabel("Files").setInputFiles(adapterFiles("llama/adapter_all_r8"));
      await dialog.getByRole("button", { name: /^Replace \d/ }).click();
      await dialog.getByText(`adapter "swap" is generation ${theirs}, not the expected`).waitFor();
      assert.equal((await adapter("swap")).generation, theirs);
      await dialog.getByRole("button", { name: "Replace that one" }).click();
      await dialog.getByRole("button", { name: /^Replace \d/ }).click();
      await page.locator("dialog").waitFor({ state: "detached" });
      assert.equal((await adapter("swap")).rank, 8);
    },
    { refusals: 1 },
  );
});

test("a replacement that is cancelled while it is sent is given up", async () => {
  await put(server.url, "cancelled", "llama/adapter_qv_r4");
  const before = (await adapter("cancelled")).generation;
  await visit("adapters", async (page) => {
    // Held back, so that it is under way when it is cancelled.
    let held;
    await page.route("**/v1/adapters/cancelled", (route) => {
      held = route;
    });
    await page.getByRole("button", { name: "Replace cancelled" }).click();
    const dialog = page.getByRole("dialog");
    await dialog.getByLabel("Files").setInputFiles(adapterFiles("llama/adapter_all_r8"));
    const ended = page.waitForEvent("requestfailed", (request) => request.method() === "PUT");
    await dialog.getByRole("button", { name: /^Replace \d/ }).click();
    await until(() => held, "is it sent");
    await dialog.getByRole("button", { name: "Cancel" }).click();
    assert.match((await ended).failure().errorText, /ABORTED/);
    assert.equal((await adapter("cancelled")).generation, before);
  });
});

test("an upload that is stopped when all was sent is not told to be without effect", async () => {
  await visit("adapters", async (page) => {
    const form = uploadForm(page);
    const send = async (name) => {
      await form.getByLabel("Files").setInputFiles(adapterFiles("llama/adapter_qv_r4"));
      await form.getByLabel("Name").fill(name);
      await form.getByRole("button", { name: /^Upload/ }).click();
    };
    const told = form.locator(".alert.bad");
    // Nothing of this one is sent.
    let held;
    await page.route("**/v1/adapters/early", (route) => {
      held = route;
    });
    await send("early");
    await until(() => held, "is it sent");
    await form.getByRole("button", { name: "Stop" }).click();
    await told.waitFor();
    assert.equal(await told.textContent(), "the upload was stopped");
    assert.equal(await adapter("early"), undefined);
    await page.unroute("**/v1/adapters/early");
    // Of this one the answer alone is held back.
    const session = await page.context().newCDPSession(page);
    await session.send("Fetch.enable", { patterns: [{ urlPattern: "*/v1/adapters/late", requestStage: "Response" }] });
    await send("late");
    await form.getByText("being validated…").waitFor();
    await until(() => adapter("late"), "is it published");
    await form.getByRole("button", { name: "Stop" }).click();
    await told.waitFor();
    assert.equal(await told.textContent(), "the upload was stopped, but all was sent: the server may have taken it, see the table");
    await row(page, "late").waitFor();
  });
});

test("an answer to an upload that is not the server's is told, and the form goes on", async () => {
  await visit("adapters", async (page) => {
    const form = uploadForm(page);
    await page.route("**/v1/adapters/between", (route) => route.fulfill({ contentType: "text/html", body: "<p>Sign in</p>" }));
    await form.getByLabel("Files").setInputFiles(adapterFiles("llama/adapter_qv_r4"));
    await form.getByLabel("Name").fill("between");
    const button = form.getByRole("button", { name: /^Upload/ });
    await button.click();
    await form.getByText("the answer is not the server's").waitFor();
    await page.unroute("**/v1/adapters/between");
    await button.click();
    await form.getByText("between fits the base and is served").waitFor();
  });
});

test("a change that is made leaves alone what else is open by then", async () => {
  await put(server.url, "slow", "llama/adapter_qv_r4", { revision: "slow" });
  await put(server.url, "other", "llama/adapter_qv_r4", { revision: "other" });
  await visit(
    "adapters",
    async (page) => {
      const dialog = page.getByRole("dialog");
      /** Holds back the request to the path, and gives a way to wait for it. */
      const hold = async (path) => {
        let held;
        await page.route(`**/v1/adapters/${path}`, (route) => {
          held = route;
        });
        return () => until(() => held, `is ${path} asked for`);
      };
      const pin = await hold("slow/pin");
      const replacement = await hold("other");
      await page.getByRole("button", { name: "Pin slow", exact: true }).click();
      await pin();
      await page.getByRole("button", { name: "Replace other" }).click();
      await dialog.getByLabel("Files").setInputFiles(adapterFiles("llama/adapter_all_r8"));
      await dialog.getByRole("button", { name: /^Replace \d/ }).click();
      await replacement();
      await (await pin()).continue();
      // Behind the dialog.
      await page.locator("tbody tr", { hasText: "slow" }).getByText("pinned").waitFor();
      await dialog.getByRole("button", { name: "Stop" }).waitFor();
      await (await replacement()).continue();
      await page.locator("dialog").waitFor({ state: "detached" });
      assert.equal((await adapter("other")).rank, 8);
      // Nor is its failure another question's.
      await page.unroute("**/v1/adapters/slow/pin");
      const unpin = await hold("slow/pin");
      await page.getByRole("button", { name: "Unpin slow" }).click();
      await unpin();
      await page.getByRole("button", { name: "Delete other" }).click();
      const confirm = dialog.getByRole("button", { name: "Delete", exact: true });
      assert.ok(await confirm.isEnabled(), "a question waits for another change");
      const refused = page.waitForResponse((response) => response.url().endsWith("/slow/pin"));
      await (await unpin()).fulfill({ status: 409, json: { error: { message: "not now" } } });
      await refused;
      // The list is looked at after the change.
      await page.waitForResponse((response) => response.url().endsWith("/v1/adapters"));
      assert.equal(await dialog.getByText("not now").count(), 0);
      await dialog.getByRole("button", { name: "Cancel" }).click();
      await page.getByText("not now").waitFor();
    },
    { refusals: 1 },
  );
});

test("adapters are pinned, unloaded and deleted, the last two after a question", async () => {
  await put(server.url, "gone", "llama/adapter_all_r8", { revision: "gone" });
  await visit(
    "adapters",
    async (page) => {
      const of = row(page, "gone");
      await page.getByRole("button", { name: "Pin gone", exact: true }).click();
      await of.getByText("pinned").waitFor();
      assert.ok((await adapter("gone")).pinned);
      // A refusal is shown in the question's place.
      await page.getByRole("button", { name: "Unload gone" }).click();
      const dialog = page.getByRole("dialog");
      await dialog.getByRole("button", { name: "Unload", exact: true }).click();
      await dialog.getByText('adapter "gone" is pinned; unpin it before it is unloaded').waitFor();
      await dialog.getByRole("button", { name: "Cancel" }).click();
      await page.getByRole("button", { name: "Unpin gone" }).click();
      await of.getByText("pinned").waitFor({ state: "detached" });
      await page.getByRole("button", { name: "Unload gone" }).click();
      await dialog.getByRole("button", { name: "Unload", exact: true }).click();
      await of.getByText("disk").waitFor();
      await page.getByRole("button", { name: "Delete gone" }).click();
      await dialog.getByRole("button", { name: "Cancel" }).click();
      assert.ok(await adapter("gone"));
      await page.getByRole("button", { name: "Delete gone" }).click();
      await dialog.getByRole("button", { name: "Delete", exact: true }).click();
      await of.waitFor({ state: "detached" });
      assert.equal(await adapter("gone"), undefined);
    },
    { refusals: 1 },
  );
});

test("adapters are filtered and sorted", async () => {
  await visit("adapters", async (page) => {
    const names = () => page.locator("tbody .name").allTextContents();
    await until(async () => (await names()).length === (await list()).length, "all are shown");
    await page.getByLabel("Filter by name, label or generation").fill("SWA");
    await until(async () => (await names()).join() === "swap", "one is left");
    await page.getByLabel("Filter by name, label or generation").fill("");
    await page.getByRole("button", { name: "Name" }).click();
    const expected = (await list()).map((a) => a.name).sort().reverse();
    await until(async () => (await names()).join() === expected.join(), "sorted the other way");
    assert.equal(await page.getByRole("columnheader", { name: "Name" }).getAttribute("aria-sort"), "descending");
  });
});

const asked = { prompt: "t5 t6 t7", max_tokens: 120, seed: 7, temperature: 1 };

async function fill(page) {
  await page.getByLabel("Prompt", { exact: true }).last().fill(asked.prompt);
  await page.getByLabel("Temperature").fill(String(asked.temperature));
  await page.getByLabel("Max tokens").fill(String(asked.max_tokens));
  await page.getByLabel("Seed").fill(String(asked.seed));
}

const said = async (name) => {
  const body = JSON.stringify({ ...asked, adapter: name });
  return (await (await fetch(`${server.url}/v1/generate`, { method: "POST", body })).json()).text;
};

test("a generation comes piece by piece, and can be stopped", async () => {
  const whole = await said("first");
  assert.ok(whole.length > 300, "the model says too little to see it stream");
  await visit("playground", async (page) => {
    await fill(page);
    await choice(page, "Adapter").selectOption("first");
    await slowly(page, 4000);
    const text = page.locator(".answer .text");
    await page.getByRole("button", { name: "Generate" }).click();
    await until(async () => (await text.count()) && (await text.textContent()).length > 20, "text comes");
    const early = await text.textContent();
    assert.ok(early.length < whole.length && whole.startsWith(early), "the text did not come piece by piece");
    await page.getByRole("button", { name: "Stop" }).click();
    await page.getByRole("status").filter({ hasText: "stopped" }).waitFor();
    const stopped = await text.textContent();
    assert.ok(stopped.length < whole.length, "it was not stopped");
    await slowly(page, -1);
    await page.getByRole("button", { name: "Generate" }).click();
    await page.getByRole("status").filter({ hasText: "ended by" }).waitFor();
    assert.equal(await text.textContent(), whole);
    // The command asks for the same.
    await page.getByText("As a command").click();
    const command = await page.locator(".command").textContent();
    const shell = JSON.parse(execFileSync("sh", ["-c", `curl() { printf %s "$3"; }; ${command}`], { encoding: "utf8" }));
    assert.deepEqual(shell, { ...asked, adapter: "first" });
  });
});

test("numbers between the steps of their fields are asked for as they are", async () => {
  await visit("playground", async (page) => {
    const sent = [];
    page.on("request", (r) => r.url().endsWith("/v1/generate") && sent.push(r.postDataJSON()));
    await fill(page);
    await page.getByLabel("Temperature").fill("0.75");
    const more = page.getByText("More of sampling");
    await more.click();
    await page.getByLabel("Top p").fill("0.92");
    // A field that is not to be seen must not hold the request back either.
    await more.click();
    await page.getByRole("button", { name: "Generate" }).click();
    await page.getByRole("status").filter({ hasText: "ended by" }).waitFor();
    assert.deepEqual(sent.map((body) => [body.temperature, body.top_p]), [[0.75, 0.92]]);
  });
});

test("two adapters answer the same prompt side by side", async () => {
  await visit("playground", async (page) => {
    await fill(page);
    await page.getByLabel("Compare two side by side").check();
    await choice(page, "Adapter B").selectOption("swap");
    await page.getByRole("button", { name: "Generate" }).click();
    const answers = page.getByRole("article");
    await page.getByRole("status").filter({ hasText: "ended by" }).nth(1).waitFor();
    assert.deepEqual(await answers.locator("h3").allTextContents(), ["The base alone", "swap"]);
    assert.deepEqual(await answers.locator(".text").allTextContents(), [await said(undefined), await said("swap")]);
    const [left, right] = [await answers.nth(0).boundingBox(), await answers.nth(1).boundingBox()];
    assert.ok(left.y === right.y && right.x > left.x + left.width - 1, "they are not side by side");
  });
});

test("a chat is continued", async () => {
  const form = new FormData();
  for (const path of adapterFiles("llama/adapter_qv_r4")) form.append("file", new Blob([readFileSync(path)]), path.split("/").at(-1));
  const chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}";
  form.append("file", new Blob([JSON.stringify({ chat_template })]), "tokenizer_config.json");
  assert.equal((await fetch(`${server.url}/v1/adapters/chat`, { method: "PUT", body: form })).status, 201);
  await visit("playground", async (page) => {
    const sent = [];
    page.on("request", (r) => r.url().endsWith("/v1/generate") && sent.push(r.postDataJSON()));
    await page.getByText("Chat", { exact: true }).click();
    await choice(page, "Adapter").selectOption("chat");
    await page.getByLabel("Text of message 1").fill("t5 t6");
    await page.getByLabel("Max tokens").fill("5");
    await page.getByRole("button", { name: "Generate" }).click();
    await page.getByRole("button", { name: "Continue the chat" }).click();
    const answer = await page.getByLabel("Text of message 2").inputValue();
    await page.getByLabel("Text of message 3").fill("t9");
    await page.getByRole("button", { name: "Generate" }).click();
    await page.getByRole("status").filter({ hasText: "5 tokens" }).waitFor();
    assert.ok(answer.length > 0);
    const messages = [
      { role: "user", content: "t5 t6" },
      { role: "assistant", content: answer },
      { role: "user", content: "t9" },
    ];
    assert.deepEqual(sent.map((body) => body.messages), [messages.slice(0, 1), messages]);
  });
});

test("scores of a classification are bars", async () => {
  const body = JSON.stringify({ adapter: "labels", input: "t5 t6 t7" });
  const { results } = await (await fetch(`${server.url}/v1/classify`, { method: "POST", body })).json();
  const scores = Object.entries(results[0].scores).sort((a, b) => b[1] - a[1]);
  await visit(
    "playground",
    async (page) => {
      await page.getByText("Classify", { exact: true }).first().click();
      await page.getByLabel("Text", { exact: true }).fill("t5 t6 t7");
      // The base has no head, and says so.
      await page.getByRole("button", { name: "Classify" }).click();
      await page.getByRole("alert").getByText("the base model has no classification head").waitFor();
      await choice(page, "Adapter").selectOption("labels");
      await page.getByRole("button", { name: "Classify" }).click();
      const bars = page.locator(".scores tr");
      await bars.first().waitFor();
      assert.deepEqual(await bars.locator("th").allTextContents(), scores.map(([label]) => label));
      assert.deepEqual(await bars.locator(".number").allTextContents(), scores.map(([, s]) => `${(100 * s).toFixed(1)} %`));
      for (const [i, [, score]] of scores.entries()) {
        const track = await bars.nth(i).locator(".track").boundingBox();
        const fill = await bars.nth(i).locator(".fill").boundingBox();
        assert.ok(Math.abs(fill.width - Math.max(2, score * track.width)) < 2, `${fill.width} of ${track.width}`);
      }
      // Labels of one's own, scored as continuations.
      await choice(page, "Adapter").selectOption("");
      await page.getByLabel(/^Labels/).fill("t9\nt10 t11");
      await page.getByRole("button", { name: "Classify" }).click();
      await page.getByRole("rowheader", { name: "t10 t11" }).waitFor();
      assert.equal(await bars.count(), 2);
    },
    { refusals: 1 },
  );
});

test("labels are for the adapter without a head where the other has one", async () => {
  await visit("playground", async (page) => {
    const sent = [];
    page.on("request", (r) => r.url().endsWith("/v1/classify") && sent.push(r.postDataJSON()));
    await page.getByText("Classify", { exact: true }).first().click();
    await page.getByLabel("Compare two side by side").check();
    await choice(page, "Adapter A").selectOption("first");
    await choice(page, "Adapter B").selectOption("labels");
    await page.getByText("An adapter with a head has its own; these are for the others.").waitFor();
    await page.getByLabel("Text", { exact: true }).fill("t5 t6 t7");
    await page.getByLabel(/^Labels/).fill("t9\nt10 t11");
    await page.getByRole("button", { name: "Classify" }).click();
    const answers = page.getByRole("article");
    await page.getByRole("status").filter({ hasText: "tokens read" }).nth(1).waitFor();
    const classes = async (i) => (await answers.nth(i).getByRole("rowheader").allTextContents()).sort();
    assert.deepEqual(await classes(0), ["t10 t11", "t9"]);
    assert.deepEqual(await classes(1), [EVIL, "<script>1</script>", "plain"].sort());
    assert.deepEqual(new Map(sent.map((body) => [body.adapter, body.labels])), new Map([["first", ["t9", "t10 t11"]], ["labels", undefined]]));
  });
});

test("charts follow the traffic", async () => {
  await visit("live", async (page) => {
    const legend = (chart, line) =>
      page.locator("figure", { has: page.getByRole("heading", { name: chart }) }).locator("li", { hasText: line }).locator("b");
    const pixels = () => page.locator("figure canvas").evaluateAll((all) => all.map((canvas) => canvas.toDataURL()));
    await page.getByLabel("Every").selectOption("1");
    await until(async () => (await legend("Throughput", "Generated").textContent()) === "0", "idle");
    await until(async () => (await legend("Time to the first token", "p50").textContent()) === "–", "without requests");
    const before = await pixels();
    assert.equal(before.length, 6);
    const ask = (name) =>
      fetch(`${server.url}/v1/generate`, { method: "POST", body: JSON.stringify({ ...asked, adapter: name }) }).then((r) => r.text());
    await Promise.all(["first", "swap", undefined].flatMap((name) => [ask(name), ask(name)]));
    for (const [chart, line] of [
      ["Throughput", "Generated"],
      ["Throughput", "Prompt"],
      ["Time to the first token", "p50"],
      ["Time to the first token", "p95"],
      ["Time between tokens", "p95"],
      ["Batch size", "Mean"],
      ["Distinct adapters", "95 %"],
      ["Memory", "Base"],
      ["Memory", "Adapters"],
    ]) {
      await until(async () => /[1-9]/.test(await legend(chart, line).textContent()), `${chart}: ${line}`);
    }
    const later = await pixels();
    later.forEach((image, i) => assert.notEqual(image, before[i], `chart ${i} stands still`));
    // It reads what the server counts.
    const text = await (await fetch(`${server.url}/metrics`)).text();
    const base = Number(/^loramux_base_bytes (\S+)/m.exec(text)[1]);
    assert.equal(await legend("Memory", "Base").textContent(), `${(base / 1024).toFixed(base < 102400 ? 1 : 0)} KiB`);
  });
});

test("the calculator tells what it computes", async () => {
  await visit("hosting", async (page) => {
    const verdict = page.locator(".verdict");
    // 79 GiB of a GPU's 80 for copies of 15 + 2 + 1.5: four.
    assert.match(await verdict.textContent(), /^1 GPU in place of 25 for 100 tasks: 25 times less$/);
    await page.getByLabel("Tasks (N)").fill("9");
    await page.getByLabel("Price of a GPU an hour").fill("2");
    assert.match(await verdict.textContent(), /^1 GPU in place of 3 for 9 tasks/);
    const cells = page.getByRole("row").filter({ has: page.getByRole("rowheader", { name: "Cost an hour" }) }).getByRole("cell");
    assert.deepEqual(await cells.allTextContents(), ["6", "2"]);
    await page.getByText("Memory only.").waitFor();
    await page.getByText("copies a GPU holds = floor((GPU memory - reserve) / (weights + KV + overhead))").waitFor();
    // A base that no GPU holds alone.
    await page.getByLabel("Base model").selectOption({ label: "70B (Llama 3.1)" });
    await page.getByText("GPUs a copy takes = ceil(").waitFor();
    assert.match(await verdict.textContent(), /^2 GPUs in place of 18 for 9 tasks/);
    await page.getByLabel("Tasks (N)").fill("");
    await page.getByText("Every field needs a number").waitFor();
    await page.getByLabel("Tasks (N)").fill("50");
    await page.getByLabel("Logarithmic").check();
    await page.getByLabel("What to plot").selectOption("gpus");
    await page.getByRole("heading", { name: "GPUs over N" }).waitFor();
    assert.ok(await page.locator("figure canvas").last().isVisible());
  });
});

test("the keyboard alone is enough", async () => {
  await put(server.url, "keys", "llama/adapter_qv_r4", { revision: "keys" });
  await visit("adapters", async (page) => {
    const focused = () => page.evaluate(() => document.activeElement?.getAttribute("aria-label") ?? document.activeElement?.textContent);
    const press = (key) => page.keyboard.press(key);
    const tabTo = async (what) => {
      for (let i = 0; i < 150; i += 1) {
        if ((await focused())?.startsWith(what)) return;
        await press("Tab");
      }
      throw new Error(`Tab does not reach ${what}`);
    };
    page.on("filechooser", (chooser) => chooser.setFiles(adapterFiles("llama/adapter_all_r8")));
    await page.getByRole("button", { name: "Delete keys" }).waitFor();
    await press("Tab");
    assert.equal(await focused(), "Skip to the content");
    await press("Enter");
    await tabTo("Delete keys");
    // What has the focus shows it.
    const outline = await page.evaluate(() => getComputedStyle(document.activeElement).outlineStyle);
    assert.equal(outline, "solid");
    await press("Enter");
    await page.getByRole("dialog").waitFor();
    await press("Escape");
    await page.locator("dialog").waitFor({ state: "detached" });
    assert.equal(await focused(), "Delete keys");
    await press("Enter");
    await page.getByRole("dialog").waitFor();
    await tabTo("Delete");
    await press("Enter");
    await page.locator("dialog").waitFor({ state: "detached" });
    assert.equal(await adapter("keys"), undefined);
    // Files are chosen with it, too.
    await tabTo("choose files");
    await press("Enter");
    await page.getByRole("listitem").filter({ hasText: "adapter_model.safetensors" }).waitFor();
    await tabTo("Upload");
    await press("Shift+Tab");
    await page.keyboard.type("typed");
    await press("Enter");
    await until(() => adapter("typed"), "uploaded");
    await tabTo("Playground");
    await press("Enter");
    await page.getByRole("heading", { name: "Playground" }).waitFor();
    for (let i = 0; i < 40 && !(await page.evaluate(() => document.activeElement.tagName === "TEXTAREA")); i += 1) await press("Tab");
    await press("Control+a");
    await page.keyboard.type("t5 t6");
    await press("Control+Enter");
    await page.getByRole("status").filter({ hasText: "tokens" }).waitFor();
    // And a generation is stopped.
    await slowly(page, 1000);
    await press("Control+Enter");
    await page.getByRole("status").filter({ hasText: "running" }).waitFor();
    await press("Escape");
    await page.getByRole("status").filter({ hasText: "stopped" }).waitFor();
  });
});

test("light and dark follow the system until one is chosen", async () => {
  const background = (page) => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
  const brightness = async (page) => (await background(page)).match(/\d+/g).slice(0, 3).reduce((sum, v) => sum + Number(v), 0) / 3;
  await visit(
    "live",
    async (page) => {
      assert.ok((await brightness(page)) < 60);
      const canvas = page.locator("figure canvas").first();
      const dark = await canvas.evaluate((c) => c.toDataURL());
      await page.getByLabel("Theme").selectOption("light");
      assert.ok((await brightness(page)) > 200);
      assert.notEqual(await canvas.evaluate((c) => c.toDataURL()), dark);
      await page.reload();
      assert.ok((await brightness(page)) > 200, "the choice is forgotten");
      await page.getByLabel("Theme").selectOption("system");
      assert.ok((await brightness(page)) < 60);
      await page.emulateMedia({ colorScheme: "light" });
      assert.ok((await brightness(page)) > 200);
    },
    { colorScheme: "dark" },
  );
});

for (const colorScheme of ["light", "dark"]) {
  test(`axe finds nothing against the page in ${colorScheme}`, async () => {
    for (const view of VIEWS) {
      await visit(
        view,
        async (page) => {
          await page.waitForLoadState("networkidle").catch(() => {});
          if (view === "adapters") await page.getByRole("button", { name: "Replace swap" }).waitFor();
          assert.deepEqual(await axe(page), [], view);
        },
        { colorScheme },
      );
    }
  });
}

test("a narrow screen does not scroll sideways", async () => {
  for (const view of VIEWS) {
    await visit(
      view,
      async (page) => {
        await page.waitForTimeout(300);
        const [wide, seen] = await page.evaluate(() => [document.documentElement.scrollWidth, innerWidth]);
        assert.ok(wide <= seen, `${view}: ${wide} of ${seen}`);
      },
      { viewport: { width: 420, height: 800 } },
    );
  }
});

test("a server that does not answer is told, and the page goes on when it is back", async () => {
  await visit(
    "adapters",
    async (page) => {
      await page.getByRole("button", { name: "Replace swap" }).waitFor();
      await page.route("**/v1/adapters", (route) => route.abort());
      await page.getByText("the server could not be reached").waitFor();
      await page.unroute("**/v1/adapters");
      await page.getByText("the server could not be reached").waitFor({ state: "detached" });
    },
    { expected: /net::ERR_FAILED/ },
  );
});

test("a server that has gone silent is told, too", async () => {
  await visit("adapters", async (page) => {
    await page.getByRole("button", { name: "Replace swap" }).waitFor();
    const polled = /\/(v1\/adapters|metrics)$/;
    const held = [];
    await page.route(polled, (route) => {
      held.push(route);
    });
    await page.getByText("the server could not be reached").waitFor({ timeout: 30_000 });
    const asked = (path) => held.filter((route) => route.request().url().endsWith(path)).length;
    await until(() => asked("/v1/adapters") > 1 && asked("/metrics") > 1, "are both asked for again");
    await page.unroute(polled);
    // Those that the page has given up are gone.
    await Promise.all(held.map((route) => route.continue().catch(() => {})));
    await page.getByText("the server could not be reached").waitFor({ state: "detached" });
  });
});
