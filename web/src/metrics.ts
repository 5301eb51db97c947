// The Prometheus text format, and what charts make of two readings of it.

/** A histogram's cumulative counts by upper bound, in ascending order; the last bound is infinity. */
export interface Histogram {
  bounds: number[];
  counts: number[];
  sum: number;
}

/** A reading: plain samples summed over their labels but those asked for, by name. */
export class Reading {
  constructor(
    /** Seconds. */
    readonly time: number,
    private readonly samples: Map<string, Sample[]>,
  ) {}

  has(name: string): boolean {
    return this.samples.has(name);
  }

  /** The sum of all series of a metric whose labels are as given. */
  value(name: string, labels: Record<string, string> = {}): number {
    const wanted = Object.entries(labels);
    const matching = this.samples.get(name)?.filter((s) => wanted.every(([key, value]) => s.labels[key] === value));
    return matching?.reduce((sum, s) => sum + s.value, 0) ?? 0;
  }

  /** The sum over those series whose labels pass. */
  sum(name: string, passes: (labels: Record<string, string>) => boolean): number {
    return this.samples.get(name)?.reduce((sum, s) => sum + (passes(s.labels) ? s.value : 0), 0) ?? 0;
  }

  histogram(name: string): Histogram {
    const buckets = new Map<number, number>();
    for (const { labels, value } of this.samples.get(`${name}_bucket`) ?? []) {
      const bound = number(labels["le"] ?? "");
      buckets.set(bound, (buckets.get(bound) ?? 0) + value);
    }
    const sorted = [...buckets].sort((a, b) => a[0] - b[0]);
    return { bounds: sorted.map((b) => b[0]), counts: sorted.map((b) => b[1]), sum: this.value(`${name}_sum`) };
  }
}

interface Sample {
  labels: Record<string, string>;
  value: number;
}

const number = (text: string) => (text === "+Inf" ? Infinity : text === "-Inf" ? -Infinity : Number(text));
const ESCAPES: Record<string, string> = { "\\n": "\n", '\\"': '"', "\\\\": "\\" };

export function parse(text: string, time: number): Reading {
  const samples = new Map<string, Sample[]>();
  for (const line of text.split("\n")) {
    const found = /^([a-zA-Z_:][\w:]*)(\{.*\})?\s+(\S+)/.exec(line);
    if (!found) continue;
    const labels: Record<string, string> = {};
    for (const [, key, value] of (found[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) {
      labels[key!] = value!.replace(/\\[\\n"]/g, (escape) => ESCAPES[escape]!);
    }
    const name = found[1]!;
    const sample = { labels, value: number(found[3]!) };
    const there = samples.get(name);
    if (there) there.push(sample);
    else samples.set(name, [sample]);
  }
  return new Reading(time, samples);
}

/** What came between two readings. After a restart of the server it is what came since. */
export function increase(before: number, now: number): number {
  return now >= before ? now - before : now;
}

export function between(before: Histogram, now: Histogram): Histogram {
  const restarted = (now.counts.at(-1) ?? 0) < (before.counts.at(-1) ?? 0);
  const earlier = (i: number) => (restarted ? 0 : (before.counts[i] ?? 0));
  return {
    bounds: now.bounds,
    counts: now.counts.map((count, i) => count - earlier(i)),
    sum: restarted ? now.sum : now.sum - before.sum,
  };
}

export function mean(h: Histogram): number | null {
  const count = h.counts.at(-1) ?? 0;
  return count > 0 ? h.sum / count : null;
}

/** The upper bound of the bucket that the quantile lies in, for counts, which are no more than that. */
export function quantileBound(h: Histogram, q: number): number | null {
  const total = h.counts.at(-1) ?? 0;
  if (total <= 0) return null;
  const i = h.counts.findIndex((count) => count >= q * total);
  return h.bounds[h.bounds[i] === Infinity ? i - 1 : i] ?? null;
}

/**
 * The quantile as Prometheus' histogram_quantile has it: linear within a bucket, and the last finite bound for what lies
 * beyond it. Null where there is no observation.
 */
export function quantile(h: Histogram, q: number): number | null {
  const total = h.counts.at(-1) ?? 0;
  if (total <= 0) return null;
  const rank = q * total;
  const i = h.counts.findIndex((count) => count >= rank);
  const upper = h.bounds[i]!;
  if (upper === Infinity) return h.bounds[i - 1] ?? null;
  const lower = i > 0 ? h.bounds[i - 1]! : 0;
  const below = i > 0 ? h.counts[i - 1]! : 0;
  const inside = h.counts[i]! - below;
  return inside > 0 ? lower + ((upper - lower) * (rank - below)) / inside : upper;
}
