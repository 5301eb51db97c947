//! Tests against reference outputs, real weights and real clients. One program, so that it links once.

mod common;
mod llama;
mod smollm2;
