//! Every error that a client can get: the only place that chooses a status and an error body.
//!
//! | outcome | status | `code` |
//! | --- | --- | --- |
//! | the body is no JSON, or not of the right shape; a field out of range or not supported | 400 | `null`, or what is wrong |
//! | prompt and output don't fit the context | 400 | `context_length_exceeded` |
//! | the chat template refuses the messages | 400 | `chat_template_error` |
//! | a grammar or schema can't be compiled | 400 | `invalid_grammar` |
//! | an adapter can't be loaded, LoRA is off, or a request names more adapters than there may be in memory | 400 | `adapter_…` |
//! | the Hub denies access, has not what is needed, or may not be asked | 400 | `hub_error` |
//! | an alias's name or targets can't be | 400 | `alias_bad_name`, `alias_bad_target`, `alias_too_many` |
//! | no key, or a wrong one | 401 | `invalid_api_key` |
//! | the key's role or base-model right does not suffice; a path outside the allowed roots | 403 | `insufficient_permissions`, `forbidden_path` |
//! | no such model or adapter (for this key); no such alias | 404 | `model_not_found`, `alias_not_found` |
//! | no such route; a route without this method | 404, 405 | `unknown_url`, `method_not_allowed` |
//! | the body took too long, or is too large; not `application/json` | 408, 413, 415 | |
//! | an adapter has another version than the one that was to be replaced | 409 | `adapter_version_conflict` |
//! | an adapter shall be unloaded that an alias points at | 409 | `adapter_in_use` |
//! | a limit of the key is reached | 429 + Retry-After | `rate_limit_exceeded` |
//! | ended by `/abort_request` before anything was sent | 499 | `request_aborted` |
//! | its adapter was unloaded by force before anything was sent | 503 | `adapter_unloaded` |
//! | the engine failed; a panic in a handler | 500 | `engine_error`, `internal_error` |
//! | the model gave logits that are not finite | 500 | `not_finite` |
//! | a change at run time is in effect, but not in `--state-dir` | 500 | `state_not_saved` |
//! | the Hub can't be reached, or fails | 502 | `hub_unreachable` |
//! | an adapter of that name is being loaded for the first time | 503 + Retry-After | `adapter_loading` |
//! | the queue is full; the server is stopping; no room for another adapter now | 503 + Retry-After | `queue_full`, `shutting_down`, `adapter_capacity` |
//! | other adapters are being pushed | 503 + Retry-After | `too_many_pushes` |
//! | no room on the disk for a pushed adapter, or among the pushed ones | 507 | `storage_full`, `pushed_adapters_full` |
//!
//! After the first byte of a stream the status is spent: the same body goes out as an event, and the stream ends without a
//! finish reason.

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header::RETRY_AFTER},
    response::{IntoResponse, Response},
};
use polylora_engine::{AdapterError, RequestError, SubmitError};
use serde::Serialize;
use utoipa::ToSchema;

use crate::{
    aliases::AliasError,
    auth::{AuthError, SourceError},
    chat_template::TemplateError,
    hub::HubError,
    tokenizer::TokenizerError,
};

/// OpenAI's error body.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct ErrorBody {
    /// The error.
    pub error: ErrorDetail,
}

/// What went wrong.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct ErrorDetail {
    /// A sentence for a human.
    #[schema(example = "The model 'x' does not exist.")]
    pub message: String,
    /// The class of error.
    #[serde(rename = "type")]
    #[schema(example = "invalid_request_error")]
    pub kind: String,
    /// The field of the request that is wrong, if one is.
    #[schema(example = "model")]
    pub param: Option<String>,
    /// What went wrong, for a program.
    #[schema(example = "model_not_found")]
    pub code: Option<String>,
}

/// The error body of the routes that speak vLLM's form.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct VllmErrorBody {
    /// The error.
    pub error: VllmErrorDetail,
}

/// What went wrong.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct VllmErrorDetail {
    /// A sentence for a human.
    #[schema(example = "The lora adapter 'x' cannot be found.")]
    pub message: String,
    /// The class of error: `InvalidUserInput`, `NotFoundError`, `InternalServerError`; of a body that is wrong, OpenAI's.
    #[serde(rename = "type")]
    #[schema(example = "NotFoundError")]
    pub kind: String,
    /// The field of the request that is wrong, if one is.
    pub param: Option<String>,
    /// The status, as a number; of a body that is wrong, OpenAI's code.
    pub code: Option<VllmErrorCode>,
}

/// A status, or OpenAI's code.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
#[serde(untagged)]
pub enum VllmErrorCode {
    /// The status.
    #[schema(title = "Status")]
    Status(u16),
    /// What went wrong, for a program.
    #[schema(title = "Code")]
    Code(String),
}

/// The error body of the native routes, as SGLang writes it.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct NativeErrorBody {
    /// The error.
    pub error: NativeErrorDetail,
}

/// What went wrong.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct NativeErrorDetail {
    /// A sentence for a human.
    #[schema(example = "sampling_params.top_p must be in (0, 1], got 2")]
    pub message: String,
    /// The class of error.
    #[serde(rename = "type")]
    #[schema(example = "invalid_request_error")]
    pub kind: String,
    /// The field of the request that is wrong, if one is.
    pub param: Option<String>,
    /// The HTTP status.
    #[schema(example = 400)]
    pub code: u16,
    /// Whether the same request may work later.
    pub retryable: bool,
}

/// An error on its way to a client.
#[derive(Clone, Debug)]
pub struct ApiError {
    status: StatusCode,
    kind: &'static str,
    code: Option<&'static str>,
    param: Option<String>,
    message: String,
    retry_after_seconds: Option<u64>,
}

const INVALID_REQUEST: &str = "invalid_request_error";
const SERVER_ERROR: &str = "server_error";
const QUEUE_FULL: &str = "queue_full";
const STATE_NOT_SAVED: &str = "state_not_saved";

/// What a client called something, short enough for a message.
pub fn shown(name: &str) -> std::borrow::Cow<'_, str> {
    const MOST_CHARS: usize = 256;
    match name.char_indices().nth(MOST_CHARS) {
        Some((end, _)) => format!("{}…", &name[..end]).into(),
        None => name.into(),
    }
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, code: Option<&'static str>, message: impl Into<String>) -> Self {
        Self {
            status,
            kind,
            code,
            param: None,
            message: message.into(),
            retry_after_seconds: None,
        }
    }

    /// 400 for a field.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::bad_request(message).for_param(param)
    }

    /// 400.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, INVALID_REQUEST, None, message)
    }

    /// 400 for a field that this server can't honour.
    pub fn unsupported(param: &str, why: &str) -> Self {
        let message = format!("`{param}` is not supported: {why}");
        Self::new(StatusCode::BAD_REQUEST, INVALID_REQUEST, Some("unsupported_parameter"), message).for_param(param)
    }

    /// 404 for a model or an adapter; names what exists, or some of it, and what `part` of a combination does not.
    pub fn model_not_found(name: &str, part: Option<&str>, param: &str, available: &[String], are_all: bool) -> Self {
        let list = available.join(", ");
        let part = part.map_or_else(String::new, |part| format!(": there is no adapter '{}'", shown(part)));
        let more = if are_all { "" } else { ", and more (GET /v1/models lists all)" };
        let message = format!("The model '{}' does not exist{part}. Available: {list}{more}", shown(name));
        Self::new(StatusCode::NOT_FOUND, INVALID_REQUEST, Some("model_not_found"), message).for_param(param)
    }

    /// 503 for an adapter that is not served yet, but is about to be.
    pub fn adapter_loading(name: &str, param: &str) -> Self {
        let message = format!("The adapter '{name}' is being loaded; try again in a moment.");
        let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, SERVER_ERROR, Some("adapter_loading"), message);
        error.for_param(param).retry_after(1)
    }

    /// 404 for an adapter that an admin names.
    pub fn no_such_adapter(name: &str) -> Self {
        let message = format!("There is no adapter '{name}'.");
        Self::new(StatusCode::NOT_FOUND, INVALID_REQUEST, Some("model_not_found"), message).for_param("name")
    }

    /// 404 for a path.
    pub fn unknown_url(method: &str, path: &str) -> Self {
        let message = format!("Invalid URL ({method} {path})");
        Self::new(StatusCode::NOT_FOUND, INVALID_REQUEST, Some("unknown_url"), message)
    }

    /// 405.
    pub fn method_not_allowed(method: &str, path: &str) -> Self {
        let message = format!("{path} does not answer to {method}");
        Self::new(StatusCode::METHOD_NOT_ALLOWED, INVALID_REQUEST, Some("method_not_allowed"), message)
    }

    /// What axum's extractors refuse, with axum's status: 400, 408, 413, 415.
    pub fn bad_body(status: StatusCode, message: impl Into<String>) -> Self {
        Self::new(status, INVALID_REQUEST, None, message)
    }

    /// 400 for a prompt and output that don't fit.
    pub fn context_length(message: impl Into<String>, param: &str) -> Self {
        Self::new(StatusCode::BAD_REQUEST, INVALID_REQUEST, Some("context_length_exceeded"), message).for_param(param)
    }

    /// 400 for a schema, regex or grammar.
    pub fn invalid_grammar(param: &str, reason: &str) -> Self {
        let message = format!("{param}: {reason}");
        Self::new(StatusCode::BAD_REQUEST, INVALID_REQUEST, Some("invalid_grammar"), message).for_param(param)
    }

    /// A request that was ended by `/abort_request` before it was answered.
    pub fn aborted() -> Self {
        let status = StatusCode::from_u16(499).expect("three digits");
        Self::new(status, "request_aborted", Some("request_aborted"), "The request was aborted.")
    }

    /// 503 for a request whose adapter an admin has unloaded by force: it was neither the client's doing nor its mistake.
    pub fn adapter_unloaded() -> Self {
        let message = "The adapter was unloaded while it answered your request.";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, SERVER_ERROR, Some("adapter_unloaded"), message).for_param("model")
    }

    /// 500 for a panic: `log` has what the client must not see.
    pub fn internal() -> Self {
        let message = "The server had an error while processing your request.";
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, SERVER_ERROR, Some("internal_error"), message)
    }

    /// 500 for a change that a restart would lose.
    pub fn state_not_saved(error: &std::io::Error) -> Self {
        tracing::error!(%error, "a change could not be written to --state-dir");
        let message = "The change is in effect, but it could not be written to --state-dir: a restart would lose it. Any later change that \
                       is written brings it along.";
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, SERVER_ERROR, Some(STATE_NOT_SAVED), message)
    }

    /// 503 for one push too many.
    pub fn too_many_uploads(limit: usize) -> Self {
        let message = format!("{limit} adapters are being pushed, more at once are not possible.");
        Self::new(StatusCode::SERVICE_UNAVAILABLE, SERVER_ERROR, Some("too_many_pushes"), message).retry_after(1)
    }

    /// 507 for more pushed adapters than there may be.
    pub fn pushed_full(limit_bytes: u64) -> Self {
        let message = format!("Pushed adapters may take {limit_bytes} bytes together (--max-pushed-size); unload some.");
        Self::new(StatusCode::INSUFFICIENT_STORAGE, SERVER_ERROR, Some("pushed_adapters_full"), message)
    }

    /// 507 for a full disk, 500 for anything else that it says.
    pub fn storage(error: &std::io::Error) -> Self {
        use std::io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
        tracing::error!(%error, "a pushed adapter could not be stored");
        match error.kind() {
            StorageFull | QuotaExceeded | FileTooLarge => {
                let message = "There is no room for the adapter on the server's disk.";
                Self::new(StatusCode::INSUFFICIENT_STORAGE, SERVER_ERROR, Some("storage_full"), message)
            }
            _ => Self::internal(),
        }
    }

    /// 503 for a server that is not well.
    pub fn unhealthy(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, SERVER_ERROR, Some("unhealthy"), message)
    }

    /// Names the field.
    #[must_use]
    pub fn for_param(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// Names the field as a route has it, where the engine and the other routes have another word for it.
    #[must_use]
    pub fn rename_param(self, from: &str, to: &str) -> Self {
        if self.param() == Some(from) { self.for_param(to) } else { self }
    }

    /// Says it with more around.
    #[must_use]
    pub fn with_message(mut self, message: impl FnOnce(&str) -> String) -> Self {
        self.message = message(&self.message);
        self
    }

    fn retry_after(mut self, seconds: u64) -> Self {
        self.retry_after_seconds = Some(seconds);
        self
    }

    /// The status.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// Whether it says that the queue is full.
    pub fn is_queue_full(&self) -> bool {
        self.code == Some(QUEUE_FULL)
    }

    /// Whether it says that a change is in effect, but not kept.
    pub fn is_state_not_saved(&self) -> bool {
        self.code == Some(STATE_NOT_SAVED)
    }

    /// The sentence.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// Says in a response when to try again, if that may help.
    pub fn write_retry_after(&self, response: &mut Response) {
        if let Some(seconds) = self.retry_after_seconds {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
    }

    /// The field.
    pub fn param(&self) -> Option<&str> {
        self.param.as_deref()
    }

    /// OpenAI's body.
    pub fn body(&self) -> ErrorBody {
        ErrorBody {
            error: ErrorDetail {
                message: self.message.clone(),
                kind: self.kind.to_owned(),
                param: self.param.clone(),
                code: self.code.map(str::to_owned),
            },
        }
    }

    /// SGLang's body.
    pub fn native_body(&self) -> NativeErrorBody {
        NativeErrorBody {
            error: NativeErrorDetail {
                message: self.message.clone(),
                kind: self.kind.to_owned(),
                param: self.param.clone(),
                code: self.status.as_u16(),
                retryable: self.retry_after_seconds.is_some(),
            },
        }
    }

    fn respond(&self, body: impl Serialize) -> Response {
        let mut response = (self.status, Json(body)).into_response();
        self.write_retry_after(&mut response);
        if self.status == StatusCode::UNAUTHORIZED {
            let challenge = HeaderValue::from_static("Bearer");
            response.headers_mut().insert(axum::http::header::WWW_AUTHENTICATE, challenge);
        }
        response
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = self.respond(self.body());
        // For the layer that knows which form the route speaks.
        response.extensions_mut().insert(self);
        response
    }
}

/// An [`ApiError`] with SGLang's body.
#[derive(Clone, Debug)]
pub struct NativeError(pub ApiError);

impl<E: Into<ApiError>> From<E> for NativeError {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

impl IntoResponse for NativeError {
    fn into_response(self) -> Response {
        self.0.respond(self.0.native_body())
    }
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        let message = error.to_string();
        match error {
            SubmitError::QueueFull { .. } => Self::new(StatusCode::SERVICE_UNAVAILABLE, SERVER_ERROR, Some(QUEUE_FULL), message).retry_after(1),
            SubmitError::EmptyPrompt => Self::invalid("prompt", "Prompt cannot be empty"),
            SubmitError::TokenOutOfRange { .. } => Self::invalid("prompt", message),
            SubmitError::PromptTooLong { .. } | SubmitError::KvCapacity { .. } => Self::context_length(message, "prompt"),
            SubmitError::InvalidParam { field, .. } => Self::invalid(field, message),
            SubmitError::ShuttingDown => Self::shutting_down(message),
            SubmitError::Unhealthy(reason) => {
                tracing::debug!(reason, "refused a request: the engine is not healthy");
                Self::unhealthy("The engine has failed; the server must be restarted.")
            }
        }
    }
}

impl ApiError {
    fn shutting_down(message: String) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, SERVER_ERROR, Some("shutting_down"), message).retry_after(1)
    }
}

impl From<RequestError> for ApiError {
    fn from(error: RequestError) -> Self {
        let message = error.to_string();
        match error {
            RequestError::KvCapacity { .. } => Self::context_length(message, "prompt"),
            RequestError::Adapter { .. } => Self::new(StatusCode::BAD_REQUEST, INVALID_REQUEST, Some("adapter_error"), message).for_param("model"),
            RequestError::Constraint(reason) => Self::invalid_grammar("response_format", &reason),
            RequestError::NotFinite => Self::new(StatusCode::INTERNAL_SERVER_ERROR, SERVER_ERROR, Some("not_finite"), message),
            RequestError::Engine(reason) => {
                tracing::error!(reason, "the engine failed a request");
                Self::new(
                    StatusCode::INTERNAL_SERVER_ERROR,
                    SERVER_ERROR,
                    Some("engine_error"),
                    "The engine failed while processing your request.",
                )
            }
            RequestError::ShuttingDown => Self::shutting_down(message),
        }
    }
}

impl From<AdapterError> for ApiError {
    fn from(error: AdapterError) -> Self {
        let message = error.to_string();
        let bad = |code| Self::new(StatusCode::BAD_REQUEST, INVALID_REQUEST, Some(code), message.clone());
        match error {
            AdapterError::NotEnabled => bad("adapter_not_enabled").for_param("model"),
            AdapterError::Unknown { .. } => Self::new(StatusCode::NOT_FOUND, INVALID_REQUEST, Some("model_not_found"), message).for_param("model"),
            AdapterError::AlreadyLoaded { .. } => bad("adapter_already_loaded").for_param("lora_name"),
            AdapterError::BadName { .. } => bad("adapter_bad_name").for_param("lora_name"),
            AdapterError::Incompatible { .. } => bad("adapter_incompatible").for_param("lora_path"),
            AdapterError::Unsupported { .. } => bad("adapter_unsupported").for_param("lora_path"),
            AdapterError::BadFile { .. } => bad("adapter_bad_file").for_param("lora_path"),
            AdapterError::TooManyAdapters { .. } | AdapterError::TooManySums { .. } | AdapterError::TooManyBytes { .. } => {
                bad("adapter_too_many").for_param("model")
            }
            AdapterError::TooManyPinned { .. } => bad("adapter_too_many_pinned").for_param("pinned"),
            AdapterError::VersionConflict { .. } => {
                Self::new(StatusCode::CONFLICT, INVALID_REQUEST, Some("adapter_version_conflict"), message).for_param("lora_name")
            }
            AdapterError::Internal { reason } => {
                tracing::error!(reason, "an adapter could not be loaded");
                Self::internal()
            }
            AdapterError::NothingToEvict { .. }
            | AdapterError::HostMemoryFull { .. }
            | AdapterError::TooManyCombinations { .. }
            | AdapterError::TooManyLoads { .. } => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, SERVER_ERROR, Some("adapter_capacity"), message).retry_after(1)
            }
        }
    }
}

impl From<AliasError> for ApiError {
    fn from(error: AliasError) -> Self {
        let message = error.to_string();
        let refuse = |status, code| Self::new(status, INVALID_REQUEST, Some(code), message);
        match error {
            AliasError::BadName { .. } => refuse(StatusCode::BAD_REQUEST, "alias_bad_name").for_param("name"),
            AliasError::BadTarget { .. } => refuse(StatusCode::BAD_REQUEST, "alias_bad_target").for_param("targets"),
            AliasError::TooMany => refuse(StatusCode::BAD_REQUEST, "alias_too_many").for_param("name"),
            AliasError::Unknown { .. } => refuse(StatusCode::NOT_FOUND, "alias_not_found").for_param("name"),
            AliasError::InUse { .. } => refuse(StatusCode::CONFLICT, "adapter_in_use").for_param("lora_name"),
        }
    }
}

impl From<AuthError> for ApiError {
    fn from(error: AuthError) -> Self {
        let message = error.to_string();
        match error {
            AuthError::Unauthorized { .. } => Self::new(StatusCode::UNAUTHORIZED, INVALID_REQUEST, Some("invalid_api_key"), message),
            AuthError::AdminOnly | AuthError::BaseModelForbidden => {
                Self::new(StatusCode::FORBIDDEN, "permission_error", Some("insufficient_permissions"), message)
            }
            AuthError::RateLimited { what, retry_after, .. } => {
                let kind = if what == "tokens" { "tokens" } else { "requests" };
                let seconds = retry_after.as_secs_f64().ceil().max(1.0) as u64;
                Self::new(StatusCode::TOO_MANY_REQUESTS, kind, Some("rate_limit_exceeded"), message).retry_after(seconds)
            }
            AuthError::RequestTooLarge { .. } => Self::new(StatusCode::TOO_MANY_REQUESTS, "tokens", Some("rate_limit_exceeded"), message),
        }
    }
}

impl From<SourceError> for ApiError {
    fn from(error: SourceError) -> Self {
        let message = error.to_string();
        if let SourceError::Hub(HubError::Failed { .. }) = error {
            // Not the client's fault, and perhaps better in a minute.
            return Self::new(StatusCode::BAD_GATEWAY, SERVER_ERROR, Some("hub_unreachable"), message).for_param("lora_path");
        }
        let (status, code) = match &error {
            SourceError::Forbidden { .. } | SourceError::LinkOut { .. } => (StatusCode::FORBIDDEN, "forbidden_path"),
            SourceError::NotFound { .. } | SourceError::UnknownEmbedded { .. } | SourceError::Hub(HubError::NotFound { .. }) => {
                (StatusCode::NOT_FOUND, "path_not_found")
            }
            SourceError::Hub(_) => (StatusCode::BAD_REQUEST, "hub_error"),
        };
        Self::new(status, INVALID_REQUEST, Some(code), message).for_param("lora_path")
    }
}

impl From<TemplateError> for ApiError {
    fn from(error: TemplateError) -> Self {
        Self::new(StatusCode::BAD_REQUEST, INVALID_REQUEST, Some("chat_template_error"), error.to_string()).for_param("messages")
    }
}

impl From<TokenizerError> for ApiError {
    fn from(error: TokenizerError) -> Self {
        Self::invalid("prompt", error.to_string())
    }
}
