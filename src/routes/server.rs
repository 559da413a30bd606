//! What routers and operators ask a server about itself, and what they tell it.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};

use crate::{
    app::{AppState, Caller, Gateway},
    error::{ApiError, NativeError, NativeErrorBody},
    extract::NativeJson,
    protocol::server::{AbortRequest, AbortResponse, AggregateLoad, EngineLoad, Loads, LoraLoad, ModelInfo, ServerInfo, ServerLoad, Version},
};

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// `GET /version`.
#[utoipa::path(
    get, path = "/version", tag = "Server",
    responses((status = 200, description = "The server's version.", body = Version), crate::openapi::ReadErrors),
    security(()),
)]
pub async fn version() -> Json<Version> {
    Json(Version { version: VERSION.to_owned() })
}

/// `GET /load`.
#[utoipa::path(
    get, path = "/load", tag = "Server",
    responses((status = 200, description = "How much there is to do.", body = ServerLoad), crate::openapi::ReadErrors),
)]
pub async fn load(State(state): State<AppState>) -> Json<ServerLoad> {
    let stats = state.engine.stats();
    Json(ServerLoad {
        server_load: stats.running + stats.waiting,
    })
}

/// `GET /v1/loads`.
#[utoipa::path(
    get, path = "/v1/loads", tag = "Server",
    responses((status = 200, description = "How much there is to do, in detail.", body = Loads), crate::openapi::ReadErrors),
)]
pub async fn loads(State(state): State<AppState>) -> Json<Loads> {
    let load = engine_load(&state);
    Json(Loads {
        timestamp: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64()),
        dp_rank_count: 1,
        aggregate: AggregateLoad {
            total_running_reqs: load.num_running_reqs,
            total_waiting_reqs: load.num_waiting_reqs,
            total_reqs: load.num_total_reqs,
            total_tokens: load.num_used_tokens,
        },
        loads: vec![load],
    })
}

fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

fn engine_load(state: &Gateway) -> EngineLoad {
    let (stats, description) = (state.engine.stats(), state.engine.describe());
    EngineLoad {
        dp_rank: 0,
        num_running_reqs: stats.running,
        num_waiting_reqs: stats.waiting,
        num_total_reqs: stats.running + stats.waiting,
        num_used_tokens: stats.used_blocks * description.block_size,
        max_total_num_tokens: stats.total_blocks * description.block_size,
        token_usage: ratio(stats.used_blocks as u64, stats.total_blocks as u64),
        cache_hit_rate: ratio(stats.cached_tokens_total, stats.prompt_tokens_total),
        utilization: ratio(stats.running as u64, description.max_running_requests as u64),
        max_running_requests: description.max_running_requests,
        gen_throughput: state.metrics.gen_throughput(stats.output_tokens_total, Instant::now()),
        lora: description.lora_enabled.then(|| LoraLoad {
            slots_used: stats.running_adapters.len(),
            slots_total: description.max_loras_per_batch,
            utilization: ratio(stats.running_adapters.len() as u64, description.max_loras_per_batch as u64),
        }),
    }
}

/// `GET /model_info`.
#[utoipa::path(
    get, path = "/model_info", tag = "Server",
    responses((status = 200, description = "About the model.", body = ModelInfo), crate::openapi::ReadErrors),
)]
pub async fn model_info(State(state): State<AppState>) -> Json<ModelInfo> {
    let architecture = &state.engine.describe().architecture;
    Json(ModelInfo {
        model_path: state.served.path.clone(),
        tokenizer_path: state.served.path.clone(),
        is_generation: true,
        preferred_sampling_params: serde_json::to_value(state.text.prompt.sampling_defaults()).ok(),
        weight_version: state.weight_version(None),
        has_image_understanding: false,
        has_audio_understanding: false,
        model_type: architecture.strip_suffix("ForCausalLM").unwrap_or(architecture).to_lowercase(),
        architectures: vec![architecture.clone()],
    })
}

/// `GET /server_info`.
#[utoipa::path(
    get, path = "/server_info", tag = "Server",
    responses((status = 200, description = "About the server.", body = ServerInfo), crate::openapi::ReadErrors),
)]
pub async fn server_info(State(state): State<AppState>) -> Json<ServerInfo> {
    let (stats, description) = (state.engine.stats(), state.engine.describe());
    let max_total_tokens = description.num_blocks * description.block_size;
    Json(ServerInfo {
        model_id: state.served.name().to_owned(),
        model_path: state.served.path.clone(),
        served_model_name: state.served.name().to_owned(),
        version: VERSION.to_owned(),
        status: if stats.healthy { "ready" } else { "unhealthy" }.to_owned(),
        context_length: description.context_length,
        max_total_num_tokens: max_total_tokens,
        max_total_tokens,
        max_running_requests: description.max_running_requests,
        max_queued_requests: description.max_queued_requests,
        tp_size: 1,
        dp_size: 1,
        pp_size: 1,
        disaggregation_mode: "null".to_owned(),
        is_embedding: false,
        enable_lora: description.lora_enabled,
        max_loras_per_batch: description.max_loras_per_batch,
        max_loaded_loras: description.max_loaded_loras,
        max_lora_rank: description.max_lora_rank,
        lora_target_modules: description.lora_target_modules.clone(),
        num_loaded_loras: state.engine.adapter_names().len(),
        device: description.device.clone(),
        dtype: description.dtype.clone(),
        weight_version: state.weight_version(None),
        internal_states: serde_json::to_value(&stats).into_iter().collect(),
    })
}

/// `POST /flush_cache`: forgets cached prefixes; 400 while requests run.
#[utoipa::path(
    post, path = "/flush_cache", tag = "Server",
    responses(
        (status = 200, description = "Cached prefixes are forgotten.", body = String, content_type = "text/plain"),
        (status = 400, description = "Requests run or wait: nothing was done.", body = NativeErrorBody),
        crate::openapi::NativeAdminErrors,
    ),
)]
pub async fn flush_cache(State(state): State<AppState>) -> Result<Response, NativeError> {
    if state.engine.flush_cache().await {
        Ok("Cache flushed.\n".into_response())
    } else {
        Err(ApiError::bad_request("The cache can't be flushed while requests run or wait.").into())
    }
}

/// `POST /abort_request`: ends one request of the key's own, or (which is for admins) any, or all.
#[utoipa::path(
    post, path = "/abort_request", tag = "Native", request_body = AbortRequest,
    responses((status = 200, description = "What was told to end.", body = AbortResponse), crate::openapi::NativeBodyErrors),
)]
pub async fn abort_request(
    State(state): State<AppState>,
    caller: Caller,
    NativeJson(request): NativeJson<AbortRequest>,
) -> Result<Json<AbortResponse>, NativeError> {
    if request.abort_all == Some(true) {
        caller.identity.require_admin()?;
        state.engine.abort_all();
        return Ok(Json(AbortResponse { aborted: None }));
    }
    match request.rid.filter(|rid| !rid.is_empty()) {
        Some(rid) => {
            let owner = caller.identity.name();
            // Who may abort all may abort any.
            let owner = (!caller.identity.is_admin()).then_some(&*owner);
            Ok(Json(AbortResponse {
                aborted: Some(state.running.abort(&rid, owner)),
            }))
        }
        None => Err(ApiError::invalid("rid", "Give rid, or abort_all.").into()),
    }
}

/// `GET /get_load`: an older name.
#[utoipa::path(
    get, path = "/get_load", tag = "Server",
    responses((status = 200, description = "The same as `/load`, under its older name.", body = ServerLoad), crate::openapi::ReadErrors),
)]
pub async fn get_load(state: State<AppState>) -> Json<ServerLoad> {
    load(state).await
}

/// `GET /get_model_info`: an older name.
#[utoipa::path(
    get, path = "/get_model_info", tag = "Server",
    responses((status = 200, description = "The same as `/model_info`, under its older name.", body = ModelInfo), crate::openapi::ReadErrors),
)]
pub async fn get_model_info(state: State<AppState>) -> Json<ModelInfo> {
    model_info(state).await
}

/// `GET /get_server_info`: an older name.
#[utoipa::path(
    get, path = "/get_server_info", tag = "Server",
    responses((status = 200, description = "The same as `/server_info`, under its older name.", body = ServerInfo), crate::openapi::ReadErrors),
)]
pub async fn get_server_info(state: State<AppState>) -> Json<ServerInfo> {
    server_info(state).await
}

/// `GET /flush_cache`: the same.
#[utoipa::path(
    get, path = "/flush_cache", tag = "Server",
    responses(
        (status = 200, description = "Cached prefixes are forgotten.", body = String, content_type = "text/plain"),
        (status = 400, description = "Requests run or wait: nothing was done.", body = NativeErrorBody),
        crate::openapi::NativeAdminErrors,
    ),
)]
pub async fn get_flush_cache(state: State<AppState>) -> Result<Response, NativeError> {
    flush_cache(state).await
}
