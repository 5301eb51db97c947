//! The cost of hosting and of training, measured.
//!
//! - [`methods`]: transfer learning beside full fine-tuning
//! - [`report`]: what a benchmark has to say, as Markdown and as one HTML file; its plots in [`plot`]
//! - [`machine`](mod@machine): where it was measured

mod machine;
pub mod methods;
mod plot;
pub mod report;

pub use machine::machine;
