//! The log, and traces for an OpenTelemetry collector (feature `otlp`).
//!
//! A request is a span, `request`, and its stages are spans in it: `adapter` (a lease on it, which may wait for its load and comes first, since
//! the adapter may have a tokenizer of its own), `render` (chat template), `tokenize`, `grammar` (compiling one), and for each output the
//! engine's [`polylora_engine::stages`]: `queue`, `prefill` and `decode`, which begin and end when they do there. The stages are at level
//! `debug`: without a collector, and at the usual log level, they cost nothing.

use std::io::IsTerminal;

use anyhow::{Context, anyhow};
use axum::http::HeaderMap;
use tracing::Span;
use tracing_subscriber::{EnvFilter, Layer, Registry, layer::SubscriberExt, util::SubscriberInitExt};

use crate::config::{LogFormat, OtlpSettings};

type BoxedLayer = Box<dyn Layer<Registry> + Send + Sync>;

/// Keeps traces flowing. Dropping it sends what has not been sent.
pub struct Telemetry {
    #[cfg(feature = "otlp")]
    provider: Option<opentelemetry_sdk::trace::SdkTracerProvider>,
}

/// Starts the log, on standard error, and traces if they are wanted.
///
/// # Errors
/// A filter that is none; an exporter that can't be; a log that was started before.
pub fn start(filter: &str, format: LogFormat, otlp: Option<&OtlpSettings>) -> anyhow::Result<Telemetry> {
    let filter = EnvFilter::try_new(filter).with_context(|| format!("--log-level {filter:?}"))?;
    // Standard error, so that standard output holds only what a person or a script reads: the start line.
    // A line that can't be written (a full disk, a reader that has gone) is lost; to say so would be a write that fails, too, and a panic.
    let log = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).log_internal_errors(false);
    let log: BoxedLayer = match format {
        LogFormat::Text => log.with_ansi(std::io::stderr().is_terminal()).with_filter(filter).boxed(),
        LogFormat::Json => log.json().flatten_event(true).with_filter(filter).boxed(),
    };
    let (telemetry, traces) = export(otlp)?;
    let layers: Vec<BoxedLayer> = traces.into_iter().chain([log]).collect();
    let installed = tracing_subscriber::registry().with(layers).try_init();
    installed.map_err(|error| anyhow!("{error}"))?;
    Ok(telemetry)
}

#[cfg(not(feature = "otlp"))]
fn export(otlp: Option<&OtlpSettings>) -> anyhow::Result<(Telemetry, Option<BoxedLayer>)> {
    anyhow::ensure!(otlp.is_none(), "--otlp-endpoint: this binary was built without the `otlp` feature");
    Ok((Telemetry {}, None))
}

#[cfg(feature = "otlp")]
fn export(otlp: Option<&OtlpSettings>) -> anyhow::Result<(Telemetry, Option<BoxedLayer>)> {
    use opentelemetry::trace::TracerProvider as _;
    use opentelemetry_otlp::{WithExportConfig, WithHttpConfig};
    use opentelemetry_sdk::{Resource, trace::SdkTracerProvider};
    use tracing_subscriber::filter::{LevelFilter, Targets};

    let Some(otlp) = otlp else {
        return Ok((Telemetry { provider: None }, None));
    };
    let exporter = opentelemetry_otlp::SpanExporter::builder()
        .with_http()
        .with_http_client(otlp_client::Client::default())
        .with_endpoint(traces_url(&otlp.endpoint));
    let exporter = exporter.build().with_context(|| format!("--otlp-endpoint {}", otlp.endpoint))?;
    let resource = Resource::builder().with_service_name(otlp.service_name.clone()).build();
    let provider = SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build();
    // Spans of the gateway alone: those of others are no stages of a request, and the exporter's own would never end.
    let spans = Targets::new()
        .with_target("polylora", LevelFilter::DEBUG)
        .with_target("polylora_engine", LevelFilter::OFF)
        .with_target(polylora_engine::stages::TARGET, LevelFilter::DEBUG);
    let layer = tracing_opentelemetry::layer()
        .with_tracer(provider.tracer("polylora"))
        .with_location(false)
        .with_threads(false)
        .with_target(false)
        .with_tracked_inactivity(false);
    let provider = Some(provider);
    Ok((Telemetry { provider }, Some(layer.with_filter(spans).boxed())))
}

impl Telemetry {
    /// Whether requests are traced.
    pub fn exports_traces(&self) -> bool {
        #[cfg(feature = "otlp")]
        return self.provider.is_some();
        #[cfg(not(feature = "otlp"))]
        false
    }
}

#[cfg(feature = "otlp")]
impl Drop for Telemetry {
    fn drop(&mut self) {
        if let Some(provider) = &self.provider
            && let Err(error) = provider.shutdown_with_timeout(LAST_TRACES_TIMEOUT)
        {
            tracing::warn!(%error, "the last traces could not be sent");
        }
    }
}

/// For what has not been sent when the server ends.
#[cfg(feature = "otlp")]
const LAST_TRACES_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(30);

/// Where traces go at an OTLP endpoint.
#[cfg(feature = "otlp")]
fn traces_url(endpoint: &str) -> String {
    const PATH: &str = "/v1/traces";
    let endpoint = endpoint.trim_end_matches('/');
    if endpoint.ends_with(PATH) {
        endpoint.to_owned()
    } else {
        format!("{endpoint}{PATH}")
    }
}

/// Makes a span part of the trace that the client (or a gateway in front) has begun, if `traceparent` names one. A client that says that its
/// trace is not recorded is believed.
pub fn continue_trace(span: &Span, headers: &HeaderMap) {
    #[cfg(feature = "otlp")]
    {
        use opentelemetry::propagation::TextMapPropagator;
        use tracing_opentelemetry::OpenTelemetrySpanExt;
        let propagator = opentelemetry_sdk::propagation::TraceContextPropagator::new();
        let parent = propagator.extract(&opentelemetry_http::HeaderExtractor(headers));
        // Without a layer for it the span is none of a trace.
        let _ = span.set_parent(parent);
    }
    #[cfg(not(feature = "otlp"))]
    let _ = (span, headers);
}

/// The exporter's HTTP client: the one that the Hub's files come by.
#[cfg(feature = "otlp")]
mod otlp_client {
    use std::time::Duration;

    use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};

    const TIMEOUT: Duration = Duration::from_secs(10);
    const MAX_ANSWER_BYTES: u64 = 4 << 20;

    #[derive(Debug)]
    pub struct Client(ureq::Agent);

    impl Default for Client {
        fn default() -> Self {
            let config = ureq::Agent::config_builder().timeout_global(Some(TIMEOUT)).http_status_as_error(false);
            Self(config.build().into())
        }
    }

    #[async_trait::async_trait]
    impl HttpClient for Client {
        /// Blocks: the exporter has a thread of its own.
        async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
            let (parts, body) = request.into_parts();
            let response = self.0.run(Request::from_parts(parts, body.to_vec()))?;
            let (parts, mut body) = response.into_parts();
            let body = body.with_config().limit(MAX_ANSWER_BYTES).read_to_vec()?;
            Ok(Response::from_parts(parts, body.into()))
        }
    }
}

#[cfg(test)]
mod stages_tests {
    use std::{collections::BTreeMap, sync::Arc};

    use parking_lot::Mutex;
    use polylora_engine::{GenerationRequest, LogprobsParams, SamplingParams, Stages};
    use tracing::{
        field::{Field, Visit},
        span::{Attributes, Id, Record},
    };
    use tracing_subscriber::{layer::Context, registry::LookupSpan};

    use super::*;

    type Recorded = BTreeMap<String, String>;

    /// Begins (with the parent) and ends of spans in their order, and what was recorded of each.
    #[derive(Clone, Default)]
    struct Seen(Arc<Mutex<(Vec<String>, Recorded)>>);

    struct Fields<'a>(&'a str, &'a mut Recorded);

    impl Visit for Fields<'_> {
        fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
            self.1.insert(format!("{}.{field}", self.0), format!("{value:?}"));
        }
    }

    impl<S: tracing::Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Seen {
        fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
            let span = context.span(id).unwrap();
            let parent = span.parent().map_or("nothing", |parent| parent.name());
            let mut seen = self.0.lock();
            seen.0.push(format!("{} in {parent}", span.name()));
            attributes.record(&mut Fields(span.name(), &mut seen.1));
        }

        fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
            values.record(&mut Fields(context.span(id).unwrap().name(), &mut self.0.lock().1));
        }

        fn on_close(&self, id: Id, context: Context<'_, S>) {
            let name = context.span(&id).unwrap().name();
            self.0.lock().0.push(format!("{name} ends"));
        }
    }

    /// What a subscriber sees of one request, to which `happens` happens.
    fn seen(happens: impl FnOnce(&Stages)) -> (Vec<String>, Recorded) {
        let seen = Seen::default();
        tracing::subscriber::with_default(tracing_subscriber::registry().with(seen.clone()), || {
            let span = tracing::info_span!("request");
            let stages = span.in_scope(|| {
                Stages::begin(&GenerationRequest {
                    prompt_tokens: vec![1, 2, 3],
                    sampling: SamplingParams::default(),
                    adapter: None,
                    logprobs: LogprobsParams::default(),
                    constraint: None,
                    fairness_key: "".into(),
                })
            });
            happens(&stages);
            drop(span);
            // The engine finds out later.
            seen.0.lock().0.push("answered".into());
            assert!(stages.admit().is_none() || stages.queued().is_some());
            stages.compute(0);
        });
        let seen = seen.0.lock();
        seen.clone()
    }

    #[test]
    fn the_stages_of_a_request_are_spans_in_its_own_one_after_the_other() {
        let (spans, fields) = seen(|stages| {
            assert_eq!((stages.queued(), stages.prefilled()), (None, None));
            let queued = stages.admit().expect("this is the first time");
            assert_eq!(stages.queued(), Some(queued));
            assert_eq!(stages.admit(), None, "pushed back and admitted again: it has run before");
            let took = stages.compute(2);
            assert_eq!((stages.queued(), stages.prefilled()), (Some(queued), Some(took)));
            stages.end(7, "stop");
        });
        let expected = [
            "request in nothing",
            "queue in request",
            "queue ends",
            "prefill in request",
            "prefill ends",
            "decode in request",
            "decode ends",
            "request ends",
            "answered",
        ];
        assert_eq!(spans, expected);
        for (field, value) in [
            ("prefill.adapter", "\"(base)\""),
            ("prefill.prompt_tokens", "3"),
            ("prefill.cached_tokens", "2"),
            ("decode.output_tokens", "7"),
            ("decode.outcome", "\"stop\""),
        ] {
            assert_eq!(fields.get(field).map(String::as_str), Some(value), "{field}: {fields:?}");
        }
    }

    #[test]
    fn a_request_whose_client_goes_away_has_no_stages_after_that() {
        let (spans, _) = seen(|stages| stages.end(0, "abort"));
        assert_eq!(
            spans,
            ["request in nothing", "queue in request", "queue ends", "request ends", "answered"]
        );
        let (spans, _) = seen(|stages| {
            stages.admit();
            stages.end(0, "abort");
        });
        assert_eq!(
            spans[2..],
            ["queue ends", "prefill in request", "prefill ends", "request ends", "answered"]
        );
    }
}

#[cfg(all(test, feature = "otlp"))]
mod tests {
    use super::*;

    #[test]
    fn traces_have_a_path_of_their_own() {
        for (endpoint, url) in [
            ("http://collector:4318", "http://collector:4318/v1/traces"),
            ("http://collector:4318/", "http://collector:4318/v1/traces"),
            ("http://gateway/otlp", "http://gateway/otlp/v1/traces"),
            ("http://collector:4318/v1/traces", "http://collector:4318/v1/traces"),
        ] {
            assert_eq!(traces_url(endpoint), url);
        }
    }
}
