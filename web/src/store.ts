// What the parts of the page share: the list of adapters, and the readings of the metrics.

import { useEffect, useState } from "preact/hooks";

import * as api from "./api";
import { parse } from "./metrics";
import { type Point, point } from "./points";

/** A value that components follow. */
export class Store<T> {
  private listeners = new Set<(value: T) => void>();

  constructor(public value: T) {}

  set(value: T) {
    this.value = value;
    for (const listener of this.listeners) listener(value);
  }

  subscribe(listener: (value: T) => void): () => void {
    this.listeners.add(listener);
    return () => this.listeners.delete(listener);
  }
}

export function useStore<T>(store: Store<T>): T {
  const [value, set] = useState(store.value);
  useEffect(() => {
    set(store.value);
    return store.subscribe(set);
  }, [store]);
  return value;
}

export const adapters = new Store<api.AdapterList | null>(null);
/** Why the last looks at the adapters and the metrics failed, where they did. */
export const trouble = new Store<{ adapters?: string; metrics?: string }>({});
/** In the order of time. */
export const points = new Store<Point[]>([]);
/** Seconds between readings of the metrics; 0 is none. */
export const interval = new Store(2);

/** Points are kept for this long, in seconds. */
export const HISTORY = 1800;
/** Seconds between looks at the adapters. */
const LIST_EVERY = 4;

async function attempt(what: "adapters" | "metrics", look: () => Promise<void>) {
  const outcome = await look().then(
    () => ({}),
    (error) => ({ [what]: api.describe(error) }),
  );
  const { [what]: _, ...others } = trouble.value;
  trouble.set({ ...others, ...outcome });
}

export const refreshAdapters = () => attempt("adapters", async () => adapters.set(await api.listAdapters()));

const readMetrics = () =>
  attempt("metrics", async () => {
    const next = point(parse(await api.metrics(), Date.now() / 1000));
    points.set([...points.value.filter((earlier) => earlier.time > next.time - HISTORY), next]);
  });

/** Polls for as long as the page is there, except that adapters are not looked at while it is hidden. */
export function poll() {
  const list = async () => {
    if (!document.hidden) await refreshAdapters();
    setTimeout(list, LIST_EVERY * 1000);
  };
  const metrics = async () => {
    const seconds = interval.value;
    if (seconds > 0) await readMetrics();
    setTimeout(metrics, (seconds || 1) * 1000);
  };
  void list();
  void metrics();
}
