//! The batched low-rank delta `y += scale * (x Aᵀ) Bᵀ` for rows grouped by adapter, and what else an adapter may change:
//! gains and shifts of outputs, norms, embeddings, logits.

mod delta;
mod dora;
mod op;
mod packed;
mod pool;
mod table;
#[cfg_attr(not(any(feature = "cuda", test)), allow(dead_code))]
mod tiles;

pub use delta::{BatchDelta, Segment};
pub use packed::PackedAdapter;
pub use pool::Pool;
#[cfg(test)]
pub(crate) use pool::tests::HostUploads;
