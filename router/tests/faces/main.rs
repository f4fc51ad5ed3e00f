//! Both faces over an engine without a model: what they answer, refuse, stream and give back.

mod answers;
mod contracts;
mod dialects;
mod drain;
mod editors;
mod embeddings;
mod endings;
mod grpc;
mod harness;
mod hostile;
mod kv_events;
mod messages;
mod ollama;
mod pooling;
mod refusals;
mod responses;
mod structured;
mod tokens;
mod tools;
