// What asks for an API key, where the server does.

import { useEffect, useId, useRef, useState } from "preact/hooks";

import * as key from "./key";
import { unlock } from "./store";

/** `refusal` is what the server said last. */
export function Unlock({ refusal }: { refusal: string }) {
  const [text, setText] = useState("");
  const [busy, setBusy] = useState(false);
  const field = useRef<HTMLInputElement>(null);
  const id = useId();
  useEffect(() => {
    // Whoever is typing elsewhere goes on.
    if (document.activeElement === document.body) field.current?.focus();
  }, []);
  const send = async () => {
    setBusy(true);
    await unlock(text.trim());
    setBusy(false);
  };
  return (
    <form
      class="card unlock"
      aria-labelledby={`${id}-title`}
      onSubmit={(event) => {
        event.preventDefault();
        if (!busy) void send();
      }}
    >
      <h2 id={`${id}-title`}>This server asks for an API key</h2>
      <div aria-live="assertive">{key.current() !== null && !busy && <p class="alert bad">{refusal}</p>}</div>
      <div class="row">
        <label for={`${id}-key`}>
          API key
          <input
            ref={field}
            id={`${id}-key`}
            type="password"
            value={text}
            onInput={(event) => setText(event.currentTarget.value)}
            pattern="\s*[!-~]+\s*"
            title="Letters, digits and signs, without spaces between them"
            aria-describedby={`${id}-note`}
            autocomplete="off"
            spellcheck={false}
            required
          />
        </label>
        <button class="primary" disabled={busy}>
          Use this key
        </button>
      </div>
      <p class="note" id={`${id}-note`}>
        It stays in this tab until the tab is closed, or until you forget it here.
        {!isSecureContext && " The connection is not encrypted: whoever is in between can read the key."}
      </p>
    </form>
  );
}

/** Also forgets what the key was shown. */
export function Forget() {
  return (
    <button
      type="button"
      class="small"
      onClick={() => {
        key.keep(null);
        location.reload();
      }}
    >
      Forget the API key
    </button>
  );
}
