//! `/v1/adapters`: adapters as resources, polylora's own form: list, push, unload.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Instant,
};

use axum::{
    Json,
    body::Body,
    extract::State,
    http::HeaderMap,
    response::{IntoResponse, Response},
};
use polylora_engine::AdapterInfo;

use super::{
    adapters::{drain_timeout, unload_mode},
    models::{state_name, unix_time, with_all_adapters},
};
use crate::{
    app::{AppState, Gateway},
    error::ApiError,
    extract::{ApiPath, ApiQuery},
    lifecycle::Load,
    protocol::adapters::{AdapterEntry, AdapterEntryList, AdapterPushed, AdapterUnloaded, PushBody, PushQuery, UnloadQuery},
};

/// Which aliases point at each adapter.
fn aliases_by_adapter(state: &Gateway) -> HashMap<String, Vec<String>> {
    let mut by_adapter: HashMap<String, Vec<String>> = HashMap::new();
    for alias in state.aliases.list() {
        for target in alias.targets() {
            by_adapter.entry(target.adapter().to_string()).or_default().push(alias.name().to_string());
        }
    }
    by_adapter
}

fn entry(info: &AdapterInfo, aliases: &mut HashMap<String, Vec<String>>) -> AdapterEntry {
    AdapterEntry {
        object: "adapter".to_owned(),
        aliases: aliases.remove(&*info.name).unwrap_or_default(),
        name: info.name.to_string(),
        source: info.source.clone(),
        state: state_name(info.state).to_owned(),
        version: info.version.clone(),
        lora_rank: info.max_lora_rank,
        target_modules: info.target_modules.clone(),
        size_bytes: info.bytes,
        tokenizer_bytes: info.companion_bytes,
        pinned: info.pinned,
        leases: info.leases,
        requests_total: info.requests_total,
        hits_total: info.hits_total,
        last_used: info.last_used.map(unix_time),
        last_error: info.last_error.clone(),
    }
}

/// One that is loaded for the first time: nothing is known of it yet.
fn loading_entry(name: String, source: String) -> AdapterEntry {
    AdapterEntry {
        object: "adapter".to_owned(),
        name,
        source,
        state: "loading".to_owned(),
        version: None,
        lora_rank: 0,
        target_modules: Vec::new(),
        size_bytes: 0,
        tokenizer_bytes: 0,
        pinned: false,
        leases: 0,
        requests_total: 0,
        hits_total: 0,
        last_used: None,
        last_error: None,
        aliases: Vec::new(),
    }
}

/// The adapter's name is a part of the path here.
fn path_names(error: ApiError) -> ApiError {
    error.rename_param("lora_name", "name").rename_param("model", "name")
}

/// `GET /v1/adapters`: every adapter, with all that is known of it.
#[utoipa::path(
    get, path = "/v1/adapters", operation_id = "list_adapters", tag = "Adapters",
    responses((status = 200, description = "Every adapter: those that are being loaded for the first time, then the others, last used last.", body = AdapterEntryList), crate::openapi::AdminReadErrors),
)]
pub async fn list(State(state): State<AppState>) -> Response {
    with_all_adapters(&state, || {
        // Asked first: what is loaded before the next look is found there.
        let loading = state.loading.list();
        let adapters = state.engine.list_adapters();
        let mut aliases = aliases_by_adapter(&state);
        let served: HashSet<Arc<str>> = adapters.iter().map(|info| Arc::clone(&info.name)).collect();
        let loading = loading.into_iter().filter(|(name, _)| !served.contains(name.as_str()));
        let mut data: Vec<AdapterEntry> = loading.map(|(name, source)| loading_entry(name, source)).collect();
        data.extend(adapters.iter().map(|info| entry(info, &mut aliases)));
        let object = "list".to_owned();
        Json(AdapterEntryList { object, data }).into_response()
    })
    .await
}

/// `GET /v1/adapters/{name}`: one adapter.
#[utoipa::path(
    get, path = "/v1/adapters/{name}", operation_id = "get_adapter", tag = "Adapters",
    params(("name" = String, Path, description = "The adapter's name; a slash in it as `%2F`.", example = "sql")),
    responses((status = 200, description = "About it.", body = AdapterEntry), crate::openapi::AdminReadOneErrors),
)]
pub async fn get(State(state): State<AppState>, ApiPath(name): ApiPath<String>) -> Result<Json<AdapterEntry>, ApiError> {
    // Asked first: what is loaded before the next look is found there.
    let loading = state.loading.source(&name);
    match (state.adapter_named(&name), loading) {
        (Some(info), _) => Ok(Json(entry(&info, &mut aliases_by_adapter(&state)))),
        (None, Some(source)) => Ok(Json(loading_entry(name, source))),
        (None, None) => Err(ApiError::no_such_adapter(&name)),
    }
}

/// `POST /v1/adapters/{name}`: receives an adapter's files and serves them under this name at once.
///
/// The body is `multipart/form-data` with two parts: `config`, the bytes of `adapter_config.json`, and `weights`, those of
/// `adapter_model.safetensors`. Of weights that were split, `weights` is replaced by `index`, the bytes of
/// `adapter_model.safetensors.index.json`, and a part `shard` for each file that it names, with the file's name as `filename`. An adapter
/// that has tokens or a chat template of its own brings `tokenizer` (`tokenizer.json`), `tokenizer_config`, `special_tokens_map`,
/// `added_tokens` and `chat_template` (Jinja), each if need be. They are stored as they come (in `--state-dir`, or in a temporary folder)
/// and checked like every other adapter. A name that is taken gets the new version atomically: requests in flight end on the old one,
/// later ones use the new.
/// With an error nothing has changed, and nothing of the body is left.
#[utoipa::path(
    post, path = "/v1/adapters/{name}", operation_id = "push_adapter", tag = "Adapters",
    params(("name" = String, Path, description = "The name to serve it under; a slash in it as `%2F`.", example = "summary"), PushQuery),
    request_body(content = PushBody, content_type = "multipart/form-data"),
    responses((status = 200, description = "It is served.", body = AdapterPushed), crate::openapi::PushErrors),
)]
pub async fn push(
    State(state): State<AppState>,
    ApiPath(name): ApiPath<String>,
    ApiQuery(query): ApiQuery<PushQuery>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<AdapterPushed>, ApiError> {
    let load = Load {
        name,
        path: String::new(),
        pinned: query.pinned.unwrap_or(false),
        replace: query.replace.unwrap_or(true),
        expected_version: query.expected_version,
    };
    // Refused before a gigabyte is received, where that is possible.
    let _loading = state.begin_load(&load).map_err(path_names)?;
    let began = Instant::now();
    let upload = state.pushed.receive(&headers, body).await?;
    let info = state.push_adapter(load, upload, began).await.map_err(path_names)?;
    let report = info.report.as_ref().and_then(|report| serde_json::to_value(&**report).ok());
    Ok(Json(AdapterPushed {
        adapter: entry(&info, &mut aliases_by_adapter(&state)),
        report,
    }))
}

/// `DELETE /v1/adapters/{name}`: unloads an adapter.
///
/// The name is unknown at once. The answer comes when the last request on it has ended, of itself or, with `force`, aborted; or when
/// the time is up.
#[utoipa::path(
    delete, path = "/v1/adapters/{name}", operation_id = "unload_adapter", tag = "Adapters",
    params(("name" = String, Path, description = "The adapter's name; a slash in it as `%2F`.", example = "summary"), UnloadQuery),
    responses((status = 200, description = "Unloaded.", body = AdapterUnloaded), crate::openapi::UnloadErrors),
)]
pub async fn unload(
    State(state): State<AppState>,
    ApiPath(name): ApiPath<String>,
    ApiQuery(query): ApiQuery<UnloadQuery>,
) -> Result<Json<AdapterUnloaded>, ApiError> {
    let timeout = drain_timeout(query.timeout_seconds, "timeout_seconds")?;
    let report = state.unload_adapter(&name, unload_mode(query.force), timeout).await.map_err(path_names)?;
    Ok(Json(report.into()))
}
