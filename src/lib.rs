//! The gateway of polylora: HTTP, JSON, text and the command line around an [`InferenceEngine`](polylora_engine::InferenceEngine).

pub mod aliases;
pub mod app;
pub mod auth;
pub mod chat_template;
pub mod cli;
pub mod config;
pub mod constraint;
pub mod conversation;
pub mod demo;
pub mod error;
pub mod extract;
#[doc(hidden)]
pub mod fuzzing;
pub mod gbnf;
pub mod generation;
pub mod hub;
pub mod lifecycle;
pub mod logprobs;
pub mod message_parser;
pub mod metrics;
pub mod openapi;
pub mod prompt;
pub mod protocol;
pub mod pushed;
pub mod reasoning;
pub mod requests;
pub mod routes;
pub mod routing;
pub mod server;
pub mod sse;
pub mod state_dir;
pub mod stream;
pub mod telemetry;
pub mod text_side;
pub mod tokenizer;
pub mod tool_calls;
