import { useMemo, useRef, useState } from "preact/hooks";

import * as api from "./api";
import { Confirm, Dialog } from "./dialog";
import { ago, bytes, count, date, known } from "./format";
import { type Column, ordered } from "./order";
import { adapters, refreshAdapters, useStore } from "./store";
import { Upload } from "./upload";

const COLUMNS: { key: Column; label: string; number: boolean }[] = [
  { key: "name", label: "Name", number: false },
  { key: "tier", label: "Tier", number: false },
  { key: "rank", label: "Rank", number: true },
  { key: "bytes", label: "Files", number: true },
  { key: "memory_bytes", label: "In memory", number: true },
  { key: "requests", label: "Requests", number: true },
  { key: "last_used", label: "Last use", number: true },
  { key: "in_flight", label: "In flight", number: true },
];
/** Rows shown at first, and with each press of the button below. */
const PAGE = 100;

type Open = { what: "replace" | "unload" | "delete"; adapter: api.Adapter };

export function Adapters() {
  const list = useStore(adapters);
  const [filter, setFilter] = useState("");
  const [order, setOrder] = useState<{ key: Column; down: boolean }>({ key: "name", down: false });
  const [rows, setRows] = useState(PAGE);
  const [open, setOpen] = useState<Open | null>(null);
  /** Why what a row's button asked for was not done. */
  const [error, setError] = useState<string | null>(null);
  /** The same of the question that is open. */
  const [refused, setRefused] = useState<string | null>(null);
  /** The question whose answer is being carried out. */
  const [busy, setBusy] = useState<Open | null>(null);
  /** What is open now, for changes that began before. */
  const latest = useRef(open);
  latest.current = open;

  const all = list?.adapters ?? [];
  const shown = useMemo(() => {
    const wanted = filter.trim().toLowerCase();
    const text = (a: api.Adapter) => [a.name, a.generation, ...(a.labels ?? [])].join(" ").toLowerCase();
    const found = wanted ? all.filter((a) => text(a).includes(wanted)) : all;
    return ordered(found, order.key, order.down);
  }, [all, filter, order]);

  /** Carries out what a row's button asks for, or the answer to the question `asked`. */
  const act = async (change: () => Promise<unknown>, asked: Open | null = null) => {
    // A pin may load for long: when it is done, whatever else is open by then is none of its business.
    const isAsked = () => asked !== null && asked === latest.current;
    (asked ? setRefused : setError)(null);
    if (asked) setBusy(asked);
    try {
      await change();
      if (isAsked()) setOpen(null);
    } catch (e) {
      (isAsked() ? setRefused : setError)(api.describe(e));
    } finally {
      setBusy((now) => (now === asked ? null : now));
      await refreshAdapters();
    }
  };
  const show = (what: Open["what"], adapter: api.Adapter) => {
    setError(null);
    setRefused(null);
    setOpen({ what, adapter });
  };
  // An upload closes its own dialog when it is done, and no later one.
  const close = () => setOpen((now) => (now === open ? null : now));

  return (
    <>
      <div class="bar">
        <h2>Adapters</h2>
        <span class="note" role="status">
          {list ? (filter ? `${count(shown.length)} of ${count(all.length)}` : count(all.length)) : "…"}
        </span>
        <label>
          <span class="hidden">Filter by name, label or generation</span>
          <input
            type="search"
            placeholder="Filter by name, label, generation"
            value={filter}
            onInput={(event) => setFilter(event.currentTarget.value)}
          />
        </label>
      </div>
      <div aria-live="polite">{error && !open && <p class="alert bad">{error}</p>}</div>
      <div class="card table">
        <table>
          <caption class="hidden">Adapters of this server</caption>
          <thead>
            <tr>
              {COLUMNS.map(({ key, label, number }) => (
                <th
                  key={key}
                  scope="col"
                  class={number ? "number" : undefined}
                  aria-sort={order.key === key ? (order.down ? "descending" : "ascending") : undefined}
                >
                  <button
                    type="button"
                    class="sort"
                    onClick={() => setOrder({ key, down: order.key === key ? !order.down : number })}
                  >
                    {label}
                    <span aria-hidden="true">{order.key === key ? (order.down ? " ↓" : " ↑") : ""}</span>
                  </button>
                </th>
              ))}
              <th scope="col">Generation</th>
              <th scope="col">
                <span class="hidden">Actions</span>
              </th>
            </tr>
          </thead>
          <tbody>
            {shown.slice(0, rows).map((a) => (
              <Row key={a.name} adapter={a} show={show} act={act} />
            ))}
          </tbody>
        </table>
        {list && shown.length === 0 && (
          <p class="empty">{all.length ? "No adapter matches the filter." : "No adapters yet. Upload the first one below."}</p>
        )}
        {shown.length > rows && (
          <button type="button" class="more" onClick={() => setRows(rows + PAGE)}>
            Show more ({count(shown.length - rows)} left)
          </button>
        )}
      </div>
      <div class="card">
        <h3>Upload a new adapter</h3>
        <Upload />
      </div>
      {open?.what === "replace" && (
        <Dialog title={`Replace ${open.adapter.name}`} close={close}>
          <p>
            In the place of generation <code title={open.adapter.generation}>{open.adapter.generation.slice(0, 12)}</code>, and
            of no other. Requests in flight finish on it.
          </p>
          <Upload
            replaces={open.adapter}
            current={all.find((a) => a.name === open.adapter.name)?.generation}
            close={close}
          />
        </Dialog>
      )}
      {open?.what === "unload" && (
        <Confirm
          title={`Unload ${open.adapter.name}?`}
          text="Its memory is freed. The files stay, and the next request for it loads it again."
          action="Unload"
          error={refused}
          busy={busy === open}
          confirm={() => void act(() => api.unload(open.adapter.name), open)}
          close={close}
        />
      )}
      {open?.what === "delete" && (
        <Confirm
          title={`Delete ${open.adapter.name}?`}
          text={`Generation ${open.adapter.generation.slice(0, 12)} and its files are removed from this server. Requests in flight finish on it.`}
          action="Delete"
          error={refused}
          busy={busy === open}
          confirm={() => void act(() => api.remove(open.adapter.name, open.adapter.generation), open)}
          close={close}
        />
      )}
    </>
  );
}

interface RowProps {
  adapter: api.Adapter;
  show: (what: Open["what"], adapter: api.Adapter) => void;
  act: (change: () => Promise<unknown>) => Promise<void>;
}

function Row({ adapter: a, show, act }: RowProps) {
  const now = Date.now() / 1000;
  const loaded = a.tier === "device";
  // A tenant is not told of others' use of it, nor may change it.
  const shared = a.tier === undefined;
  const fetched = a.generation !== "";
  const origins: Record<string, string> = { directory: "from a read-only folder", store: "uploaded" };
  const details = [
    ...(fetched ? [`alpha ${a.lora_alpha}`, `${count(a.parameters)} parameters`] : []),
    origins[a.source] ?? `from ${a.source}`,
    date(a.created),
  ].join(" · ");
  return (
    <tr>
      <th scope="row" title={details}>
        <span class="name">{a.name}</span>
        <span class="chips">
          {a.labels?.slice(0, 6).map((label) => (
            <span key={label} class="chip">
              {label}
            </span>
          ))}
          {a.labels && a.labels.length > 6 && <span class="chip">+{a.labels.length - 6}</span>}
        </span>
      </th>
      <td>
        {shared ? "–" : <span class={loaded ? "tier device" : "tier"}>{loaded ? "memory" : a.tier}</span>}
        {a.pinned && <span class="tier pinned">pinned</span>}
      </td>
      <td class="number" title={a.target_modules.join(", ")}>
        {fetched ? a.rank : "–"}
      </td>
      <td class="number" title={`${count(a.bytes)} bytes`}>
        {bytes(a.bytes)}
      </td>
      <td class="number" title={a.memory_bytes == null ? undefined : `${count(a.memory_bytes)} bytes`}>
        {known(a.memory_bytes, bytes)}
      </td>
      <td class="number">{known(a.requests, count)}</td>
      <td class="number" title={a.last_used == null ? undefined : date(a.last_used)}>
        {a.last_used === null ? "never" : known(a.last_used, (then) => ago(then, now))}
      </td>
      <td class="number">{known(a.in_flight, count)}</td>
      <td>
        <code title={a.generation}>{a.generation.slice(0, 12)}</code>
      </td>
      <td class="actions">{shared ? <span class="note">everybody's</span> : <Actions adapter={a} show={show} act={act} />}</td>
    </tr>
  );
}

function Actions({ adapter: a, show, act }: RowProps) {
  return (
    <>
      {a.generation !== "" && <Action name={a.name} verb="Replace" onClick={() => show("replace", a)} />}
      <Action
        name={a.name}
        verb={a.pinned ? "Unpin" : "Pin"}
        title={a.pinned ? "Let it be evicted again" : "Keep it in memory until the server ends"}
        onClick={() => void act(() => api.setPinned(a.name, !a.pinned))}
      />
      {a.tier === "device" && <Action name={a.name} verb="Unload" onClick={() => show("unload", a)} />}
      {a.source === "store" && <Action name={a.name} verb="Delete" danger onClick={() => show("delete", a)} />}
    </>
  );
}

interface ActionProps {
  name: string;
  verb: string;
  title?: string;
  danger?: boolean;
  onClick: () => void;
}

function Action({ name, verb, title, danger, onClick }: ActionProps) {
  return (
    <button type="button" class={danger ? "small danger" : "small"} aria-label={`${verb} ${name}`} title={title} onClick={onClick}>
      {verb}
    </button>
  );
}
