import { useMemo, useState } from "preact/hooks";

import { Chart, type Line } from "./chart";
import { bytes, count, duration, known, short } from "./format";
import { type Point, pairs, rate, series } from "./points";
import { interval, points, trouble, useStore } from "./store";

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

export function Live({ shown }: { shown: boolean }) {
  const all = useStore(points);
  const seconds = useStore(interval);
  const { metrics } = useStore(trouble);
  const [minutes, setMinutes] = useState(5);
  const end = all.at(-1)?.time ?? Date.now() / 1000;
  // A tenant is told nothing of the engine that it shares.
  const whole = all.at(-1)?.base !== null;
  const recent = useMemo(() => {
    // One span more, for the first points' rates.
    return all.filter((point) => point.time >= end - minutes * 60 - SPAN);
  }, [all, minutes]);
  const data = useMemo(() => (shown ? series(recent, SPAN) : null), [recent, shown]);
  const common = { shown, sync: "live", range: [end - minutes * 60, end] as [number, number] };
  return (
    <>
      <div class="bar">
        <h2>Live</h2>
        <span class="note">
          From /metrics{!whole && ", of the tenant's adapters alone"}. Rates, means and quantiles are over the last {SPAN} s.
        </span>
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
      <div aria-live="polite">{metrics?.forbidden && <p class="alert bad">{metrics.text}</p>}</div>
      <Tiles all={recent} />
      {data && !metrics?.forbidden && (
        <div class="charts">
          <Chart
            {...common}
            title="Throughput"
            note="tokens a second"
            lines={GENERATED}
            data={data.throughput}
            format={short}
          />
          {whole && (
            <>
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
            </>
          )}
        </div>
      )}
    </>
  );
}

function Tiles({ all }: { all: Point[] }) {
  const pair = pairs(all, SPAN).at(-1);
  const now = all.at(-1);
  if (!now) return null;
  const tiles: [string, string][] = [
    ["Requests a second", short(pair ? rate(pair, "requests") : 0)],
    ["Errors a second", short(pair ? rate(pair, "failures") : 0)],
    ["Running", known(now.running, count)],
    ["Waiting", known(now.waiting, count)],
    ["Adapters in memory", known(now.loaded, (n) => `${count(n)} of ${known(now.there, count)}`)],
    ["KV cache in use", known(now.kvShare, (share) => `${short(100 * share)} %`)],
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
