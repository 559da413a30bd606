//! How far a request is: queue, prefill, decode; as times and, for whoever traces, as spans.
//!
//! The engine says when one stage ends and the next begins, on its own thread, so that spans are as long as what they stand for. Who asked
//! says when decoding ends: it may be done with a request (a stop text came, the client went away) before the engine knows.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tracing::{Span, field::Empty};

use crate::request::GenerationRequest;

/// Target of the spans: with it a filter can tell them from those of the engine's own work, which are of no request.
pub const TARGET: &str = "polylora_engine::stages";
/// What the base model is called where adapters have their name.
pub const BASE_LABEL: &str = "(base)";

/// The stages of one request, seen from both sides.
///
/// Spans, at level `debug`, each a child of the span in which the request was submitted, each ended before the next begins: `queue`, from
/// `submit` to the first admission to the batch, whatever was waited for; `prefill`, from there to the end of the prompt's computation
/// (fields `adapter`, `prompt_tokens`, `cached_tokens`); `decode`, from there to the end (fields `output_tokens`, `outcome`).
#[derive(Debug)]
pub struct Stages {
    adapter: Option<Arc<str>>,
    prompt_tokens: usize,
    submitted: Instant,
    now: Mutex<Now>,
}

#[derive(Debug)]
struct Now {
    /// Whose stages they are; none when they are over, since a span ends when nobody holds it.
    request: Span,
    stage: Span,
    admitted: Option<Instant>,
    computed: Option<Instant>,
    ended: bool,
}

impl Stages {
    /// Submitted now, in the span that is entered now.
    pub fn begin(request: &GenerationRequest) -> Self {
        let parent = Span::current();
        let now = Now {
            stage: tracing::debug_span!(target: TARGET, parent: &parent, "queue"),
            request: parent,
            admitted: None,
            computed: None,
            ended: false,
        };
        Self {
            adapter: request.adapter.as_ref().map(|lease| Arc::clone(lease.label())),
            prompt_tokens: request.prompt_tokens.len(),
            submitted: Instant::now(),
            now: Mutex::new(now),
        }
    }

    /// When it was submitted.
    pub fn submitted(&self) -> Instant {
        self.submitted
    }

    /// From `submit` to the first admission, once that has happened.
    pub fn queued(&self) -> Option<Duration> {
        let admitted = self.now.lock().admitted?;
        Some(admitted - self.submitted)
    }

    /// From the first admission to the end of the prompt's computation, once that has happened.
    pub fn prefilled(&self) -> Option<Duration> {
        let now = self.now.lock();
        Some(now.computed? - now.admitted?)
    }

    /// It runs. What it did before is given; nothing if it ran before: a sequence that was pushed back is admitted again.
    pub fn admit(&self) -> Option<Duration> {
        let mut now = self.now.lock();
        if now.admitted.is_some() {
            return None;
        }
        let admitted = Instant::now();
        now.admitted = Some(admitted);
        let adapter = self.adapter.as_deref().unwrap_or(BASE_LABEL);
        now.enter(|request| {
            tracing::debug_span!(
                target: TARGET,
                parent: request,
                "prefill",
                adapter,
                prompt_tokens = self.prompt_tokens,
                cached_tokens = Empty
            )
        });
        Some(admitted - self.submitted)
    }

    /// Its prompt is computed, with so many tokens from the prefix cache; how long that took.
    pub fn compute(&self, cached_tokens: u32) -> Duration {
        let mut now = self.now.lock();
        let computed = Instant::now();
        now.computed = Some(computed);
        now.stage.record("cached_tokens", cached_tokens);
        now.enter(|request| tracing::debug_span!(target: TARGET, parent: request, "decode", output_tokens = Empty, outcome = Empty));
        now.admitted.map_or(Duration::ZERO, |admitted| computed - admitted)
    }

    /// It is over for whoever asked: no span of it is left, nor will any begin.
    pub fn end(&self, output_tokens: u64, outcome: &'static str) {
        let mut now = self.now.lock();
        now.stage.record("output_tokens", output_tokens).record("outcome", outcome);
        now.ended = true;
        now.stage = Span::none();
        now.request = Span::none();
    }
}

impl Now {
    fn enter(&mut self, stage: impl FnOnce(&Span) -> Span) {
        // The one ends before the other begins.
        self.stage = Span::none();
        if !self.ended {
            self.stage = stage(&self.request);
        }
    }
}
