// What the parts of the page share: the list of adapters, and the readings of the metrics.

import { useEffect, useState } from "preact/hooks";

import * as api from "./api";
import { type Reading, parse } from "./metrics";

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
/** Why the last poll failed; null after one that did not. */
export const trouble = new Store<string | null>(null);
/** In the order of time. */
export const readings = new Store<Reading[]>([]);
/** Seconds between readings; 0 is none. */
export const interval = new Store(2);

/** Readings are kept for this long, in seconds. */
export const HISTORY = 1800;
/** Seconds between looks at the adapters. */
const LIST_EVERY = 4;

export async function refreshAdapters() {
  try {
    adapters.set(await api.listAdapters());
    trouble.set(null);
  } catch (error) {
    trouble.set(api.describe(error));
  }
}

async function read() {
  try {
    const text = await api.metrics();
    const reading = parse(text, Date.now() / 1000);
    const kept = readings.value.filter((earlier) => earlier.time > reading.time - HISTORY);
    readings.set([...kept, reading]);
    trouble.set(null);
  } catch (error) {
    trouble.set(api.describe(error));
  }
}

/** Polls for as long as the page is there, except that adapters are not looked at while it is hidden. */
export function poll() {
  const list = async () => {
    if (!document.hidden) await refreshAdapters();
    setTimeout(list, LIST_EVERY * 1000);
  };
  const metrics = async () => {
    const seconds = interval.value;
    if (seconds > 0) await read();
    setTimeout(metrics, (seconds || 1) * 1000);
  };
  void list();
  void metrics();
}
