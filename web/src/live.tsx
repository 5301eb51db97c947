import { useMemo, useState } from "preact/hooks";

import { Chart, type Line } from "./chart";
import { bytes, duration, short } from "./format";
import { type Histogram, type Reading, between, increase, mean, quantile, quantileBound } from "./metrics";
import { interval, readings, useStore } from "./store";

/** Quantiles and rates are over what came in so many seconds, so that a single request still shows. */
const SPAN = 10;

const GENERATED: Line[] = [
  { label: "Generated", colour: "series-1", fill: true },
  { label: "Prompt", colour: "series-2" },
];
const LATENCY: Line[] = [
  { label: "p50", colour: "series-1" },
  { label: "p95", colour: "series-3", dashed: true },
];
const BATCH: Line[] = [
  { label: "Mean", colour: "series-1", fill: true },
  { label: "95 % at most", colour: "series-3", dashed: true },
];
// The largest first: each is drawn over the one before.
const MEMORY: Line[] = [
  { label: "KV cache in use", colour: "series-3", fill: true },
  { label: "Adapters", colour: "series-2", fill: true },
  { label: "Base", colour: "series-1", fill: true },
];

type Row = (number | null)[];

/** For each reading the one about `SPAN` seconds before it. */
function pairs(all: Reading[]): [Reading, Reading][] {
  let first = 0;
  return all.slice(1).map((now) => {
    while (first + 1 < all.length && all[first + 1]!.time <= now.time - SPAN) first += 1;
    return [all[first]!, now];
  });
}

function series(all: Reading[]) {
  const both = pairs(all);
  const rate = (name: string): Row =>
    both.map(([before, now]) => increase(before.value(name), now.value(name)) / (now.time - before.time));
  const over = (name: string, of: (h: Histogram) => number | null): Row =>
    both.map(([before, now]) => of(between(before.histogram(name), now.histogram(name))));
  const quantiles = (name: string) => [over(name, (h) => quantile(h, 0.5)), over(name, (h) => quantile(h, 0.95))];
  const batch = (name: string) => [over(name, mean), over(name, (h) => quantileBound(h, 0.95))];
  const now = (of: (reading: Reading) => number): Row => both.map(([, reading]) => of(reading));
  const kv = now((r) => r.value("loramux_kv_blocks", { state: "used" }) * r.value("loramux_kv_block_bytes"));
  const adapters = now((r) => r.value("loramux_adapter_bytes", { tier: "device" }));
  const base = now((r) => r.value("loramux_base_bytes"));
  const sum = (...rows: Row[]): Row => base.map((_, i) => rows.reduce((total, row) => total + (row[i] ?? 0), 0));
  const times: Row = both.map(([, reading]) => reading.time);
  return {
    throughput: [times, rate("loramux_generated_tokens_total"), rate("loramux_prompt_tokens_total")],
    first: [times, ...quantiles("loramux_ttft_seconds")],
    gap: [times, ...quantiles("loramux_token_seconds")],
    batch: [times, ...batch("loramux_batch_sequences")],
    distinct: [times, ...batch("loramux_batch_adapters")],
    memory: [times, sum(base, adapters, kv), sum(base, adapters), base],
    parts: [kv, adapters, base],
  };
}

export function Live({ shown }: { shown: boolean }) {
  const all = useStore(readings);
  const seconds = useStore(interval);
  const [minutes, setMinutes] = useState(5);
  const end = all.at(-1)?.time ?? Date.now() / 1000;
  const recent = useMemo(() => {
    // One span more, for the first points' rates.
    return all.filter((reading) => reading.time >= end - minutes * 60 - SPAN);
  }, [all, minutes]);
  const data = useMemo(() => (shown ? series(recent) : null), [recent, shown]);
  const common = { shown, sync: "live", range: [end - minutes * 60, end] as [number, number] };
  return (
    <>
      <div class="bar">
        <h2>Live</h2>
        <span class="note">From /metrics. Rates, means and quantiles are over the last {SPAN} s.</span>
        <label>
          Every
          <select value={seconds} onChange={(event) => interval.set(Number(event.currentTarget.value))}>
            <option value="1">1 s</option>
            <option value="2">2 s</option>
            <option value="5">5 s</option>
            <option value="0">paused</option>
          </select>
        </label>
        <label>
          Show
          <select value={minutes} onChange={(event) => setMinutes(Number(event.currentTarget.value))}>
            <option value="1">1 min</option>
            <option value="5">5 min</option>
            <option value="30">30 min</option>
          </select>
        </label>
      </div>
      <Tiles all={recent} />
      {data && (
        <div class="charts">
          <Chart
            {...common}
            title="Throughput"
            note="tokens a second"
            lines={GENERATED}
            data={data.throughput}
            format={short}
          />
          <Chart
            {...common}
            title="Time to the first token"
            lines={LATENCY}
            data={data.first}
            format={duration}
          />
          <Chart
            {...common}
            title="Time between tokens"
            lines={LATENCY}
            data={data.gap}
            format={duration}
          />
          <Chart
            {...common}
            title="Batch size"
            note="sequences in a step"
            lines={BATCH}
            data={data.batch}
            format={short}
          />
          <Chart
            {...common}
            title="Distinct adapters"
            note="in a step"
            lines={BATCH}
            data={data.distinct}
            format={short}
          />
          <Chart
            {...common}
            title="Memory"
            note="stacked"
            lines={MEMORY}
            data={data.memory}
            values={data.parts}
            format={bytes}
            binary
          />
        </div>
      )}
    </>
  );
}

function Tiles({ all }: { all: Reading[] }) {
  const now = all.at(-1);
  const before = pairs(all).at(-1)?.[0];
  if (!now) return null;
  const asked = (labels: Record<string, string>) => labels["adapter"] !== "-";
  // 499 is a client that hung up.
  const failed = (labels: Record<string, string>) => /^[45](?!99)/.test(labels["status"] ?? "");
  const rate = (passes: (labels: Record<string, string>) => boolean) =>
    before
      ? increase(before.sum("loramux_requests_total", passes), now.sum("loramux_requests_total", passes)) /
        (now.time - before.time)
      : 0;
  const blocks = (state: string) => now.value("loramux_kv_blocks", { state });
  const total = blocks("used") + blocks("cached") + blocks("free");
  const tiles: [string, string][] = [
    ["Requests a second", short(rate(asked))],
    ["Errors a second", short(rate(failed))],
    ["Running", String(now.value("vllm:num_requests_running"))],
    ["Waiting", String(now.value("vllm:num_requests_waiting"))],
    ["Adapters in memory", `${now.value("loramux_adapters", { tier: "device" })} of ${now.value("loramux_adapters", { tier: "disk" })}`],
    ["KV cache in use", total > 0 ? `${short((100 * blocks("used")) / total)} %` : "–"],
  ];
  return (
    <dl class="tiles">
      {tiles.map(([name, value]) => (
        <div key={name}>
          <dt>{name}</dt>
          <dd>{value}</dd>
        </div>
      ))}
    </dl>
  );
}
