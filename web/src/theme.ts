// Light, dark, or what the system says.

import { Store } from "./store";

export type Theme = "system" | "light" | "dark";

const KEY = "loramux-theme";

/** Counts changes of colours, for what is drawn and not styled. */
export const colours = new Store(0);
const dark = matchMedia("(prefers-color-scheme: dark)");
dark.addEventListener("change", () => colours.set(colours.value + 1));

export function storedTheme(): Theme {
  try {
    const stored = localStorage.getItem(KEY);
    return stored === "light" || stored === "dark" ? stored : "system";
  } catch {
    // Storage may be forbidden.
    return "system";
  }
}

export function applyTheme(theme: Theme) {
  if (theme === "system") delete document.documentElement.dataset["theme"];
  else document.documentElement.dataset["theme"] = theme;
  try {
    if (theme === "system") localStorage.removeItem(KEY);
    else localStorage.setItem(KEY, theme);
  } catch {
    // The choice then lasts as long as the page.
  }
  colours.set(colours.value + 1);
}

/** A colour of the style sheet as the canvas takes it. */
export function colour(name: string): string {
  const probe = document.createElement("i");
  probe.style.color = `var(--${name})`;
  document.body.append(probe);
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value;
}
