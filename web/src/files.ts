// What a user dropped or chose, as the form of an upload.

/** Files of an adapter that the server takes by name; it looks into all of them itself. */
const KEPT = new Set([
  "adapter_config.json",
  "adapter_model.safetensors",
  "adapter_model.safetensors.index.json",
  "chat_template.jinja",
  "labels.json",
  "labels.txt",
  "tokenizer.json",
  "tokenizer_config.json",
]);
const SHARD = /^adapter_model-\d{5}-of-\d{5}\.safetensors$/;
const ARCHIVE = /\.(zip|tar|tar\.gz|tgz)$/i;
const WEIGHTS = /\.(safetensors|bin|pt|gguf)$/i;

export interface Chosen {
  files: File[];
  /** Names of files that are of no use to the server, as a model card. */
  leftOut: string[];
  /** What the adapter may be called: its folder or archive. */
  suggestion: string;
}

/** What looks like weights is sent even where it cannot be used: the server says why not. */
const isUseful = (name: string) => KEPT.has(name) || SHARD.test(name) || ARCHIVE.test(name) || WEIGHTS.test(name);

export function choose(files: File[], folder = ""): Chosen {
  const useful = files.filter((file) => isUseful(file.name));
  const single = useful.length === 1 ? useful[0]!.name.replace(ARCHIVE, "").replace(/\.gguf$/i, "") : "";
  const parent = files[0]?.webkitRelativePath.split("/").at(-2) ?? "";
  const named = folder || parent || (KEPT.has(useful[0]?.name ?? "") ? "" : single);
  return {
    files: useful,
    leftOut: files.filter((file) => !isUseful(file.name)).map((file) => file.name),
    suggestion: named.replace(/[^A-Za-z0-9._-]+/g, "-").replace(/^[^A-Za-z0-9]+/, "").slice(0, 128),
  };
}

/** The dropped files, and those right in a dropped folder. */
export async function dropped(data: DataTransfer): Promise<Chosen> {
  // All at once, before the first wait: the list is emptied after the event.
  const entries = [...data.items].map((item) => item.webkitGetAsEntry());
  const files: File[] = [...data.files];
  const folder = entries.find((entry): entry is FileSystemDirectoryEntry => entry?.isDirectory ?? false);
  if (!folder) return choose(files);
  return choose(await filesIn(folder), folder.name);
}

async function filesIn(folder: FileSystemDirectoryEntry): Promise<File[]> {
  const reader = folder.createReader();
  const entries: FileSystemEntry[] = [];
  for (;;) {
    // A reader gives a part of the entries at a time, and none at the end.
    const part = await new Promise<FileSystemEntry[]>((resolve, reject) => reader.readEntries(resolve, reject));
    if (part.length === 0) break;
    entries.push(...part);
  }
  const files = entries.filter((entry): entry is FileSystemFileEntry => entry.isFile);
  return Promise.all(files.map((entry) => new Promise<File>((resolve, reject) => entry.file(resolve, reject))));
}

export function form(files: File[]): FormData {
  const form = new FormData();
  for (const file of files) form.append(ARCHIVE.test(file.name) ? "archive" : "file", file, file.name);
  return form;
}
