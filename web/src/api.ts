// The server's own routes. Paths are relative, so that the page also works behind a proxy that adds a prefix.

import * as key from "./key";

/** What is optional is not told to a tenant of adapters that are everybody's. */
export interface Adapter {
  name: string;
  /** Empty, as what follows it is, until it is fetched: in the tier `remote`. */
  generation: string;
  /** `directory`, `store`, or the URL that it is fetched from. */
  source: string;
  tier?: "device" | "disk" | "remote";
  rank: number;
  lora_alpha: number;
  target_modules: string[];
  labels: string[] | null;
  parameters: number;
  /** Size of its files. */
  bytes: number;
  /** Size in memory; null where it is on disk only. */
  memory_bytes?: number | null;
  pinned: boolean;
  in_flight?: number;
  requests?: number;
  /** Unix seconds. */
  last_used?: number | null;
  created: number;
}

export interface AdapterList {
  base: string;
  adapters: Adapter[];
  /** Bytes that adapters take in memory, and may take. Not told to tenants. */
  memory?: { used: number; limit: number };
}

export interface Usage {
  prompt_tokens: number;
  completion_tokens: number;
  prompt_tokens_details: { cached_tokens: number };
}

export interface Classified {
  generation: string | null;
  results: { label: string; score: number; scores: Record<string, number> }[];
  usage: Usage;
}

/** One event of a streamed generation. The last one has `usage`. */
export interface Piece {
  text: string;
  generation?: string | null;
  finish_reason?: string | null;
  usage?: Usage;
}

/** What the server answered in place of what was asked for. `message` is the server's, as it is. */
export class Refusal extends Error {
  constructor(
    readonly status: number,
    message: string,
  ) {
    super(message);
  }
}

/** The message of an error in the server's form, or what else there is to tell. */
export function refusal(status: number, text: string): Refusal {
  try {
    const message: unknown = JSON.parse(text)?.error?.message;
    if (typeof message === "string") return new Refusal(status, message);
  } catch {
    // Not the server's form: something between here and there has answered.
  }
  return new Refusal(status, text.trim().slice(0, 500) || `the server answered with status ${status}`);
}

/** What went wrong, for people. */
export function describe(error: unknown): string {
  if (error instanceof Refusal) return error.message;
  return `the server could not be reached (${error instanceof Error ? error.message : String(error)})`;
}

async function answer(path: string, init?: RequestInit & { headers?: Record<string, string> }): Promise<Response> {
  const response = await fetch(path, { ...init, headers: { ...init?.headers, ...key.header() } });
  if (!response.ok) throw refusal(response.status, await response.text());
  return response;
}

const json = async <T>(...request: Parameters<typeof answer>): Promise<T> => (await answer(...request)).json() as Promise<T>;

const post = (body: unknown, signal?: AbortSignal) => ({
  method: "POST",
  headers: { "Content-Type": "application/json" },
  body: JSON.stringify(body),
  ...(signal && { signal }),
});

const path = (name: string, more = "") => `v1/adapters/${encodeURIComponent(name)}${more}`;
const match = (generation: string) => ({ "If-Match": `"${generation}"` });

/** For what is polled: a connection that has gone silent does not fail by itself. */
const soon = () => ({ signal: AbortSignal.timeout(15_000) });

export const listAdapters = () => json<AdapterList>("v1/adapters", soon());
export const metrics = async () => (await answer("metrics", soon())).text();
export const setPinned = (name: string, pinned: boolean) =>
  json<Adapter>(path(name, "/pin"), { method: pinned ? "PUT" : "DELETE" });
export const unload = (name: string) => json<Adapter>(path(name, "/unload"), { method: "POST" });
export const remove = (name: string, generation: string) =>
  json<Adapter>(path(name), { method: "DELETE", headers: match(generation) });
export const classify = (body: object, signal: AbortSignal) => json<Classified>("v1/classify", post(body, signal));

/** Uploads under a new name or, with the generation that is there, in its place. Progress is from 0 to 1. */
export function upload(
  name: string,
  form: FormData,
  generation: string | null,
  progress: (share: number) => void,
  signal: AbortSignal,
): Promise<Adapter> {
  return new Promise((resolve, reject) => {
    // Not fetch, which does not tell how far an upload is.
    const request = new XMLHttpRequest();
    request.upload.onprogress = (event) => event.lengthComputable && progress(event.loaded / event.total);
    request.onload = () => {
      if (request.status >= 300) {
        reject(refusal(request.status, request.responseText));
        return;
      }
      try {
        resolve(JSON.parse(request.responseText) as Adapter);
      } catch {
        // Something between here and there has answered.
        reject(new Error("the answer is not the server's"));
      }
    };
    request.onerror = () => reject(new Error("the connection broke"));
    request.onabort = () => reject(new DOMException("stopped", "AbortError"));
    signal.addEventListener("abort", () => request.abort());
    request.open("PUT", path(name));
    const condition: Record<string, string> = generation === null ? { "If-None-Match": "*" } : match(generation);
    const headers = { ...condition, ...key.header() };
    for (const [name, value] of Object.entries(headers)) request.setRequestHeader(name, value);
    request.send(form);
  });
}

/** The data of server-sent events as they arrive. */
export async function* events(body: ReadableStream<Uint8Array>): AsyncGenerator<string> {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    rest += decoder.decode(value, { stream: !done });
    const parts = rest.split("\n\n");
    rest = parts.pop() ?? "";
    for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
    if (done) return;
  }
}

/** A generation, piece by piece. An error within the stream is thrown like one before it. */
export async function* generate(body: object, signal: AbortSignal): AsyncGenerator<Piece> {
  const response = await answer("v1/generate", post({ ...body, stream: true }, signal));
  if (!response.body) throw new Error("the answer has no body");
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const piece: unknown = JSON.parse(data);
    if (piece && typeof piece === "object" && "error" in piece) throw refusal(200, data);
    yield piece as Piece;
  }
  throw new Refusal(200, "the answer was cut short");
}
