// What the parts of the page share: the list of adapters, the readings of the metrics, and whether the server wants a key.

import { useEffect, useState } from "preact/hooks";

import * as api from "./api";
import * as key from "./key";
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

export interface Trouble {
  text: string;
  /** The key is not for it. */
  forbidden: boolean;
}

export const adapters = new Store<api.AdapterList | null>(null);
/** Why the last looks at the adapters and the metrics failed, where they did. */
export const trouble = new Store<{ adapters?: Trouble; metrics?: Trouble }>({});
/** What the server says in place of answers while it wants an API key, or another one. Nothing is polled then. */
export const locked = new Store<string | null>(null);
/** In the order of time. */
export const points = new Store<Point[]>([]);
/** Seconds between readings of the metrics; 0 is none. */
export const interval = new Store(2);

/** Points are kept for this long, in seconds. */
export const HISTORY = 1800;
/** Seconds between looks at the adapters. */
const LIST_EVERY = 4;

async function attempt<T>(what: "adapters" | "metrics", look: () => Promise<T>, take: (seen: T) => void) {
  const shown = key.current();
  let failure: unknown;
  let seen: T | undefined;
  try {
    seen = await look();
  } catch (error) {
    failure = error;
  }
  // What an earlier key was told, or not told.
  if (key.current() !== shown) return;
  const { [what]: _, ...others } = trouble.value;
  const status = failure instanceof api.Refusal ? failure.status : null;
  locked.set(status === 401 ? api.describe(failure) : null);
  if (failure === undefined) take(seen as T);
  const told = failure !== undefined && status !== 401;
  trouble.set(told ? { ...others, [what]: { text: api.describe(failure), forbidden: status === 403 } } : others);
}

export const refreshAdapters = () => attempt("adapters", api.listAdapters, (list) => adapters.set(list));

const readMetrics = () =>
  attempt("metrics", api.metrics, (text) => {
    const next = point(parse(text, Date.now() / 1000));
    points.set([...points.value.filter((earlier) => earlier.time > next.time - HISTORY), next]);
  });

/** Goes on with this key, and with nothing that another was told. */
export async function unlock(next: string) {
  key.keep(next);
  adapters.set(null);
  points.set([]);
  trouble.set({});
  await refreshAdapters();
}

/** Polls for as long as the page is there, except that adapters are not looked at while it is hidden. */
export function poll() {
  const list = async () => {
    if (!document.hidden && locked.value === null) await refreshAdapters();
    setTimeout(list, LIST_EVERY * 1000);
  };
  const metrics = async () => {
    const seconds = interval.value;
    // A key's scopes stay as they are.
    if (seconds > 0 && locked.value === null && !trouble.value.metrics?.forbidden) await readMetrics();
    setTimeout(metrics, (seconds || 1) * 1000);
  };
  // By the list it is known whether the key is good, or needed.
  void list().then(metrics);
}
