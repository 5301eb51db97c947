//! The cost of hosting and of training, measured.
//!
//! - [`report`]: what a benchmark has to say, as Markdown and as one HTML file; its plots in [`plot`]
//! - [`machine`](mod@machine): where it was measured

mod machine;
mod plot;
pub mod report;

pub use machine::machine;
