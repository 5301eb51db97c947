//! The batched low-rank delta `y += scale * (x Aᵀ) Bᵀ` for rows grouped by adapter.

mod packed;

pub use packed::PackedAdapter;
