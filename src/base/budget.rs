//! How the memory of a GPU is divided among a step, the KV cache and the adapters, beside the base's weights.

use candle_core::DType;

use crate::base::flash::PAGE;
use crate::base::{BLOCK, KvCache, ModelConfig};
use crate::{Error, Result};

/// The share of what is left that adapters get where nobody says: one part of so many.
const ADAPTERS: u64 = 4;
/// Rank on all linear layers of the adapter that there has to be room for.
const RANK: u64 = 64;
/// What a step takes beside its activations: cuBLAS's workspaces, the code of kernels, tiles.
const WORKSPACE: u64 = 512 << 20;
const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

/// What is asked of a GPU.
#[derive(Debug, Clone, Copy)]
pub struct Wishes {
    /// Of `--kv-memory` and `--adapter-memory`; `None` where they are not given.
    pub kv: Option<u64>,
    pub adapters: Option<u64>,
    /// The share of all memory that may be taken, the weights with it.
    pub utilization: f64,
    pub step: Step,
}

/// The largest step.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    pub rows: usize,
    /// Rows whose logits are wanted.
    pub logits: usize,
}

/// Bytes of a GPU, and what a model needs of them.
#[derive(Debug, Clone, Copy)]
pub struct Budget {
    pub total: u64,
    /// What nobody has, when the weights are there.
    pub free: u64,
    pub weights: u64,
    /// What the largest step takes.
    pub step: u64,
    /// Of a sequence as long as the model's context, in the KV cache.
    pub sequence: u64,
    /// Positions of that sequence.
    pub context: usize,
    /// Of an adapter of rank 64 on all linear layers.
    pub adapter: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Division {
    pub kv: u64,
    pub adapters: u64,
}

impl Budget {
    /// For a model in numbers of `dtype` on a GPU with `total` bytes, `free` of them beside the `weights`.
    pub fn new(config: &ModelConfig, dtype: DType, step: Step, [total, free, weights]: [u64; 3]) -> Self {
        let linears = config.target_modules();
        let sums: usize = linears.iter().map(|m| m.in_features + m.out_features).sum();
        Budget {
            total,
            free,
            weights,
            step: step_bytes(config, dtype, step),
            sequence: (config.context.next_multiple_of(PAGE) / BLOCK) as u64
                * KvCache::block_bytes(config, true, dtype) as u64,
            context: config.context,
            adapter: RANK * (sums * dtype.size_in_bytes()) as u64,
        }
    }

    /// What is left for the KV cache and adapters: of the share of the memory that may be taken what the weights and a step
    /// leave, and never more than is free.
    fn left(&self, utilization: f64) -> u64 {
        let share = (self.total as f64 * utilization) as u64;
        share.saturating_sub(self.weights).min(self.free).saturating_sub(self.step)
    }

    /// Divides what is left. What is given stands; the other gets the rest. Where neither is, adapters get a quarter, but
    /// each has room for one of its kind.
    ///
    /// Errors: `BadRequest` where that is more than there is, or less than one needs whose size nobody gave, with what would
    /// fit.
    pub fn divide(&self, wishes: &Wishes) -> Result<Division> {
        let left = self.left(wishes.utilization);
        let rest = |given: u64, least: u64| left.checked_sub(given).filter(|&rest| rest >= least);
        let division = match (wishes.kv, wishes.adapters) {
            (Some(kv), Some(adapters)) => rest(kv, adapters).map(|_| Division { kv, adapters }),
            (Some(kv), None) => rest(kv, self.adapter).map(|adapters| Division { kv, adapters }),
            (None, Some(adapters)) => rest(adapters, self.sequence).map(|kv| Division { kv, adapters }),
            (None, None) => rest(self.sequence, self.adapter).map(|most| {
                let adapters = (left / ADAPTERS).clamp(self.adapter, most);
                Division { kv: left - adapters, adapters }
            }),
        };
        division.ok_or_else(|| Error::bad_request(self.too_little(wishes, left)))
    }

    fn too_little(&self, wishes: &Wishes, left: u64) -> String {
        let kv = match wishes.kv {
            Some(kv) => format!("--kv-memory {}", size(kv)),
            None => format!("{} for the KV cache of a sequence of {} positions", size(self.sequence), self.context),
        };
        let adapters = match wishes.adapters {
            Some(adapters) => format!("--adapter-memory {}", size(adapters)),
            None => format!("{} for an adapter of rank {RANK} on all linear layers", size(self.adapter)),
        };
        let [total, weights, free, step] = [self.total, self.weights, self.free, self.step].map(size);
        let advice = match self.would_fit(wishes, left) {
            Some(Division { kv, adapters }) => {
                let positions = (kv as f64 / self.sequence as f64 * self.context as f64) as u64;
                let shorter = match kv < self.sequence {
                    true => format!(", for sequences of up to {positions} of the model's {} positions", self.context),
                    false => String::new(),
                };
                format!("--kv-memory {} --adapter-memory {} would fit{shorter}", size(kv), size(adapters))
            }
            None => "it takes a larger GPU, a smaller model, fewer --max-batch-tokens or more of \
                     --gpu-memory-utilization"
                .into(),
        };
        format!(
            "the GPU has {total}, of which the weights take {weights} and {free} are free beside them; with \
             --gpu-memory-utilization {} and {step} for a step, {} are left, which is less than {kv} and {adapters}; \
             {advice}",
            wishes.utilization,
            size(left)
        )
    }

    /// As much as possible of what is wanted, in sizes that [`size`] writes exactly.
    fn would_fit(&self, wishes: &Wishes, left: u64) -> Option<Division> {
        let (kv, adapters) = (wishes.kv.unwrap_or(self.sequence), wishes.adapters.unwrap_or(self.adapter));
        let least = left / 16;
        let divisions =
            [(left.saturating_sub(adapters), adapters), (kv, left.saturating_sub(kv)), (left / 2, left / 2)];
        // Each gets something worth having, unless it is to have less.
        let (kv_least, adapters_least) = (kv.min(least), adapters.min(least));
        let useful =
            |d: &Division| d.kv >= kv_least.max(1) && d.adapters >= adapters_least && d.kv + d.adapters <= left;
        let rounded = |(kv, adapters)| Division { kv: round_down(kv), adapters: round_down(adapters) };
        divisions.into_iter().map(rounded).find(|d| left >= 256 * MIB && useful(d))
    }
}

/// Whole GiB, MiB or bytes.
fn size(bytes: u64) -> String {
    match bytes {
        b if b >= GIB && b.is_multiple_of(GIB) => format!("{}GiB", b / GIB),
        b if b.is_multiple_of(MIB) => format!("{}MiB", b / MIB),
        b if b > GIB => format!("{:.1}GiB", b as f64 / GIB as f64),
        b if b > MIB => format!("{:.1}MiB", b as f64 / MIB as f64),
        b => format!("{b} bytes"),
    }
}

fn round_down(bytes: u64) -> u64 {
    let unit = if bytes >= 8 * GIB { GIB } else { MIB };
    bytes - bytes % unit
}

/// What a step takes at most on a GPU beside weights and cache. Tensors are freed when they are used, so it is the most of
/// what is alive at a time: in attention, in the MLP, or the logits.
fn step_bytes(config: &ModelConfig, dtype: DType, step: Step) -> u64 {
    let (c, number) = (config, dtype.size_in_bytes());
    // The stream, what is normed of it, what is added to it, and a norm in f32.
    let stream = 6 * c.hidden_size;
    let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
    // The product; q and k while they are turned, with and without gaps; what is attended.
    let attention = (q + 2 * kv) + 3 * (q + kv) + kv + q;
    // The product, its first half without gaps and activated, and what is multiplied.
    let mlp = (2 + 3) * c.intermediate_size;
    let layer = step.rows * (stream + attention.max(mlp)) * number;
    // The product, its copy with an adapter's tokens, twice while it is capped or changed; and f32.
    let width = if c.predicts { c.vocab_size * (4 * number + 4) } else { 0 };
    let logits = step.logits.min(step.rows) * (c.hidden_size * (4 + number) + width);
    layer.max(logits) as u64 + WORKSPACE
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A model of 8 billion numbers in bf16, context 8192.
    fn budget(total: u64) -> Budget {
        Budget {
            total,
            free: total.saturating_sub(16 * GIB + GIB / 2),
            weights: 16 * GIB,
            step: GIB,
            sequence: GIB,
            context: 8192,
            adapter: 336 * MIB,
        }
    }

    fn wishes(kv: Option<u64>, adapters: Option<u64>) -> Wishes {
        Wishes { kv, adapters, utilization: 0.9, step: Step { rows: 512, logits: 512 } }
    }

    #[test]
    fn what_is_left_is_divided() {
        let of = |total: u64, kv, adapters| budget(total).divide(&wishes(kv, adapters)).unwrap();
        // 72 - 16 - 1 GiB are left.
        assert_eq!(of(80 * GIB, None, None), Division { kv: 55 * GIB * 3 / 4, adapters: 55 * GIB / 4 });
        assert_eq!(of(80 * GIB, Some(30 * GIB), None), Division { kv: 30 * GIB, adapters: 25 * GIB });
        assert_eq!(of(80 * GIB, None, Some(5 * GIB)), Division { kv: 50 * GIB, adapters: 5 * GIB });
        assert_eq!(of(80 * GIB, Some(GIB), Some(GIB)), Division { kv: GIB, adapters: GIB });
        // Of 1 GiB and 512 MiB that are left an adapter takes more than its quarter, but leaves room for the sequence.
        let small = Budget { free: 2 * GIB + GIB / 2, adapter: 400 * MIB, ..budget(80 * GIB) };
        let division = small.divide(&wishes(None, None)).unwrap();
        assert_eq!(division, Division { kv: 1136 * MIB, adapters: 400 * MIB });
        // Others have most of the GPU.
        let shared = Budget { free: 3 * GIB, ..budget(80 * GIB) };
        assert_eq!(shared.divide(&wishes(Some(GIB), None)).unwrap().adapters, GIB);
    }

    #[test]
    fn what_would_fit_is_said() {
        let message = |total: u64, kv, adapters| budget(total).divide(&wishes(kv, adapters)).unwrap_err().message;
        let error = message(24 * GIB, Some(40 * GIB), Some(GIB));
        assert!(
            error.starts_with("the GPU has 24GiB, of which the weights take 16GiB and 7680MiB are free"),
            "{error}"
        );
        assert!(error.contains("less than --kv-memory 40GiB and --adapter-memory 1GiB"), "{error}");
        // 21.6 - 16 - 1 GiB are left, and the adapters get theirs.
        assert!(error.ends_with("--kv-memory 3686MiB --adapter-memory 1GiB would fit"), "{error}");
        let error = message(24 * GIB, None, Some(4 * GIB + GIB / 2));
        assert!(error.contains("1GiB for the KV cache of a sequence of 8192 positions"), "{error}");
        assert!(error.ends_with("--kv-memory 1GiB --adapter-memory 3686MiB would fit"), "{error}");
        let long = Budget { sequence: 16 * GIB, context: 131_072, ..budget(24 * GIB) };
        let error = long.divide(&wishes(None, None)).unwrap_err().message;
        let advice = "--kv-memory 4374MiB --adapter-memory 336MiB would fit, for sequences of up to";
        assert!(error.contains(advice) && error.ends_with("of the model's 131072 positions"), "{error}");
        assert!(message(18 * GIB, None, None).contains("a larger GPU"));
    }

    #[test]
    fn sizes_are_written_as_they_are_read() {
        for (bytes, text) in [(3 * GIB, "3GiB"), (1536 * MIB, "1536MiB"), (GIB + 1, "1.0GiB"), (5, "5 bytes")] {
            assert_eq!(size(bytes), text);
        }
    }

    fn some(most: u64) -> impl Strategy<Value = u64> {
        prop_oneof![0..most, (0..40u32).prop_map(|bits| 1u64 << bits)]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn divisions_fit(
            total in some(200 * GIB),
            free in some(200 * GIB),
            weights in some(100 * GIB),
            step in some(8 * GIB),
            sequence in some(20 * GIB),
            adapter in some(2 * GIB),
            kv in prop::option::of(some(100 * GIB)),
            adapters in prop::option::of(some(100 * GIB)),
            utilization in 0.01f64..1.0,
        ) {
            let free = free.min(total);
            let budget = Budget { total, free, weights, step, sequence: sequence.max(1), context: 8192, adapter };
            let wishes = Wishes { kv, adapters, utilization, step: Step { rows: 1, logits: 1 } };
            let fits = |d: &Division| {
                let taken = d.kv as f64 + d.adapters as f64 + step as f64;
                taken <= free as f64 && taken + weights as f64 <= total as f64 * utilization
            };
            match budget.divide(&wishes) {
                Ok(division) => {
                    prop_assert!(fits(&division) || (division.kv, division.adapters) == (0, 0));
                    prop_assert!(kv.map_or(division.kv >= budget.sequence, |kv| kv == division.kv));
                    prop_assert!(adapters.map_or(division.adapters >= adapter, |a| a == division.adapters));
                }
                Err(_) => {
                    // Not even the least of each.
                    let least = Division { kv: kv.unwrap_or(budget.sequence), adapters: adapters.unwrap_or(adapter) };
                    prop_assert!(!fits(&least));
                    let left = budget.left(utilization);
                    if let Some(advised) = budget.would_fit(&wishes, left) {
                        let given = Wishes { kv: Some(advised.kv), adapters: Some(advised.adapters), ..wishes };
                        prop_assert_eq!(budget.divide(&given).unwrap(), advised);
                    }
                }
            }
        }
    }
}
