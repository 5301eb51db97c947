// The form that uploads an adapter: a new one, or in the place of one.

import { useEffect, useId, useRef, useState } from "preact/hooks";

import * as api from "./api";
import { type Chosen, choose, dropped, form } from "./files";
import { bytes } from "./format";
import { refreshAdapters } from "./store";

interface Props {
  /** The adapter to replace, as it was shown when the user chose to. */
  replaces?: api.Adapter;
  /** Its generation now. */
  current?: string | undefined;
  /** Closes the dialog that it is in. */
  close?: () => void;
}

type Outcome = { good: boolean; text: string; conflict?: boolean };

export function Upload({ replaces, current, close }: Props) {
  const [chosen, setChosen] = useState<Chosen | null>(null);
  const [name, setName] = useState("");
  const [expected, setExpected] = useState(replaces?.generation ?? null);
  const [share, setShare] = useState<number | null>(null);
  const [outcome, setOutcome] = useState<Outcome | null>(null);
  const [over, setOver] = useState(false);
  const stop = useRef<AbortController | null>(null);
  const files = useRef<HTMLInputElement>(null);
  const folder = useRef<HTMLInputElement>(null);
  const id = useId();
  // With its dialog, an upload that has not come to its end goes too.
  useEffect(() => () => stop.current?.abort(), []);

  const take = (next: Chosen) => {
    setChosen(next);
    setOutcome(next.files.length ? null : { good: false, text: "there is no file of an adapter among these" });
    if (!replaces && next.suggestion) setName(next.suggestion);
  };
  const picked = (input: HTMLInputElement) => {
    if (input.files?.length) take(choose([...input.files]));
    // So that the same files can be chosen again, after a change.
    input.value = "";
  };
  const send = async () => {
    if (!chosen?.files.length || share !== null) return;
    stop.current = new AbortController();
    setOutcome(null);
    setShare(0);
    let sent = false;
    const progress = (to: number) => {
      sent = to === 1;
      setShare(to);
    };
    try {
      const target = replaces?.name ?? name.trim();
      const info = await api.upload(target, form(chosen.files), expected, progress, stop.current.signal);
      const what = `rank ${info.rank}, ${bytes(info.bytes)}, generation ${info.generation.slice(0, 12)}`;
      setOutcome({ good: true, text: `${info.name} fits the base and is served: ${what}` });
      setChosen(null);
      setName("");
      await refreshAdapters();
      close?.();
    } catch (error) {
      const stopped = error instanceof DOMException && error.name === "AbortError";
      const conflict = error instanceof api.Refusal && error.status === 409;
      const what = stopped ? "the upload was stopped" : api.describe(error);
      // What it has in full the server validates and publishes also where nobody waits for its answer.
      const unsure = sent && !(error instanceof api.Refusal);
      const text = unsure ? `${what}, but all was sent: the server may have taken it, see the table` : what;
      setOutcome({ good: false, text, conflict });
      await refreshAdapters();
    } finally {
      setShare(null);
    }
  };

  const moved = replaces && current !== undefined && current !== expected;
  const total = chosen?.files.reduce((sum, file) => sum + file.size, 0) ?? 0;
  return (
    <form
      class="upload"
      onSubmit={(event) => {
        event.preventDefault();
        void send();
      }}
    >
      <div
        class={over ? "drop over" : "drop"}
        onDragOver={(event) => {
          event.preventDefault();
          setOver(true);
        }}
        onDragLeave={() => setOver(false)}
        onDrop={(event) => {
          event.preventDefault();
          setOver(false);
          if (event.dataTransfer) void dropped(event.dataTransfer).then(take);
        }}
      >
        <p>
          Drop a PEFT folder, its files, a GGUF LoRA or an archive (.zip, .tar, .tar.gz) here, or{" "}
          <button type="button" class="link" onClick={() => files.current?.click()}>
            choose files
          </button>{" "}
          or{" "}
          <button type="button" class="link" onClick={() => folder.current?.click()}>
            a folder
          </button>
          .
        </p>
        <input ref={files} type="file" multiple hidden aria-label="Files" onChange={(e) => picked(e.currentTarget)} />
        <input
          ref={folder}
          type="file"
          hidden
          aria-label="Folder"
          {...{ webkitdirectory: true }}
          onChange={(e) => picked(e.currentTarget)}
        />
        {chosen && chosen.files.length > 0 && (
          <ul class="files">
            {chosen.files.map((file) => (
              <li key={file.name}>
                {file.name} <span class="note">{bytes(file.size)}</span>
              </li>
            ))}
          </ul>
        )}
        {chosen && chosen.leftOut.length > 0 && <p class="note">Not needed, left out: {chosen.leftOut.join(", ")}</p>}
      </div>
      <div class="row">
        {!replaces && (
          <label for={`${id}-name`}>
            Name
            <input
              id={`${id}-name`}
              value={name}
              onInput={(event) => setName(event.currentTarget.value)}
              placeholder="my-adapter"
              // With @ and a tenant's, which a key of no tenant may add.
              maxLength={193}
              autocomplete="off"
              spellcheck={false}
              required
            />
          </label>
        )}
        <button class="primary" disabled={!chosen?.files.length || share !== null}>
          {replaces ? "Replace" : "Upload"}
          {total > 0 && ` ${bytes(total)}`}
        </button>
        {close && (
          <button type="button" onClick={close}>
            Cancel
          </button>
        )}
        {share !== null && (
          <>
            <progress value={share} aria-label="Uploaded" />
            <span class="note">{share < 1 ? `${Math.floor(share * 100)} %` : "being validated…"}</span>
            <button type="button" onClick={() => stop.current?.abort()}>
              Stop
            </button>
          </>
        )}
      </div>
      <div aria-live="polite">
        {outcome && <p class={outcome.good ? "alert good" : "alert bad"}>{outcome.text}</p>}
        {moved && (
          <p class="alert">
            Since this was opened the adapter has changed to generation <code>{current.slice(0, 12)}</code>.{" "}
            <button type="button" class="link" onClick={() => setExpected(current)}>
              Replace that one
            </button>
          </p>
        )}
      </div>
    </form>
  );
}
