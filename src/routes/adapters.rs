//! Loading and unloading adapters: SGLang's, vLLM's and Dynamo's forms of the same two operations.

use std::{collections::BTreeMap, time::Duration};

use axum::{
    Json,
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use polylora_engine::UnloadMode;
use sha2::{Digest, Sha256};

use super::models::with_all_adapters;
use crate::{
    app::{AppState, Gateway},
    error::{ApiError, VllmErrorBody, VllmErrorCode, VllmErrorDetail},
    extract::{ApiJson, ApiPath, NativeJson},
    lifecycle::Load,
    protocol::adapters::{
        AdapterFailure, AdapterResponse, AdapterUnloaded, DynamoList, DynamoLoadRequest, DynamoResponse, LoadAdapterRequest, PinAdapterRequest,
        UnloadAdapterRequest, VllmLoadRequest, VllmUnloadRequest,
    },
};

/// What `force` of an unload means.
pub(super) fn unload_mode(force: Option<bool>) -> UnloadMode {
    if force == Some(true) { UnloadMode::Abort } else { UnloadMode::Drain }
}

/// How long an unload waits, from a number of seconds.
pub(super) fn drain_timeout(seconds: Option<f64>, param: &str) -> Result<Option<Duration>, ApiError> {
    let timeout = seconds.map(Duration::try_from_secs_f64).transpose();
    timeout.map_err(|error| ApiError::invalid(param, format!("{param} is a number of seconds: {error}")))
}

fn loaded_adapters(state: &Gateway) -> BTreeMap<String, String> {
    let adapters = state.engine.list_adapters().into_iter();
    adapters.map(|info| (info.name.to_string(), info.source)).collect()
}

/// SGLang answers every failure of an adapter with 400; what is not the client's fault keeps its status here, and so does a conflict.
async fn native_answer(state: &Gateway, result: Result<Option<serde_json::Value>, ApiError>) -> Response {
    let (status, error_message, report) = match &result {
        Ok(report) => (StatusCode::OK, String::new(), report.clone()),
        Err(error) if error.status().is_server_error() || error.status() == StatusCode::CONFLICT => {
            (error.status(), error.message().to_owned(), None)
        }
        Err(error) => (StatusCode::BAD_REQUEST, error.message().to_owned(), None),
    };
    // All of them, each time: SGLang's clients read it.
    let write = || {
        let body = AdapterResponse {
            rid: None,
            success: status == StatusCode::OK,
            error_message,
            loaded_adapters: loaded_adapters(state),
            report,
        };
        (status, Json(body)).into_response()
    };
    let mut response = with_all_adapters(state, write).await;
    if let Err(error) = &result {
        error.write_retry_after(&mut response);
    }
    response
}

/// `POST /load_lora_adapter`.
#[utoipa::path(
    post, path = "/load_lora_adapter", operation_id = "load_lora_adapter", tag = "Adapters", request_body = LoadAdapterRequest,
    responses(
        (status = 200, description = "Loaded.", body = AdapterResponse),
        (status = 400, description = "The adapter or the request is wrong; nothing was registered.",
            content((AdapterFailure = "application/json"))),
        (status = 409, description = "The name has another version than `expected_version`; nothing was changed.", body = AdapterResponse),
        (status = 502, description = "The Hub can't be reached, or fails.", body = AdapterResponse),
        (status = 503, description = "No room for another adapter now.", body = AdapterResponse),
        crate::openapi::NativeAdminErrors,
    ),
)]
pub async fn load(State(state): State<AppState>, NativeJson(request): NativeJson<LoadAdapterRequest>) -> Response {
    let load = Load {
        name: request.lora_name,
        path: request.lora_path,
        pinned: request.pinned.unwrap_or(false),
        replace: request.replace.unwrap_or(false),
        expected_version: request.expected_version,
    };
    let loaded = state.load_adapter(load).await;
    let report = loaded.map(|info| info.report.and_then(|report| serde_json::to_value(&*report).ok()));
    native_answer(&state, report).await
}

/// `POST /pin_lora_adapter`.
#[utoipa::path(
    post, path = "/pin_lora_adapter", operation_id = "pin_lora_adapter", tag = "Adapters", request_body = PinAdapterRequest,
    responses(
        (status = 200, description = "Pinned, or not any more.", body = AdapterResponse),
        (status = 400, description = "No such adapter, too many pins, or the request is wrong.", content((AdapterFailure = "application/json"))),
        crate::openapi::NativeAdminErrors,
    ),
)]
pub async fn pin(State(state): State<AppState>, NativeJson(request): NativeJson<PinAdapterRequest>) -> Response {
    let pinned = state.pin_adapter(&request.lora_name, request.pinned).await;
    native_answer(&state, pinned.map(|()| None)).await
}

/// `POST /unload_lora_adapter`.
#[utoipa::path(
    post, path = "/unload_lora_adapter", operation_id = "unload_lora_adapter", tag = "Adapters", request_body = UnloadAdapterRequest,
    responses(
        (status = 200, description = "Unloaded; requests that use it have ended.", body = AdapterResponse),
        (status = 400, description = "No such adapter, or the request is wrong.", content((AdapterFailure = "application/json"))),
        crate::openapi::NativeAdminErrors,
    ),
)]
pub async fn unload(State(state): State<AppState>, NativeJson(request): NativeJson<UnloadAdapterRequest>) -> Response {
    let mode = unload_mode(request.force);
    let unloaded = match drain_timeout(request.timeout_seconds, "timeout_seconds") {
        Ok(timeout) => state.unload_adapter(&request.lora_name, mode, timeout).await,
        Err(error) => Err(error),
    };
    let report = unloaded.map(|report| serde_json::to_value(AdapterUnloaded::from(report)).ok());
    native_answer(&state, report).await
}

/// An error in vLLM's words; its clients look at `type`.
fn vllm_error(status: StatusCode, kind: &str, message: String) -> Response {
    let error = VllmErrorDetail {
        message,
        kind: kind.to_owned(),
        param: None,
        code: Some(VllmErrorCode::Status(status.as_u16())),
    };
    (status, Json(VllmErrorBody { error })).into_response()
}

fn vllm_failure(error: &ApiError) -> Response {
    let kind = match error.status() {
        StatusCode::NOT_FOUND => "NotFoundError",
        status if status.is_server_error() => "InternalServerError",
        _ => "InvalidUserInput",
    };
    let mut response = vllm_error(error.status(), kind, error.message().to_owned());
    error.write_retry_after(&mut response);
    response
}

/// `POST /v1/load_lora_adapter`.
#[utoipa::path(
    post, path = "/v1/load_lora_adapter", tag = "Adapters", request_body = VllmLoadRequest,
    responses((status = 200, description = "Loaded.", body = String, content_type = "text/plain"), crate::openapi::VllmLoadErrors),
)]
pub async fn vllm_load(State(state): State<AppState>, ApiJson(request): ApiJson<VllmLoadRequest>) -> Result<Response, ApiError> {
    if request.is_3d_lora_weight == Some(true) {
        return Err(ApiError::unsupported(
            "is_3d_lora_weight",
            "mixture-of-experts adapters in that format are not served",
        ));
    }
    let present = |text: Option<String>| text.filter(|text| !text.is_empty());
    let (Some(name), Some(path)) = (present(request.lora_name), present(request.lora_path)) else {
        let message = "Both 'lora_name' and 'lora_path' must be provided.".to_owned();
        return Ok(vllm_error(StatusCode::BAD_REQUEST, "InvalidUserInput", message));
    };
    let in_place = request.load_inplace.unwrap_or(false);
    if !in_place && state.engine.adapter_info(&name).is_some() {
        let message =
            format!("The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set 'load_inplace' to True.");
        return Ok(vllm_error(StatusCode::BAD_REQUEST, "InvalidUserInput", message));
    }
    let load = Load {
        name: name.clone(),
        path,
        replace: in_place,
        ..Load::default()
    };
    Ok(match state.load_adapter(load).await {
        Ok(_) => format!("Success: LoRA adapter '{name}' added successfully.").into_response(),
        Err(error) => vllm_failure(&error),
    })
}

/// `POST /v1/unload_lora_adapter`.
#[utoipa::path(
    post, path = "/v1/unload_lora_adapter", tag = "Adapters", request_body = VllmUnloadRequest,
    responses((status = 200, description = "Unloaded.", body = String, content_type = "text/plain"), crate::openapi::VllmLoadErrors),
)]
pub async fn vllm_unload(State(state): State<AppState>, ApiJson(request): ApiJson<VllmUnloadRequest>) -> Response {
    let Some(name) = request.lora_name.filter(|name| !name.is_empty()) else {
        let message = "'lora_name' needs to be provided to unload a LoRA adapter.".to_owned();
        return vllm_error(StatusCode::BAD_REQUEST, "InvalidUserInput", message);
    };
    match state.unload_adapter(&name, UnloadMode::Drain, None).await {
        Ok(_) => format!("Success: LoRA adapter '{name}' removed successfully.").into_response(),
        Err(error) if error.status() == StatusCode::NOT_FOUND => vllm_error(
            StatusCode::NOT_FOUND,
            "NotFoundError",
            format!("The lora adapter '{name}' cannot be found."),
        ),
        Err(error) => vllm_failure(&error),
    }
}

/// A number made from the name, the same everywhere and always.
fn dynamo_id(name: &str) -> u32 {
    let digest = Sha256::digest(name.as_bytes());
    u32::from_be_bytes([digest[0], digest[1], digest[2], digest[3]]) & 0x7fff_ffff
}

fn dynamo_answer(name: String, message: String) -> Json<DynamoResponse> {
    Json(DynamoResponse {
        status: "success".to_owned(),
        message,
        lora_id: dynamo_id(&name),
        lora_name: name,
    })
}

/// `POST /v1/loras`.
#[utoipa::path(
    post, path = "/v1/loras", tag = "Adapters", request_body = DynamoLoadRequest,
    responses((status = 200, description = "Loaded.", body = DynamoResponse), crate::openapi::LoadErrors),
)]
pub async fn dynamo_load(State(state): State<AppState>, ApiJson(request): ApiJson<DynamoLoadRequest>) -> Result<Json<DynamoResponse>, ApiError> {
    let uri = request.source.uri;
    let path = uri.strip_prefix("file://").unwrap_or(&uri).to_owned();
    let load = Load {
        name: request.lora_name.clone(),
        path,
        ..Load::default()
    };
    state
        .load_adapter(load)
        .await
        .map_err(|error| error.rename_param("lora_path", "source.uri"))?;
    let message = format!("LoRA adapter '{}' loaded successfully", request.lora_name);
    Ok(dynamo_answer(request.lora_name, message))
}

/// `GET /v1/loras`.
#[utoipa::path(
    get, path = "/v1/loras", tag = "Adapters",
    responses((status = 200, description = "Every adapter.", body = DynamoList), crate::openapi::AdminReadErrors),
)]
pub async fn dynamo_list(State(state): State<AppState>) -> Response {
    with_all_adapters(&state, || {
        let names = state.engine.adapter_names();
        let loras: BTreeMap<String, u32> = names.iter().map(|name| (name.to_string(), dynamo_id(name))).collect();
        let list = DynamoList {
            status: "success".to_owned(),
            count: loras.len(),
            loras,
        };
        Json(list).into_response()
    })
    .await
}

/// `DELETE /v1/loras/{name}`.
#[utoipa::path(
    delete, path = "/v1/loras/{name}", tag = "Adapters", params(("name" = String, Path, description = "The adapter's name.")),
    responses((status = 200, description = "Unloaded.", body = DynamoResponse), crate::openapi::LoadErrors),
)]
pub async fn dynamo_unload(State(state): State<AppState>, ApiPath(name): ApiPath<String>) -> Result<Json<DynamoResponse>, ApiError> {
    let unloaded = state.unload_adapter(&name, UnloadMode::Drain, None).await;
    unloaded.map_err(|error| error.rename_param("model", "name").rename_param("lora_name", "name"))?;
    let message = format!("LoRA adapter '{name}' unloaded successfully");
    Ok(dynamo_answer(name, message))
}
