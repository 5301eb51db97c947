// The API key that requests show. It is in this tab's session storage and nowhere else.

const NAME = "loramux-key";

let key = stored();

function stored(): string | null {
  try {
    return sessionStorage.getItem(NAME);
  } catch {
    // Storage may be forbidden.
    return null;
  }
}

export const current = () => key;

export function keep(next: string | null) {
  key = next;
  try {
    if (next === null) sessionStorage.removeItem(NAME);
    else sessionStorage.setItem(NAME, next);
  } catch {
    // The key then lasts as long as the page.
  }
}

/** The header that shows it, where there is one. */
export const header = (): Record<string, string> => (key === null ? {} : { Authorization: `Bearer ${key}` });
