//! Both faces over an engine without a model: what they answer, refuse, stream and give back.

mod answers;
mod contracts;
mod dialects;
mod drain;
mod endings;
mod grpc;
mod harness;
mod hostile;
mod refusals;
mod structured;
mod tokens;
mod tools;
