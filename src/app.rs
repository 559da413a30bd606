//! [`app`]: everything that is served, as a router that tests call without a socket.

use std::{
    panic::AssertUnwindSafe,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use axum::{
    Router,
    extract::{DefaultBodyLimit, MatchedPath, Request, State},
    http::{
        HeaderMap, HeaderName, HeaderValue, Method, Uri,
        header::{AUTHORIZATION, CONTENT_LENGTH, RETRY_AFTER, TRANSFER_ENCODING},
    },
    middleware::{Next, from_fn, from_fn_with_state},
    response::{IntoResponse, Response},
};
use futures::FutureExt;
use polylora_engine::InferenceEngine;
use sha2::{Digest, Sha256};
use tower::ServiceBuilder;
use tower_http::{cors::CorsLayer, timeout::RequestBodyTimeoutLayer, trace::TraceLayer};

use crate::{
    aliases::Aliases,
    auth::{AdapterSources, Auth, Identity, RATE_LIMIT_HEADERS, RequestPermit},
    beside::LARGE_BYTES,
    error::{ApiError, NativeError},
    extract::{BodyTime, Received},
    lifecycle::{LoadingNames, NameLocks},
    metrics::{Metrics, MetricsConfig, RunsOn},
    prompt::PromptProcessor,
    pushed::{PushLimits, PushedAdapters},
    requests::RunningRequests,
    routes,
    routing::ServedModel,
    state_dir::RuntimeState,
    telemetry,
    text_side::{OwnSides, TextSide},
};

/// In and out: the request's id.
pub const REQUEST_ID_HEADER: HeaderName = HeaderName::from_static("x-request-id");
/// Out: the adapter that answered; absent for the base model.
pub const ADAPTER_HEADER: HeaderName = HeaderName::from_static("x-polylora-adapter");
/// In: whom a request is counted under for fairness, as gateways in front name it.
const FAIRNESS_HEADERS: [&str; 2] = ["x-llm-d-inference-fairness-id", "x-gateway-inference-fairness-id"];
const MAX_FAIRNESS_KEY_BYTES: usize = 128;

/// Bounds on what one request may ask for.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Bytes of a body.
    pub max_body_bytes: usize,
    /// Between two pieces of a body, and for a JSON body as a whole.
    pub body_timeout: Duration,
    /// Prompts of one request.
    pub max_prompts: usize,
    /// Outputs of one prompt.
    pub max_n: u32,
    /// Stop texts.
    pub max_stop: usize,
    /// Bytes of a stop text.
    pub max_stop_bytes: usize,
    /// Likeliest tokens reported at a position.
    pub max_top_logprobs: u32,
    /// Bytes of a schema, regex or grammar.
    pub max_grammar_bytes: usize,
    /// Functions of one request.
    pub max_tools: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_body_bytes: 32 << 20,
            body_timeout: Duration::from_secs(30),
            max_prompts: 4096,
            max_n: 128,
            max_stop: 32,
            max_stop_bytes: 1024,
            max_top_logprobs: 20,
            max_grammar_bytes: 256 << 10,
            max_tools: 128,
        }
    }
}

/// What the routes work with.
pub struct Gateway {
    /// Generates.
    pub engine: Arc<dyn InferenceEngine>,
    /// The base model's way with text.
    pub text: TextSide,
    /// Those of adapters that have their own.
    pub own_sides: Arc<OwnSides>,
    /// The base model's names.
    pub served: ServedModel,
    /// Where adapters come from.
    pub sources: Arc<AdapterSources>,
    /// Names that stand for adapters.
    pub aliases: Arc<Aliases>,
    /// What was changed at run time.
    pub runtime: Arc<RuntimeState>,
    /// Adapters that clients sent.
    pub pushed: Arc<PushedAdapters>,
    /// One change of a name at a time.
    pub name_locks: Arc<NameLocks>,
    /// Names that are being loaded.
    pub loading: LoadingNames,
    /// Bounds.
    pub limits: Limits,
    /// Counts.
    pub metrics: Arc<Metrics>,
    /// Whether requests are traced.
    pub traces: bool,
    /// Keys.
    pub auth: Auth,
    /// Origins that browsers may call from; `*` is any.
    pub cors_origins: Vec<String>,
    /// `owned_by` of the models.
    pub owned_by: String,
    /// The running sequences.
    pub running: RunningRequests,
    started_at: SystemTime,
    weight_version: String,
}

/// Shared by all requests.
pub type AppState = Arc<Gateway>;

impl Gateway {
    /// With default limits and no keys.
    pub fn new(engine: Arc<dyn InferenceEngine>, prompt: PromptProcessor, served: ServedModel, sources: Arc<AdapterSources>) -> Self {
        let description = engine.describe();
        let metrics = Arc::new(Metrics::new(served.name(), description, MetricsConfig::default()));
        let identity = format!("{}\n{}\n{}", served.path, description.architecture, description.dtype);
        let weight_version = Sha256::digest(identity)[..4].iter().map(|byte| format!("{byte:02x}")).collect();
        let text = TextSide::new(prompt, description.vocab_size, description.eos_token_ids.clone());
        Self {
            engine,
            text,
            own_sides: Arc::default(),
            served,
            sources,
            aliases: Arc::default(),
            runtime: Arc::default(),
            pushed: Arc::new(PushedAdapters::temporary(PushLimits::default())),
            name_locks: Arc::default(),
            loading: LoadingNames::default(),
            limits: Limits::default(),
            metrics,
            traces: false,
            auth: Auth::open(),
            cors_origins: Vec::new(),
            owned_by: "polylora".to_owned(),
            running: RunningRequests::default(),
            started_at: SystemTime::now(),
            weight_version,
        }
    }

    /// Unix time at which the server started.
    pub fn started_at(&self) -> u64 {
        unix_seconds(self.started_at)
    }

    /// Identifies the weights that answer: the base model's, and the adapter's version if there is one.
    pub fn weight_version(&self, adapter: Option<&polylora_engine::AdapterLease>) -> String {
        match adapter {
            Some(lease) => {
                let version = lease.version().0;
                format!(
                    "{}-{:02x}{:02x}{:02x}{:02x}",
                    self.weight_version, version[0], version[1], version[2], version[3]
                )
            }
            None => self.weight_version.clone(),
        }
    }

    /// The way with text of what a request runs on.
    pub fn text(&self, adapter: Option<&polylora_engine::AdapterLease>) -> TextSide {
        adapter.and_then(|lease| self.own_sides.of(lease)).unwrap_or_else(|| self.text.clone())
    }

    /// Finds models and adapters for a caller.
    pub fn router<'a>(&'a self, identity: &'a Identity) -> crate::routing::Router<'a> {
        crate::routing::Router {
            served: &self.served,
            engine: self.engine.as_ref(),
            aliases: &self.aliases,
            loading: &self.loading,
            identity,
        }
    }
}

/// Seconds since 1970.
pub fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Everything that is served.
pub fn app(state: AppState) -> Router {
    let limits = state.limits.clone();
    let (routes, document) = routes::router();
    let documentation: Router = utoipa_swagger_ui::SwaggerUi::new("/docs").url("/openapi.json", document).into();
    let make_span: fn(&Request) -> tracing::Span = if state.traces { traced_span } else { request_span };
    // One stack, not a layer after the other: `Router::layer` puts every route into a box each time.
    let around = ServiceBuilder::new()
        .layer(from_fn(identify))
        .layer(
            TraceLayer::new_for_http()
                .make_span_with(make_span)
                .on_request(())
                .on_response(())
                .on_failure(()),
        )
        .option_layer(cors(&state.cors_origins))
        .layer(from_fn_with_state(Arc::clone(&state), guard))
        .layer(RequestBodyTimeoutLayer::new(limits.body_timeout))
        .layer(DefaultBodyLimit::max(limits.max_body_bytes));
    routes
        .merge(documentation.with_state(()))
        .method_not_allowed_fallback(method_not_allowed)
        .fallback(unknown_url)
        .layer(around)
        .with_state(state)
}

/// Who makes a request, and when it came.
#[derive(Clone)]
pub struct Caller {
    /// The key.
    pub identity: Identity,
    /// Whom it is counted under.
    pub fairness_key: Arc<str>,
    /// `x-request-id`.
    pub request_id: Arc<str>,
    /// When it came.
    pub arrived: Instant,
    /// When its body was here.
    pub received: Received,
    /// On what it runs, for the metrics.
    pub runs_on: RunsOn,
    /// Its place among its key's concurrent requests, once a route has asked for it.
    pub permit: Option<Arc<RequestPermit>>,
    /// What is done with its body is better done [beside](crate::beside) the thread's other tasks.
    pub is_large: bool,
}

impl Caller {
    /// From when on its sequences are measured: how long a client takes to send its body is not the server's time.
    pub fn began(&self) -> Instant {
        self.received.at().unwrap_or(self.arrived)
    }

    /// What an alias's choice sticks to: the request's own `user`; else whom the request is counted under (the API key, or whom a
    /// gateway in front names); else nothing but the request itself.
    pub fn sticky_key<'a>(&'a self, users: [Option<&'a str>; 2], request: &'a str) -> &'a str {
        let mut names = users.into_iter().flatten().chain([&*self.fairness_key]);
        names.find(|name| !name.is_empty()).unwrap_or(request)
    }
}

impl<S: Sync> axum::extract::FromRequestParts<S> for Caller {
    type Rejection = ApiError;
    async fn from_request_parts(parts: &mut axum::http::request::Parts, _state: &S) -> Result<Self, ApiError> {
        // The layer is around every route.
        parts.extensions.get::<Self>().cloned().ok_or_else(ApiError::internal)
    }
}

/// Paths that need no key: probes, and the documentation.
fn is_open(path: &str) -> bool {
    matches!(
        path,
        "/" | "/health" | "/health_generate" | "/metrics" | "/ping" | "/version" | "/openapi.json"
    ) || path == "/docs"
        || path.starts_with("/docs/")
}

/// Around every route: counts its answers, keeps its panics to the one request, gives its errors their form, and asks for the key.
async fn guard(State(state): State<AppState>, path: Option<MatchedPath>, mut request: Request, next: Next) -> Response {
    let arrived = Instant::now();
    let runs_on = RunsOn::default();
    request.extensions_mut().insert(runs_on.clone());
    let is_native = speaks_native(request.uri().path());
    let answered = AssertUnwindSafe(authenticated(&state, request, next)).catch_unwind().await;
    let mut response = answered.unwrap_or_else(|panic| panicked(&*panic));
    // The layers around a native route don't know what they stand around.
    if let Some(error) = response.extensions_mut().remove::<ApiError>()
        && is_native
    {
        response = native_error(error, &response);
    }
    let route = path.as_ref().map_or("(unknown)", MatchedPath::as_str);
    let status = response.status().as_u16();
    state.metrics.http_request(route, &runs_on, status);
    if state.traces {
        let span = tracing::Span::current();
        span.record("http.response.status_code", status);
        if let Some(adapter) = runs_on.name() {
            span.record("polylora.adapter", &*adapter);
        }
    }
    tracing::debug!(route, status, seconds = arrived.elapsed().as_secs_f64(), "answered");
    response
}

async fn authenticated(state: &Gateway, mut request: Request, next: Next) -> Response {
    let authorization = request.headers().get(AUTHORIZATION).map(|value| value.to_str().unwrap_or_default());
    let identity = match state.auth.authenticate(authorization) {
        Ok(identity) => identity,
        // A probe without a key is nobody in particular; what it may see, anyone may.
        Err(_) if is_open(request.uri().path()) => Identity::anonymous(),
        Err(error) => return ApiError::from(error).into_response(),
    };
    let caller = Caller {
        fairness_key: fairness_key(&state.auth, &identity, request.headers()),
        identity,
        request_id: request_id(request.headers()).into(),
        arrived: Instant::now(),
        received: Received::default(),
        // The layer that counts is around this one.
        runs_on: request.extensions().get().cloned().unwrap_or_default(),
        permit: None,
        is_large: is_large(request.headers()),
    };
    request.extensions_mut().insert(caller.received.clone());
    request.extensions_mut().insert(caller);
    request.extensions_mut().insert(BodyTime(state.limits.body_timeout));
    next.run(request).await
}

/// Routes whose errors have SGLang's form.
fn speaks_native(path: &str) -> bool {
    matches!(
        path,
        "/generate" | "/load_lora_adapter" | "/unload_lora_adapter" | "/pin_lora_adapter" | "/flush_cache" | "/abort_request"
    ) || matches!(path, "/health" | "/health_generate" | "/ping" | "/metrics")
}

/// SGLang's form of an error that was answered in OpenAI's.
fn native_error(error: ApiError, answered: &Response) -> Response {
    let mut native = NativeError(error).into_response();
    for (name, value) in answered.headers() {
        // Not the length of the other body.
        if !native.headers().contains_key(name) && name != CONTENT_LENGTH {
            native.headers_mut().insert(name.clone(), value.clone());
        }
    }
    native
}

/// Counts a request against its key's limits, and tells how they stand. Around the routes that generate.
pub async fn admit(mut request: Request, next: Next) -> Response {
    let Some(mut caller) = request.extensions_mut().remove::<Caller>() else {
        return ApiError::internal().into_response();
    };
    let identity = caller.identity.clone();
    let mut response = match identity.admit(Instant::now()) {
        Ok(permit) => {
            caller.permit = Some(Arc::new(permit));
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(error) => ApiError::from(error).into_response(),
    };
    for (name, value) in identity.rate_limit_headers(Instant::now()) {
        if let Ok(value) = HeaderValue::from_str(&value) {
            response.headers_mut().insert(name, value);
        }
    }
    response
}

/// Lets admins pass. Around the routes that change the server.
pub async fn require_admin(caller: Caller, request: Request, next: Next) -> Response {
    match caller.identity.require_admin() {
        Ok(()) => next.run(request).await,
        Err(error) => ApiError::from(error).into_response(),
    }
}

/// Whether the body is large, or may turn out to be.
fn is_large(headers: &HeaderMap) -> bool {
    match headers.get(CONTENT_LENGTH) {
        Some(length) => length
            .to_str()
            .ok()
            .and_then(|length| length.parse().ok())
            .is_none_or(|length: usize| length > LARGE_BYTES),
        None => headers.contains_key(TRANSFER_ENCODING),
    }
}

/// A gateway in front says for whom it asks. A user's key speaks for itself: it could otherwise be as many as it likes.
fn fairness_key(auth: &Auth, identity: &Identity, headers: &HeaderMap) -> Arc<str> {
    let named = FAIRNESS_HEADERS.iter().find_map(|name| headers.get(*name)?.to_str().ok());
    match named {
        Some(name) if (!auth.is_enabled() || identity.is_admin()) && name.len() <= MAX_FAIRNESS_KEY_BYTES => name.into(),
        _ => identity.name(),
    }
}

fn request_id(headers: &HeaderMap) -> &str {
    headers.get(REQUEST_ID_HEADER).and_then(|id| id.to_str().ok()).unwrap_or_default()
}

/// Gives every request an id, and its answer the same. One from outside goes into logs and answers: if it is too long or no plain text,
/// it gets replaced.
async fn identify(mut request: Request, next: Next) -> Response {
    const MAX_BYTES: usize = 200;
    let is_good = |id: &HeaderValue| !id.is_empty() && id.len() <= MAX_BYTES && id.to_str().is_ok();
    let id = match request.headers().get(REQUEST_ID_HEADER) {
        Some(id) if is_good(id) => id.clone(),
        _ => {
            let mut text = [0; uuid::fmt::Hyphenated::LENGTH];
            let text = uuid::Uuid::new_v4().hyphenated().encode_lower(&mut text);
            let id = HeaderValue::from_str(text).expect("hexadecimal digits and hyphens");
            request.headers_mut().insert(REQUEST_ID_HEADER, id.clone());
            id
        }
    };
    let mut response = next.run(request).await;
    response.headers_mut().entry(REQUEST_ID_HEADER).or_insert(id);
    response
}

fn request_span(request: &Request) -> tracing::Span {
    tracing::info_span!(
        "request",
        method = %request.method(),
        path = request.uri().path(),
        request_id = request_id(request.headers()),
    )
}

/// The same, with what OpenTelemetry calls it.
fn traced_span(request: &Request) -> tracing::Span {
    let path = request.extensions().get::<MatchedPath>();
    let route = path.map_or("(unknown)", MatchedPath::as_str);
    let span = tracing::info_span!(
        "request",
        otel.name = format!("{} {route}", request.method()),
        otel.kind = "server",
        method = %request.method(),
        path = request.uri().path(),
        request_id = request_id(request.headers()),
        http.route = route,
        http.response.status_code = tracing::field::Empty,
        polylora.adapter = tracing::field::Empty,
    );
    telemetry::continue_trace(&span, request.headers());
    span
}

fn panicked(panic: &(dyn std::any::Any + Send)) -> Response {
    let reason = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied());
    tracing::error!(reason, "a handler panicked");
    ApiError::internal().into_response()
}

async fn unknown_url(method: Method, uri: Uri) -> ApiError {
    ApiError::unknown_url(method.as_str(), uri.path())
}

async fn method_not_allowed(method: Method, uri: Uri) -> ApiError {
    ApiError::method_not_allowed(method.as_str(), uri.path())
}

fn cors(origins: &[String]) -> Option<CorsLayer> {
    use tower_http::cors::{AllowHeaders, AllowMethods, AllowOrigin, ExposeHeaders};
    let origin = match origins {
        [] => return None,
        origins if origins.iter().any(|origin| origin == "*") => AllowOrigin::any(),
        origins => AllowOrigin::list(origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok())),
    };
    let limits = RATE_LIMIT_HEADERS.into_iter().flatten().map(HeaderName::from_static);
    let exposed = ExposeHeaders::list([REQUEST_ID_HEADER, ADAPTER_HEADER, RETRY_AFTER].into_iter().chain(limits));
    Some(
        CorsLayer::new()
            .allow_origin(origin)
            .allow_methods(AllowMethods::mirror_request())
            .allow_headers(AllowHeaders::mirror_request())
            .expose_headers(exposed),
    )
}
