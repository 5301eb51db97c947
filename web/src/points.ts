// What the page keeps of a reading of the metrics: a few numbers, however many adapters have series of their own.

import { type Histogram, type Reading, between, increase, mean, quantile, quantileBound } from "./metrics";

export type Point = ReturnType<typeof point>;

export function point(r: Reading) {
  // A tenant is told of its adapters, and nothing of the engine that it shares.
  const whole = r.has("loramux_base_bytes");
  const gauge = (name: string, labels?: Record<string, string>) => (whole ? r.value(name, labels) : null);
  const blocks = (state: string) => r.value("loramux_kv_blocks", { state });
  // A request that never came to name an adapter or the base has "-"; 499 is a client that hung up.
  const failed = (labels: Record<string, string>) => /^[45](?!99)/.test(labels["status"] ?? "");
  return {
    time: r.time,
    requests: r.sum("loramux_requests_total", (labels) => labels["adapter"] !== "-"),
    failures: r.sum("loramux_requests_total", failed),
    generated: r.value("loramux_generated_tokens_total"),
    prompt: r.value("loramux_prompt_tokens_total"),
    first: r.histogram("loramux_ttft_seconds"),
    gap: r.histogram("loramux_token_seconds"),
    batch: r.histogram("loramux_batch_sequences"),
    distinct: r.histogram("loramux_batch_adapters"),
    base: gauge("loramux_base_bytes"),
    adapters: gauge("loramux_adapter_bytes", { tier: "device" }),
    kv: whole ? blocks("used") * r.value("loramux_kv_block_bytes") : null,
    // Before the first step no blocks are told.
    kvShare: whole ? blocks("used") / Math.max(1, blocks("used") + blocks("cached") + blocks("free")) : null,
    loaded: gauge("loramux_adapters", { tier: "device" }),
    there: gauge("loramux_adapters", { tier: "disk" }),
    running: gauge("vllm:num_requests_running"),
    waiting: gauge("vllm:num_requests_waiting"),
  };
}

type Row = (number | null)[];
type Counter = "requests" | "failures" | "generated" | "prompt";
type Distribution = "first" | "gap" | "batch" | "distinct";

/** For each point but the first the one about `span` seconds before it. */
export function pairs(all: Point[], span: number): [Point, Point][] {
  let first = 0;
  return all.slice(1).map((now) => {
    while (first + 1 < all.length && all[first + 1]!.time <= now.time - span) first += 1;
    return [all[first]!, now];
  });
}

/** A counter's increase a second. */
export const rate = ([before, now]: [Point, Point], counter: Counter) =>
  increase(before[counter], now[counter]) / (now.time - before.time);

/** Rows for the charts, x first; rates and distributions are of what came in `span` seconds. */
export function series(all: Point[], span: number) {
  const both = pairs(all, span);
  const rates = (counter: Counter): Row => both.map((pair) => rate(pair, counter));
  const over = (name: Distribution, of: (h: Histogram) => number | null): Row =>
    both.map(([before, now]) => of(between(before[name], now[name])));
  const quantiles = (name: Distribution) => [over(name, (h) => quantile(h, 0.5)), over(name, (h) => quantile(h, 0.95))];
  const counts = (name: Distribution) => [over(name, mean), over(name, (h) => quantileBound(h, 0.95))];
  const now = (of: (point: Point) => number | null): Row => both.map(([, point]) => of(point));
  const sum = (...parts: (number | null)[]) => parts.reduce<number | null>((all, n) => (all === null || n === null ? null : all + n), 0);
  const times = now((p) => p.time);
  return {
    throughput: [times, rates("generated"), rates("prompt")],
    first: [times, ...quantiles("first")],
    gap: [times, ...quantiles("gap")],
    batch: [times, ...counts("batch")],
    distinct: [times, ...counts("distinct")],
    /** Stacked, the sum of all first. */
    memory: [times, now((p) => sum(p.base, p.adapters, p.kv)), now((p) => sum(p.base, p.adapters)), now((p) => p.base)],
    parts: [now((p) => p.kv), now((p) => p.adapters), now((p) => p.base)],
  };
}
