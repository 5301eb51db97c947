// The order of the table of adapters.

import type { Adapter } from "./api";

export type Column = "name" | "tier" | "rank" | "bytes" | "memory_bytes" | "requests" | "last_used" | "in_flight";

/** Adapters by one column; those of which the server does not tell it come last, whichever way the others go. */
export function ordered(adapters: Adapter[], column: Column, down: boolean): Adapter[] {
  const compare = (a: Adapter, b: Adapter) => {
    const [x, y] = [a[column], b[column]];
    if (x === undefined || y === undefined) return Number(x === undefined) - Number(y === undefined);
    // Null is less than any number: not in memory, never used.
    const order = typeof x === "string" ? x.localeCompare(String(y)) : (x ?? -1) - Number(y ?? -1);
    return down ? -order : order;
  };
  return [...adapters].sort(compare);
}
