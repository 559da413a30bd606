//! [`TokenEvent`]s to text. Dropping a [`TextStream`] cancels its request.

use std::{
    collections::VecDeque,
    future::poll_fn,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use futures::{
    Stream, StreamExt,
    stream::{SelectAll, select_all},
};
use polylora_engine::{FinishReason, RequestError, TokenEvent, TokenLogprobs, TokenStream};

use crate::{
    auth::{RequestPermit, TokenReservation},
    error::ApiError,
    metrics::{Outcome, RequestMetrics},
    protocol::MatchedStop,
    requests::RunningRequest,
    tokenizer::{Detokenizer, TextTokenizer},
};

/// How tokens become text.
#[derive(Clone, Debug, Default)]
pub struct TextOptions {
    /// Generation ends before any of these.
    pub stop: Vec<String>,
    /// The text or token that stopped generation stays.
    pub keep_stop: bool,
    /// Special tokens are no text.
    pub skip_special_tokens: bool,
    /// Special tokens that are text even so.
    pub shown_tokens: Vec<u32>,
    /// Tokens that end generation: the engine's and the request's.
    pub stop_token_ids: Vec<u32>,
    /// Stop texts count after so many tokens.
    pub min_tokens: u32,
    /// Every token is reported at once, also one that adds no text yet.
    pub every_token: bool,
    /// The one token that the engine must generate was not asked for (`max_tokens` was 0).
    pub discard_output: bool,
}

/// One output token.
#[derive(Clone, Debug, PartialEq)]
pub struct OutputToken {
    /// Its id.
    pub id: u32,
    /// Its log-probabilities, if asked for.
    pub logprobs: Option<TokenLogprobs>,
    /// A stop token that is no part of the text.
    pub is_stop: bool,
}

/// What ended a sequence well.
#[derive(Clone, Debug, PartialEq)]
pub enum Finish {
    /// A stop token.
    StopToken(u32),
    /// A stop text.
    StopText(String),
    /// The grammar is complete.
    GrammarDone,
    /// As many tokens as were asked for, or as fit.
    Length,
    /// `/abort_request`.
    Aborted,
    /// An admin has unloaded the adapter by force.
    AdapterUnloaded,
}

impl Finish {
    /// OpenAI's word; `None` for an abort, which it has no word for: see [`Self::error`].
    pub fn reason(&self) -> Option<&'static str> {
        match self {
            Self::StopToken(_) | Self::StopText(_) | Self::GrammarDone => Some("stop"),
            Self::Length => Some("length"),
            Self::Aborted | Self::AdapterUnloaded => None,
        }
    }

    /// What is said of an end that OpenAI has no word for.
    pub fn error(&self) -> ApiError {
        if *self == Self::AdapterUnloaded {
            ApiError::adapter_unloaded()
        } else {
            ApiError::aborted()
        }
    }

    /// The stop token's id or the stop text.
    pub fn matched(&self) -> Option<MatchedStop> {
        match self {
            Self::StopToken(id) => Some(MatchedStop::Token(*id)),
            Self::StopText(text) => Some(MatchedStop::Text(text.clone())),
            Self::GrammarDone | Self::Length | Self::Aborted | Self::AdapterUnloaded => None,
        }
    }
}

/// What happens to a sequence, in order: `Started`, `Chunk`*, then exactly one of `Finished` and `Failed`.
#[derive(Clone, Debug, PartialEq)]
pub enum TextEvent {
    /// The prompt is computed.
    Started {
        /// Prompt tokens found in the prefix cache.
        cached_tokens: u32,
        /// One per reported prompt position.
        prompt_logprobs: Vec<TokenLogprobs>,
    },
    /// More text, or more tokens, or both.
    Chunk {
        /// Text that is certain now.
        text: String,
        /// Tokens since the last chunk.
        tokens: Vec<OutputToken>,
    },
    /// The end.
    Finished(Finish),
    /// The end, badly.
    Failed(RequestError),
}

/// What a sequence holds until its end, beside the engine's stream.
pub struct Held {
    /// Measures it.
    pub metrics: RequestMetrics,
    /// Its key's tokens, shared by all sequences of a request.
    pub reservation: Arc<TokenReservation>,
    /// Its key's place among the concurrent requests, likewise.
    pub permit: Arc<RequestPermit>,
    /// Its place in the table that `/abort_request` looks into.
    pub running: RunningRequest,
}

/// One sequence as text.
pub struct TextStream {
    tokens: Option<TokenStream>,
    held: Option<Held>,
    options: TextOptions,
    detokenizer: Detokenizer,
    stops: StopMatcher,
    /// Text that is certain and not reported.
    text: String,
    /// Tokens that are not reported.
    unreported: Vec<OutputToken>,
    num_tokens: u32,
    /// A stop token that came: text only if it did not stop generation after all, or is to be kept.
    stop_token: Option<u32>,
    queue: VecDeque<TextEvent>,
}

impl TextStream {
    /// Text of a request's tokens.
    pub fn new(tokens: TokenStream, tokenizer: Arc<TextTokenizer>, options: TextOptions, mut held: Held) -> Self {
        held.metrics.submitted(tokens.stages());
        Self {
            tokens: Some(tokens),
            held: Some(held),
            detokenizer: Detokenizer::new(tokenizer, options.skip_special_tokens, options.shown_tokens.clone()),
            stops: StopMatcher::new(options.stop.clone()),
            options,
            text: String::new(),
            unreported: Vec::new(),
            num_tokens: 0,
            stop_token: None,
            queue: VecDeque::new(),
        }
    }

    fn token(&mut self, token_id: u32, logprobs: Option<TokenLogprobs>) {
        if self.options.discard_output {
            return self.end(TextEvent::Finished(Finish::Length));
        }
        if let Some(held) = &mut self.held {
            held.metrics.token();
            held.reservation.use_tokens(1);
        }
        self.num_tokens += 1;
        let is_stop = self.options.stop_token_ids.contains(&token_id);
        self.unreported.push(OutputToken {
            id: token_id,
            logprobs,
            is_stop: is_stop && !self.options.keep_stop,
        });
        if is_stop {
            // The engine's `Finished` follows at once and says what to do with it.
            self.stop_token = Some(token_id);
            return;
        }
        let mut new = String::new();
        self.detokenizer.push(token_id, &mut new);
        let stopped = if self.num_tokens <= self.options.min_tokens {
            self.text.push_str(&new);
            None
        } else {
            self.stops.push(&new, &mut self.text, self.options.keep_stop)
        };
        if let Some(held) = &mut self.held {
            held.metrics.detokenized();
        }
        if let Some(stop) = stopped {
            return self.end(TextEvent::Finished(Finish::StopText(stop)));
        }
        if !self.text.is_empty() || self.options.every_token {
            self.report();
        }
    }

    fn finished(&mut self, reason: FinishReason) {
        if let Some(token_id) = self.stop_token.take()
            && (self.options.keep_stop || !matches!(reason, FinishReason::Stop { .. }))
        {
            let mut new = String::new();
            self.detokenizer.push(token_id, &mut new);
            // A stop token's text is kept as it is; it takes no part in the search for stop texts.
            self.stops.finish(&mut self.text);
            self.text.push_str(&new);
        }
        let mut rest = String::new();
        self.detokenizer.finish(&mut rest);
        let finish = match self.stops.push(&rest, &mut self.text, self.options.keep_stop) {
            Some(stop) => Finish::StopText(stop),
            None => match reason {
                FinishReason::Stop { token_id } => Finish::StopToken(token_id),
                FinishReason::Length => Finish::Length,
                FinishReason::ConstraintDone => Finish::GrammarDone,
                FinishReason::Aborted => Finish::Aborted,
                FinishReason::AdapterUnloaded => Finish::AdapterUnloaded,
            },
        };
        if !matches!(finish, Finish::StopText(_)) {
            self.stops.finish(&mut self.text);
        }
        self.end(TextEvent::Finished(finish));
    }

    fn report(&mut self) {
        self.queue.push_back(TextEvent::Chunk {
            text: std::mem::take(&mut self.text),
            tokens: std::mem::take(&mut self.unreported),
        });
    }

    /// Reports the rest and the end, and lets go of everything: the engine stops at its next step.
    fn end(&mut self, last: TextEvent) {
        if !self.text.is_empty() || !self.unreported.is_empty() {
            self.report();
        }
        if let Some(held) = self.held.take() {
            held.metrics.finish(match &last {
                TextEvent::Finished(Finish::Length) => Outcome::Length,
                TextEvent::Finished(Finish::Aborted | Finish::AdapterUnloaded) => Outcome::Abort,
                TextEvent::Failed(_) => Outcome::Error,
                _ => Outcome::Stop,
            });
        }
        self.tokens = None;
        self.queue.push_back(last);
    }

    fn event(&mut self, event: TokenEvent) {
        match event {
            TokenEvent::Started {
                cached_tokens,
                prompt_logprobs,
            } => {
                if let Some(held) = &mut self.held {
                    held.metrics.started(cached_tokens);
                }
                self.queue.push_back(TextEvent::Started {
                    cached_tokens,
                    prompt_logprobs,
                });
            }
            TokenEvent::Token { token_id, logprobs } => self.token(token_id, logprobs),
            TokenEvent::Finished { reason } => self.finished(reason),
            TokenEvent::Failed(error) => self.end(TextEvent::Failed(error)),
        }
    }
}

impl Stream for TextStream {
    type Item = TextEvent;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<TextEvent>> {
        loop {
            if let Some(event) = self.queue.pop_front() {
                return Poll::Ready(Some(event));
            }
            if self.held.as_ref().is_some_and(|held| held.running.is_aborted()) {
                self.finished(FinishReason::Aborted);
                continue;
            }
            let Some(tokens) = &mut self.tokens else {
                return Poll::Ready(None);
            };
            match tokens.poll_next(context) {
                Poll::Ready(Some(event)) => self.event(event),
                // A stream without a terminal event breaks the engine's contract: its thread has died.
                Poll::Ready(None) => self.event(TokenEvent::Failed(RequestError::Engine("the engine stopped".into()))),
                Poll::Pending => match &self.held {
                    // It was told to end since it was asked above.
                    Some(held) if held.running.wake_when_aborted(context.waker()) => {}
                    _ => return Poll::Pending,
                },
            }
        }
    }
}

/// Finds stop texts in text that comes in pieces, and holds back what may be the beginning of one.
///
/// One Knuth-Morris-Pratt automaton per stop text: work is linear, and what is held back is exactly the longest open beginning.
struct StopMatcher {
    patterns: Vec<Pattern>,
    held: String,
}

struct Pattern {
    text: String,
    /// `borders[i]`: length of the longest proper prefix of `text[..=i]` that is also its suffix.
    borders: Vec<usize>,
    /// Bytes matched so far.
    matched: usize,
}

impl Pattern {
    fn new(text: String) -> Self {
        let bytes = text.as_bytes();
        let mut borders = vec![0; bytes.len()];
        for i in 1..bytes.len() {
            let mut len = borders[i - 1];
            while len > 0 && bytes[len] != bytes[i] {
                len = borders[len - 1];
            }
            borders[i] = len + usize::from(bytes[len] == bytes[i]);
        }
        Self { text, borders, matched: 0 }
    }

    /// Takes a byte; true when the whole text is matched.
    fn push(&mut self, byte: u8) -> bool {
        let bytes = self.text.as_bytes();
        while self.matched > 0 && bytes[self.matched] != byte {
            self.matched = self.borders[self.matched - 1];
        }
        self.matched += usize::from(bytes[self.matched] == byte);
        self.matched == bytes.len()
    }
}

impl StopMatcher {
    fn new(stop: Vec<String>) -> Self {
        let patterns = stop.into_iter().filter(|text| !text.is_empty()).map(Pattern::new).collect();
        Self {
            patterns,
            held: String::new(),
        }
    }

    /// Takes text; appends to `out` what is certain. Some: that stop text is complete, and nothing may be pushed any more.
    fn push(&mut self, new: &str, out: &mut String, keep_stop: bool) -> Option<String> {
        if self.patterns.is_empty() {
            out.push_str(new);
            return None;
        }
        let start = self.held.len();
        self.held.push_str(new);
        for index in start..self.held.len() {
            let byte = self.held.as_bytes()[index];
            let mut complete: Option<&Pattern> = None;
            for pattern in &mut self.patterns {
                if pattern.push(byte) && complete.is_none_or(|other| other.text.len() < pattern.text.len()) {
                    complete = Some(pattern);
                }
            }
            if let Some(pattern) = complete {
                let end = if keep_stop { index + 1 } else { index + 1 - pattern.text.len() };
                out.push_str(&self.held[..end]);
                let stop = pattern.text.clone();
                self.held.clear();
                return Some(stop);
            }
        }
        let open = self.patterns.iter().map(|pattern| pattern.matched).max().unwrap_or(0);
        let certain = self.held.len() - open;
        out.extend(self.held.drain(..certain));
        None
    }

    /// Appends what was held back, at the end.
    fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
        self.patterns.iter_mut().for_each(|pattern| pattern.matched = 0);
    }
}

/// The events of several sequences as they come, each with its index.
pub struct MergedStream {
    sequences: Sequences,
    first: VecDeque<(usize, TextEvent)>,
}

enum Sequences {
    /// Nearly always: nothing has to be found out about who was woken.
    One(Box<TextStream>),
    Several(SelectAll<Indexed>),
}

struct Indexed {
    index: usize,
    stream: TextStream,
}

impl Stream for Indexed {
    type Item = (usize, TextEvent);
    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let index = self.index;
        self.stream.poll_next_unpin(context).map(|event| event.map(|event| (index, event)))
    }
}

impl MergedStream {
    /// The streams, by index.
    pub fn new(mut streams: Vec<TextStream>) -> Self {
        let sequences = match streams.pop() {
            Some(only) if streams.is_empty() => Sequences::One(Box::new(only)),
            last => {
                streams.extend(last);
                let indexed = streams.into_iter().enumerate().map(|(index, stream)| Indexed { index, stream });
                Sequences::Several(select_all(indexed))
            }
        };
        Self {
            sequences,
            first: VecDeque::new(),
        }
    }

    /// Waits until there is something to send, so that an error before it is an HTTP error. Nothing is lost.
    ///
    /// # Errors
    /// What the first sequence failed with, or that it was aborted; the others are cancelled.
    pub async fn wait_for_first(&mut self) -> Result<(), ApiError> {
        while let Some((index, event)) = poll_fn(|context| self.poll_sequences(context)).await {
            let done = match &event {
                TextEvent::Started { .. } => false,
                TextEvent::Failed(error) => return Err(error.clone().into()),
                TextEvent::Finished(finish) if finish.reason().is_none() => return Err(finish.error()),
                TextEvent::Chunk { .. } | TextEvent::Finished(_) => true,
            };
            self.first.push_back((index, event));
            if done {
                break;
            }
        }
        Ok(())
    }

    fn poll_sequences(&mut self, context: &mut Context<'_>) -> Poll<Option<(usize, TextEvent)>> {
        match &mut self.sequences {
            Sequences::One(stream) => stream.poll_next_unpin(context).map(|event| event.map(|event| (0, event))),
            Sequences::Several(streams) => streams.poll_next_unpin(context),
        }
    }

    /// The next event; `None` after the last sequence has ended.
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<(usize, TextEvent)>> {
        match self.first.pop_front() {
            Some(event) => Poll::Ready(Some(event)),
            None => self.poll_sequences(context),
        }
    }

    /// The same.
    pub async fn next(&mut self) -> Option<(usize, TextEvent)> {
        poll_fn(|context| self.poll_next(context)).await
    }
}

/// A whole sequence.
#[derive(Clone, Debug, Default)]
pub struct Completed {
    /// Its text, in pieces with the number of tokens of each.
    pub pieces: Vec<(String, usize)>,
    /// Its tokens.
    pub tokens: Vec<OutputToken>,
    /// Prompt tokens found in the prefix cache.
    pub cached_tokens: u32,
    /// One per reported prompt position.
    pub prompt_logprobs: Vec<TokenLogprobs>,
    /// What ended it.
    pub finish: Option<Finish>,
}

impl Completed {
    /// Its text.
    pub fn text(&self) -> String {
        self.pieces.iter().map(|(text, _)| text.as_str()).collect()
    }

    /// Takes an event.
    ///
    /// # Errors
    /// What the sequence failed with.
    pub fn push(&mut self, event: TextEvent) -> Result<(), RequestError> {
        match event {
            TextEvent::Started {
                cached_tokens,
                prompt_logprobs,
            } => {
                self.cached_tokens = cached_tokens;
                self.prompt_logprobs = prompt_logprobs;
            }
            TextEvent::Chunk { text, tokens } => {
                self.pieces.push((text, tokens.len()));
                self.tokens.extend(tokens);
            }
            TextEvent::Finished(finish) => self.finish = Some(finish),
            TextEvent::Failed(error) => return Err(error),
        }
        Ok(())
    }
}

/// Waits for all sequences; the first failure cancels the rest.
///
/// # Errors
/// That failure.
pub async fn collect(streams: Vec<TextStream>) -> Result<Vec<Completed>, RequestError> {
    let mut completed = vec![Completed::default(); streams.len()];
    let mut merged = MergedStream::new(streams);
    while let Some((index, event)) = merged.next().await {
        completed[index].push(event)?;
    }
    Ok(completed)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(stop: &[&str], pieces: &[&str], keep: bool) -> (Vec<String>, Option<String>) {
        let mut matcher = StopMatcher::new(stop.iter().map(|&text| text.to_owned()).collect());
        let mut out = Vec::new();
        for piece in pieces {
            let mut text = String::new();
            let stopped = matcher.push(piece, &mut text, keep);
            out.push(text);
            if stopped.is_some() {
                return (out, stopped);
            }
        }
        let mut text = String::new();
        matcher.finish(&mut text);
        out.push(text);
        (out, None)
    }

    #[test]
    fn a_stop_text_is_found_across_pieces_and_cut() {
        let stopped = |out: &[&str], stop: &str| (out.iter().map(|&text| text.to_owned()).collect(), Some(stop.to_owned()));
        assert_eq!(run(&["END"], &["abE", "N", "Dxyz"], false), stopped(&["ab", "", ""], "END"));
        assert_eq!(run(&["END"], &["abE", "N", "Dxyz"], true), stopped(&["ab", "", "END"], "END"));
        assert_eq!(
            run(&["aab"], &["aaa", "b"], false),
            stopped(&["a", ""], "aab"),
            "a beginning inside a beginning"
        );
        assert_eq!(
            run(&["b", "ab"], &["xab"], false),
            stopped(&["x"], "ab"),
            "the longest of those that end together"
        );
        assert_eq!(run(&["é!"], &["caf", "é", "!"], false), stopped(&["caf", "", ""], "é!"));
    }

    #[test]
    fn what_was_held_back_is_released() {
        assert_eq!(run(&["END"], &["E", "NE", "x"], false).0, ["", "EN", "Ex", ""]);
        assert_eq!(run(&["END"], &["abEN"], false).0, ["ab", "EN"]);
        assert_eq!(run(&[], &["a"], false).0, ["a", ""]);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn the_split_into_pieces_does_not_matter(
            text in "[abé]{0,24}",
            cuts in prop::collection::vec(0usize..24, 0..8),
            stop in prop::collection::vec("[abé]{1,4}", 0..3),
        ) {
            let chars: Vec<char> = text.chars().collect();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(chars.len())).chain([0, chars.len()]).collect();
            cuts.sort_unstable();
            let pieces: Vec<String> = cuts.windows(2).map(|pair| chars[pair[0]..pair[1]].iter().collect()).collect();
            let stop: Vec<&str> = stop.iter().map(String::as_str).collect();
            let (out, stopped) = run(&stop, &pieces.iter().map(String::as_str).collect::<Vec<_>>(), false);
            // The plain definition: cut at the stop text that is complete first, and of those at the longest.
            let first_end = stop.iter().filter_map(|stop| text.find(stop).map(|start| start + stop.len())).min();
            let expected = first_end.map_or(text.as_str(), |end| {
                let longest = stop.iter().filter(|stop| text[..end].ends_with(**stop)).map(|stop| stop.len()).max();
                &text[..end - longest.unwrap_or(0)]
            });
            prop_assert_eq!(out.concat(), expected);
            prop_assert_eq!(stopped.is_some(), first_end.is_some());
        }
    }
}
