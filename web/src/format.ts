// Numbers and times for people.

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

export function bytes(n: number): string {
  let unit = 0;
  while (n >= 1024 && unit < UNITS.length - 1) {
    n /= 1024;
    unit += 1;
  }
  return `${unit === 0 || n >= 100 ? n.toFixed(0) : n.toFixed(1)} ${UNITS[unit]}`;
}

/** What is not known is a dash. */
export const known = <T>(value: T | null | undefined, show: (value: T) => string) => (value == null ? "–" : show(value));

export const count = (n: number) => n.toLocaleString("en-GB");

/** About three digits. */
export function short(n: number): string {
  if (n !== 0 && Math.abs(n) < 1) return n.toPrecision(2);
  return n.toLocaleString("en-GB", { maximumFractionDigits: n < 10 ? 2 : n < 100 ? 1 : 0 });
}

/** Seconds as a duration. */
export function duration(seconds: number): string {
  if (seconds < 1) return `${short(seconds * 1000)} ms`;
  return seconds < 120 ? `${short(seconds)} s` : `${short(seconds / 60)} min`;
}

/** How long ago a Unix time was. */
export function ago(then: number, now: number): string {
  const seconds = Math.max(0, now - then);
  if (seconds < 5) return "just now";
  if (seconds < 60) return `${Math.floor(seconds)} s ago`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ago`;
  return `${Math.floor(seconds / 86400)} d ago`;
}

export const date = (then: number) => new Date(then * 1000).toLocaleString();
export const money = (n: number) => n.toLocaleString("en-GB", { maximumFractionDigits: n < 100 ? 2 : 0 });
