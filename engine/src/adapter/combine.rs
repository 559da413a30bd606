//! Several adapters on one request: `a+b`, `a*0.7+b*0.3`, `a*0.5`.
//!
//! A combination is an adapter of its own, whose delta is the weighted sum of the others' deltas: the A's below each other, the Bᵀ's
//! likewise, scaled. It needs nothing from a backend, has a version that follows from its parts', and costs the sum of their ranks.

use std::sync::Arc;

use super::{
    AdapterError, AlignedBytes, HostAdapter, ModuleId, PackedDtype, PackedModule, VersionId,
    load::{LoraLimits, Packed, group},
};

/// Largest absolute weight in an expression.
const MAX_WEIGHT: f32 = 16.0;
/// Names (and repetitions of them) that are read of an expression, whatever it may have: each is compared with those before.
const MAX_TERMS: usize = 256;

/// One adapter of an expression and its weight.
#[derive(Clone, Debug, PartialEq)]
pub struct Part<'a> {
    /// The adapter's name.
    pub name: &'a str,
    /// What its delta is multiplied with.
    pub weight: f32,
}

/// Reads `name`, `name*weight`, and sums of them. `None` if `expression` is neither a sum nor weighted: an ordinary name. A name that
/// occurs twice has the sum of its weights; the order does not matter and is that of the names.
///
/// # Errors
/// `BadName`: an empty name, a weight that is no number or too large, more than `max_parts` names, or more of them than are read.
pub fn parse_expression(expression: &str, max_parts: usize) -> Result<Option<Vec<Part<'_>>>, AdapterError> {
    if !expression.contains(['+', '*']) {
        return Ok(None);
    }
    let bad = |reason: String| AdapterError::BadName {
        name: expression.chars().take(256).collect(),
        reason,
    };
    let num_terms = expression.split('+').count();
    if num_terms > MAX_TERMS {
        return Err(bad(format!("has {num_terms} names, at most {MAX_TERMS} are read")));
    }
    let mut parts: Vec<Part<'_>> = Vec::new();
    for term in expression.split('+') {
        let (name, weight) = match term.rsplit_once('*') {
            None => (term.trim(), 1.0),
            Some((name, weight)) => {
                let weight = weight.trim();
                let parsed: f32 = weight.parse().map_err(|_| bad(format!("has the weight {weight:?}, expected a number")))?;
                (name.trim(), parsed)
            }
        };
        if name.is_empty() {
            return Err(bad("has an empty name in it".into()));
        }
        match parts.iter_mut().find(|part| part.name == name) {
            Some(part) => part.weight += weight,
            None => parts.push(Part { name, weight }),
        }
    }
    if let Some(part) = parts.iter().find(|part| !part.weight.is_finite() || part.weight.abs() > MAX_WEIGHT) {
        return Err(bad(format!(
            "gives {:?} the weight {}, expected one between -{MAX_WEIGHT} and {MAX_WEIGHT}",
            part.name, part.weight
        )));
    }
    if parts.len() > max_parts {
        return Err(bad(format!("combines {} adapters, at most {max_parts} may be", parts.len())));
    }
    parts.sort_by(|a, b| a.name.cmp(b.name));
    Ok(Some(parts))
}

/// The version of a combination, known before it is made.
pub fn combined_version(parts: &[(&HostAdapter, f32)]) -> VersionId {
    let mut sorted: Vec<(VersionId, f32)> = parts.iter().map(|(adapter, weight)| (adapter.version, *weight)).collect();
    sorted.sort_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
    let mut hash = blake3::Hasher::new();
    hash.update(b"polylora combination 2");
    for (version, weight) in sorted {
        hash.update(&version.0);
        hash.update(&weight.to_bits().to_le_bytes());
    }
    VersionId(hash.finalize().into())
}

/// The adapter whose delta is the weighted sum of the parts' deltas.
///
/// # Errors
/// `Incompatible`: parts that are more than A and B (a sum of DoRA's scales, of whole heads or of vocabularies means nothing), a rank above
/// `limits.max_combined_rank`.
pub fn combine(parts: &[(&HostAdapter, f32)], limits: &LoraLimits) -> Result<HostAdapter, AdapterError> {
    let incompatible = |reason: String| Err(AdapterError::Incompatible { reason });
    let Some(dtype) = parts.first().map(|(adapter, _)| adapter.dtype) else {
        return incompatible("a combination of no adapters".into());
    };
    for (adapter, _) in parts {
        let has_output_terms = |module: &PackedModule| module.output_scale_offset_bytes.is_some() || module.output_bias_offset_bytes.is_some();
        if !adapter.token_rows.is_empty() || adapter.resized_vocab.is_some() {
            return incompatible("an adapter with tokens of its own can't be combined or weighted".into());
        }
        if !adapter.replaced.is_empty() || adapter.modules.iter().any(has_output_terms) {
            return incompatible("an adapter with DoRA, biases or whole modules can't be combined or weighted".into());
        }
        let digest = |adapter: &HostAdapter| adapter.companion.as_ref().map(|companion| companion.digest());
        if digest(adapter) != digest(parts[0].0) {
            return incompatible("adapters that differ in tokenizer or chat template can't be combined".into());
        }
        if adapter.dtype != dtype {
            return incompatible("adapters packed in different dtypes".into());
        }
    }
    let mut ids: Vec<ModuleId> = parts
        .iter()
        .flat_map(|(adapter, _)| adapter.modules.iter().map(|module| module.id))
        .collect();
    ids.sort();
    ids.dedup();
    let members: Vec<Vec<Member<'_>>> = ids.iter().map(|id| members(parts, *id)).collect();
    let (modules, bytes) = layout(&members, dtype)?;
    let largest = modules.iter().map(|module| module.lora_rank).max().unwrap_or(0);
    if let Some(max) = limits.max_combined_rank.filter(|max| largest > *max) {
        return incompatible(format!(
            "the combination has lora_rank {largest}, the sum of its parts'; at most {max} on this device (--max-lora-rank)"
        ));
    }
    let mut blob = limits.new_blob(bytes);
    blob.as_bytes_mut().fill(0);
    for (module, members) in modules.iter().zip(&members) {
        match dtype {
            PackedDtype::F32 => write::<f32>(&mut blob, module, members)?,
            PackedDtype::Bf16 => write::<half::bf16>(&mut blob, module, members)?,
        }
    }
    blob.filled();
    Ok(HostAdapter {
        version: combined_version(parts),
        dtype,
        modules,
        blob: Arc::new(blob),
        max_lora_rank: largest,
        replaced: Vec::new(),
        token_rows: Vec::new(),
        resized_vocab: None,
        companion: parts[0].0.companion.clone(),
    })
}

/// One part's pair on one module.
struct Member<'a> {
    adapter: &'a HostAdapter,
    module: &'a PackedModule,
    /// Weight times scaling.
    factor: f32,
}

fn members<'a>(parts: &[(&'a HostAdapter, f32)], id: ModuleId) -> Vec<Member<'a>> {
    let member = |(adapter, weight): &(&'a HostAdapter, f32)| {
        let module = adapter.module(id)?;
        Some(Member {
            adapter,
            module,
            factor: weight * module.scaling,
        })
    };
    parts.iter().filter_map(member).collect()
}

/// The largest factor is the module's scaling, so that the rows of Bᵀ are multiplied by at most 1, and equal factors by exactly 1.
fn scaling(members: &[Member<'_>]) -> f32 {
    let largest = members.iter().map(|member| member.factor).max_by(|a, b| a.abs().total_cmp(&b.abs()));
    largest.filter(|factor| *factor != 0.0).unwrap_or(1.0)
}

/// Places as the loader lays them out: A's of one group, then its Bᵀ's.
fn layout(members: &[Vec<Member<'_>>], dtype: PackedDtype) -> Result<(Vec<PackedModule>, usize), AdapterError> {
    let mut modules: Vec<PackedModule> = Vec::with_capacity(members.len());
    for members in members {
        let first = members[0].module;
        modules.push(PackedModule {
            lora_rank: members.iter().map(|member| member.module.lora_rank).sum(),
            scaling: scaling(members),
            ..*first
        });
        if members
            .iter()
            .any(|member| (member.module.d_in, member.module.d_out) != (first.d_in, first.d_out))
        {
            return Err(AdapterError::Internal {
                reason: "adapters of different base models".into(),
            });
        }
    }
    let mut end = 0usize;
    let mut place = |elements: usize| {
        let offset = end.next_multiple_of(64);
        end = offset + elements * dtype.size_bytes();
        offset
    };
    for group in modules.chunk_by_mut(|a, b| group(a.id) == group(b.id)) {
        for module in group.iter_mut() {
            module.a_offset_bytes = place(module.lora_rank as usize * module.d_in as usize);
        }
        for module in group.iter_mut() {
            module.b_t_offset_bytes = place(module.lora_rank as usize * module.d_out as usize);
        }
    }
    Ok((modules, end.next_multiple_of(64)))
}

fn write<P: Packed + bytemuck::Pod>(blob: &mut AlignedBytes, module: &PackedModule, members: &[Member<'_>]) -> Result<(), AdapterError> {
    let size = size_of::<P>();
    let (d_in, d_out, rank) = (module.d_in as usize, module.d_out as usize, module.lora_rank as usize);
    let is_token_major = module.id == ModuleId::EmbedTokens;
    let mut first_row = 0;
    for member in members {
        let own_rank = member.module.lora_rank as usize;
        let own = member.adapter.blob.as_bytes();
        let own_a: &[P] = bytemuck::cast_slice(&own[member.module.a_offset_bytes..][..own_rank * d_in * size]);
        let own_b: &[P] = bytemuck::cast_slice(&own[member.module.b_t_offset_bytes..][..own_rank * d_out * size]);
        let a: &mut [P] = bytemuck::cast_slice_mut(&mut blob.as_bytes_mut()[module.a_offset_bytes..][..rank * d_in * size]);
        if is_token_major {
            for (to, from) in a.chunks_exact_mut(rank).zip(own_a.chunks_exact(own_rank)) {
                to[first_row..first_row + own_rank].copy_from_slice(from);
            }
        } else {
            a[first_row * d_in..(first_row + own_rank) * d_in].copy_from_slice(own_a);
        }
        let b: &mut [P] = bytemuck::cast_slice_mut(&mut blob.as_bytes_mut()[module.b_t_offset_bytes..][..rank * d_out * size]);
        let b = &mut b[first_row * d_out..(first_row + own_rank) * d_out];
        let factor = member.factor / module.scaling;
        let mut is_usable = true;
        for (to, from) in b.iter_mut().zip(own_b) {
            *to = if factor == 1.0 { *from } else { P::pack(from.unpack() * factor) };
            is_usable &= to.is_usable();
        }
        if !is_usable {
            return Err(AdapterError::Incompatible {
                reason: "the combination's weights are not finite".into(),
            });
        }
        first_row += own_rank;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::adapter::{
        LoraLimits, load_adapter,
        testing::{AdapterFiles, limits, source, tiny_decoder},
    };

    #[test]
    fn expressions_are_read() {
        let parse = |text| parse_expression(text, 4).unwrap();
        let part = |name, weight| Part { name, weight };
        assert_eq!(parse("a"), None);
        assert_eq!(parse("a+b"), Some(vec![part("a", 1.0), part("b", 1.0)]));
        assert_eq!(parse("b*0.3+a*0.7"), Some(vec![part("a", 0.7), part("b", 0.3)]));
        assert_eq!(parse(" a * -1.5 + b "), Some(vec![part("a", -1.5), part("b", 1.0)]));
        assert_eq!(parse("a*0.5"), Some(vec![part("a", 0.5)]));
        assert_eq!(parse("a+a"), Some(vec![part("a", 2.0)]));
        assert_eq!(parse("org/a*1e-1"), Some(vec![part("org/a", 0.1)]));
        for bad in [
            "a+",
            "+a",
            "+",
            "*",
            "*2",
            "a*",
            "a*x",
            "a*NaN",
            "a*inf",
            "a*17",
            "a*9+a*9",
            "a+b+c+d+e",
            "a++b",
        ] {
            let error = parse_expression(bad, 4).expect_err(bad);
            assert!(matches!(error, AdapterError::BadName { .. }), "{bad}: {error}");
        }
    }

    /// Who looks names up reads expressions of any length that a body has room for.
    #[test]
    fn an_expression_is_read_up_to_a_bound() {
        let names: Vec<String> = (0..=MAX_TERMS).map(|index| index.to_string()).collect();
        let most = names[1..].join("+");
        assert_eq!(parse_expression(&most, usize::MAX).unwrap().unwrap().len(), MAX_TERMS);
        let error = parse_expression(&names.join("+"), usize::MAX).unwrap_err().to_string();
        assert!(error.contains("has 257 names, at most 256 are read"), "{error}");
        assert!(error.len() < 1000, "{error}");
    }

    fn adapter(config: serde_json::Value, seed: u32, limits: &LoraLimits) -> HostAdapter {
        let decoder = tiny_decoder();
        load_adapter(&source(&AdapterFiles::new(&decoder, config, seed).write()), &decoder, limits)
            .unwrap()
            .0
    }

    /// The whole delta of a module, `[d_out][d_in]`.
    fn delta(adapter: &HostAdapter, id: ModuleId) -> Vec<f32> {
        let Some(module) = adapter.module(id) else { return vec![0.0; 1] };
        let (d_in, d_out, rank) = (module.d_in as usize, module.d_out as usize, module.lora_rank as usize);
        let (a, b_t): (Vec<f32>, Vec<f32>) = match adapter.dtype {
            PackedDtype::F32 => (adapter.a_f32(module).to_vec(), adapter.b_t_f32(module).to_vec()),
            PackedDtype::Bf16 => (
                adapter.a_bf16(module).iter().map(|value| value.to_f32()).collect(),
                adapter.b_t_bf16(module).iter().map(|value| value.to_f32()).collect(),
            ),
        };
        let a_at = |k: usize, column: usize| {
            if id == ModuleId::EmbedTokens {
                a[column * rank + k]
            } else {
                a[k * d_in + column]
            }
        };
        let mut delta = vec![0.0; d_out * d_in];
        for row in 0..d_out {
            for column in 0..d_in {
                delta[row * d_in + column] = module.scaling * (0..rank).map(|k| b_t[k * d_out + row] * a_at(k, column)).sum::<f32>();
            }
        }
        delta
    }

    #[test]
    fn deltas_add_up() {
        for (dtype, tolerance) in [(PackedDtype::F32, 1e-5), (PackedDtype::Bf16, 0.03)] {
            let limits = LoraLimits { dtype, ..limits() };
            let first = adapter(
                json!({"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "k_proj", "embed_tokens", "lm_head"]}),
                1,
                &limits,
            );
            let second = adapter(
                json!({"r": 3, "lora_alpha": 5, "use_rslora": true, "target_modules": ["q_proj", "v_proj", "embed_tokens", "down_proj"]}),
                2,
                &limits,
            );
            let combined = combine(&[(&first, 0.7), (&second, -0.3)], &limits).unwrap();
            assert_eq!(combined.max_lora_rank, 5);
            let ids: Vec<ModuleId> = combined.modules.iter().map(|module| module.id).collect();
            assert!(ids.is_sorted() && ids.len() == 3 * 4 + 2, "{ids:?}");
            for id in ids {
                let (got, one, two) = (delta(&combined, id), delta(&first, id), delta(&second, id));
                assert!(got.iter().any(|value| value.abs() > 0.01));
                for (index, got) in got.iter().enumerate() {
                    let of = |delta: &[f32]| delta.get(index).copied().unwrap_or(0.0);
                    let expected = 0.7 * of(&one) - 0.3 * of(&two);
                    assert!((got - expected).abs() < tolerance, "{id:?}: expected {expected}, got {got}");
                }
            }
        }
    }

    #[test]
    fn equal_factors_copy_bits() {
        let limits = LoraLimits {
            dtype: PackedDtype::Bf16,
            ..limits()
        };
        let config = json!({"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"]});
        let (first, second) = (adapter(config.clone(), 1, &limits), adapter(config, 2, &limits));
        let combined = combine(&[(&first, 1.0), (&second, 1.0)], &limits).unwrap();
        let (module, own) = (&combined.modules[0], &first.modules[0]);
        assert_eq!(module.scaling, own.scaling);
        assert_eq!(combined.b_t_bf16(module)[..12], *first.b_t_bf16(own));
        assert_eq!(combined.b_t_bf16(module)[12..], *second.b_t_bf16(&second.modules[0]));
    }

    #[test]
    fn versions_follow_parts_and_weights() {
        let config = json!({"r": 2, "target_modules": ["q_proj"]});
        let (first, second) = (adapter(config.clone(), 1, &limits()), adapter(config, 2, &limits()));
        let version = |parts: &[(&HostAdapter, f32)]| combine(parts, &limits()).unwrap().version;
        let plain = version(&[(&first, 1.0), (&second, 0.5)]);
        assert_eq!(version(&[(&second, 0.5), (&first, 1.0)]), plain);
        assert_ne!(version(&[(&second, 1.0), (&first, 0.5)]), plain);
        assert_ne!(version(&[(&first, 1.0)]), first.version);
    }

    #[test]
    fn what_has_no_sum_is_refused() {
        let first = adapter(json!({"r": 2, "target_modules": ["q_proj"]}), 1, &limits());
        let up_to = |rank| LoraLimits {
            max_combined_rank: Some(rank),
            ..limits()
        };
        assert!(combine(&[(&first, 1.0), (&first, 1.0)], &up_to(3)).is_err());
        combine(&[(&first, 1.0), (&first, 1.0)], &up_to(4)).unwrap();
        let mut with_bias = adapter(json!({"r": 2, "target_modules": ["q_proj"]}), 1, &limits());
        with_bias.modules[0].output_bias_offset_bytes = Some(0);
        let error = combine(&[(&with_bias, 0.5)], &limits()).unwrap_err();
        assert!(error.to_string().contains("can't be combined"), "{error}");
    }
}
