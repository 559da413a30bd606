//! Rows with tokens of their adapter's own: read by the embedding, given logits, and sampled among as many tokens as they have.

use bytemuck::bytes_of;
use half::bf16;
use polylora_kernels::{
    cuda::{
        embedding::{EmbeddingAdapter, FROM_CHOSEN},
        own_logits::{LogitsCopy, TokenRowsItem},
        sampling::{MAX_TOP, SampleEdit, SampleParams, SampleResult, SamplingArgs, flags},
    },
    reference,
};

use crate::support::{Rng, TOLERANCE, assert_close, gpu, widen};

/// `num` of `0 .. below`, ascending, and all of `below .. end`.
fn own_ids(rng: &mut Rng, num: usize, below: usize, end: usize) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..below as u32).collect();
    rng.shuffle(&mut ids);
    ids.truncate(num);
    ids.sort_unstable();
    ids.extend(below as u32..end as u32);
    ids
}

#[test]
#[ignore = "needs a GPU: --include-ignored"]
fn embedding_reads_rows_of_an_adapters_own() {
    let gpu = gpu();
    let mut rng = Rng(31);
    let (vocab, hidden, rank) = (50, 72, 3);
    let table = rng.bf16s(vocab * hidden, 1.0);
    let device_table = gpu.stream.upload(&table).unwrap();
    // Rows alone for more tokens, with a pair on top; a whole table for more with rows in it; rows for tokens that the base has; one row.
    let cases = [(57, 9, false, rank), (53, 4, true, 0), (50, 20, false, 0), (51, 0, false, 0)];
    for (own_vocab, num_own, is_whole, lora_rank) in cases {
        let ids = own_ids(&mut rng, num_own, vocab, own_vocab);
        let rows = rng.bf16s(ids.len() * hidden, 1.0);
        let whole = rng.bf16s(own_vocab * hidden, 1.0);
        let (a, b_t) = (rng.bf16s(own_vocab * rank, 1.0), rng.bf16s(rank * hidden, 1.0));
        let device_ids = gpu.stream.upload(&ids).unwrap();
        let device = [&rows, &whole, &a, &b_t].map(|values| gpu.stream.upload(values).unwrap());
        let adapter = EmbeddingAdapter {
            a: device[2].view().address(),
            b_t: device[3].view().address(),
            lora_rank: lora_rank as u32,
            scaling: 0.75,
            table: if is_whole { device[1].view().address() } else { 0 },
            own_ids: device_ids.view().address(),
            own_rows: device[0].view().address(),
            num_own: ids.len() as u32,
            vocab: own_vocab as u32,
            ..EmbeddingAdapter::default()
        };
        let device_adapter = gpu.stream.upload(bytes_of(&adapter)).unwrap();
        // Every token that the adapter has, half of them chosen by the step before; and those of the base without it.
        let chosen: Vec<u32> = (0..own_vocab as u32).rev().collect();
        let tokens: Vec<usize> = (0..own_vocab).chain(0..vocab).collect();
        let source = |(row, &token): (usize, &usize)| match row % 2 {
            0 => token as u32,
            _ => FROM_CHOSEN | (own_vocab - 1 - token) as u32,
        };
        let sources: Vec<u32> = tokens.iter().enumerate().map(source).collect();
        let mut addresses = vec![device_adapter.view().address(); own_vocab];
        addresses.resize(tokens.len(), 0);
        let look_up = |sources: &[u32]| gpu.embedding(device_table.view(), hidden, sources, &chosen, &addresses);
        let got = look_up(&sources);
        let mut expected = Vec::new();
        for (row, &token) in tokens.iter().enumerate() {
            let is_own = row < own_vocab;
            let own_row = ids.binary_search(&(token as u32)).ok().filter(|_| is_own);
            let from: &[bf16] = match own_row {
                Some(own) => &rows[own * hidden..][..hidden],
                None if is_own && is_whole => &whole[token * hidden..][..hidden],
                None => &table[token * hidden..][..hidden],
            };
            for (column, value) in from.iter().enumerate() {
                let product = |r: usize| a[token * lora_rank + r].to_f32() * b_t[r * hidden + column].to_f32();
                let delta: f32 = if is_own { (0..lora_rank).map(product).sum() } else { 0.0 };
                expected.push(value.to_f32() + 0.75 * delta);
            }
        }
        assert_close(&format!("embedding of {own_vocab} tokens"), &got, &expected, 1e-6);
        // One that the adapter has not reads its last: nothing outside.
        let clamped = look_up(&vec![9999u32; tokens.len()]);
        let last = |row: usize| row * hidden..(row + 1) * hidden;
        assert_eq!(clamped[last(0)], got[last(own_vocab - 1)]);
        assert_eq!(clamped[last(own_vocab)], got[last(tokens.len() - 1)]);
    }
}

#[test]
#[ignore = "needs a GPU: --include-ignored"]
fn logits_of_own_tokens_are_put_among_those_of_the_base() {
    let gpu = gpu();
    let mut rng = Rng(32);
    for (hidden, vocab) in [(8usize, 40usize), (264, 5003), (576, 2048)] {
        // Of 17 rows the first two have rows of their own in place, 13 have another vocabulary, one has own rows again, one has nothing.
        let num_rows = 17;
        let own_vocab = vocab + 21;
        let width = own_vocab.next_multiple_of(8);
        let own_start = (num_rows * vocab).next_multiple_of(8);
        let x = rng.bf16s(num_rows * hidden, 1.0);
        let mut logits = rng.f32s(own_start + 13 * width, 1.0);
        logits[num_rows * vocab..].fill(f32::NAN);
        let (many, few) = (own_ids(&mut rng, vocab / 3, vocab, own_vocab), own_ids(&mut rng, 3, vocab - 1, vocab));
        let (many_rows, few_rows) = (rng.bf16s(many.len() * hidden, 1.0), rng.bf16s(few.len() * hidden, 1.0));
        let (device_x, device_logits) = (gpu.stream.upload(&x).unwrap(), gpu.stream.upload(&logits).unwrap());
        let (device_many, device_few) = (gpu.stream.upload(&many).unwrap(), gpu.stream.upload(&few).unwrap());
        let (device_many_rows, device_few_rows) = (gpu.stream.upload(&many_rows).unwrap(), gpu.stream.upload(&few_rows).unwrap());
        // One of the 13 keeps fewer of the base model.s.
        let copies: Vec<LogitsCopy> = (0..13)
            .map(|row| LogitsCopy {
                from: ((2 + row) * vocab) as u64,
                to: (own_start + row * width) as u64,
                len: (if row == 5 { vocab - 7 } else { vocab }) as u32,
                reserved: 0,
            })
            .collect();
        let many_item = |first: usize, num_rows: usize| TokenRowsItem {
            rows: device_many_rows.view().address(),
            token_ids: device_many.view().address(),
            y_start: (own_start + first * width) as u64,
            y_stride: width as u32,
            num_tokens: many.len() as u32,
            row_start: (2 + first) as u32,
            num_rows: num_rows as u32,
        };
        let few_item = |row: usize, num_rows: usize| TokenRowsItem {
            rows: device_few_rows.view().address(),
            token_ids: device_few.view().address(),
            y_start: (row * vocab) as u64,
            y_stride: vocab as u32,
            num_tokens: few.len() as u32,
            row_start: row as u32,
            num_rows: num_rows as u32,
        };
        let items = [few_item(0, 2), many_item(0, 8), many_item(8, 5), few_item(15, 1)];
        let (device_copies, device_items) = (gpu.stream.upload(&copies).unwrap(), gpu.stream.upload(&items).unwrap());
        let kernels = &gpu.kernels.own_logits;
        kernels
            .launch_copy(&gpu.stream, device_logits.view(), device_copies.view(), vocab)
            .unwrap();
        let max_tokens = many.len().max(few.len());
        kernels
            .launch_token_rows(
                &gpu.stream,
                device_logits.view(),
                device_x.view(),
                hidden,
                device_items.view(),
                max_tokens,
            )
            .unwrap();
        let got = gpu.stream.download(device_logits.view()).unwrap();

        let mut expected = logits.clone();
        for copy in &copies {
            let (from, len) = (copy.from as usize, copy.len as usize);
            expected.copy_within(from..from + len, copy.to as usize);
        }
        let x = widen(&x);
        let rows_of_x = |from: usize, to: usize| &x[from * hidden..to * hidden];
        let apply = |x: &[f32], rows: &[bf16], ids: &[u32], y: &mut [f32], stride: usize| {
            reference::token_row_logits(x, hidden, &widen(rows), ids, y, stride);
        };
        apply(rows_of_x(2, 15), &many_rows, &many, &mut expected[own_start..], width);
        apply(rows_of_x(0, 2), &few_rows, &few, &mut expected[..2 * vocab], vocab);
        apply(rows_of_x(15, 16), &few_rows, &few, &mut expected[15 * vocab..16 * vocab], vocab);
        for (index, (got, expected)) in got.iter().zip(&expected).enumerate() {
            assert_eq!(got.is_nan(), expected.is_nan(), "element {index}: what nothing writes stays");
        }
        let written = |values: &[f32]| values.iter().copied().filter(|value| !value.is_nan()).collect::<Vec<f32>>();
        assert!(got.iter().any(|value| value.is_nan()), "padding is not written");
        assert_close("logits of own tokens", &written(&got), &written(&expected), TOLERANCE);
    }
}

/// `ln Σ e^x`.
fn log_sum_exp(x: &[f32]) -> f64 {
    let max = f64::from(x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    max + x.iter().map(|&x| (f64::from(x) - max).exp()).sum::<f64>().ln()
}

#[test]
#[ignore = "needs a GPU: --include-ignored"]
fn sampling_is_of_the_tokens_that_a_row_has() {
    let gpu = gpu();
    let mut rng = Rng(33);
    // Not in order, poisoned between: larger than any logit, so that whatever reads it shows.
    let vocabs = [300usize, 307, 5001, 1, 300, 4096, 297, 320];
    let mut starts = vec![0; vocabs.len()];
    let mut end = 5;
    for &row in &[3usize, 0, 7, 1, 2, 6, 4, 5] {
        starts[row] = end;
        end += vocabs[row] + 3;
    }
    let mut logits = vec![1e30f32; end];
    for (&start, &vocab) in starts.iter().zip(&vocabs) {
        logits[start..start + vocab].copy_from_slice(&rng.f32s(vocab, 4.0));
    }
    let row_logits = |row: usize| &logits[starts[row]..][..vocabs[row]];
    // What each row chooses: the likeliest; a draw that falls into the middle of its token; the only one of a mask; and the last, by a bias.
    let mut expected = Vec::new();
    let (mut params, mut edits, mut masks) = (Vec::new(), Vec::new(), Vec::new());
    for (row, &vocab) in vocabs.iter().enumerate() {
        let x = row_logits(row);
        let mut one = SampleParams {
            flags: flags::CHOOSE | flags::OUTPUT_LOGPROB | flags::PROMPT_LOGPROB,
            prompt_token: vocab as u32 - 1,
            num_top: 20,
            top_p: 1.0,
            repetition_penalty: 1.0,
            slot: (vocabs.len() - 1 - row) as u32,
            vocab: vocab as u32,
            logits_start: starts[row] as u64,
            ..SampleParams::default()
        };
        let likeliest = (0..vocab).max_by(|&a, &b| x[a].total_cmp(&x[b])).expect("a token");
        let token = match row % 4 {
            0 => likeliest,
            1 => {
                one.temperature = 1.0;
                let weights: Vec<f64> = x.iter().map(|&x| f64::from(x).exp()).collect();
                let token = (vocab / 2..vocab).max_by(|&a, &b| x[a].total_cmp(&x[b])).expect("a token");
                let before: f64 = weights[..token].iter().sum();
                one.u = (before + weights[token] / 2.0) / weights.iter().sum::<f64>();
                token
            }
            2 => {
                one.flags |= flags::MASKED;
                one.mask_start = masks.len() as u32;
                let token = vocab - 1 - row;
                masks.extend((0..vocab.div_ceil(32)).map(|word| if word == token / 32 { 1u32 << (token % 32) } else { 0 }));
                // Bits past the row's tokens allow nothing.
                if let Some(last) = masks.last_mut() {
                    *last |= (!0u32).checked_shl(vocab as u32 % 32).filter(|_| vocab % 32 != 0).unwrap_or(0);
                }
                token
            }
            _ => {
                one.edits_start = edits.len() as u32;
                // The second is of a token that the row has not.
                edits.extend([(vocab as u32 - 1, 100.0), (vocab as u32, 1000.0)].map(|(token, bias)| SampleEdit {
                    token,
                    bias,
                    ..SampleEdit::default()
                }));
                one.num_edits = 2;
                vocab - 1
            }
        };
        expected.push(token);
        params.push(one);
    }
    let rows = vocabs.len();
    let device_logits = gpu.stream.upload(&logits).unwrap();
    let (device_params, device_edits) = (gpu.stream.upload(&params).unwrap(), gpu.stream.upload(&edits).unwrap());
    let device_masks = gpu.stream.upload(&masks).unwrap();
    let results = gpu
        .stream
        .upload(&vec![
            SampleResult {
                token: 77_777,
                ..SampleResult::default()
            };
            rows
        ])
        .unwrap();
    let (top_ids, chosen) = (
        gpu.stream.upload(&vec![77_777u32; rows * MAX_TOP]).unwrap(),
        gpu.stream.upload(&vec![77_777u32; rows]).unwrap(),
    );
    let top_logprobs = gpu.stream.upload(&vec![f32::NAN; rows * MAX_TOP]).unwrap();
    let args = SamplingArgs {
        logits: device_logits.view(),
        params: device_params.view(),
        edits: device_edits.view(),
        masks: device_masks.view(),
        results: results.view(),
        top_ids: top_ids.view(),
        top_logprobs: top_logprobs.view(),
        chosen: chosen.view(),
        rows,
    };
    gpu.kernels.sampling.launch(&gpu.stream, &args).unwrap();
    assert_eq!(gpu.stream.download(device_logits.view()).unwrap(), logits, "logits are as they were");
    let results = gpu.stream.download(results.view()).unwrap();
    let chosen = gpu.stream.download(chosen.view()).unwrap();
    let (top_ids, top_logprobs) = (
        gpu.stream.download(top_ids.view()).unwrap(),
        gpu.stream.download(top_logprobs.view()).unwrap(),
    );
    for (row, &vocab) in vocabs.iter().enumerate() {
        let (x, result) = (row_logits(row), results[row]);
        let total = log_sum_exp(x);
        let logprob = |token: usize| (f64::from(x[token]) - total) as f32;
        assert_eq!((result.status, result.token as usize), (0, expected[row]), "row {row} of {vocab} tokens");
        assert_eq!(chosen[rows - 1 - row], result.token, "row {row}");
        assert!((result.logprob - logprob(expected[row])).abs() < 1e-4, "row {row}: {result:?}");
        assert!((result.prompt_logprob - logprob(vocab - 1)).abs() < 1e-4, "row {row}: {result:?}");
        let mut likeliest: Vec<usize> = (0..vocab).collect();
        likeliest.sort_by(|&a, &b| x[b].total_cmp(&x[a]).then(a.cmp(&b)));
        for (place, (&id, &got)) in top_ids[row * MAX_TOP..]
            .iter()
            .zip(&top_logprobs[row * MAX_TOP..])
            .take(MAX_TOP)
            .enumerate()
        {
            match likeliest.get(place).filter(|_| place < 20) {
                Some(&token) => {
                    assert_eq!(id as usize, token, "row {row}, place {place}");
                    assert!((got - logprob(token)).abs() < 1e-4, "row {row}, place {place}: {got}");
                }
                None => assert_eq!(id, u32::MAX, "row {row}, place {place}"),
            }
        }
    }
}
