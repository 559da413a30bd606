//! The served API over the mock engine, one file an endpoint or behaviour: no socket, no model, no sleeps.

mod adapters;
mod aliases;
mod async_openai;
mod chat_completions;
mod common;
mod completions;
mod generate;
mod openapi;
mod push;
mod responses;
mod routers;
mod server;
mod structured;
mod tenants;
mod tools;
