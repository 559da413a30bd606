//! `adapter_config.json`: read completely, or refused by the key's name.
//!
//! Meanings and defaults are those of PEFT 0.21 (`LoraConfig`). Every key that it knows is applied, or has no effect on inference and
//! is listed, or refuses the adapter when it has a value that changes the result. A key that it doesn't know refuses the adapter
//! unless its value is off (`null`, `false`, empty), since nobody can tell what it changes.

use fancy_regex::{Regex, RegexBuilder};
use serde_json::{Map, Value};

use super::{AdapterError, ModuleId, Projection};
use crate::decoder::DecoderConfig;

/// Name of the file.
pub const CONFIG_FILE: &str = "adapter_config.json";

/// Most bytes of `adapter_config.json` that are read.
pub const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// PEFT condenses lists of at least so many target modules to suffixes (`MIN_TARGET_MODULES_FOR_OPTIMIZATION`).
const CONDENSED_TARGETS: usize = 20;

/// Names the rows of embeddings that were trained one by one.
const TOKEN_INDICES: &str = "trainable_token_indices";

/// Longest regular expression that is compiled.
const MAX_PATTERN_BYTES: usize = 4096;

/// Most steps of one match: a pattern that needs more is refused, so that no file can keep a loader busy.
const BACKTRACK_LIMIT: usize = 100_000;

/// What PEFT takes when `target_modules` is absent, for every architecture of this decoder's family.
const DEFAULT_TARGETS: [&str; 2] = ["q_proj", "v_proj"];

/// What a key is to inference, for keys that `PeftConfig::parse` doesn't read itself.
enum Treatment {
    /// Never changes the result.
    NoEffect,
    /// Changes the result when it is on, and is not applied.
    Refuse(&'static str),
}

/// Keys of `LoraConfig` (PEFT 0.1 to 0.21) that are not read below, in alphabetical order.
const OTHER_KEYS: &[(&str, Treatment)] = &[
    (
        "alora_invocation_tokens",
        Treatment::Refuse("activated LoRA switches the adapter on in the middle of a prompt"),
    ),
    ("arrow_config", Treatment::Refuse("Arrow routes tokens between adapters")),
    ("auto_mapping", Treatment::NoEffect),
    ("base_model_name_or_path", Treatment::NoEffect),
    ("corda_config", Treatment::NoEffect),
    (
        "enable_lora",
        Treatment::Refuse("merged linear layers of PEFT before 0.3 have another tensor layout"),
    ),
    ("eva_config", Treatment::NoEffect),
    ("inference_mode", Treatment::NoEffect),
    (
        "kasa_config",
        Treatment::Refuse("KaSA changes the base model's weights, which the other adapters share"),
    ),
    ("layer_replication", Treatment::Refuse("a stack of repeated layers is another base model")),
    ("loftq_config", Treatment::NoEffect),
    ("lora_dropout", Treatment::NoEffect),
    ("lora_ga_config", Treatment::NoEffect),
    (
        "megatron_config",
        Treatment::Refuse("Megatron's parallel layers are not those of this model"),
    ),
    ("megatron_core", Treatment::NoEffect),
    ("merge_weights", Treatment::NoEffect),
    ("monteclora_config", Treatment::Refuse("MonteCLoRA has parameters beside A and B")),
    ("peft_version", Treatment::NoEffect),
    ("qalora_group_size", Treatment::NoEffect),
    ("revision", Treatment::NoEffect),
    ("runtime_config", Treatment::NoEffect),
    (
        "target_parameters",
        Treatment::Refuse("LoRA on bare parameters (mixture-of-experts weights) is not applied"),
    ),
    ("use_bdlora", Treatment::Refuse("block-diagonal A and B have another tensor layout")),
    ("use_qalora", Treatment::Refuse("QA-LoRA pools its input before A")),
    ("velora_config", Treatment::NoEffect),
];

/// Values of `init_lora_weights` that leave the base model's weights as they are. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA)
/// subtract something from them when PEFT loads the adapter.
const HARMLESS_INITS: [&str; 4] = ["gaussian", "eva", "orthogonal", "mica"];

/// Which biases of the base model were trained and are in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BiasMode {
    /// None.
    None,
    /// Every bias of the model.
    All,
    /// Those of the modules that have a pair.
    LoraOnly,
}

/// A set of modules, as `target_modules` and `exclude_modules` name them.
#[derive(Clone, Debug)]
enum ModuleSet {
    /// A module whose path is one of these or ends with `.` and one of these.
    Names(Vec<String>),
    /// A module whose whole path matches.
    Pattern(Regex),
    /// Every linear layer but the head (`all-linear`).
    AllLinear,
    /// Absent: PEFT's choice for the architecture.
    Default,
}

/// `adapter_config.json`, read and checked. [`PeftConfig::resolve`] says what it means for a base model.
#[derive(Clone, Debug)]
pub struct PeftConfig {
    lora_rank: u32,
    lora_alpha: f64,
    /// α/√r instead of α/r.
    pub use_rslora: bool,
    /// Outputs are rescaled by a learned magnitude.
    pub use_dora: bool,
    /// B has a bias.
    pub lora_bias: bool,
    /// Which biases of the base were trained.
    pub bias: BiasMode,
    targets: ModuleSet,
    excluded: Option<ModuleSet>,
    saved: Vec<(String, Regex)>,
    token_rows: Vec<(String, Vec<u32>)>,
    layers: Option<Vec<u64>>,
    layers_patterns: Vec<Regex>,
    rank_pattern: Vec<(String, Regex, u32)>,
    alpha_pattern: Vec<(String, Regex, f64)>,
    ensure_weight_tying: bool,
    keys_without_effect: Vec<String>,
}

/// What the configuration says of one module.
#[derive(Clone, Debug, PartialEq)]
pub struct ResolvedModule {
    /// The module.
    pub id: ModuleId,
    /// Rows of A.
    pub lora_rank: u32,
    /// α.
    pub lora_alpha: f64,
    /// α/r or α/√r, worked out in f64 as PEFT does.
    pub scaling: f64,
    /// The head shares the embedding's pair, transposed (`ensure_weight_tying` over a tied base).
    pub tied_to_embedding: bool,
}

/// Rows of an embedding or a head that were trained one by one (`trainable_token_indices`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolvedRows {
    /// `EmbedTokens` or `LmHead`.
    pub id: ModuleId,
    /// The token of each row, in the file's order; no token twice.
    pub token_ids: Vec<u32>,
    /// The head's rows are those of the embedding, which it is tied to.
    pub tied_to_embedding: bool,
}

/// What the configuration says of a base model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Resolution {
    /// Modules with a pair, sorted by `id`.
    pub modules: Vec<ResolvedModule>,
    /// Modules that the adapter brings whole (`modules_to_save`), sorted.
    pub saved: Vec<ModuleId>,
    /// The saved embedding is also the head (`ensure_weight_tying` over a tied base).
    pub saved_head_is_embedding: bool,
    /// Rows of embeddings that the adapter brings one by one, sorted by `id`.
    pub token_rows: Vec<ResolvedRows>,
    /// Keys and entries that have no effect here.
    pub without_effect: Vec<String>,
}

impl Resolution {
    /// Names of the modules that the adapter changes, those that it brings whole or in part included.
    pub fn module_names(&self) -> std::collections::BTreeSet<&'static str> {
        let ids = self.modules.iter().map(|module| module.id).chain(self.saved.iter().copied());
        let rows = self.token_rows.iter().filter(|rows| !rows.tied_to_embedding).map(|rows| rows.id);
        ids.chain(rows).map(ModuleId::module_name).collect()
    }

    /// Largest rank of a pair.
    pub fn max_lora_rank(&self) -> u32 {
        self.modules.iter().map(|module| module.lora_rank).max().unwrap_or(0)
    }
}

impl PeftConfig {
    /// Reads `adapter_config.json`.
    ///
    /// # Errors
    /// `BadFile` for what isn't JSON or has a wrong type (key, expected, got); `Unsupported` for a key that changes the result and is
    /// not applied.
    pub fn parse(bytes: &[u8]) -> Result<Self, AdapterError> {
        let value: Value = serde_json::from_slice(bytes).map_err(|error| bad(format!("not valid JSON: {error}")))?;
        let Value::Object(object) = value else {
            return Err(bad(format!("expected a JSON object, got {}", describe(&value))));
        };
        let mut reader = Reader {
            object: &object,
            without_effect: Vec::new(),
            known: Vec::new(),
        };
        reader.peft_type()?;
        reader.task_type()?;
        reader.init_lora_weights()?;
        let config = Self {
            lora_rank: reader.rank("r", 8)?,
            lora_alpha: reader.number("lora_alpha", 8.0)?,
            use_rslora: reader.bool("use_rslora")?,
            use_dora: reader.bool("use_dora")?,
            lora_bias: reader.bool("lora_bias")?,
            bias: reader.bias()?,
            targets: reader.module_set("target_modules")?.unwrap_or(ModuleSet::Default),
            excluded: reader.module_set("exclude_modules")?,
            saved: reader.modules_to_save()?,
            token_rows: reader.trainable_token_indices()?,
            layers: reader.layers_to_transform()?,
            layers_patterns: reader.layers_patterns()?,
            rank_pattern: reader.pattern_map("rank_pattern", parse_rank)?,
            alpha_pattern: reader.pattern_map("alpha_pattern", parse_number)?,
            ensure_weight_tying: reader.bool("ensure_weight_tying")?,
            keys_without_effect: Vec::new(),
        };
        // PyTorch's linear layers are never stored (in, out): PEFT resets the flag with a warning.
        if reader.bool("fan_in_fan_out")? {
            reader.without_effect.push("fan_in_fan_out".into());
        }
        reader.other_keys()?;
        let mut without_effect = reader.without_effect;
        config.check_combinations(&object)?;
        without_effect.sort();
        Ok(Self {
            keys_without_effect: without_effect,
            ..config
        })
    }

    /// Combinations that PEFT itself refuses, or in which it does what nobody can mean.
    fn check_combinations(&self, object: &Map<String, Value>) -> Result<(), AdapterError> {
        let is_set = |key: &str| object.get(key).is_some_and(|value| !value.is_null());
        let is_string = matches!(self.targets, ModuleSet::Pattern(_) | ModuleSet::AllLinear);
        for key in ["layers_to_transform", "layers_pattern"] {
            if is_string && is_set(key) {
                return Err(unsupported(key, "PEFT refuses it beside a `target_modules` that is a string"));
            }
        }
        if !self.layers_patterns.is_empty() && !is_set("layers_to_transform") {
            return Err(unsupported("layers_pattern", "PEFT refuses it without `layers_to_transform`"));
        }
        if let (ModuleSet::Names(names), Some(_)) = (&self.targets, &self.layers)
            && names.len() >= CONDENSED_TARGETS
        {
            return Err(unsupported(
                "layers_to_transform",
                format!(
                    "beside {} `target_modules` its meaning depends on how PEFT shortens the list; name fewer modules",
                    names.len()
                ),
            ));
        }
        if self.lora_bias && self.use_dora {
            return Err(unsupported("lora_bias", "PEFT refuses it beside `use_dora`"));
        }
        Ok(())
    }

    /// Says which modules of a base model the adapter changes, with rank and scaling of each, by PEFT's rules.
    ///
    /// # Errors
    /// `Incompatible` when nothing matches, or when what matches can take no LoRA; `Unsupported` for an unusable pattern.
    pub fn resolve(&self, decoder: &DecoderConfig) -> Result<Resolution, AdapterError> {
        let tying = self.weight_tying(decoder)?;
        let mut resolution = Resolution {
            without_effect: self.keys_without_effect.clone(),
            ..Resolution::default()
        };
        let mut used_names = vec![false; self.target_names().map_or(0, <[String]>::len)];
        for (path, id) in module_paths(decoder) {
            if self.is_saved(&path)? || (tying == Tying::Saved && id == Some(ModuleId::EmbedTokens)) {
                match id {
                    Some(id @ (ModuleId::EmbedTokens | ModuleId::LmHead)) => resolution.saved.push(id),
                    _ => {
                        return Err(unsupported(
                            "modules_to_save",
                            format!("it holds `{path}`, only embed_tokens and lm_head can be replaced"),
                        ));
                    }
                }
                continue;
            }
            let tied_to_embedding = tying == Tying::Targets && id == Some(ModuleId::LmHead);
            let is_target =
                tied_to_embedding || (tying == Tying::Targets && id == Some(ModuleId::EmbedTokens)) || self.is_target(&path, id, &mut used_names)?;
            if !is_target {
                continue;
            }
            if tying == Tying::Saved && id == Some(ModuleId::LmHead) {
                return Err(unsupported(
                    "ensure_weight_tying",
                    "`target_modules` puts a pair on the head, which is to be tied to the saved embedding",
                ));
            }
            let Some(id) = id else {
                return Err(AdapterError::Incompatible {
                    reason: format!("`target_modules` matches `{path}`, which is no linear layer and no embedding"),
                });
            };
            resolution.modules.push(self.resolve_module(id, &path, tied_to_embedding)?);
        }
        if tying == Tying::Saved {
            resolution.saved = vec![ModuleId::EmbedTokens];
            resolution.saved_head_is_embedding = true;
        }
        resolution.modules.sort_by_key(|module| module.id);
        resolution.saved.sort();
        resolution.token_rows = self.resolve_token_rows(&resolution, decoder)?;
        self.list_unused(&mut resolution, decoder, &used_names, tying)?;
        Ok(resolution)
    }

    /// Which rows of which module `trainable_token_indices` stands for (PEFT's `set_additional_trainable_modules`): a tied head has the
    /// embedding's rows, unless it is given others of its own.
    fn resolve_token_rows(&self, resolution: &Resolution, decoder: &DecoderConfig) -> Result<Vec<ResolvedRows>, AdapterError> {
        let refuse = |reason: String| Err(unsupported(TOKEN_INDICES, reason));
        let mut of_embedding: Option<&Vec<u32>> = None;
        let mut of_head: Option<&Vec<u32>> = None;
        for (name, token_ids) in &self.token_rows {
            let (id, place) = if is_suffix(name, &module_path(ModuleId::EmbedTokens)) {
                (ModuleId::EmbedTokens, &mut of_embedding)
            } else if is_suffix(name, &module_path(ModuleId::LmHead)) {
                (ModuleId::LmHead, &mut of_head)
            } else {
                return refuse(format!("it holds `{name}`, only embed_tokens and lm_head have rows for tokens"));
            };
            if place.replace(token_ids).is_some() {
                return refuse(format!("it names `{}` twice", module_path(id)));
            }
        }
        let is_tied = decoder.tie_word_embeddings;
        let differ = of_head.is_some_and(|head| of_embedding.is_some_and(|embedding| embedding != head));
        if is_tied && differ && self.ensure_weight_tying {
            return refuse("PEFT refuses other rows for the head than for the embedding that `ensure_weight_tying` ties it to".into());
        }
        let rows = |id, token_ids: &Vec<u32>, tied_to_embedding| ResolvedRows {
            id,
            token_ids: token_ids.clone(),
            tied_to_embedding,
        };
        let mut resolved: Vec<ResolvedRows> = of_embedding.map(|ids| rows(ModuleId::EmbedTokens, ids, false)).into_iter().collect();
        match (of_embedding, of_head) {
            (Some(embedding), _) if is_tied && !differ => resolved.push(rows(ModuleId::LmHead, embedding, true)),
            (_, Some(head)) => resolved.push(rows(ModuleId::LmHead, head, false)),
            _ => {}
        }
        for ResolvedRows { id, .. } in &resolved {
            let is_saved = resolution.saved.contains(id) || (resolution.saved_head_is_embedding && *id == ModuleId::LmHead);
            if is_saved {
                return refuse(format!("`{}` is in `modules_to_save`, too", module_path(*id)));
            }
            if resolution.modules.iter().any(|module| module.id == *id) {
                return refuse(format!("`{}` has a pair, too: rows beside a pair are not applied", module_path(*id)));
            }
        }
        Ok(resolved)
    }

    /// Entries of lists and maps that match nothing: PEFT passes over them in silence or with a warning.
    fn list_unused(&self, resolution: &mut Resolution, decoder: &DecoderConfig, used_names: &[bool], tying: Tying) -> Result<(), AdapterError> {
        if resolution.modules.is_empty() {
            return Err(AdapterError::Incompatible {
                reason: format!(
                    "`target_modules` matches no module of {} ({})",
                    decoder.architecture,
                    match &self.targets {
                        ModuleSet::Names(names) => names.join(", "),
                        ModuleSet::Pattern(pattern) => pattern.as_str().to_owned(),
                        ModuleSet::AllLinear => "all-linear".to_owned(),
                        ModuleSet::Default => DEFAULT_TARGETS.join(", "),
                    }
                ),
            });
        }
        if let Some(names) = self.target_names() {
            let unused = names.iter().zip(used_names).filter(|(name, used)| {
                let by_tying = tying == Tying::Targets && (is_suffix(name, "lm_head") || is_suffix(name, "model.embed_tokens"));
                !**used && !by_tying
            });
            resolution
                .without_effect
                .extend(unused.map(|(name, _)| format!("target_modules: {name}")));
        }
        for (key, patterns) in [
            (
                "rank_pattern",
                self.rank_pattern.iter().map(|(text, regex, _)| (text, regex)).collect::<Vec<_>>(),
            ),
            ("alpha_pattern", self.alpha_pattern.iter().map(|(text, regex, _)| (text, regex)).collect()),
        ] {
            for (text, regex) in patterns {
                let mut used = false;
                for module in &resolution.modules {
                    used |= matches(key, regex, &module_path(module.id))?;
                }
                if !used {
                    resolution.without_effect.push(format!("{key}: {text}"));
                }
            }
        }
        for (name, regex) in &self.saved {
            let mut used = false;
            for (path, _) in module_paths(decoder) {
                used |= matches("modules_to_save", regex, &path)?;
            }
            if !used {
                resolution.without_effect.push(format!("modules_to_save: {name}"));
            }
        }
        if self.ensure_weight_tying && tying == Tying::None {
            resolution.without_effect.push("ensure_weight_tying".into());
        }
        Ok(())
    }

    fn resolve_module(&self, id: ModuleId, path: &str, tied_to_embedding: bool) -> Result<ResolvedModule, AdapterError> {
        let config_rank = first_match("rank_pattern", &self.rank_pattern, path)?.unwrap_or(self.lora_rank);
        let lora_alpha = first_match("alpha_pattern", &self.alpha_pattern, path)?.unwrap_or(self.lora_alpha);
        let scaling = if self.use_rslora {
            lora_alpha / f64::from(config_rank).sqrt()
        } else {
            lora_alpha / f64::from(config_rank)
        };
        // A tied head has the rank of the embedding's pair and the scaling that its own name gives it.
        let lora_rank = if tied_to_embedding {
            first_match("rank_pattern", &self.rank_pattern, "model.embed_tokens")?.unwrap_or(self.lora_rank)
        } else {
            config_rank
        };
        Ok(ResolvedModule {
            id,
            lora_rank,
            lora_alpha,
            scaling,
            tied_to_embedding,
        })
    }

    fn target_names(&self) -> Option<&[String]> {
        match &self.targets {
            ModuleSet::Names(names) => Some(names),
            _ => None,
        }
    }

    fn is_saved(&self, path: &str) -> Result<bool, AdapterError> {
        for (_, pattern) in &self.saved {
            if matches("modules_to_save", pattern, path)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// PEFT's `check_target_module_exists`, after the check on `modules_to_save`.
    fn is_target(&self, path: &str, id: Option<ModuleId>, used_names: &mut [bool]) -> Result<bool, AdapterError> {
        if let Some(excluded) = &self.excluded {
            let is_excluded = match excluded {
                ModuleSet::Names(names) => names.iter().any(|name| is_suffix(name, path)),
                ModuleSet::Pattern(pattern) => matches("exclude_modules", pattern, path)?,
                ModuleSet::AllLinear | ModuleSet::Default => false,
            };
            if is_excluded {
                return Ok(false);
            }
        }
        let names = match &self.targets {
            ModuleSet::Pattern(pattern) => return matches("target_modules", pattern, path),
            ModuleSet::AllLinear => return Ok(matches!(id, Some(ModuleId::Layer { .. }))),
            ModuleSet::Default => return self.is_default_target(path),
            ModuleSet::Names(names) => names,
        };
        let mut found = false;
        // A name that is the whole path counts whatever `layers_to_transform` says.
        let mut is_whole_path = false;
        for (name, used) in names.iter().zip(used_names) {
            if is_suffix(name, path) {
                found = true;
                *used = true;
                is_whole_path |= name == path;
            }
        }
        Ok(found && (is_whole_path || self.is_selected_layer(path)?))
    }

    fn is_default_target(&self, path: &str) -> Result<bool, AdapterError> {
        Ok(DEFAULT_TARGETS.iter().any(|name| is_suffix(name, path)) && self.is_selected_layer(path)?)
    }

    fn is_selected_layer(&self, path: &str) -> Result<bool, AdapterError> {
        let Some(layers) = &self.layers else { return Ok(true) };
        let index = if self.layers_patterns.is_empty() {
            layer_index(path)
        } else {
            let mut index = None;
            for pattern in &self.layers_patterns {
                let captures = pattern.captures(path).map_err(|error| pattern_error("layers_pattern", &error))?;
                if let Some(captures) = captures {
                    index = captures.name("idx").and_then(|digits| digits.as_str().parse().ok());
                    break;
                }
            }
            index
        };
        Ok(index.is_some_and(|index: u64| layers.contains(&index)))
    }

    /// PEFT's `_check_tied_modules`: what `ensure_weight_tying` does over this base.
    fn weight_tying(&self, decoder: &DecoderConfig) -> Result<Tying, AdapterError> {
        let is_embedding = |name: &str| matches!(name.rsplit('.').next(), Some("embed_tokens" | "lm_head"));
        if !self.ensure_weight_tying || !decoder.tie_word_embeddings {
            return Ok(Tying::None);
        }
        if self.saved.iter().any(|(name, _)| is_embedding(name)) {
            return Ok(Tying::Saved);
        }
        let targets_embedding = match &self.targets {
            ModuleSet::Names(names) => names.iter().any(|name| is_embedding(name)),
            ModuleSet::Pattern(pattern) => matches("target_modules", pattern, "embed_tokens")? || matches("target_modules", pattern, "lm_head")?,
            ModuleSet::AllLinear | ModuleSet::Default => false,
        };
        Ok(if targets_embedding { Tying::Targets } else { Tying::None })
    }
}

/// What `ensure_weight_tying` ties.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tying {
    None,
    /// The head's pair is the embedding's, transposed.
    Targets,
    /// The saved embedding is the head, too.
    Saved,
}

/// `name` is the path or a dotted suffix of it.
fn is_suffix(name: &str, path: &str) -> bool {
    path.strip_suffix(name).is_some_and(|front| front.is_empty() || front.ends_with('.'))
}

/// The number after the second component at the earliest, as in `model.layers.3.`.
fn layer_index(path: &str) -> Option<u64> {
    let components: Vec<&str> = path.split('.').collect();
    let last = components.len().checked_sub(1)?;
    components
        .get(2..last)?
        .iter()
        .find(|component| !component.is_empty() && component.bytes().all(|byte| byte.is_ascii_digit()))?
        .parse()
        .ok()
}

/// Path of a module in the base model, as PEFT names it (without `base_model.model.`).
pub fn module_path(id: ModuleId) -> String {
    match id {
        ModuleId::Layer { layer, projection } => {
            format!("model.layers.{layer}.{}.{}", projection.parent(), projection.module_name())
        }
        ModuleId::EmbedTokens => "model.embed_tokens".into(),
        ModuleId::LmHead => "lm_head".into(),
    }
}

/// Every module of the base model, in the order of PyTorch's `named_modules`, with its id if an adapter can change it.
pub fn module_paths(decoder: &DecoderConfig) -> Vec<(String, Option<ModuleId>)> {
    let mut paths: Vec<(String, Option<ModuleId>)> = vec![
        ("model".into(), None),
        ("model.embed_tokens".into(), Some(ModuleId::EmbedTokens)),
        ("model.layers".into(), None),
    ];
    for layer in 0..u16::try_from(decoder.num_layers).unwrap_or(u16::MAX) {
        let root = format!("model.layers.{layer}");
        let plain = |suffix: &str| (format!("{root}.{suffix}"), None);
        let projections = |parent: &str| {
            Projection::ALL
                .into_iter()
                .filter(|projection| projection.parent() == parent)
                .map(|projection| {
                    let id = ModuleId::Layer { layer, projection };
                    (module_path(id), Some(id))
                })
                .collect::<Vec<_>>()
        };
        paths.push((root.clone(), None));
        paths.push(plain("self_attn"));
        paths.extend(projections("self_attn"));
        if decoder.qk_norm {
            paths.extend([plain("self_attn.q_norm"), plain("self_attn.k_norm")]);
        }
        paths.push(plain("mlp"));
        paths.extend(projections("mlp"));
        paths.extend([plain("mlp.act_fn"), plain("input_layernorm"), plain("post_attention_layernorm")]);
    }
    paths.extend([
        ("model.norm".into(), None),
        ("model.rotary_emb".into(), None),
        ("lm_head".into(), Some(ModuleId::LmHead)),
    ]);
    paths
}

/// The value of the first pattern that matches, in the file's order (PEFT's `get_pattern_key`).
fn first_match<T: Copy>(key: &str, patterns: &[(String, Regex, T)], path: &str) -> Result<Option<T>, AdapterError> {
    for (_, regex, value) in patterns {
        if matches(key, regex, path)? {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}

fn matches(key: &str, regex: &Regex, path: &str) -> Result<bool, AdapterError> {
    regex.is_match(path).map_err(|error| pattern_error(key, &error))
}

fn pattern_error(key: &str, error: &fancy_regex::Error) -> AdapterError {
    unsupported(key, format!("regular expression: {error}"))
}

fn compile(key: &str, text: &str, wrap: impl Fn(&str) -> String) -> Result<Regex, AdapterError> {
    if text.len() > MAX_PATTERN_BYTES {
        return Err(unsupported(
            key,
            format!("a regular expression of {} bytes, at most {MAX_PATTERN_BYTES} are read", text.len()),
        ));
    }
    // Python's `re` has no set operations: in a class these are literals there and operators here.
    if let Some(operator) = ["&&", "~~", "--", "[["].into_iter().find(|operator| text.contains(operator)) {
        return Err(unsupported(
            key,
            format!("regular expression {text:?} contains {operator:?}, which has another meaning in Python"),
        ));
    }
    // The pattern alone, too: one with an unbalanced bracket must not compile with the brackets around it.
    let build = |pattern: &str| {
        RegexBuilder::new(pattern)
            .backtrack_limit(BACKTRACK_LIMIT)
            .delegate_size_limit(1 << 20)
            .build()
            .map_err(|error| unsupported(key, format!("regular expression {text:?}: {error}")))
    };
    build(text)?;
    build(&wrap(text))
}

/// Typed access to the keys of the file, which notes what was read.
struct Reader<'a> {
    object: &'a Map<String, Value>,
    known: Vec<&'static str>,
    without_effect: Vec<String>,
}

impl<'a> Reader<'a> {
    /// The value of a key; absent and `null` are the same, as they are in PEFT for every key that may be `null`.
    fn get(&mut self, key: &'static str) -> Option<&'a Value> {
        self.known.push(key);
        self.object.get(key).filter(|value| !value.is_null())
    }

    fn bool(&mut self, key: &'static str) -> Result<bool, AdapterError> {
        match self.get(key) {
            None => Ok(false),
            Some(Value::Bool(value)) => Ok(*value),
            Some(other) => Err(wrong_type(key, "true or false", other)),
        }
    }

    fn rank(&mut self, key: &'static str, default: u32) -> Result<u32, AdapterError> {
        self.get(key).map_or(Ok(default), |value| parse_rank(key, value))
    }

    fn number(&mut self, key: &'static str, default: f64) -> Result<f64, AdapterError> {
        self.get(key).map_or(Ok(default), |value| parse_number(key, value))
    }

    fn string(&mut self, key: &'static str) -> Result<Option<&'a str>, AdapterError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong_type(key, "a string", other)),
        }
    }

    fn peft_type(&mut self) -> Result<(), AdapterError> {
        match self.string("peft_type")? {
            Some("LORA") => Ok(()),
            Some(other) => Err(unsupported("peft_type", format!("expected \"LORA\", got {other:?}"))),
            None => Err(bad("`peft_type` is missing, expected \"LORA\"".into())),
        }
    }

    fn task_type(&mut self) -> Result<(), AdapterError> {
        match self.string("task_type")? {
            None | Some("CAUSAL_LM") => Ok(()),
            Some(other) => Err(unsupported(
                "task_type",
                format!("expected \"CAUSAL_LM\", got {other:?}: a model with another head"),
            )),
        }
    }

    fn bias(&mut self) -> Result<BiasMode, AdapterError> {
        match self.string("bias")? {
            None | Some("none") => Ok(BiasMode::None),
            Some("all") => Ok(BiasMode::All),
            Some("lora_only") => Ok(BiasMode::LoraOnly),
            Some(other) => Err(bad(format!("`bias`: expected \"none\", \"all\" or \"lora_only\", got {other:?}"))),
        }
    }

    fn init_lora_weights(&mut self) -> Result<(), AdapterError> {
        match self.get("init_lora_weights") {
            None | Some(Value::Bool(_)) => Ok(()),
            Some(Value::String(name)) if HARMLESS_INITS.contains(&name.to_ascii_lowercase().as_str()) => {
                self.without_effect.push("init_lora_weights".into());
                Ok(())
            }
            Some(Value::String(name)) => Err(unsupported(
                "init_lora_weights",
                format!(
                    "{name:?} changes the base model's weights when the adapter is loaded; save it with PEFT's \
                     `path_initial_model_for_weight_conversion`, which makes a plain LoRA of it"
                ),
            )),
            Some(other) => Err(wrong_type("init_lora_weights", "true, false or a string", other)),
        }
    }

    fn module_set(&mut self, key: &'static str) -> Result<Option<ModuleSet>, AdapterError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) if key == "exclude_modules" && text.is_empty() => Ok(None),
            Some(Value::String(text)) if key == "target_modules" && text.eq_ignore_ascii_case("all-linear") => Ok(Some(ModuleSet::AllLinear)),
            Some(Value::String(text)) => compile(key, text, |pattern| format!(r"\A(?:{pattern})\z"))
                .map(ModuleSet::Pattern)
                .map(Some),
            Some(list @ Value::Array(_)) => strings(key, list).map(ModuleSet::Names).map(Some),
            Some(other) => Err(wrong_type(key, "a list of strings or a string", other)),
        }
    }

    fn modules_to_save(&mut self) -> Result<Vec<(String, Regex)>, AdapterError> {
        let Some(value) = self.get("modules_to_save") else {
            return Ok(Vec::new());
        };
        strings("modules_to_save", value)?
            .into_iter()
            .map(|name| {
                let regex = compile("modules_to_save", &name, |pattern| format!(r"\A(?:(?:^|.*\.){pattern}(?:$|\..*))"))?;
                Ok((name, regex))
            })
            .collect()
    }

    /// `[id, …]` for the embedding, or `{module: [id, …]}`.
    fn trainable_token_indices(&mut self) -> Result<Vec<(String, Vec<u32>)>, AdapterError> {
        let key = TOKEN_INDICES;
        let token_ids = |value: &Value| -> Result<Vec<u32>, AdapterError> {
            let wrong = |got: &Value| wrong_type(key, "token ids, or an object from module to token ids", got);
            let items = value.as_array().ok_or_else(|| wrong(value))?;
            let ids: Vec<u32> = items
                .iter()
                .map(|item| item.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(|| wrong(item)))
                .collect::<Result<_, _>>()?;
            let mut sorted = ids.clone();
            sorted.sort_unstable();
            match sorted.windows(2).find(|pair| pair[0] == pair[1]) {
                Some(pair) => Err(unsupported(
                    key,
                    format!("token {} is in it twice: which row counts is not defined", pair[0]),
                )),
                None => Ok(ids),
            }
        };
        let rows = match self.get(key) {
            None => Vec::new(),
            Some(Value::Object(map)) => map
                .iter()
                .map(|(name, ids)| Ok((name.clone(), token_ids(ids)?)))
                .collect::<Result<Vec<_>, AdapterError>>()?,
            Some(value) => vec![("embed_tokens".to_owned(), token_ids(value)?)],
        };
        Ok(rows.into_iter().filter(|(_, ids)| !ids.is_empty()).collect())
    }

    fn layers_to_transform(&mut self) -> Result<Option<Vec<u64>>, AdapterError> {
        let key = "layers_to_transform";
        let index = |value: &Value| value.as_u64().ok_or_else(|| wrong_type(key, "a layer's number or a list of them", value));
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(items)) if items.is_empty() => Ok(None),
            Some(Value::Array(items)) => items.iter().map(index).collect::<Result<_, _>>().map(Some),
            Some(value) => Ok(Some(vec![index(value)?])),
        }
    }

    fn layers_patterns(&mut self) -> Result<Vec<Regex>, AdapterError> {
        let key = "layers_pattern";
        let texts = match self.get(key) {
            None => Vec::new(),
            Some(Value::String(text)) if text.is_empty() => Vec::new(),
            Some(Value::String(text)) => vec![text.clone()],
            Some(list @ Value::Array(_)) => strings(key, list)?,
            Some(other) => return Err(wrong_type(key, "a string or a list of strings", other)),
        };
        texts
            .iter()
            .map(|text| compile(key, text, |pattern| format!(r"\A(?:(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.)")))
            .collect()
    }

    fn pattern_map<T>(
        &mut self,
        key: &'static str,
        parse: impl Fn(&str, &Value) -> Result<T, AdapterError>,
    ) -> Result<Vec<(String, Regex, T)>, AdapterError> {
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(Value::Object(map)) => map
                .iter()
                .map(|(text, value)| {
                    let regex = compile(key, text, |pattern| format!(r"\A(?:.*\.)?(?:{pattern})\z"))?;
                    let value = parse(&format!("{key}.{text}"), value)?;
                    Ok((text.clone(), regex, value))
                })
                .collect(),
            Some(other) => Err(wrong_type(key, "an object", other)),
        }
    }

    /// Every key that was not read by name.
    fn other_keys(&mut self) -> Result<(), AdapterError> {
        for (key, value) in self.object {
            if self.known.contains(&key.as_str()) {
                continue;
            }
            let is_off = is_off(value);
            match OTHER_KEYS.iter().find(|(known, _)| known == key) {
                Some((_, Treatment::NoEffect)) if is_off || is_default(key, value) => {}
                Some((_, Treatment::NoEffect)) => self.without_effect.push(key.clone()),
                _ if is_off => {}
                Some((_, Treatment::Refuse(reason))) => return Err(unsupported(key, *reason)),
                None => {
                    return Err(unsupported(
                        key,
                        format!("an unknown key with the value {}, which may change the result", describe(value)),
                    ));
                }
            }
        }
        Ok(())
    }
}

/// What PEFT writes into every file under a key without effect: not worth listing.
fn is_default(key: &str, value: &Value) -> bool {
    match key {
        "lora_dropout" => value.as_f64() == Some(0.0),
        "megatron_core" => value == "megatron.core",
        "qalora_group_size" => value == 16,
        _ => false,
    }
}

/// `null`, `false` or empty.
fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Bool(true) | Value::Number(_) => false,
    }
}

fn parse_rank(key: &str, value: &Value) -> Result<u32, AdapterError> {
    value
        .as_u64()
        .and_then(|rank| u32::try_from(rank).ok())
        .filter(|&rank| rank > 0)
        .ok_or_else(|| wrong_type(key, "a positive integer", value))
}

fn parse_number(key: &str, value: &Value) -> Result<f64, AdapterError> {
    value
        .as_f64()
        .filter(|number| number.is_finite())
        .ok_or_else(|| wrong_type(key, "a number", value))
}

fn strings(key: &str, value: &Value) -> Result<Vec<String>, AdapterError> {
    let items = value.as_array().ok_or_else(|| wrong_type(key, "a list of strings", value))?;
    items
        .iter()
        .map(|item| match item {
            Value::String(text) if !text.is_empty() => Ok(text.clone()),
            other => Err(wrong_type(key, "a list of non-empty strings", other)),
        })
        .collect()
}

fn wrong_type(key: &str, expected: &str, got: &Value) -> AdapterError {
    bad(format!("`{key}`: expected {expected}, got {}", describe(got)))
}

/// A value as it stands in the file, shortened.
fn describe(value: &Value) -> String {
    const MOST: usize = 80;
    let text = value.to_string();
    match text.char_indices().nth(MOST) {
        None => text,
        Some((end, _)) => format!("{}…", &text[..end]),
    }
}

fn bad(reason: String) -> AdapterError {
    AdapterError::BadFile {
        file: CONFIG_FILE.into(),
        reason,
    }
}

fn unsupported(key: &str, reason: impl Into<String>) -> AdapterError {
    AdapterError::Unsupported {
        key: key.into(),
        reason: reason.into(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::json;

    use super::*;
    use crate::adapter::testing::tiny_decoder;

    const GOLDEN: &str = include_str!("../../tests/golden/peft_resolution.json");

    #[derive(serde::Deserialize)]
    struct Golden {
        shape: BTreeMap<String, usize>,
        default_config: Map<String, Value>,
        cases: Vec<Case>,
    }

    #[derive(serde::Deserialize)]
    struct Case {
        name: String,
        tied: bool,
        config: Map<String, Value>,
        peft: Answer,
    }

    #[derive(serde::Deserialize)]
    #[serde(untagged)]
    enum Answer {
        Error {
            #[serde(rename = "error")]
            _class: String,
        },
        Modules {
            modules: BTreeMap<String, ModuleAnswer>,
            saved: Vec<String>,
        },
    }

    #[derive(serde::Deserialize)]
    struct ModuleAnswer {
        lora_rank: u32,
        lora_alpha: f64,
        scaling: f64,
    }

    fn golden() -> Golden {
        serde_json::from_str(GOLDEN).unwrap()
    }

    fn parse(config: &Value) -> Result<PeftConfig, AdapterError> {
        PeftConfig::parse(&serde_json::to_vec(config).unwrap())
    }

    /// A configuration that is good but for what is added.
    fn config_with(key: &str, value: Value) -> Value {
        let mut config = json!({"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]});
        config[key] = value;
        config
    }

    #[test]
    fn resolves_every_configuration_as_peft_does() {
        let golden = golden();
        assert!(golden.cases.len() > 60);
        for case in golden.cases {
            let mut decoder = tiny_decoder();
            decoder.tie_word_embeddings = case.tied;
            assert_eq!(decoder.num_layers, golden.shape["num_hidden_layers"]);
            let mut config = case.config.clone();
            config.insert("peft_type".into(), json!("LORA"));
            let resolution = parse(&Value::Object(config)).and_then(|config| config.resolve(&decoder));
            match (case.peft, resolution) {
                (Answer::Error { .. }, Err(_)) => {}
                (Answer::Error { .. }, Ok(got)) => panic!("{}: PEFT refuses it, got {got:?}", case.name),
                (Answer::Modules { .. }, Err(error)) => panic!("{}: {error}", case.name),
                (Answer::Modules { modules, saved }, Ok(got)) => {
                    let paths: Vec<String> = got.modules.iter().map(|module| module_path(module.id)).collect();
                    let mut sorted = paths.clone();
                    sorted.sort();
                    assert_eq!(sorted, modules.keys().cloned().collect::<Vec<_>>(), "{}", case.name);
                    for (path, module) in paths.iter().zip(&got.modules) {
                        let expected = &modules[path];
                        assert_eq!(module.lora_rank, expected.lora_rank, "{}: {path}", case.name);
                        assert_eq!(module.lora_alpha, expected.lora_alpha, "{}: {path}", case.name);
                        assert_eq!(module.scaling, expected.scaling, "{}: {path}", case.name);
                    }
                    let mut got_saved: Vec<String> = got.saved.iter().map(|id| module_path(*id)).collect();
                    got_saved.sort();
                    assert_eq!(got_saved, saved, "{}", case.name);
                }
            }
        }
    }

    #[test]
    fn peft_default_configuration_is_accepted_and_lists_nothing() {
        let config = parse(&Value::Object(golden().default_config)).unwrap();
        let resolution = config.resolve(&tiny_decoder()).unwrap();
        assert_eq!(resolution.without_effect, ["peft_version"]);
        assert_eq!(resolution.modules.len(), 3);
    }

    /// What a key with an odd value does.
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Outcome {
        /// Changes what the adapter does, or how it is checked.
        Applied,
        /// Listed as having no effect.
        Listed,
        /// Refuses the adapter by its name.
        Refused,
    }

    /// One odd value for every key of PEFT's configuration: nothing is passed over in silence.
    fn odd_values() -> Vec<(&'static str, Value, Outcome)> {
        use Outcome::{Applied, Listed, Refused};
        vec![
            ("alora_invocation_tokens", json!([1, 2]), Refused),
            ("alpha_pattern", json!({"q_proj": 2}), Applied),
            ("arrow_config", json!({"top_k": 2}), Refused),
            ("auto_mapping", json!({"base_model_class": "X"}), Listed),
            ("base_model_name_or_path", json!("org/model"), Listed),
            ("bias", json!("all"), Applied),
            ("bias", json!("lora_only"), Applied),
            ("corda_config", json!({"corda_method": "ipm"}), Listed),
            ("enable_lora", json!([true, false, true]), Refused),
            ("ensure_weight_tying", json!(true), Listed),
            ("eva_config", json!({"rho": 2.0}), Listed),
            ("exclude_modules", json!(["0.self_attn.q_proj"]), Applied),
            ("fan_in_fan_out", json!(true), Listed),
            ("inference_mode", json!(true), Listed),
            ("init_lora_weights", json!("gaussian"), Listed),
            ("init_lora_weights", json!("eva"), Listed),
            ("init_lora_weights", json!("mica"), Listed),
            ("init_lora_weights", json!("orthogonal"), Listed),
            ("init_lora_weights", json!("pissa"), Refused),
            ("init_lora_weights", json!("pissa_niter_16"), Refused),
            ("init_lora_weights", json!("olora"), Refused),
            ("init_lora_weights", json!("corda"), Refused),
            ("init_lora_weights", json!("loftq"), Refused),
            ("init_lora_weights", json!("lora_ga"), Refused),
            ("init_lora_weights", json!("of next year"), Refused),
            ("kasa_config", json!({"beta": 1e-4}), Refused),
            ("layer_replication", json!([[0, 2], [1, 3]]), Refused),
            ("layers_pattern", json!("layers"), Refused),
            ("layers_to_transform", json!([1]), Applied),
            ("loftq_config", json!({"loftq_bits": 4}), Listed),
            ("lora_alpha", json!(5), Applied),
            ("lora_alpha", json!(0.25), Applied),
            ("lora_bias", json!(true), Applied),
            ("lora_dropout", json!(0.1), Listed),
            ("lora_ga_config", json!({"direction": "ArB2r"}), Listed),
            ("megatron_config", json!({"x": 1}), Refused),
            ("megatron_core", json!("my.megatron"), Listed),
            ("merge_weights", json!(true), Listed),
            ("modules_to_save", json!(["lm_head"]), Applied),
            ("modules_to_save", json!(["norm"]), Refused),
            ("modules_to_save", json!(["classifier"]), Listed),
            ("monteclora_config", json!({"num_samples": 8}), Refused),
            ("peft_type", json!("IA3"), Refused),
            ("peft_type", json!("ADALORA"), Refused),
            ("peft_version", json!("0.9.0"), Listed),
            ("qalora_group_size", json!(32), Listed),
            ("r", json!(3), Applied),
            ("rank_pattern", json!({"q_proj": 2}), Applied),
            ("rank_pattern", json!({"k_proj": 2}), Listed),
            ("revision", json!("main"), Listed),
            ("runtime_config", json!({"ephemeral_gpu_offload": true}), Listed),
            ("target_modules", json!(["k_proj"]), Applied),
            ("target_modules", json!(["q_proj", "c_attn"]), Listed),
            ("target_parameters", json!(["experts.gate_up_proj"]), Refused),
            ("task_type", json!("SEQ_CLS"), Refused),
            ("trainable_token_indices", json!([3, 4]), Applied),
            ("trainable_token_indices", json!({"lm_head": [3], "embed_tokens": [3]}), Applied),
            ("trainable_token_indices", json!({"q_proj": [3]}), Refused),
            ("trainable_token_indices", json!([3, 3]), Refused),
            ("use_bdlora", json!({"nblocks": 2}), Refused),
            ("use_dora", json!(true), Applied),
            ("use_qalora", json!(true), Refused),
            ("use_rslora", json!(true), Applied),
            ("velora_config", json!({"num_groups": 64}), Listed),
            // Not PEFT's: nobody can tell what they do.
            ("use_new_lora_of_next_year", json!(true), Refused),
            ("new_scale", json!(0), Refused),
            ("new_name", json!("x"), Refused),
        ]
    }

    #[test]
    fn every_key_is_applied_or_listed_or_refused_by_name() {
        let decoder = tiny_decoder();
        let plain = parse(&config_with("r", json!(4))).unwrap();
        let plain_resolution = plain.resolve(&decoder).unwrap();
        for (key, value, outcome) in odd_values() {
            let result = parse(&config_with(key, value.clone())).and_then(|config| Ok((config.resolve(&decoder)?, config)));
            let what = format!("{key} = {value}");
            match (outcome, result) {
                (Outcome::Refused, Err(AdapterError::Unsupported { key: named, .. })) => assert_eq!(named, key, "{what}"),
                (Outcome::Listed, Ok((resolution, _))) => {
                    assert!(
                        resolution.without_effect.iter().any(|listed| listed.starts_with(key)),
                        "{what}: {resolution:?}"
                    );
                    assert_eq!(resolution.modules, plain_resolution.modules, "{what}");
                }
                (Outcome::Applied, Ok((resolution, config))) => {
                    let is_noted = config.use_dora
                        || config.lora_bias
                        || config.bias != BiasMode::None
                        || !resolution.saved.is_empty()
                        || !resolution.token_rows.is_empty();
                    assert!(is_noted || resolution.modules != plain_resolution.modules, "{what} changed nothing");
                    assert_eq!(resolution.without_effect, plain_resolution.without_effect, "{what}");
                }
                (_, result) => panic!("{what}: expected {outcome:?}, got {result:?}"),
            }
        }
    }

    #[test]
    fn no_key_of_peft_is_without_an_odd_value() {
        for key in golden().default_config.keys() {
            assert!(odd_values().iter().any(|(odd, ..)| odd == key), "`{key}` is not classified");
        }
        for (key, _) in OTHER_KEYS {
            assert!(odd_values().iter().any(|(odd, ..)| odd == key), "`{key}` is not tested");
        }
    }

    #[test]
    fn unknown_keys_that_are_off_are_accepted() {
        for value in [json!(null), json!(false), json!([]), json!({}), json!("")] {
            parse(&config_with("use_new_lora_of_next_year", value)).unwrap();
        }
    }

    #[test]
    fn wrong_types_name_key_expected_and_got() {
        let cases = [
            ("r", json!("8"), "`r`: expected a positive integer, got \"8\""),
            ("r", json!(0), "`r`: expected a positive integer, got 0"),
            ("r", json!(-1), "`r`: expected a positive integer, got -1"),
            ("r", json!(8.5), "`r`: expected a positive integer, got 8.5"),
            ("r", json!(true), "`r`: expected a positive integer, got true"),
            ("r", json!(1u64 << 40), "`r`: expected a positive integer, got 1099511627776"),
            ("lora_alpha", json!("16"), "`lora_alpha`: expected a number, got \"16\""),
            ("use_rslora", json!(1), "`use_rslora`: expected true or false, got 1"),
            ("use_rslora", json!("true"), "`use_rslora`: expected true or false, got \"true\""),
            ("use_dora", json!("no"), "`use_dora`: expected true or false, got \"no\""),
            (
                "target_modules",
                json!(7),
                "`target_modules`: expected a list of strings or a string, got 7",
            ),
            (
                "target_modules",
                json!(["q_proj", 7]),
                "`target_modules`: expected a list of non-empty strings, got 7",
            ),
            (
                "exclude_modules",
                json!({}),
                "`exclude_modules`: expected a list of strings or a string, got {}",
            ),
            (
                "modules_to_save",
                json!("lm_head"),
                "`modules_to_save`: expected a list of strings, got \"lm_head\"",
            ),
            (
                "layers_to_transform",
                json!("1"),
                "`layers_to_transform`: expected a layer's number or a list of them, got \"1\"",
            ),
            (
                "layers_to_transform",
                json!([1, -1]),
                "`layers_to_transform`: expected a layer's number or a list of them, got -1",
            ),
            ("rank_pattern", json!(["q_proj"]), "`rank_pattern`: expected an object, got [\"q_proj\"]"),
            (
                "rank_pattern",
                json!({"q_proj": "8"}),
                "`rank_pattern.q_proj`: expected a positive integer, got \"8\"",
            ),
            (
                "alpha_pattern",
                json!({"q_proj": null}),
                "`alpha_pattern.q_proj`: expected a number, got null",
            ),
            ("bias", json!("some"), "`bias`: expected \"none\", \"all\" or \"lora_only\", got \"some\""),
            ("bias", json!(false), "`bias`: expected a string, got false"),
            (
                "init_lora_weights",
                json!(3),
                "`init_lora_weights`: expected true, false or a string, got 3",
            ),
            ("peft_type", json!(1), "`peft_type`: expected a string, got 1"),
            ("peft_type", json!(null), "`peft_type` is missing, expected \"LORA\""),
        ];
        for (key, value, expected) in cases {
            let error = parse(&config_with(key, value.clone())).unwrap_err();
            assert_eq!(error.to_string(), format!("adapter_config.json: {expected}"), "{key} = {value}");
        }
        for text in ["", "[]", "null", "{", "{\"r\": 4} x"] {
            assert!(
                matches!(PeftConfig::parse(text.as_bytes()), Err(AdapterError::BadFile { .. })),
                "{text:?}"
            );
        }
    }

    #[test]
    fn patterns_that_cannot_be_matched_are_refused_by_key() {
        let many = "a".repeat(MAX_PATTERN_BYTES + 1);
        for (key, value) in [
            ("target_modules", json!("(q_proj")),
            ("target_modules", json!("q_proj)(")),
            ("target_modules", json!("[a&&b]")),
            ("target_modules", json!(many)),
            ("exclude_modules", json!("*")),
            ("rank_pattern", json!({"(": 3})),
            ("alpha_pattern", json!({"[z-a]": 3})),
            ("modules_to_save", json!(["("])),
            // Exponential in a backtracking matcher.
            ("target_modules", json!(r"((?:(?=.*x)|\w|\.)*)*(?!.)y")),
        ] {
            let result = parse(&config_with(key, value.clone())).and_then(|config| config.resolve(&tiny_decoder()).map(drop));
            match result {
                Err(AdapterError::Unsupported { key: named, .. }) => assert_eq!(named, key, "{value}"),
                Err(AdapterError::Incompatible { .. }) if value.as_str().is_some_and(|text| text.ends_with('y')) => {}
                other => panic!("{key} = {value}: {other:?}"),
            }
        }
    }

    #[test]
    fn layers_with_a_condensed_list_is_refused() {
        let names: Vec<String> = (0..CONDENSED_TARGETS).map(|layer| format!("model.layers.{layer}.mlp.up_proj")).collect();
        let mut config = config_with("target_modules", json!(names));
        parse(&config).unwrap();
        config["layers_to_transform"] = json!([0]);
        let error = parse(&config).unwrap_err();
        assert!(
            matches!(error, AdapterError::Unsupported { ref key, .. } if key == "layers_to_transform"),
            "{error}"
        );
    }
}
