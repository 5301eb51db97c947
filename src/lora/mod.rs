//! The batched low-rank delta `y += scale * (x Aᵀ) Bᵀ` for rows grouped by adapter.

mod delta;
mod packed;

pub use delta::{BatchDelta, Segment};
pub use packed::PackedAdapter;
