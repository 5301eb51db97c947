// What N tasks cost in GPUs: one shared base with adapters, or a full copy of the model for each task. Memory only.

export const GIB = 2 ** 30;

/** A decoder with Llama's layers. */
export interface Shape {
  name: string;
  hidden: number;
  layers: number;
  heads: number;
  kvHeads: number;
  intermediate: number;
  vocabulary: number;
  /** Whether the output layer is the embedding. */
  tied: boolean;
}

export const SHAPES: readonly Shape[] = [
  shape("1B (Llama 3.2)", 2048, 16, 32, 8, 8192, 128256, true),
  shape("7B (Llama 2)", 4096, 32, 32, 32, 11008, 32000, false),
  shape("8B (Llama 3.1)", 4096, 32, 32, 8, 14336, 128256, false),
  shape("13B (Llama 2)", 5120, 40, 40, 40, 13824, 32000, false),
  shape("70B (Llama 3.1)", 8192, 80, 64, 8, 28672, 128256, false),
];

function shape(
  name: string,
  hidden: number,
  layers: number,
  heads: number,
  kvHeads: number,
  intermediate: number,
  vocabulary: number,
  tied: boolean,
): Shape {
  return { name, hidden, layers, heads, kvHeads, intermediate, vocabulary, tied };
}

const kvWidth = (s: Shape) => (s.hidden / s.heads) * s.kvHeads;

/** Inputs and outputs of a layer's matrices. */
function matrices(s: Shape): { attention: Matrix[]; mlp: Matrix[] } {
  const kv = kvWidth(s);
  return {
    attention: [
      { name: "q_proj", inputs: s.hidden, outputs: s.hidden },
      { name: "k_proj", inputs: s.hidden, outputs: kv },
      { name: "v_proj", inputs: s.hidden, outputs: kv },
      { name: "o_proj", inputs: s.hidden, outputs: s.hidden },
    ],
    mlp: [
      { name: "gate_proj", inputs: s.hidden, outputs: s.intermediate },
      { name: "up_proj", inputs: s.hidden, outputs: s.intermediate },
      { name: "down_proj", inputs: s.intermediate, outputs: s.hidden },
    ],
  };
}

interface Matrix {
  name: string;
  inputs: number;
  outputs: number;
}

export function parameters(s: Shape): number {
  const { attention, mlp } = matrices(s);
  const layer = [...attention, ...mlp].reduce((sum, m) => sum + m.inputs * m.outputs, 2 * s.hidden);
  return s.layers * layer + s.hidden + (s.tied ? 1 : 2) * s.vocabulary * s.hidden;
}

export type Targets = "qv" | "attention" | "all";

/** Numbers of an adapter: a pair of `[rank, inputs]` and `[outputs, rank]` for each matrix that it changes. */
export function adapterParameters(s: Shape, rank: number, targets: Targets): number {
  const { attention, mlp } = matrices(s);
  const qv = attention.filter((m) => m.name === "q_proj" || m.name === "v_proj");
  const chosen = { qv, attention, all: [...attention, ...mlp] }[targets];
  return s.layers * rank * chosen.reduce((sum, m) => sum + m.inputs + m.outputs, 0);
}

/** Bytes of keys and values of one token, 2 bytes a number. */
export const kvBytesPerToken = (s: Shape) => 2 * s.layers * kvWidth(s) * 2;

/** All memory in bytes. */
export interface Setting {
  gpuMemory: number;
  /** Left free on each GPU. */
  reserve: number;
  weights: number;
  /** Of one copy of the model. */
  kvCopy: number;
  /** Of the shared base. */
  kvShared: number;
  /** Of a process on each of its GPUs. */
  overhead: number;
  adapter: number;
}

/** A unit that is bought whole: so many GPUs, which hold so many tasks. */
export interface Unit {
  gpus: number;
  tasks: number;
}

/** Copies that a GPU holds; a copy larger than a GPU takes the fewest that hold it. Null where none is enough. */
export function copies(s: Setting): Unit | null {
  const room = s.gpuMemory - s.reserve;
  const one = s.weights + s.kvCopy;
  const tasks = Math.floor(room / (one + s.overhead));
  if (tasks >= 1) return { gpus: 1, tasks };
  if (room - s.overhead <= 0) return null;
  return { gpus: Math.ceil(one / (room - s.overhead)), tasks: 1 };
}

/** Adapters beside one base, on the fewest GPUs that hold the base and one adapter. Null where none is enough. */
export function shared(s: Setting): Unit | null {
  const room = s.gpuMemory - s.reserve - s.overhead;
  if (room <= 0) return null;
  const base = s.weights + s.kvShared;
  const gpus = Math.max(1, Math.ceil((base + s.adapter) / room));
  return { gpus, tasks: Math.floor((gpus * room - base) / s.adapter) };
}

export const gpusFor = (unit: Unit, tasks: number) => Math.ceil(tasks / unit.tasks) * unit.gpus;
