import { render } from "preact";
import { useEffect, useState } from "preact/hooks";

import { Adapters } from "./adapters";
import { Calculator } from "./calculator";
import { bytes, count, known } from "./format";
import * as key from "./key";
import { Live } from "./live";
import { Playground } from "./playground";
import { adapters, locked, points, poll, trouble, useStore } from "./store";
import "uplot/dist/uPlot.min.css";
import "./style.css";
import { type Theme, applyTheme, storedTheme } from "./theme";
import { Forget, Unlock } from "./unlock";

const VIEWS = { adapters: "Adapters", playground: "Playground", live: "Live", hosting: "Hosting cost" } as const;
type View = keyof typeof VIEWS;

const viewOf = (hash: string): View => {
  const name = hash.replace(/^#\/?/, "");
  return name in VIEWS ? (name as View) : "adapters";
};

function App() {
  const [view, setView] = useState(viewOf(location.hash));
  useEffect(() => {
    const follow = () => setView(viewOf(location.hash));
    addEventListener("hashchange", follow);
    return () => removeEventListener("hashchange", follow);
  }, []);
  const refusal = useStore(locked);
  useEffect(() => {
    document.title = `${VIEWS[view]} · loramux`;
  }, [view]);
  // All views stay, so that a generation goes on and fields keep what they hold.
  return (
    <>
      <a
        class="skip"
        href="#main"
        onClick={(event) => {
          event.preventDefault();
          document.getElementById("main")?.focus();
        }}
      >
        Skip to the content
      </a>
      <Header view={view} />
      <main id="main" tabIndex={-1}>
        {refusal === null ? <Trouble /> : <Unlock refusal={refusal} />}
        <section hidden={view !== "adapters"} aria-label={VIEWS.adapters}>
          <Adapters />
        </section>
        <section hidden={view !== "playground"} aria-label={VIEWS.playground}>
          <Playground />
        </section>
        <section hidden={view !== "live"} aria-label={VIEWS.live}>
          <Live shown={view === "live"} />
        </section>
        <section hidden={view !== "hosting"} aria-label={VIEWS.hosting}>
          <Calculator shown={view === "hosting"} />
        </section>
      </main>
    </>
  );
}

function Header({ view }: { view: View }) {
  const list = useStore(adapters);
  const point = useStore(points).at(-1);
  return (
    <header>
      <div class="brand">
        <img src="./assets/icon.svg" alt="" width="26" height="26" />
        <h1>loramux</h1>
        <span class="base" title="The base model">
          {list?.base ?? "…"}
        </span>
      </div>
      <nav aria-label="Views">
        {Object.entries(VIEWS).map(([name, label]) => (
          <a key={name} href={`#${name}`} aria-current={name === view ? "page" : undefined}>
            {label}
          </a>
        ))}
      </nav>
      <dl class="facts">
        <div>
          <dt>Running</dt>
          <dd>{known(point?.running, count)}</dd>
        </div>
        <div>
          <dt>Waiting</dt>
          <dd>{known(point?.waiting, count)}</dd>
        </div>
        <div>
          <dt>Adapter memory</dt>
          <dd>{known(list?.memory, ({ used, limit }) => `${bytes(used)} of ${bytes(limit)}`)}</dd>
        </div>
      </dl>
      {key.current() !== null && <Forget />}
      <ThemeChoice />
    </header>
  );
}

function ThemeChoice() {
  const [theme, setTheme] = useState<Theme>(storedTheme());
  return (
    <label class="theme">
      <span class="hidden">Theme</span>
      <select
        value={theme}
        onChange={(event) => {
          const chosen = event.currentTarget.value as Theme;
          setTheme(chosen);
          applyTheme(chosen);
        }}
      >
        <option value="system">System theme</option>
        <option value="light">Light</option>
        <option value="dark">Dark</option>
      </select>
    </label>
  );
}

function Trouble() {
  const { adapters, metrics } = useStore(trouble);
  // What the key is not for is told where it is missed.
  const what = adapters ?? (metrics?.forbidden ? undefined : metrics);
  return <div aria-live="polite">{what && <p class="alert bad">{what.text}</p>}</div>;
}

applyTheme(storedTheme());
const root = document.getElementById("app");
if (root) render(<App />, root);
poll();
