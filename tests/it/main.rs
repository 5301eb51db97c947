//! Tests against reference outputs, real weights and real clients. One program, so that it links once.

mod access;
mod bad_input;
mod blends;
mod churn;
mod classifications;
mod cli;
mod clients;
mod common;
mod faults;
mod fuzz;
mod gguf;
mod grammars;
mod host;
mod hosting;
mod hub;
mod lora_gguf;
mod methods;
mod server;
mod shapes;
mod smollm2;
mod sources;
mod tiny;
mod traces;
mod train;
