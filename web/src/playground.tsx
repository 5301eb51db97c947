import { useRef, useState } from "preact/hooks";

import * as api from "./api";
import { duration, short } from "./format";
import * as key from "./key";
import { adapters, refreshAdapters, useStore } from "./store";

type Mode = "prompt" | "chat" | "classify";
type Message = { role: string; content: string };

const MODES: Record<Mode, string> = { prompt: "Prompt", chat: "Chat", classify: "Classify" };
const ROLES = ["system", "user", "assistant"];

/** Fields of sampling, in the order of the form; the first few are always shown. An empty one is left to the server. */
const PARAMETERS = [
  { name: "temperature", label: "Temperature", initial: "0", step: "0.1", min: 0 },
  { name: "max_tokens", label: "Max tokens", initial: "128", step: "1", min: 1 },
  { name: "seed", label: "Seed", initial: "", step: "1", min: 0 },
  { name: "top_p", label: "Top p", initial: "", step: "0.05", min: 0 },
  { name: "top_k", label: "Top k", initial: "", step: "1", min: 0 },
  { name: "min_p", label: "Min p", initial: "", step: "0.01", min: 0 },
  { name: "repetition_penalty", label: "Repetition penalty", initial: "", step: "0.05", min: 0 },
  { name: "frequency_penalty", label: "Frequency penalty", initial: "", step: "0.1", min: -2 },
  { name: "presence_penalty", label: "Presence penalty", initial: "", step: "0.1", min: -2 },
] as const;
const FIRST = 3;
type Parameters = Record<(typeof PARAMETERS)[number]["name"], string>;

/** What one side shows. */
interface Side {
  adapter: string;
  text: string;
  scores: [string, number][];
  error: string | null;
  /** What there is to tell of a generation, when it ends. */
  facts: string[];
  running: boolean;
}

const lines = (text: string) => text.split("\n").filter((line) => line !== "");

export function Playground() {
  const list = useStore(adapters);
  const [mode, setMode] = useState<Mode>("prompt");
  const [chosen, setChosen] = useState(["", ""]);
  const [compare, setCompare] = useState(false);
  const [prompt, setPrompt] = useState("Once upon a time");
  const [messages, setMessages] = useState<Message[]>([{ role: "user", content: "" }]);
  const [input, setInput] = useState("");
  const [labels, setLabels] = useState("");
  const [stops, setStops] = useState("");
  const [parameters, setParameters] = useState(
    () => Object.fromEntries(PARAMETERS.map((p) => [p.name, p.initial])) as Parameters,
  );
  const [sides, setSides] = useState<Side[]>([]);
  const stop = useRef<AbortController | null>(null);
  const running = sides.some((side) => side.running);
  const picked = compare ? chosen : chosen.slice(0, 1);

  const hasHead = (adapter: string) => list?.adapters.some((a) => a.name === adapter && a.labels);

  const body = (adapter: string): object => {
    const common = adapter ? { adapter } : {};
    if (mode === "classify") {
      // The server takes none for a head: it has its own.
      const asked = hasHead(adapter) ? [] : lines(labels);
      return { ...common, input, ...(asked.length && { labels: asked }) };
    }
    const given = Object.entries(parameters).filter(([, value]) => value !== "");
    return {
      ...common,
      ...(mode === "prompt" ? { prompt } : { messages }),
      ...Object.fromEntries(given.map(([name, value]) => [name, Number(value)])),
      ...(lines(stops).length && { stop: lines(stops) }),
    };
  };

  const run = async () => {
    stop.current?.abort();
    const abort = new AbortController();
    stop.current = abort;
    const fresh = picked.map((adapter): Side => ({ adapter, text: "", scores: [], error: null, facts: [], running: true }));
    setSides(fresh);
    const change = (i: number, to: (side: Side) => Partial<Side>) => {
      if (stop.current === abort) setSides((all) => all.map((side, j) => (i === j ? { ...side, ...to(side) } : side)));
    };
    await Promise.all(
      picked.map(async (adapter, i) => {
        try {
          if (mode === "classify") {
            const answer = await api.classify(body(adapter), abort.signal);
            const scores = Object.entries(answer.results[0]?.scores ?? {}).sort((a, b) => b[1] - a[1]);
            change(i, () => ({ scores, facts: [`${answer.usage.prompt_tokens} tokens read`] }));
          } else {
            await stream(body(adapter), abort.signal, (to) => change(i, to));
          }
        } catch (error) {
          const stopped = abort.signal.aborted;
          change(i, () => (stopped ? { facts: ["stopped"] } : { error: api.describe(error) }));
        }
        change(i, () => ({ running: false }));
      }),
    );
    await refreshAdapters();
  };

  const parameter = (p: (typeof PARAMETERS)[number]) => (
    <label key={p.name}>
      {p.label}
      <input
        type="number"
        min={p.min}
        step={p.step}
        value={parameters[p.name]}
        placeholder="default"
        onInput={(event) => setParameters({ ...parameters, [p.name]: event.currentTarget.value })}
      />
    </label>
  );
  return (
    <form
      class="playground"
      // The steps are for the arrows alone; what a number may be the server says.
      noValidate
      onSubmit={(event) => {
        event.preventDefault();
        void run();
      }}
      onKeyDown={(event) => {
        if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
          event.preventDefault();
          void run();
        }
        if (event.key === "Escape" && running) stop.current?.abort();
      }}
    >
      <div class="bar">
        <h2>Playground</h2>
        <fieldset class="segments">
          <legend class="hidden">What to ask for</legend>
          {(Object.keys(MODES) as Mode[]).map((m) => (
            <label key={m} class={m === mode ? "on" : undefined}>
              <input type="radio" name="mode" checked={m === mode} onChange={() => setMode(m)} />
              {MODES[m]}
            </label>
          ))}
        </fieldset>
        <label class="check">
          <input type="checkbox" checked={compare} onChange={(event) => setCompare(event.currentTarget.checked)} />
          Compare two side by side
        </label>
      </div>
      <div class="columns">
        <div class="card ask">
          {picked.map((adapter, i) => (
            <AdapterChoice
              key={i}
              label={compare ? `Adapter ${"AB"[i]}` : "Adapter"}
              list={list}
              value={adapter}
              choose={(name) => setChosen(chosen.map((old, j) => (i === j ? name : old)))}
            />
          ))}
          {mode === "prompt" && (
            <label>
              Prompt
              <textarea rows={7} value={prompt} onInput={(event) => setPrompt(event.currentTarget.value)} />
            </label>
          )}
          {mode === "chat" && <Messages messages={messages} change={setMessages} />}
          {mode === "classify" && (
            <>
              <label>
                Text
                <textarea rows={6} value={input} onInput={(event) => setInput(event.currentTarget.value)} />
              </label>
              <label>
                Labels, one a line
                <textarea rows={3} value={labels} onInput={(event) => setLabels(event.currentTarget.value)} />
                <span class="note">
                  {picked.some(hasHead)
                    ? "An adapter with a head has its own; these are for the others."
                    : "Needed where there is no classification head."}
                </span>
              </label>
            </>
          )}
          {mode !== "classify" && (
            <>
              <div class="parameters">{PARAMETERS.slice(0, FIRST).map(parameter)}</div>
              <details>
                <summary>More of sampling</summary>
                <div class="parameters">
                  {PARAMETERS.slice(FIRST).map(parameter)}
                  <label class="wide">
                    Stop texts, one a line
                    <textarea rows={2} value={stops} onInput={(event) => setStops(event.currentTarget.value)} />
                  </label>
                </div>
              </details>
            </>
          )}
          <div class="row">
            <button class="primary">{mode === "classify" ? "Classify" : "Generate"}</button>
            <button type="button" disabled={!running} onClick={() => stop.current?.abort()}>
              Stop
            </button>
            <span class="note">
              <kbd>Ctrl</kbd> <kbd>Enter</kbd> runs, <kbd>Esc</kbd> stops
            </span>
          </div>
          <details>
            <summary>As a command</summary>
            <pre class="command">{command(mode, body(picked[0] ?? ""))}</pre>
          </details>
        </div>
        <div class={sides.length > 1 ? "answers two" : "answers"}>
          {sides.length === 0 && <p class="card empty">Answers appear here.</p>}
          {sides.map((side, i) => (
            <Answer key={i} side={side} />
          ))}
          {mode === "chat" && sides.length === 1 && !running && sides[0]!.text && (
            <button
              type="button"
              onClick={() => {
                setMessages([...messages, { role: "assistant", content: sides[0]!.text }, { role: "user", content: "" }]);
                setSides([]);
              }}
            >
              Continue the chat
            </button>
          )}
        </div>
      </div>
    </form>
  );
}

/** Shows a generation as it comes, and its speed when it ends. */
async function stream(body: object, signal: AbortSignal, change: (to: (side: Side) => Partial<Side>) => void) {
  const start = performance.now();
  let first: number | null = null;
  for await (const piece of api.generate(body, signal)) {
    first ??= performance.now();
    if (piece.text) change((side) => ({ text: side.text + piece.text }));
    if (!piece.usage) continue;
    const tokens = piece.usage.completion_tokens;
    const seconds = (performance.now() - first) / 1000;
    const cached = piece.usage.prompt_tokens_details.cached_tokens;
    const facts = [
      `${tokens} tokens`,
      ...(tokens > 1 && seconds > 0 ? [`${short((tokens - 1) / seconds)} tok/s`] : []),
      `first after ${duration((first - start) / 1000)}`,
      `prompt ${piece.usage.prompt_tokens}${cached ? `, ${cached} of them cached` : ""}`,
      `ended by ${piece.finish_reason ?? "?"}`,
      ...(piece.generation ? [`generation ${piece.generation.slice(0, 12)}`] : []),
    ];
    change(() => ({ facts }));
  }
}

/** The request for a shell. A key stays out of it. */
function command(mode: Mode, body: object): string {
  const url = new URL(mode === "classify" ? "v1/classify" : "v1/generate", document.baseURI);
  const head = key.current() === null ? "" : ' -H "Authorization: Bearer $LORAMUX_API_KEY"';
  return `curl ${url.href} -d '${JSON.stringify(body).replaceAll("'", "'\\''")}'${head}`;
}

interface ChoiceProps {
  label: string;
  list: api.AdapterList | null;
  value: string;
  choose: (name: string) => void;
}

function AdapterChoice({ label, list, value, choose }: ChoiceProps) {
  const names = list?.adapters.map((a) => a.name) ?? [];
  return (
    <label>
      {label}
      <select value={value} onChange={(event) => choose(event.currentTarget.value)}>
        <option value="">The base alone</option>
        {value && !names.includes(value) && <option value={value}>{value} (gone)</option>}
        {names.map((name) => (
          <option key={name} value={name}>
            {name}
          </option>
        ))}
      </select>
    </label>
  );
}

function Messages({ messages, change }: { messages: Message[]; change: (messages: Message[]) => void }) {
  const edit = (i: number, to: Partial<Message>) => change(messages.map((m, j) => (i === j ? { ...m, ...to } : m)));
  return (
    <fieldset class="messages">
      <legend>Messages</legend>
      {messages.map((message, i) => (
        <div key={i} class="message">
          <select aria-label={`Role of message ${i + 1}`} value={message.role} onChange={(e) => edit(i, { role: e.currentTarget.value })}>
            {ROLES.map((role) => (
              <option key={role}>{role}</option>
            ))}
          </select>
          <button
            type="button"
            class="small"
            aria-label={`Remove message ${i + 1}`}
            disabled={messages.length === 1}
            onClick={() => change(messages.filter((_, j) => i !== j))}
          >
            Remove
          </button>
          <textarea
            rows={3}
            aria-label={`Text of message ${i + 1}`}
            value={message.content}
            onInput={(event) => edit(i, { content: event.currentTarget.value })}
          />
        </div>
      ))}
      <button type="button" class="small" onClick={() => change([...messages, { role: "user", content: "" }])}>
        Add a message
      </button>
    </fieldset>
  );
}

function Answer({ side }: { side: Side }) {
  const title = side.adapter || "The base alone";
  return (
    <article class="card answer" aria-label={`Answer of ${title}`} aria-busy={side.running}>
      <h3>
        {title}
        {side.running && <span class="pulse" aria-hidden="true" />}
      </h3>
      {side.error && (
        <p class="alert bad" role="alert">
          {side.error}
        </p>
      )}
      {side.text && <pre class="text">{side.text}</pre>}
      {side.scores.length > 0 && (
        <table class="scores">
          <caption class="hidden">Scores of the classes</caption>
          <tbody>
            {side.scores.map(([label, score], i) => (
              <tr key={label} class={i === 0 ? "best" : undefined}>
                <th scope="row">{label}</th>
                <td class="track">
                  <div class="fill" style={{ width: `${100 * score}%` }} />
                </td>
                <td class="number">{(100 * score).toFixed(1)} %</td>
              </tr>
            ))}
          </tbody>
        </table>
      )}
      <p class="note" role="status">
        {side.running ? "running" : side.facts.join(" · ")}
      </p>
    </article>
  );
}
