// What the page computes, without a browser.

import assert from "node:assert/strict";
import { after, test } from "node:test";

import { createServer } from "vite";

const vite = await createServer({ configFile: false, server: { middlewareMode: true, ws: false }, appType: "custom", logLevel: "error" });
after(() => vite.close());
const load = (name) => vite.ssrLoadModule(`/src/${name}.ts`);
const hosting = await load("hosting");
const metrics = await load("metrics");
const points = await load("points");
const api = await load("api");
const files = await load("files");
const format = await load("format");
const { ordered } = await load("order");

const { GIB } = hosting;
const shape = (name) => hosting.SHAPES.find((s) => s.name.startsWith(name));

test("shapes have the parameters that their models have", () => {
  const published = { "1B": 1235814400, "7B": 6738415616, "8B": 8030261248, "13B": 13015864320, "70B": 70553706496 };
  for (const [name, count] of Object.entries(published)) assert.equal(hosting.parameters(shape(name)), count, name);
  // Rank 16 on q and v of Llama 2 7B, as PEFT prints it.
  assert.equal(hosting.adapterParameters(shape("7B"), 16, "qv"), 8388608);
  // And on all linear layers of Llama 3.1 8B.
  assert.equal(hosting.adapterParameters(shape("8B"), 16, "all"), 41943040);
  assert.equal(hosting.kvBytesPerToken(shape("8B")), 131072);
});

test("GPUs hold what the formula says", () => {
  const setting = { gpuMemory: 80 * GIB, reserve: GIB, weights: 15 * GIB, kvCopy: 2 * GIB, kvShared: 8 * GIB, overhead: GIB, adapter: GIB / 16 };
  assert.deepEqual(hosting.copies(setting), { gpus: 1, tasks: 4 });
  assert.deepEqual(hosting.shared(setting), { gpus: 1, tasks: 55 * 16 });
  assert.equal(hosting.gpusFor({ gpus: 1, tasks: 4 }, 9), 3);
  // A base larger than a GPU: 140 + 8 of 24 - 1 - 1 a GPU.
  const large = { ...setting, gpuMemory: 24 * GIB, weights: 140 * GIB };
  assert.deepEqual(hosting.copies(large), { gpus: 7, tasks: 1 });
  assert.deepEqual(hosting.shared(large), { gpus: 7, tasks: (154 - 148) * 16 });
  assert.equal(hosting.gpusFor({ gpus: 7, tasks: 1 }, 3), 21);
  // Nothing fits where a process' overhead does not, and a base that just fits has no room for an adapter.
  assert.equal(hosting.copies({ ...setting, gpuMemory: 2 * GIB }), null);
  assert.equal(hosting.shared({ ...setting, gpuMemory: 2 * GIB }), null);
  assert.equal(hosting.shared({ ...setting, gpuMemory: 25 * GIB }).gpus, 2);
});

test("metrics are read with their labels", () => {
  const text = [
    "# HELP a What it is",
    'a{x="1"} 2',
    'a{x="quote \\" slash \\\\ line \\n, }",y="b"} 3',
    "b 1.5e3",
    'h_bucket{le="1"} 2',
    'h_bucket{le="2"} 6',
    'h_bucket{le="+Inf"} 8',
    "h_sum 14",
    "h_count 8",
  ].join("\n");
  const reading = metrics.parse(text, 5);
  assert.equal(reading.value("a"), 5);
  assert.equal(reading.value("a", { x: 'quote " slash \\ line \n, }' }), 3);
  assert.equal(reading.value("b"), 1500);
  assert.equal(reading.value("none"), 0);
  assert.deepEqual(reading.histogram("h"), { bounds: [1, 2, Infinity], counts: [2, 6, 8], sum: 14 });
});

test("quantiles come from what was added between two readings", () => {
  const h = (counts, sum) => ({ bounds: [1, 2, Infinity], counts, sum });
  const delta = metrics.between(h([10, 10, 10], 3), h([12, 16, 18], 17));
  assert.deepEqual(delta, h([2, 6, 8], 14));
  assert.equal(metrics.quantile(delta, 0.25), 1);
  assert.equal(metrics.quantile(delta, 0.5), 1.5);
  // What lies beyond the last bound is told as that bound.
  assert.equal(metrics.quantile(delta, 0.99), 2);
  assert.equal(metrics.quantileBound(delta, 0.5), 2);
  assert.equal(metrics.quantileBound(delta, 0.99), 2);
  assert.equal(metrics.mean(delta), 1.75);
  // Nothing came; and after a restart counts begin anew.
  assert.equal(metrics.quantile(metrics.between(delta, delta), 0.5), null);
  assert.deepEqual(metrics.between(h([10, 10, 10], 3), h([1, 2, 2], 4)), h([1, 2, 2], 4));
  assert.equal(metrics.increase(10, 3), 3);
});

test("a point of a chart is of what came in the seconds before it", () => {
  const reading = (time) => {
    const n = 10 * time;
    const lines = [
      `loramux_generated_tokens_total{adapter="a"} ${n}`,
      `loramux_generated_tokens_total{adapter="b"} ${n}`,
      `loramux_requests_total{adapter="a",status="200"} ${time}`,
      `loramux_requests_total{adapter="a",status="499"} ${time}`,
      `loramux_requests_total{adapter="-",status="404"} ${time}`,
      `loramux_ttft_seconds_bucket{le="1"} ${n}`,
      `loramux_ttft_seconds_bucket{le="+Inf"} ${n}`,
      "loramux_base_bytes 100",
      'loramux_adapter_bytes{tier="device"} 20',
      'loramux_adapter_bytes{tier="disk"} 50',
      'loramux_kv_blocks{state="used"} 3',
      'loramux_kv_blocks{state="cached"} 1',
      "loramux_kv_block_bytes 2",
    ];
    return points.point(metrics.parse(lines.join("\n"), time));
  };
  const all = [0, 2, 4, 6, 8, 10, 12, 14].map(reading);
  assert.deepEqual(points.pairs(all, 10).map(([before, now]) => now.time - before.time), [2, 4, 6, 8, 10, 10, 10]);
  const rows = points.series(all, 10);
  assert.deepEqual(rows.throughput[1], Array(7).fill(20));
  assert.deepEqual(rows.first[1], Array(7).fill(0.5));
  assert.deepEqual([rows.memory[1][0], rows.memory[2][0], rows.memory[3][0]], [126, 120, 100]);
  const last = points.pairs(all, 10).at(-1);
  assert.deepEqual([points.rate(last, "requests"), points.rate(last, "failures"), all[0].kvShare], [2, 1, 0.75]);
});

test("a tenant's metrics leave out what is all tenants'", () => {
  const reading = (time) =>
    points.point(metrics.parse(`loramux_requests_total{adapter="mine",status="200"} ${time}\nloramux_generated_tokens_total{adapter="mine"} ${9 * time}`, time));
  const all = [0, 2, 4].map(reading);
  const { base, adapters, kv, kvShare, loaded, there, running, waiting, requests } = all.at(-1);
  assert.deepEqual([base, adapters, kv, kvShare, loaded, there, running, waiting, requests], [...Array(8).fill(null), 4]);
  const rows = points.series(all, 10);
  assert.deepEqual(rows.throughput.slice(1), [[9, 9], [0, 0]]);
  for (const row of [...rows.memory.slice(1), ...rows.parts, ...rows.first.slice(1), ...rows.batch.slice(1)]) assert.deepEqual(row, [null, null]);
});

test("what is not told of an adapter comes last, whichever way the others go", () => {
  const told = (name, tier, memory_bytes, last_used) => ({ name, tier, memory_bytes, last_used });
  const all = [told("a"), told("b", "disk", null, 5), told("c"), told("d", "device", 7, null), told("e", "device", 3, 9)];
  const names = (column, down) => ordered(all, column, down).map((a) => a.name).join("");
  assert.deepEqual(["name", "tier", "memory_bytes", "last_used"].map((column) => names(column, false)), ["abcde", "debac", "bedac", "dbeac"]);
  assert.deepEqual(["name", "tier", "memory_bytes", "last_used"].map((column) => names(column, true)), ["edcba", "bdeac", "debac", "ebdac"]);
  assert.equal(all.map((a) => a.name).join(""), "abcde");
});

test("events are whole however the bytes are cut", async () => {
  const bytes = new TextEncoder().encode('data: {"text":"é🎉"}\n\ndata: [DONE]\n\n');
  for (let size = 1; size <= bytes.length; size += 1) {
    const body = new ReadableStream({
      start(controller) {
        for (let at = 0; at < bytes.length; at += size) controller.enqueue(bytes.slice(at, at + size));
        controller.close();
      },
    });
    const seen = [];
    for await (const data of api.events(body)) seen.push(data);
    assert.deepEqual(seen, ['{"text":"é🎉"}', "[DONE]"]);
  }
});

test("an error's message is the server's, whoever answers", () => {
  const message = "<b>q_proj</b> is [8, 4], expected [8, 64]";
  assert.equal(api.refusal(422, JSON.stringify({ error: { message } })).message, message);
  assert.equal(api.refusal(502, "Bad Gateway\n").message, "Bad Gateway");
  assert.equal(api.refusal(502, "").message, "the server answered with status 502");
  assert.equal(api.refusal(500, '"text"').message, '"text"');
});

test("of a folder what the server takes is sent", () => {
  const file = (name, path = "") => Object.assign(new File(["x"], name), { webkitRelativePath: path });
  const names = (chosen) => chosen.files.map((f) => f.name);
  const folder = files.choose([file("adapter_config.json", "mine/adapter_config.json"), file("README.md", "mine/README.md")]);
  assert.deepEqual([names(folder), folder.leftOut, folder.suggestion], [["adapter_config.json"], ["README.md"], "mine"]);
  assert.equal(files.choose([file("my adapter.tar.gz")]).suggestion, "my-adapter");
  assert.equal(files.choose([file("tales-f16.gguf")]).suggestion, "tales-f16");
  // Weights that it does not take are for it to refuse.
  assert.deepEqual(names(files.choose([file("adapter_model.bin"), file("adapter_model-00001-of-00002.safetensors")])).length, 2);
  assert.deepEqual([...files.form([file("a.zip"), file("labels.json")]).keys()], ["archive", "file"]);
});

test("numbers are short", () => {
  assert.deepEqual([undefined, null, 0].map((n) => format.known(n, format.bytes)), ["–", "–", "0 B"]);
  assert.deepEqual([0, 1023, 1024, 10 * 1024, 3 * 2 ** 30].map(format.bytes), ["0 B", "1023 B", "1.0 KiB", "10.0 KiB", "3.0 GiB"]);
  assert.deepEqual([0.0123, 1.5, 200].map(format.duration), ["12.3 ms", "1.5 s", "3.33 min"]);
  assert.deepEqual([2, 65, 7300, 90000].map((n) => format.ago(1e9 - n, 1e9)), ["just now", "1 min ago", "2 h ago", "1 d ago"]);
});
