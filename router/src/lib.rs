//! Speaks to the world: HTTP and gRPC in front of engines.

pub mod app;
pub mod bench;
pub mod body_budget;
pub mod chat_template;
pub mod config;
pub mod demo;
pub mod detokenizer;
pub mod error;
pub mod fim;
pub mod generation;
pub mod gguf;
pub mod grammar;
pub mod grpc;
pub mod http;
pub mod hub;
pub mod inflight;
pub mod lifecycle;
pub mod listener;
pub mod metrics;
mod random;
pub mod served_model;
pub mod shutdown;
mod stall;
pub mod telemetry;
pub mod tokenizer;
pub mod worker;
mod zip;
