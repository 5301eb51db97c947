// uPlot with a legend of text, which keyboards and screen readers reach, and the style sheet's colours.

import { useEffect, useRef, useState } from "preact/hooks";
import uPlot from "uplot";

import { useStore } from "./store";
import { colour, colours } from "./theme";

export interface Line {
  label: string;
  /** Its colour in the style sheet. */
  colour: string;
  dashed?: boolean;
  fill?: boolean;
  /** In steps, the value of a point holding up to the next. */
  stepped?: boolean;
}

export interface ChartProps {
  title: string;
  note?: string;
  lines: Line[];
  /** x, then one row for each line. */
  data: (number | null)[][];
  format: (value: number) => string;
  /** Where x is not a time. */
  formatX?: (value: number) => string;
  /** Ends of x; absent: those of the data. */
  range?: [number, number];
  logarithmic?: boolean;
  /** Ticks at powers of two, for bytes. */
  binary?: boolean;
  sync?: string;
  height?: number;
  /** Whether it is on the screen, where it has a size. */
  shown: boolean;
  /** What the legend shows, where that is not what is drawn, as in a stack. */
  values?: (number | null)[][];
}

const POWERS = Array.from({ length: 50 }, (_, i) => 2 ** i);
/** Seconds are told where ticks are closer than minutes. */
const clock = (seconds: number, step: number) => new Date(seconds * 1000).toTimeString().slice(0, step < 60 ? 8 : 5);
const FONT = "11px system-ui, sans-serif";

export function Chart(props: ChartProps) {
  const { title, note, lines, data, format, shown, height = 190 } = props;
  const box = useRef<HTMLDivElement>(null);
  const plot = useRef<uPlot | null>(null);
  const [at, setAt] = useState<number | null>(null);
  const theme = useStore(colours);
  const latest = useRef(props);
  latest.current = props;
  const kind = lines.map((line) => line.label).join("|") + (props.logarithmic ? "log" : "");

  useEffect(() => {
    const host = box.current;
    if (!host || !shown) return;
    const ink = colour("muted");
    const grid = { stroke: colour("grid"), width: 1 };
    const axis = { stroke: ink, grid, ticks: { ...grid, size: 4 }, font: FONT };
    const { formatX, logarithmic, binary, sync } = latest.current;
    const distr = logarithmic ? { distr: 3 as const } : {};
    const options: uPlot.Options = {
      width: Math.max(host.clientWidth, 100),
      height,
      padding: [10, 24, 0, 0],
      legend: { show: false },
      cursor: {
        y: false,
        drag: { x: false, y: false },
        points: { size: 7 },
        ...(sync && { sync: { key: sync, setSeries: false } }),
      },
      scales: {
        x: { time: !formatX, ...distr, range: (_, min, max) => latest.current.range ?? [min, max] },
        y: logarithmic ? { ...distr, range: (_, min, max) => [min / 2, max * 1.5] } : { range: (_, __, max) => [0, max > 0 ? max * 1.08 : 1] },
      },
      axes: [
        {
          ...axis,
          size: 26,
          values: (_, ticks, __, ___, step) => ticks.map((v) => (v == null ? "" : formatX ? formatX(v) : clock(v, step))),
        },
        { ...axis, size: 62, ...(binary && { incrs: POWERS }), values: (_, ticks) => ticks.map((v) => (v == null ? "" : latest.current.format(v))) },
      ],
      series: [
        {},
        ...lines.map((line): uPlot.Series => ({
          label: line.label,
          stroke: colour(line.colour),
          width: 1.75,
          points: { show: false },
          spanGaps: false,
          ...(line.dashed && { dash: [5, 4] }),
          ...(line.fill && { fill: colour(`${line.colour}-fill`) }),
          ...(line.stepped && { paths: uPlot.paths.stepped!({ align: 1 }) }),
        })),
      ],
      hooks: { setCursor: [(u) => setAt(u.cursor.idx ?? null)] },
    };
    const made = new uPlot(options, latest.current.data as uPlot.AlignedData, host);
    plot.current = made;
    const resized = new ResizeObserver(() => {
      if (host.clientWidth > 0) made.setSize({ width: host.clientWidth, height });
    });
    resized.observe(host);
    return () => {
      resized.disconnect();
      made.destroy();
      plot.current = null;
    };
  }, [shown, theme, kind, height]);

  useEffect(() => plot.current?.setData(data as uPlot.AlignedData), [data]);

  const values = props.values ?? data.slice(1);
  const index = at ?? (data[0]?.length ?? 0) - 1;
  const x = data[0]?.[index];
  return (
    <figure class="card chart">
      <figcaption>
        <h3>{title}</h3>
        {note && <span class="note">{note}</span>}
        {at !== null && x != null && <span class="note at">{props.formatX ? props.formatX(x) : clock(x, 1)}</span>}
      </figcaption>
      <ul class="legend">
        {lines.map((line, i) => {
          const value = values[i]?.[index];
          return (
            <li key={line.label}>
              <i class={line.dashed ? "swatch dashed" : "swatch"} style={{ color: `var(--${line.colour})` }} />
              {line.label} <b>{value == null ? "–" : format(value)}</b>
            </li>
          );
        })}
      </ul>
      <div ref={box} class="plot" style={{ height: `${height}px` }} aria-hidden="true" />
    </figure>
  );
}
