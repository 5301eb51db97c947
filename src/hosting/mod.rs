//! The cost of hosting and of training, measured.
//!
//! - [`command`]: both ways to host tasks, one after the other, under the same traffic
//! - [`fleet`]: one base with adapters, or full models (made by [`copy`]), each server a [`process`]
//! - [`traffic`]: when requests arrive and what they see; [`sender`]: whether sending is what is slow
//! - [`methods`]: transfer learning beside full fine-tuning
//! - [`record`]: what has been measured, on the disk
//! - [`findings`], with [`statistics`], [`prices`] and [`extrapolation`]: what it comes to
//! - [`pages`]: how it is told, in a [`report`], whose plots are in [`plot`]
//! - [`machine`](mod@machine): where it was measured

pub mod command;
mod copy;
mod extrapolation;
mod findings;
mod fleet;
mod machine;
pub mod methods;
mod pages;
mod plot;
mod prices;
mod process;
mod record;
pub mod report;
mod sender;
pub mod statistics;
mod traffic;

pub use machine::machine;
pub use traffic::Lengths;
