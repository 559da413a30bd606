//! Log-probabilities in the forms of each API.

use std::collections::BTreeMap;

use polylora_engine::TokenLogprobs;

use crate::{
    protocol::{
        chat::{ChatLogprobs, TokenLogprob, TopLogprob},
        completions::CompletionLogprobs,
        generate::LogprobTriple,
    },
    stream::OutputToken,
    tokenizer::TextTokenizer,
};

/// JSON has no infinity: a token that is impossible has this.
const IMPOSSIBLE: f32 = -9999.0;

fn finite(logprob: f32) -> f32 {
    logprob.max(IMPOSSIBLE)
}

/// Of output tokens, for a chat. Stop tokens that are no part of the text are left out.
pub fn chat_logprobs(tokenizer: &TextTokenizer, tokens: &[OutputToken]) -> ChatLogprobs {
    let content = tokens.iter().filter(|token| !token.is_stop).filter_map(|token| token.logprobs.as_ref());
    let content = content.map(|logprobs| {
        let (token, bytes) = text_and_bytes(tokenizer, logprobs.token_id);
        TokenLogprob {
            token,
            logprob: finite(logprobs.logprob),
            bytes: Some(bytes),
            top_logprobs: logprobs
                .top
                .iter()
                .map(|&(id, logprob)| {
                    let (token, bytes) = text_and_bytes(tokenizer, id);
                    TopLogprob {
                        token,
                        logprob: finite(logprob),
                        bytes: Some(bytes),
                    }
                })
                .collect(),
        }
    });
    ChatLogprobs {
        content: Some(content.collect()),
        refusal: None,
    }
}

fn text_and_bytes(tokenizer: &TextTokenizer, id: u32) -> (String, Vec<u8>) {
    let bytes = tokenizer.token_bytes(id);
    (String::from_utf8_lossy(&bytes).into_owned(), bytes)
}

/// Builds the log-probabilities of a completion, prompt first if it is echoed; keeps where the next token begins.
#[derive(Debug, Default)]
pub struct CompletionLogprobsBuilder {
    offset: u32,
}

impl CompletionLogprobsBuilder {
    /// Of an echoed prompt: `reported` begins at its second token.
    pub fn prompt(&mut self, tokenizer: &TextTokenizer, prompt: &[u32], reported: &[TokenLogprobs]) -> CompletionLogprobs {
        let mut logprobs = CompletionLogprobs::default();
        for (position, &token) in prompt.iter().enumerate() {
            let known = position.checked_sub(1).and_then(|index| reported.get(index));
            self.push(tokenizer, &mut logprobs, token, known);
        }
        logprobs
    }

    /// Of output tokens. Stop tokens that are no part of the text are left out.
    pub fn output(&mut self, tokenizer: &TextTokenizer, tokens: &[OutputToken]) -> CompletionLogprobs {
        let mut logprobs = CompletionLogprobs::default();
        for token in tokens.iter().filter(|token| !token.is_stop) {
            self.push(tokenizer, &mut logprobs, token.id, token.logprobs.as_ref());
        }
        logprobs
    }

    fn push(&mut self, tokenizer: &TextTokenizer, logprobs: &mut CompletionLogprobs, token: u32, known: Option<&TokenLogprobs>) {
        let text = tokenizer.token_text(token);
        logprobs.text_offset.push(self.offset);
        self.offset += text.chars().count() as u32;
        logprobs.tokens.push(text);
        logprobs.token_logprobs.push(known.map(|known| finite(known.logprob)));
        let top = known.map(|known| {
            let mut top: BTreeMap<String, f32> = BTreeMap::new();
            for &(id, logprob) in &known.top {
                // Two tokens may have one text (halves of characters): the likelier stays.
                top.entry(tokenizer.token_text(id)).or_insert(finite(logprob));
            }
            top
        });
        logprobs.top_logprobs.get_or_insert_default().push(top);
    }
}

/// SGLang's triple of a token.
pub fn triple(tokenizer: &TextTokenizer, token_id: u32, logprob: Option<f32>, with_text: bool) -> LogprobTriple {
    (logprob.map(finite), token_id, with_text.then(|| tokenizer.token_text(token_id)))
}

/// SGLang's triples of the likeliest tokens.
pub fn top_triples(tokenizer: &TextTokenizer, logprobs: &TokenLogprobs, with_text: bool) -> Vec<LogprobTriple> {
    logprobs
        .top
        .iter()
        .map(|&(id, logprob)| triple(tokenizer, id, Some(logprob), with_text))
        .collect()
}
