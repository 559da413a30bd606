//! Probes: `/health`, `/health_generate`, `/metrics`.

use std::{convert::Infallible, sync::Arc};

use axum::{
    body::Body,
    extract::State,
    http::{
        HeaderValue,
        header::{CONTENT_LENGTH, CONTENT_TYPE},
    },
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use polylora_engine::{LogprobsParams, SamplingParams};

use crate::{
    app::{AppState, Caller},
    beside::beside_if,
    error::ApiError,
    error::NativeError,
    generation::{Job, MaxTokens, new_id},
    metrics,
    stream::{TextOptions, collect},
};

/// `GET /health`: 200 while the engine is well.
#[utoipa::path(
    get, path = "/health", tag = "Server",
    responses((status = 200, description = "The engine is well."), crate::openapi::ProbeErrors),
    security(()),
)]
pub async fn health(State(state): State<AppState>) -> Result<(), NativeError> {
    if state.engine.stats().healthy {
        Ok(())
    } else {
        Err(ApiError::unhealthy("the engine has failed").into())
    }
}

/// `GET /ping`: the same, as SageMaker asks.
#[utoipa::path(
    get, path = "/ping", tag = "Server",
    responses((status = 200, description = "The engine is well."), crate::openapi::ProbeErrors),
    security(()),
)]
pub async fn ping(state: State<AppState>) -> Result<(), NativeError> {
    health(state).await
}

/// `POST /ping`: the same.
#[utoipa::path(
    post, path = "/ping", tag = "Server",
    responses((status = 200, description = "The engine is well."), crate::openapi::ProbeErrors),
    security(()),
)]
pub async fn post_ping(state: State<AppState>) -> Result<(), NativeError> {
    health(state).await
}

/// `GET /health_generate`: 200 once the base model has generated a token.
#[utoipa::path(
    get, path = "/health_generate", tag = "Server",
    responses((status = 200, description = "A token was generated, or the server is busy generating others."), crate::openapi::ProbeErrors),
    security(()),
)]
pub async fn health_generate(State(state): State<AppState>, caller: Caller) -> Result<(), NativeError> {
    let job = Job {
        prompt_tokens: vec![0],
        lease: None,
        sampling: SamplingParams {
            temperature: 0.0,
            ignore_eos: true,
            ..SamplingParams::default()
        },
        max_tokens: MaxTokens::Exactly(1),
        n: 1,
        text: TextOptions::default(),
        logprobs: LogprobsParams::default(),
        grammar: None,
        rid: Arc::from(new_id("health-")),
    };
    match state.start(&caller, vec![job]) {
        Ok(streams) => collect(streams).await.map(drop).map_err(NativeError::from),
        // A full queue is the best of proofs that work is done; a second opinion would only wait in it.
        Err(error) if error.is_queue_full() && state.engine.stats().healthy => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// `GET /metrics`: Prometheus.
#[utoipa::path(
    get, path = "/metrics", tag = "Server",
    responses((status = 200, description = "Prometheus' text format.", body = String, content_type = "text/plain"), crate::openapi::ProbeErrors),
    security(()),
)]
pub async fn metrics(State(state): State<AppState>) -> Response {
    let render = || state.metrics.render(state.engine.as_ref(), &state.aliases);
    let pieces = beside_if(state.metrics.is_stale(), render).await;
    if state.metrics.should_renew() {
        // Nobody waits for it.
        drop(tokio::task::spawn_blocking(move || {
            state.metrics.renew(state.engine.as_ref(), &state.aliases)
        }));
    }
    let length = pieces.iter().map(Bytes::len).sum::<usize>();
    let headers = [
        (CONTENT_TYPE, HeaderValue::from_static(metrics::CONTENT_TYPE)),
        (CONTENT_LENGTH, length.into()),
    ];
    // Not put together: most of it is shared with other scrapes.
    let body = Body::from_stream(futures::stream::iter(pieces.map(Ok::<_, Infallible>)));
    (headers, body).into_response()
}
