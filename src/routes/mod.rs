//! The routes, one file an endpoint.

use axum::{Router, http::HeaderValue, middleware::from_fn, response::Response};
use polylora_engine::AdapterLease;
use utoipa::{OpenApi as _, openapi::OpenApi};
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{
    app::{ADAPTER_HEADER, AppState, admit, require_admin},
    openapi::Document,
};

pub mod adapter_resources;
pub mod adapters;
pub mod aliases;
pub mod chat_completions;
pub mod completions;
pub mod generate;
pub mod health;
pub mod models;
pub mod responses;
pub mod server;
pub mod tokenize;

/// Every route, and the document of all of them.
pub fn router() -> (Router<AppState>, OpenApi) {
    let generating = OpenApiRouter::new()
        .routes(routes!(chat_completions::chat_completions))
        .routes(routes!(completions::completions))
        .routes(routes!(responses::responses))
        .routes(routes!(generate::generate, generate::put_generate))
        .route_layer(from_fn(admit));
    let admin = OpenApiRouter::new()
        .routes(routes!(adapters::load))
        .routes(routes!(adapters::unload))
        .routes(routes!(adapters::pin))
        .routes(routes!(adapters::vllm_load))
        .routes(routes!(adapters::vllm_unload))
        .routes(routes!(adapters::dynamo_load, adapters::dynamo_list))
        .routes(routes!(adapters::dynamo_unload))
        .routes(routes!(adapter_resources::list))
        .routes(routes!(adapter_resources::get, adapter_resources::push, adapter_resources::unload))
        .routes(routes!(aliases::list))
        .routes(routes!(aliases::get, aliases::set, aliases::delete))
        .routes(routes!(server::flush_cache, server::get_flush_cache))
        .route_layer(from_fn(require_admin));
    OpenApiRouter::with_openapi(Document::openapi())
        .merge(generating)
        .merge(admin)
        .routes(routes!(server::abort_request))
        .routes(routes!(models::list))
        .routes(routes!(models::one))
        .routes(routes!(models::one_of_org))
        .routes(routes!(tokenize::tokenize))
        .routes(routes!(tokenize::detokenize))
        .routes(routes!(health::health))
        .routes(routes!(health::health_generate))
        .routes(routes!(health::ping, health::post_ping))
        .routes(routes!(health::metrics))
        .routes(routes!(server::version))
        .routes(routes!(server::load))
        .routes(routes!(server::get_load))
        .routes(routes!(server::loads))
        .routes(routes!(server::model_info))
        .routes(routes!(server::get_model_info))
        .routes(routes!(server::server_info))
        .routes(routes!(server::get_server_info))
        .split_for_parts()
}

/// Says which adapter answers.
pub fn with_adapter_header(mut response: Response, lease: Option<&AdapterLease>) -> Response {
    if let Some(lease) = lease
        && let Ok(value) = HeaderValue::from_bytes(lease.name().as_bytes())
    {
        response.headers_mut().insert(ADAPTER_HEADER, value);
    }
    response
}
