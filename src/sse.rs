//! Server-sent events: how a streamed answer goes out. What stands in the events is the routes' business.

use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
};

use axum::{
    body::Body,
    http::{HeaderValue, header},
    response::Response,
};
use bytes::Bytes;
use futures::Stream;
use serde::Serialize;

use crate::stream::{MergedStream, TextEvent};

/// Events that are ready together leave in one write, until they have so many bytes.
const MAX_WRITE_BYTES: usize = 16 << 10;
/// What a chunk of a few letters takes.
const USUAL_EVENT_BYTES: usize = 384;

/// Events that are written and not sent.
#[derive(Default)]
pub struct SseEvents {
    bytes: Vec<u8>,
    is_closed: bool,
}

impl SseEvents {
    /// Adds an event.
    pub fn push(&mut self, data: &impl Serialize) {
        self.bytes.reserve(USUAL_EVENT_BYTES);
        self.bytes.extend_from_slice(b"data: ");
        serde_json::to_writer(&mut self.bytes, data).expect("wire types have string keys and write to memory");
        self.bytes.extend_from_slice(b"\n\n");
    }

    /// Adds an event with a name, as `/v1/responses` has them.
    pub fn push_named(&mut self, name: &str, data: &impl Serialize) {
        self.bytes.extend_from_slice(b"event: ");
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(b'\n');
        self.push(data);
    }

    /// Adds the last event of a stream, and closes it.
    pub fn done(&mut self) {
        self.bytes.extend_from_slice(b"data: [DONE]\n\n");
        self.close();
    }

    /// Nothing follows what is written: sequences that still run are cancelled.
    pub fn close(&mut self) {
        self.is_closed = true;
    }

    /// Whether nothing follows.
    pub fn is_closed(&self) -> bool {
        self.is_closed
    }

    /// What is written, and from now on is not here any more.
    pub fn take(&mut self) -> Bytes {
        std::mem::take(&mut self.bytes).into()
    }
}

/// Writes one answer as events.
pub trait AnswerWriter: Send + Unpin + 'static {
    /// Where it writes to.
    fn events(&mut self) -> &mut SseEvents;
    /// Tells the client what happened to a sequence.
    fn event(&mut self, index: usize, event: TextEvent);
    /// Tells what comes after the end of the last sequence.
    fn end(&mut self);
}

struct AnswerStream<W> {
    sequences: Option<MergedStream>,
    writer: W,
}

impl<W: AnswerWriter> Stream for AnswerStream<W> {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Self { sequences, writer } = &mut *self;
        while let Some(running) = sequences
            && writer.events().bytes.len() < MAX_WRITE_BYTES
        {
            match running.poll_next(context) {
                Poll::Ready(Some((index, event))) => writer.event(index, event),
                Poll::Ready(None) => {
                    writer.end();
                    writer.events().close();
                }
                Poll::Pending if writer.events().bytes.is_empty() => return Poll::Pending,
                Poll::Pending => break,
            }
            if writer.events().is_closed {
                *sequences = None;
            }
        }
        let written = writer.events().take();
        Poll::Ready((!written.is_empty()).then_some(Ok(written)))
    }
}

/// The events of a streamed answer. What comes is written when the client has taken what came before.
pub fn sse_answer(sequences: MergedStream, writer: impl AnswerWriter) -> Response {
    sse_response(Body::from_stream(AnswerStream {
        sequences: Some(sequences),
        writer,
    }))
}

/// A response of events.
pub fn sse_response(body: Body) -> Response {
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}
