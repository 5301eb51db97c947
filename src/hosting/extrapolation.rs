//! How many tasks larger models would allow on a GPU: arithmetic on sizes, not a measurement.

use serde::Serialize;

use super::prices::Gpu;

/// A Llama-like model's dimensions.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Shape {
    pub name: &'static str,
    pub hidden: u64,
    pub intermediate: u64,
    pub layers: u64,
    pub heads: u64,
    pub kv_heads: u64,
    pub vocabulary: u64,
}

/// Llama 2's models, whose sizes are the usual ones of fine-tunes.
pub const SHAPES: [Shape; 3] = [
    Shape { name: "7B", hidden: 4096, intermediate: 11008, layers: 32, heads: 32, kv_heads: 32, vocabulary: 32000 },
    Shape { name: "13B", hidden: 5120, intermediate: 13824, layers: 40, heads: 40, kv_heads: 40, vocabulary: 32000 },
    Shape { name: "70B", hidden: 8192, intermediate: 28672, layers: 80, heads: 64, kv_heads: 8, vocabulary: 32000 },
];

impl Shape {
    fn kv_width(&self) -> u64 {
        self.hidden / self.heads * self.kv_heads
    }

    /// Inputs and outputs of a layer's linear modules: q, k, v, o, gate, up and down.
    fn linear(&self) -> [(u64, u64); 7] {
        let (h, kv, i) = (self.hidden, self.kv_width(), self.intermediate);
        [(h, h), (h, kv), (h, kv), (h, h), (h, i), (h, i), (i, h)]
    }

    pub fn parameters(&self) -> u64 {
        let layer: u64 = self.linear().iter().map(|(i, o)| i * o).sum();
        self.layers * (layer + 2 * self.hidden) + 2 * self.vocabulary * self.hidden + self.hidden
    }

    /// Of an adapter with pairs of a rank on all linear modules.
    pub fn adapter_parameters(&self, rank: u64) -> u64 {
        self.layers * self.linear().iter().map(|(i, o)| rank * (i + o)).sum::<u64>()
    }

    /// Keys and values of a token.
    pub fn kv_numbers(&self) -> u64 {
        2 * self.layers * self.kv_width()
    }
}

/// What is assumed, and what was measured.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Assumptions {
    /// Of a weight, an adapter's number, a key or a value.
    pub bytes_per_number: u64,
    pub rank: u64,
    /// Tokens that the KV cache of each process holds.
    pub kv_tokens: u64,
    /// Share of a GPU's memory that is used.
    pub used: f64,
    /// Bytes that a process takes beside weights, cache and adapters.
    pub overhead: f64,
    /// Bytes that an adapter takes beside its numbers.
    pub adapter_overhead: f64,
}

/// Tasks on GPUs of one kind. Counts of a model that does not fit one GPU are of as many as it needs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Room {
    pub model: &'static str,
    pub gpu: String,
    /// Of the base's weights, an adapter and a process's KV cache.
    pub weights: f64,
    pub adapter: f64,
    pub kv: f64,
    /// GPUs that one process needs.
    pub gpus: u64,
    /// Tasks that one base and its adapters have on these.
    pub shared: u64,
    /// Full models that these hold.
    pub copies: u64,
    /// Price of a task for an hour, if all that fit are there; `None` where none fits.
    pub shared_hour: Option<f64>,
    pub copies_hour: Option<f64>,
}

impl Room {
    pub fn of(shape: &Shape, gpu: &Gpu, a: &Assumptions) -> Self {
        let bytes = |numbers: u64| (numbers * a.bytes_per_number) as f64;
        let weights = bytes(shape.parameters());
        let kv = bytes(shape.kv_numbers()) * a.kv_tokens as f64;
        let adapter = bytes(shape.adapter_parameters(a.rank)) + a.adapter_overhead;
        let usable = gpu.memory_gb * 1e9 * a.used;
        let process = weights + kv + a.overhead;
        let gpus = (process / usable).ceil().max(1.0);
        let shared = ((gpus * usable - process) / adapter).max(0.0).floor();
        let copies = (gpus * usable / process).floor();
        let hour = gpus * gpu.hour;
        Room {
            model: shape.name,
            gpu: gpu.name.clone(),
            weights,
            adapter,
            kv,
            gpus: gpus as u64,
            shared: shared as u64,
            copies: copies as u64,
            shared_hour: (shared > 0.0).then(|| hour / shared),
            copies_hour: (copies > 0.0).then(|| hour / copies),
        }
    }
}

/// The formula, for people.
pub const FORMULA: &str = "\
parameters = layers * (sum of in * out over q, k, v, o, gate, up, down + 2 * hidden) + 2 * vocabulary * hidden + hidden
weights    = parameters * bytes per number
adapter    = layers * (sum of rank * (in + out) over the same) * bytes per number + overhead of an adapter
KV         = tokens * 2 * layers * kv heads * head width * bytes per number
usable     = GPU memory * share used
GPUs       = ceil((weights + KV + overhead) / usable)
shared     = floor((GPUs * usable - weights - KV - overhead) / adapter)      tasks of one base
copies     = floor(GPUs * usable / (weights + KV + overhead))                full models
task-hour  = GPUs * price of an hour / tasks";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_those_of_the_models() {
        // As their model cards have them.
        let counts = SHAPES.map(|s| s.parameters());
        assert_eq!(counts, [6_738_415_616, 13_015_864_320, 68_976_648_192]);
        // Of q and v with rank 8 in 7B, a well-known 4,194,304, one has here all seven modules of rank 16.
        assert_eq!(SHAPES[0].adapter_parameters(16), 32 * 16 * (2 * 8192 + 2 * 8192 + 3 * 15104));
    }

    #[test]
    fn room_on_a_gpu() {
        let a = Assumptions {
            bytes_per_number: 2,
            rank: 16,
            kv_tokens: 4096,
            used: 0.9,
            overhead: 1e9,
            adapter_overhead: 0.0,
        };
        let gpu = |memory_gb: f64| Gpu { name: "g".into(), memory_gb, hour: 2.0 };
        let room = Room::of(&SHAPES[0], &gpu(80.0), &a);
        // 13.48 GB of weights, 2.15 of KV and 1 beside them: 4 such in 72 GB, or 55.4 GB of adapters of 80 MB.
        assert_eq!((room.gpus, room.copies, room.shared), (1, 4, 692));
        assert!((room.copies_hour.unwrap() - 0.5).abs() < 1e-9);
        let large = Room::of(&SHAPES[2], &gpu(80.0), &a);
        assert_eq!((large.gpus, large.copies), (2, 1));
        assert!(large.shared > 1);
    }
}
