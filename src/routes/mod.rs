//! The routes, one file an endpoint.

use axum::{
    Router,
    http::HeaderValue,
    middleware::from_fn,
    response::Response,
    routing::{get, post},
};
use polylora_engine::AdapterLease;

use crate::app::{ADAPTER_HEADER, AppState, admit, require_admin};

pub mod adapters;
pub mod chat_completions;
pub mod completions;
pub mod generate;
pub mod health;
pub mod models;
pub mod server;

/// Every route.
pub fn router() -> Router<AppState> {
    let generating = Router::new()
        .route("/v1/chat/completions", post(chat_completions::chat_completions))
        .route("/v1/completions", post(completions::completions))
        .route("/generate", post(generate::generate).put(generate::generate))
        .route_layer(from_fn(admit));
    let admin = Router::new()
        .route("/load_lora_adapter", post(adapters::load))
        .route("/unload_lora_adapter", post(adapters::unload))
        .route("/pin_lora_adapter", post(adapters::pin))
        .route("/v1/load_lora_adapter", post(adapters::vllm_load))
        .route("/v1/unload_lora_adapter", post(adapters::vllm_unload))
        .route("/v1/loras", post(adapters::dynamo_load).get(adapters::dynamo_list))
        .route("/v1/loras/{name}", axum::routing::delete(adapters::dynamo_unload))
        .route("/flush_cache", get(server::flush_cache).post(server::flush_cache))
        .route_layer(from_fn(require_admin));
    Router::new()
        .merge(generating)
        .merge(admin)
        .route("/abort_request", post(server::abort_request))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::one))
        .route("/health", get(health::health))
        .route("/health_generate", get(health::health_generate))
        .route("/ping", get(health::health).post(health::health))
        .route("/metrics", get(health::metrics))
        .route("/version", get(server::version))
        .route("/load", get(server::load))
        .route("/get_load", get(server::load))
        .route("/v1/loads", get(server::loads))
        .route("/model_info", get(server::model_info))
        .route("/get_model_info", get(server::model_info))
        .route("/server_info", get(server::server_info))
        .route("/get_server_info", get(server::server_info))
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
