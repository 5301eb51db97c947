import { useMemo, useState } from "preact/hooks";

import { Chart, type Line } from "./chart";
import { bytes, count, money, short } from "./format";
import * as hosting from "./hosting";
import { GIB, SHAPES, type Setting, type Targets, type Unit } from "./hosting";

/** Nominal memory in GiB, and an example of a price an hour. */
const GPUS = [
  { name: "L4 24 GB", memory: 24, price: 0.8 },
  { name: "A100 40 GB", memory: 40, price: 1.6 },
  { name: "L40S 48 GB", memory: 48, price: 1.8 },
  { name: "A100 80 GB", memory: 80, price: 2.2 },
  { name: "H100 80 GB", memory: 80, price: 3 },
  { name: "H200 141 GB", memory: 140, price: 4 },
];
/** Bytes a weight. 4-bit formats have a scale for each block of weights. */
const PRECISIONS = [
  { name: "16 bits (bf16, f16)", bytes: 2 },
  { name: "8 bits", bytes: 1 + 2 / 32 },
  { name: "4 bits", bytes: 0.5 + 2 / 32 },
];
const TARGETS: Record<Targets, string> = { qv: "q and v", attention: "all of attention", all: "all linear layers" };
/** Hours a month. */
const MONTH = 730;

const LINES: Line[] = [
  { label: "Full copies", colour: "series-3", stepped: true },
  { label: "Shared base with adapters", colour: "series-1", stepped: true },
];

const INITIAL = {
  tasks: 100,
  shape: 2,
  precision: 0,
  gpu: 4,
  memory: GPUS[4]!.memory,
  price: GPUS[4]!.price,
  rank: 16,
  kvCopy: 2,
  kvShared: 8,
  overhead: 1.5,
  reserve: 1,
};
type Inputs = typeof INITIAL;

export function Calculator({ shown }: { shown: boolean }) {
  const [inputs, setInputs] = useState(INITIAL);
  const [targets, setTargets] = useState<Targets>("all");
  const [logarithmic, setLogarithmic] = useState(false);
  const [unit, setUnit] = useState<"cost" | "gpus">("cost");
  const set = (change: Partial<Inputs>) => setInputs({ ...inputs, ...change });

  const shape = SHAPES[inputs.shape]!;
  const precision = PRECISIONS[inputs.precision]!;
  const setting: Setting = {
    gpuMemory: inputs.memory * GIB,
    reserve: inputs.reserve * GIB,
    weights: hosting.parameters(shape) * precision.bytes,
    kvCopy: inputs.kvCopy * GIB,
    kvShared: inputs.kvShared * GIB,
    overhead: inputs.overhead * GIB,
    adapter: hosting.adapterParameters(shape, inputs.rank, targets) * 2,
  };
  const [copies, shared] = [hosting.copies(setting), hosting.shared(setting)];
  const valid = Object.values(inputs).every((value) => Number.isFinite(value) && value >= 0) && inputs.tasks >= 1 && inputs.rank >= 1;

  const factor = unit === "cost" ? inputs.price : 1;
  const data = useMemo(() => {
    const end = Math.max(10, 2 * inputs.tasks);
    const steps = Math.min(end, 600);
    const at = (i: number) => (logarithmic ? end ** (i / steps) : 1 + (i * (end - 1)) / steps);
    const xs = [...new Set(Array.from({ length: steps + 1 }, (_, i) => Math.round(at(i))))];
    const row = (of: Unit | null) => xs.map((n) => (of ? hosting.gpusFor(of, n) * factor : null));
    return [xs, row(copies), row(shared)];
  }, [JSON.stringify([setting, inputs.tasks, factor, logarithmic])]);

  const field = (key: keyof Inputs, label: string, step: number, min = 0) => (
    <label>
      {label}
      <input
        type="number"
        min={min}
        step={step}
        value={Number.isFinite(inputs[key]) ? inputs[key] : ""}
        onInput={(event) => set({ [key]: event.currentTarget.valueAsNumber })}
      />
    </label>
  );
  const list = (key: keyof Inputs, label: string, names: readonly { name: string }[], also: (i: number) => Partial<Inputs> = () => ({})) => (
    <label>
      {label}
      <select
        value={inputs[key]}
        onChange={(event) => {
          const i = Number(event.currentTarget.value);
          set({ [key]: i, ...also(i) });
        }}
      >
        {names.map(({ name }, i) => (
          <option key={name} value={i}>
            {name}
          </option>
        ))}
      </select>
    </label>
  );

  return (
    <>
      <div class="bar">
        <h2>Hosting cost</h2>
        <span class="note">N fine-tuned tasks: adapters on one shared base, or a full copy of the model for each.</span>
      </div>
      <div class="columns">
        <form class="card ask" onSubmit={(event) => event.preventDefault()}>
          <div class="parameters wider">
            {field("tasks", "Tasks (N)", 1, 1)}
            {list("shape", "Base model", SHAPES)}
            {list("precision", "Weights", PRECISIONS)}
            {field("rank", "Adapter rank", 1, 1)}
            <label>
              Adapters change
              <select value={targets} onChange={(event) => setTargets(event.currentTarget.value as Targets)}>
                {(Object.keys(TARGETS) as Targets[]).map((name) => (
                  <option key={name} value={name}>
                    {TARGETS[name]}
                  </option>
                ))}
              </select>
            </label>
            {list("gpu", "GPU", GPUS, (i) => ({ memory: GPUS[i]!.memory, price: GPUS[i]!.price }))}
            {field("memory", "GPU memory, GiB", 1)}
            {field("price", "Price of a GPU an hour", 0.05)}
            {field("kvCopy", "KV cache of a copy, GiB", 0.5)}
            {field("kvShared", "KV cache of the shared base, GiB", 0.5)}
            {field("overhead", "Overhead of a process, GiB", 0.1)}
            {field("reserve", "Reserve on a GPU, GiB", 0.1)}
          </div>
          <p class="note">
            Prices are examples, not offers: put in your own. A process' overhead is the driver's context, activations and
            fragmentation, on each GPU that it uses.
          </p>
        </form>
        <div class="answers">
          {!valid && <p class="alert bad">Every field needs a number that is not negative; tasks and rank at least 1.</p>}
          {valid && <Result inputs={inputs} setting={setting} shape={shape} copies={copies} shared={shared} />}
          <Chart
            shown={shown}
            title={unit === "cost" ? "Cost an hour over N" : "GPUs over N"}
            lines={LINES}
            data={data}
            format={unit === "cost" ? money : short}
            formatX={(n) => `N = ${count(Math.round(n))}`}
            logarithmic={logarithmic}
            height={260}
          />
          <div class="row">
            <label class="check">
              <input type="checkbox" checked={logarithmic} onChange={(event) => setLogarithmic(event.currentTarget.checked)} />
              Logarithmic
            </label>
            <label>
              <span class="hidden">What to plot</span>
              <select value={unit} onChange={(event) => setUnit(event.currentTarget.value as "cost" | "gpus")}>
                <option value="cost">Cost an hour</option>
                <option value="gpus">GPUs</option>
              </select>
            </label>
          </div>
          <Formula inputs={inputs} setting={setting} shape={shape} copies={copies} shared={shared} />
        </div>
      </div>
    </>
  );
}

interface Parts {
  inputs: Inputs;
  setting: Setting;
  shape: hosting.Shape;
  copies: Unit | null;
  shared: Unit | null;
}

const holds = (unit: Unit | null) =>
  unit === null ? "–" : unit.gpus === 1 ? `${count(unit.tasks)} a GPU` : `${count(unit.tasks)} on ${unit.gpus} GPUs`;

function Result({ inputs, setting, shape, copies, shared }: Parts) {
  const gpus = (unit: Unit | null) => unit && hosting.gpusFor(unit, inputs.tasks);
  const [many, few] = [gpus(copies), gpus(shared)];
  const cost = (n: number | null, hours: number) => (n === null ? "–" : money(n * inputs.price * hours));
  const rows: [string, string, string][] = [
    ["GPUs", many === null ? "–" : count(many), few === null ? "–" : count(few)],
    ["Cost an hour", cost(many, 1), cost(few, 1)],
    [`Cost a month (${MONTH} h)`, cost(many, MONTH), cost(few, MONTH)],
    ["Cost of a task a month", cost(many, MONTH / inputs.tasks), cost(few, MONTH / inputs.tasks)],
    ["Memory a task adds", bytes(setting.weights + setting.kvCopy + setting.overhead * (copies?.gpus ?? 1)), bytes(setting.adapter)],
    ["Tasks that fit", holds(copies), holds(shared)],
  ];
  return (
    <div class="card">
      <p class="verdict" role="status">
        {many !== null && few !== null ? (
          <>
            <b>{count(few)}</b> {few === 1 ? "GPU" : "GPUs"} in place of <b>{count(many)}</b> for {count(inputs.tasks)} tasks:{" "}
            <b>{short(many / few)}</b> times less
          </>
        ) : (
          "A GPU of this memory holds nothing beside its reserve and a process' overhead."
        )}
      </p>
      <table>
        <caption class="hidden">Full copies and a shared base, compared</caption>
        <thead>
          <tr>
            <td />
            <th scope="col" class="number">
              Full copies
            </th>
            <th scope="col" class="number">
              Shared base
            </th>
          </tr>
        </thead>
        <tbody>
          {rows.map(([name, a, b]) => (
            <tr key={name}>
              <th scope="row">{name}</th>
              <td class="number">{a}</td>
              <td class="number">{b}</td>
            </tr>
          ))}
        </tbody>
      </table>
      <p class="note">
        {shape.name}: {short(hosting.parameters(shape) / 1e9)} billion weights, {bytes(setting.weights)}. Keys and values take{" "}
        {bytes(hosting.kvBytesPerToken(shape))} a token, so a copy holds {count(Math.floor(setting.kvCopy / hosting.kvBytesPerToken(shape)))} tokens and
        the shared base {count(Math.floor(setting.kvShared / hosting.kvBytesPerToken(shape)))}.
      </p>
    </div>
  );
}

function Formula({ inputs, setting, copies, shared }: Parts) {
  const g = (n: number) => short(n / GIB);
  const several = (unit: Unit | null) => unit !== null && unit.gpus > 1;
  return (
    <details class="card" open>
      <summary>Formula and assumptions</summary>
      <pre class="formula">
        {[
          several(copies)
            ? `GPUs a copy takes = ceil((weights + KV) / (GPU memory - reserve - overhead))
                  = ceil((${g(setting.weights)} + ${g(setting.kvCopy)}) / (${g(setting.gpuMemory)} - ${g(setting.reserve)} - ${g(setting.overhead)})) = ${copies?.gpus}`
            : `copies a GPU holds = floor((GPU memory - reserve) / (weights + KV + overhead))
                   = floor((${g(setting.gpuMemory)} - ${g(setting.reserve)}) / (${g(setting.weights)} + ${g(setting.kvCopy)} + ${g(setting.overhead)})) = ${copies?.tasks ?? 0}`,
          several(shared)
            ? `GPUs of a base = ceil((weights + KV + adapter) / (GPU memory - reserve - overhead)) = ${shared?.gpus}
tasks of a base = floor((GPUs * (GPU memory - reserve - overhead) - weights - KV) / adapter)
                = floor((${shared?.gpus} * ${g(setting.gpuMemory - setting.reserve - setting.overhead)} - ${g(setting.weights)} - ${g(setting.kvShared)}) / ${g(setting.adapter)}) = ${count(shared?.tasks ?? 0)}`
            : `tasks a GPU holds = floor((GPU memory - reserve - weights - KV - overhead) / adapter)
                  = floor((${g(setting.gpuMemory)} - ${g(setting.reserve)} - ${g(setting.weights)} - ${g(setting.kvShared)} - ${g(setting.overhead)}) / ${g(setting.adapter)}) = ${count(shared?.tasks ?? 0)}`,
          `adapter = 2 bytes * layers * rank * sum of (inputs + outputs) of the matrices it changes = ${bytes(setting.adapter)}`,
          `GPUs = ceil(N / tasks that fit) * GPUs of a unit;  cost = GPUs * ${money(inputs.price)} an hour`,
        ].join("\n\n")}
      </pre>
      <ul>
        <li>
          <b>Memory only.</b> Throughput is not in it: whether so few GPUs answer all the traffic in time depends on the
          traffic. Copies bring computing power with each GPU, used or not.
        </li>
        <li>All tasks are in GPU memory at the same time. A server that loads adapters on demand holds more.</li>
        <li>
          KV memory limits how many tokens are in flight, over all tasks of the GPU. Copies have theirs apart, one for each task; give the
          shared base as much as its traffic needs at the same time.
        </li>
        <li>Every task has its adapter or copy once; nothing is doubled for availability.</li>
        <li>Weights all have the precision chosen (files with 8 or 4 bits often keep some matrices larger); adapters and the KV cache have 16 bits.</li>
        <li>
          A model larger than one GPU is split evenly over the fewest GPUs that hold it, also where a base on more of them would hold more
          adapters a GPU. GiB are 2³⁰ bytes.
        </li>
      </ul>
    </details>
  );
}
