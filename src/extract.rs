//! JSON bodies, paths and queries, with errors that say which field is wrong.

use std::{
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use axum::{
    body::Bytes,
    extract::{FromRequest, FromRequestParts, Path, Query, Request},
    http::{HeaderMap, StatusCode, header::CONTENT_TYPE, request::Parts},
};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::{
    beside::{LARGE_BYTES, beside_if},
    error::{ApiError, NativeError, shown},
};

/// How long a JSON body may take as a whole, in a request's extensions: who sends a byte now and then would have the connection for good.
#[derive(Clone, Copy, Debug)]
pub struct BodyTime(pub Duration);

/// When a request's JSON body was here as a whole: from then on it is the server that takes time. In a request's extensions.
#[derive(Clone, Debug, Default)]
pub struct Received(Arc<OnceLock<Instant>>);

impl Received {
    /// `None`: it is not here yet.
    pub fn at(&self) -> Option<Instant> {
        self.0.get().copied()
    }
}

/// A JSON body; its errors have OpenAI's form.
pub struct ApiJson<T>(pub T);

/// A JSON body; its errors have SGLang's form.
pub struct NativeJson<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for ApiJson<T> {
    type Rejection = ApiError;
    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        if !is_json(request.headers()) {
            return Err(ApiError::bad_body(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "The body must be JSON, with the header `Content-Type: application/json`.",
            ));
        }
        let time = request.extensions().get().map_or(Duration::MAX, |BodyTime(time)| *time);
        let received: Received = request.extensions().get().cloned().unwrap_or_default();
        let body = tokio::time::timeout(time, Bytes::from_request(request, state)).await;
        let body = body.map_err(|_| {
            let message = format!("The body was not received within {} seconds.", time.as_secs_f64());
            ApiError::bad_body(StatusCode::REQUEST_TIMEOUT, message)
        })?;
        let body = body.map_err(|rejection| {
            let timed_out = std::error::Error::source(&rejection).is_some_and(is_timeout);
            let status = if timed_out { StatusCode::REQUEST_TIMEOUT } else { rejection.status() };
            ApiError::bad_body(status, rejection.body_text())
        })?;
        received.0.get_or_init(Instant::now);
        beside_if(body.len() > LARGE_BYTES, || parse(&body)).await.map(Self)
    }
}

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for NativeJson<T> {
    type Rejection = NativeError;
    async fn from_request(request: Request, state: &S) -> Result<Self, NativeError> {
        let ApiJson(value) = ApiJson::from_request(request, state).await?;
        Ok(Self(value))
    }
}

/// A part of a URL's path; its errors have OpenAI's form.
pub struct ApiPath<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for ApiPath<T> {
    type Rejection = ApiError;
    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        match Path::from_request_parts(parts, state).await {
            Ok(Path(value)) => Ok(Self(value)),
            Err(rejection) => Err(ApiError::bad_body(rejection.status(), rejection.body_text())),
        }
    }
}

/// The query of a URL; its errors have OpenAI's form.
pub struct ApiQuery<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for ApiQuery<T> {
    type Rejection = ApiError;
    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, ApiError> {
        match Query::try_from_uri(&parts.uri) {
            Ok(Query(value)) => Ok(Self(value)),
            Err(rejection) => Err(ApiError::bad_request(rejection.body_text())),
        }
    }
}

fn is_json(headers: &HeaderMap) -> bool {
    let content_type = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let media_type = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    media_type == "application/json" || (media_type.starts_with("application/") && media_type.ends_with("+json"))
}

/// Whether an error of a body is that it took too long.
pub fn is_timeout(error: &(dyn std::error::Error + 'static)) -> bool {
    error.is::<tower_http::timeout::TimeoutError>() || error.source().is_some_and(is_timeout)
}

/// What other servers' clients can ask for and this server doesn't have. Such clients write these out with the value that asks for nothing
/// (`"return_routed_experts": false` by SGLang's load generator): that changes no answer and passes, any other value is refused by its name.
const NOT_OFFERED: [&str; 52] = [
    "allowed_token_ids",
    "audio_data",
    "bad_words",
    "bootstrap_host",
    "bootstrap_pair_key",
    "bootstrap_port",
    "bootstrap_room",
    "cache_salt",
    "custom_labels",
    "custom_logit_processor",
    "custom_params",
    "data_parallel_rank",
    "documents",
    "extra_key",
    "guided_choice",
    "guided_decoding_backend",
    "guided_grammar",
    "guided_json",
    "guided_regex",
    "guided_whitespace_pattern",
    "image_data",
    "images_config",
    "input_embeds",
    "kv_transfer_params",
    "logits_processors",
    "media_io_kwargs",
    "mm_processor_kwargs",
    "prompt_embeds",
    "prompt_logprobs",
    "require_reasoning",
    "return_cached_tokens_details",
    "return_flat_raw_output_top_logprobs",
    "return_flat_raw_top_logprobs",
    "return_indexer_topk",
    "return_meta_info",
    "return_routed_experts",
    "return_sampling_mask",
    "return_spec_tokens_details",
    "return_token_ids",
    "return_tokens_as_token_ids",
    "routed_dp_rank",
    "routed_experts_start_len",
    "sampling_logprobs_mode",
    "session_id",
    "session_params",
    "stop_regex",
    "structured_outputs",
    "token_ids_logprob",
    "truncate_prompt_tokens",
    "use_beam_search",
    "video_data",
    "watermark",
];

/// Of [`NOT_OFFERED`], those whose 0 is the first of a range or of several machines. Elsewhere it is a number like others: `prompt_logprobs` 0
/// asks for the log-probabilities of the prompt.
const FROM_ZERO: [&str; 3] = ["data_parallel_rank", "routed_dp_rank", "routed_experts_start_len"];

fn asks_for_nothing(name: &str, value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Number(number) => number.as_f64() == Some(0.0) && FROM_ZERO.contains(&name),
        Value::String(text) => text.is_empty(),
        Value::Array(values) => values.is_empty(),
        // An empty schema asks for any JSON.
        Value::Object(fields) => fields.is_empty() && !["guided_json", "structured_outputs"].contains(&name),
        Value::Bool(true) => false,
    }
}

/// The body without fields of [`NOT_OFFERED`] that ask for nothing, on its top and among `sampling_params`; `None` if it has none.
fn without_idle_fields(body: &[u8]) -> Option<Value> {
    let mut body: Value = serde_json::from_slice(body).ok()?;
    let mut num_idle = 0;
    let mut clean = |fields: &mut serde_json::Map<String, Value>| {
        let before = fields.len();
        fields.retain(|name, value| NOT_OFFERED.binary_search(&name.as_str()).is_err() || !asks_for_nothing(name, value));
        num_idle += before - fields.len();
    };
    let fields = body.as_object_mut()?;
    clean(fields);
    match fields.get_mut("sampling_params") {
        Some(Value::Object(params)) => clean(params),
        Some(Value::Array(list)) => list.iter_mut().filter_map(Value::as_object_mut).for_each(clean),
        _ => {}
    }
    (num_idle > 0).then_some(body)
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    parse_strictly(body).or_else(|error| match without_idle_fields(body) {
        Some(body) => parse_strictly(body.to_string().as_bytes()),
        None => Err(error),
    })
}

fn parse_strictly<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    // serde would take a list for an object's values in order.
    if body.trim_ascii_start().starts_with(b"[") {
        return Err(ApiError::bad_request("The body must be a JSON object, got a list."));
    }
    let mut json = serde_json::Deserializer::from_slice(body);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        if let Some(error) = other_tool(body, &path) {
            return error;
        }
        let error = error.into_inner();
        if error.classify() == serde_json::error::Category::Data {
            field_error(&path, &error.to_string())
        } else {
            ApiError::bad_request(format!("We could not parse the JSON body of your request: {error}"))
        }
    })?;
    json.end()
        .map_err(|error| ApiError::bad_request(format!("We could not parse the JSON body of your request: {error}")))?;
    Ok(value)
}

/// A tool of another kind has other fields: what is wrong is its kind, not that they are not a function's.
fn other_tool(body: &[u8], path: &str) -> Option<ApiError> {
    let index: usize = path.strip_prefix("tools[")?.split(']').next()?.parse().ok()?;
    let body: Value = serde_json::from_slice(body).ok()?;
    let kind = body["tools"][index]["type"].as_str().filter(|kind| *kind != "function")?;
    let why = format!("`{}` is not; only `function` is", shown(kind));
    Some(ApiError::unsupported(&format!("tools[{index}].type"), &why))
}

fn field_error(path: &str, message: &str) -> ApiError {
    // serde_json adds the place in the text; the path says it better.
    let message = message.rsplit_once(" at line ").map_or(message, |(message, _)| message);
    let message = &json_words(message);
    let quoted = |prefix: &str| message.strip_prefix(prefix)?.split('`').next();
    let parent = path.rsplit_once('.').map_or("", |(parent, _)| parent);
    let join = |parent: &str, name: &str| {
        if parent.is_empty() || parent == "." || parent == "?" {
            name.to_owned()
        } else {
            format!("{parent}.{name}")
        }
    };
    if let Some(name) = quoted("unknown field `") {
        // The path may or may not already end in the unknown key.
        let parent = if path == name || path.ends_with(&format!(".{name}")) {
            parent
        } else {
            path
        };
        let param = join(parent, name);
        return ApiError::invalid(param.clone(), format!("Unrecognized request argument supplied: {param}"));
    }
    if let Some(name) = quoted("missing field `") {
        let param = join(path, name);
        return ApiError::invalid(param.clone(), format!("Missing required parameter: '{param}'."));
    }
    match path {
        "." | "?" | "" => ApiError::bad_request(format!("Invalid request body: {message}")),
        path => ApiError::invalid(path, format!("Invalid value for '{path}': {message}")),
    }
}

/// What serde expected, in JSON's words instead of Rust's.
fn json_words(message: &str) -> String {
    let Some((got, expected)) = message.rsplit_once(", expected ") else {
        return message.to_owned();
    };
    let expected = match expected {
        "u32" => "an integer from 0 to 4294967295",
        "u64" | "usize" => "an integer of at least 0",
        "i32" | "i64" => "an integer",
        "f32" | "f64" => "a number",
        "a sequence" => "a list",
        "a map" => "an object",
        name if name.starts_with("struct ") => "an object",
        other => other,
    };
    format!("{got}, expected {expected}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{chat::ChatRequest, generate::GenerateRequest};

    #[test]
    fn what_is_not_offered_may_be_switched_off() {
        assert!(NOT_OFFERED.is_sorted());
        // As SGLang's load generator writes it.
        let body = r#"{"text": "Hello", "sampling_params": {"temperature": 0.0, "max_new_tokens": 16, "stop_regex": null}, "stream": true,
            "lora_path": null, "return_logprob": false, "return_routed_experts": false, "routed_experts_start_len": 0, "image_data": []}"#;
        let request: GenerateRequest = parse(body.as_bytes()).unwrap();
        assert_eq!(request.stream, Some(true));
        for (body, param) in [
            (
                r#"{"text": "Hello", "image_data": [], "return_routed_experts": true}"#,
                "return_routed_experts",
            ),
            (r#"{"text": "Hello", "image_data": ["x"]}"#, "image_data"),
            (r#"{"text": "Hello", "prompt_logprobs": 0}"#, "prompt_logprobs"),
            (r#"{"text": "Hello", "guided_json": {}}"#, "guided_json"),
            (r#"{"text": "Hello", "watermark": {}, "foo": null}"#, "foo"),
            (
                r#"{"text": "Hello", "sampling_params": {"stop_regex": "a+"}}"#,
                "sampling_params.stop_regex",
            ),
            (
                r#"{"text": "Hello", "sampling_params": [{"stop_regex": null}, {"stop_regex": "a+"}]}"#,
                "sampling_params[1].stop_regex",
            ),
        ] {
            let error = parse::<GenerateRequest>(body.as_bytes()).unwrap_err();
            assert_eq!(error.param(), Some(param), "{error:?}");
            assert_eq!(error.status(), StatusCode::BAD_REQUEST);
        }
    }

    #[test]
    fn errors_name_the_field() {
        let message = |content: &str| format!(r#"{{"model": "m", "messages": [{content}]}}"#);
        for (body, param, what) in [
            ("{", None, "could not parse"),
            ("[]", None, "a JSON object, got a list"),
            (r#"{"model": "m", "messages": []} x"#, None, "trailing characters"),
            (r#"{"messages": []}"#, Some("model"), "Missing required parameter: 'model'"),
            (r#"{"model": 3, "messages": []}"#, Some("model"), "integer `3`, expected a string"),
            (
                r#"{"model": "m", "messages": [], "foo": 1}"#,
                Some("foo"),
                "Unrecognized request argument supplied: foo",
            ),
            (
                r#"{"model": "m", "messages": [], "max_tokens": -1}"#,
                Some("max_tokens"),
                "integer `-1`, expected an integer from 0 to",
            ),
            ("null", None, "null, expected an object"),
            (r#"{"model": "m", "messages": [], "stop": [1]}"#, Some("stop[0]"), "integer `1`"),
            (
                r#"{"model": "m", "messages": [], "tools": [{"type": "function", "function": {}}]}"#,
                Some("tools[0].function.name"),
                "Missing",
            ),
            (
                r#"{"model": "m", "messages": [], "tools": [{"type": "web_search", "search_context_size": "low"}]}"#,
                Some("tools[0].type"),
                "`web_search` is not; only `function` is",
            ),
            (
                r#"{"model": "m", "messages": [], "stream_options": {"x": 1}}"#,
                Some("stream_options.x"),
                "stream_options.x",
            ),
            (&message(r#"{"role": "robot", "content": "x"}"#), Some("messages[0].role"), "robot"),
            (&message(r#"{"content": "x"}"#), Some("messages[0].role"), "Missing"),
            (
                &message(r#"{"role": "user", "content": 3}"#),
                Some("messages[0].content"),
                "a string or a list of content parts",
            ),
            (
                &message(r#"{"role": "user", "content": [{"text": "x"}]}"#),
                Some("messages[0].content[0].type"),
                "Missing",
            ),
        ] {
            let error = parse::<ChatRequest>(body.as_bytes()).unwrap_err();
            assert_eq!(error.param(), param, "{body}: {error:?}");
            assert!(error.message().contains(what), "{body}: {error:?}");
            assert_eq!(error.status(), StatusCode::BAD_REQUEST);
        }
    }
}
