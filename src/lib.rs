//! The gateway of polylora: HTTP, JSON, text and the command line around an [`InferenceEngine`](polylora_engine::InferenceEngine).

pub mod auth;
pub mod demo;
pub mod hub;
pub mod metrics;
