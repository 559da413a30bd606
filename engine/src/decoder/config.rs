//! [`DecoderConfig`]: what differs between the models of the Llama family.

use serde_json::{Map, Value};

/// The shape and the switches of a decoder, read from HF `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderConfig {
    /// `LlamaForCausalLM`, …
    pub architecture: String,
    /// Rows of the embedding and of the head.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of gate and up.
    pub intermediate_size: usize,
    /// Layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Added under the root of RMSNorm.
    pub rms_norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// How the frequencies are stretched.
    pub rope_scaling: RopeScaling,
    /// Of the MLP.
    pub activation: Activation,
    /// q, k, v have biases.
    pub qkv_bias: bool,
    /// o has a bias.
    pub o_bias: bool,
    /// gate, up, down have biases.
    pub mlp_bias: bool,
    /// RMSNorm over each head of q and k before rope.
    pub qk_norm: bool,
    /// The head is the embedding.
    pub tie_word_embeddings: bool,
    /// Attend to the last so many positions only, on every layer.
    pub sliding_window: Option<usize>,
    /// The context that the model was made for.
    pub max_position_embeddings: usize,
    /// From `config.json`; `generation_config.json` may name more.
    pub eos_token_ids: Vec<u32>,
    /// Beginning-of-sequence token.
    pub bos_token_id: Option<u32>,
}

/// How rotary frequencies are stretched.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1's: low frequencies divided, high ones kept, a smooth ramp between.
    Llama3 {
        /// Divisor of low frequencies.
        factor: f64,
        /// Start of the ramp.
        low_freq_factor: f64,
        /// End of the ramp.
        high_freq_factor: f64,
        /// Context before stretching.
        original_max_position_embeddings: f64,
    },
    /// YaRN (arXiv:2309.00071): high frequencies kept, low ones divided, a linear ramp between, and cos and sin multiplied.
    Yarn {
        /// Divisor of low frequencies.
        factor: f64,
        /// Context before stretching.
        original_max_position_embeddings: f64,
        /// Rotations over the original context above which a frequency is kept.
        beta_fast: f64,
        /// Rotations below which a frequency is divided in full.
        beta_slow: f64,
        /// Whether the ramp's ends are rounded to whole dimensions.
        truncate: bool,
        /// Multiplies cos and sin.
        attention_factor: f64,
    },
}

/// Activation of the gated MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x · sigmoid(x)`.
    Silu,
    /// GELU by tanh.
    GeluTanh,
}

/// A `config.json` that does not describe a decoder that is built here.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// Not JSON, or not an object.
    #[error("{file}: {reason}")]
    BadJson {
        /// Which file.
        file: &'static str,
        /// What the parser says.
        reason: String,
    },
    /// A key that must be there.
    #[error("{file}: `{key}` is missing, expected {expected}")]
    MissingKey {
        /// Which file.
        file: &'static str,
        /// The key.
        key: String,
        /// What it should hold.
        expected: String,
    },
    /// A key with a value that is wrong or not supported.
    #[error("{file}: `{key}`: expected {expected}, got {got}")]
    BadKey {
        /// Which file.
        file: &'static str,
        /// The key.
        key: String,
        /// What is possible.
        expected: String,
        /// What is there.
        got: String,
    },
}

const CONFIG_FILE: &str = "config.json";
const GENERATION_CONFIG_FILE: &str = "generation_config.json";

/// What the architectures do not say in their `config.json`, one row each. Defaults are those of the transformers library.
struct Family {
    architecture: &'static str,
    model_type: &'static str,
    /// q, k, v have biases whatever the configuration says.
    qkv_bias: bool,
    /// `attention_bias` puts biases on q, k, v and o.
    reads_attention_bias: bool,
    /// `mlp_bias` puts biases on gate, up and down.
    reads_mlp_bias: bool,
    qk_norm: bool,
    window: WindowRule,
    /// Width of a head when `head_dim` is absent; `None`: `hidden_size / num_attention_heads`.
    default_head_dim: Option<usize>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum WindowRule {
    /// No such key.
    Never,
    /// `sliding_window`, on every layer; this much when absent.
    Plain { default: usize },
    /// Only with `use_sliding_window`, and there on the layers from `max_window_layers` on.
    Switched,
}

const FAMILIES: [Family; 4] = [
    Family {
        architecture: "LlamaForCausalLM",
        model_type: "llama",
        qkv_bias: false,
        reads_attention_bias: true,
        reads_mlp_bias: true,
        qk_norm: false,
        window: WindowRule::Never,
        default_head_dim: None,
    },
    Family {
        architecture: "MistralForCausalLM",
        model_type: "mistral",
        qkv_bias: false,
        reads_attention_bias: false,
        reads_mlp_bias: false,
        qk_norm: false,
        window: WindowRule::Plain { default: 4096 },
        default_head_dim: None,
    },
    Family {
        architecture: "Qwen2ForCausalLM",
        model_type: "qwen2",
        qkv_bias: true,
        reads_attention_bias: false,
        reads_mlp_bias: false,
        qk_norm: false,
        window: WindowRule::Switched,
        default_head_dim: None,
    },
    Family {
        architecture: "Qwen3ForCausalLM",
        model_type: "qwen3",
        qkv_bias: false,
        reads_attention_bias: true,
        reads_mlp_bias: false,
        qk_norm: true,
        window: WindowRule::Switched,
        default_head_dim: Some(128),
    },
];

// Far above every real model, far below what would overflow a product of two of them.
const MAX_VOCAB: usize = 1 << 24;
const MAX_WIDTH: usize = 1 << 20;
const MAX_LAYERS: usize = 1 << 12;
const MAX_HEADS: usize = 1 << 12;
const MAX_HEAD_DIM: usize = 1 << 12;
const MAX_POSITIONS: usize = 1 << 26;

impl DecoderConfig {
    /// Reads HF `config.json` and, for further end-of-sequence tokens, `generation_config.json`; the key names of transformers 4
    /// (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`) alike. Absent optional keys have the defaults of transformers.
    ///
    /// # Errors
    /// An unknown architecture, a missing key, a value that is wrong, out of bounds or asks for something that is not built here:
    /// each names the key, what was expected and what is there.
    pub fn from_json(config: &[u8], generation_config: Option<&[u8]>) -> Result<Self, ConfigError> {
        let keys = Keys::parse(CONFIG_FILE, config)?;
        let family = family(&keys)?;
        if keys.has("quantization_config") {
            return Err(keys.bad("quantization_config", "no quantization (bfloat16, float16 or float32 weights)"));
        }

        let vocab_size = keys.size("vocab_size", MAX_VOCAB)?;
        let hidden_size = keys.size("hidden_size", MAX_WIDTH)?;
        let intermediate_size = keys.size("intermediate_size", MAX_WIDTH)?;
        let num_layers = keys.size("num_hidden_layers", MAX_LAYERS)?;
        let num_heads = keys.size("num_attention_heads", MAX_HEADS)?;
        let num_kv_heads = if keys.has("num_key_value_heads") {
            keys.size("num_key_value_heads", MAX_HEADS)?
        } else {
            num_heads
        };
        if num_heads % num_kv_heads != 0 {
            return Err(keys.bad("num_key_value_heads", format!("a divisor of num_attention_heads ({num_heads})")));
        }
        let head_dim = if keys.has("head_dim") {
            keys.size("head_dim", MAX_HEAD_DIM)?
        } else if let Some(default) = family.default_head_dim {
            default
        } else if hidden_size % num_heads == 0 {
            hidden_size / num_heads
        } else {
            return Err(keys.bad(
                "hidden_size",
                format!("a multiple of num_attention_heads ({num_heads}) when `head_dim` is absent"),
            ));
        };
        if head_dim % 2 != 0 || head_dim > MAX_HEAD_DIM {
            return Err(keys.error("head_dim", format!("an even number of at most {MAX_HEAD_DIM}"), head_dim.to_string()));
        }
        if num_heads * head_dim > MAX_WIDTH {
            return Err(keys.error(
                "head_dim",
                format!("at most {MAX_WIDTH} over all heads"),
                format!("{num_heads} heads of {head_dim}"),
            ));
        }
        let attention_bias = family.reads_attention_bias && keys.flag("attention_bias", false)?;
        let stated_positions = keys.size("max_position_embeddings", MAX_POSITIONS)?;
        let (rope_theta, rope_scaling) = rope(&keys, stated_positions)?;
        // A YaRN block is written beside the unchanged `max_position_embeddings`: it says itself what context it makes possible.
        let max_position_embeddings = match &rope_scaling {
            RopeScaling::Yarn {
                factor,
                original_max_position_embeddings: original,
                ..
            } => stated_positions.max((factor * original).min(MAX_POSITIONS as f64) as usize),
            _ => stated_positions,
        };

        let mut eos_token_ids = keys.token_ids("eos_token_id")?;
        if let Some(bytes) = generation_config {
            for id in Keys::parse(GENERATION_CONFIG_FILE, bytes)?.token_ids("eos_token_id")? {
                if !eos_token_ids.contains(&id) {
                    eos_token_ids.push(id);
                }
            }
        }

        Ok(Self {
            architecture: family.architecture.to_owned(),
            vocab_size,
            hidden_size,
            intermediate_size,
            num_layers,
            num_heads,
            num_kv_heads,
            head_dim,
            rms_norm_eps: keys.number("rms_norm_eps", Some(1e-6), 0.0, 1.0)? as f32,
            rope_theta,
            rope_scaling,
            activation: activation(&keys)?,
            qkv_bias: family.qkv_bias || attention_bias,
            o_bias: attention_bias,
            mlp_bias: family.reads_mlp_bias && keys.flag("mlp_bias", false)?,
            qk_norm: family.qk_norm,
            tie_word_embeddings: keys.flag("tie_word_embeddings", false)?,
            sliding_window: sliding_window(&keys, family.window, num_layers)?,
            max_position_embeddings,
            eos_token_ids,
            bos_token_id: keys.token_ids("bos_token_id")?.first().copied(),
        })
    }

    /// Width of q: `num_heads · head_dim`.
    pub fn q_size(&self) -> usize {
        self.num_heads * self.head_dim
    }

    /// Width of k, and of v: `num_kv_heads · head_dim`.
    pub fn kv_size(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }

    /// Parameters of the decoder: the head is not counted again when tied.
    pub fn num_parameters(&self) -> usize {
        super::DecoderTensor::all(self)
            .iter()
            .map(|tensor| tensor.shape(self).iter().product::<usize>())
            .sum()
    }
}

fn family(keys: &Keys) -> Result<&'static Family, ConfigError> {
    let names = || FAMILIES.map(|family| family.architecture).join(", ");
    let found = match keys.get("architectures") {
        Some(Value::Array(names)) if names.len() == 1 => {
            let name = names[0].as_str();
            FAMILIES.iter().find(|family| Some(family.architecture) == name)
        }
        Some(_) => None,
        None => {
            let Some(model_type) = keys.get("model_type") else {
                return Err(keys.missing("architectures", format!("one of {}", names())));
            };
            let found = FAMILIES.iter().find(|family| Some(family.model_type) == model_type.as_str());
            return found.ok_or_else(|| keys.bad("model_type", format!("one of {}", FAMILIES.map(|family| family.model_type).join(", "))));
        }
    };
    found.ok_or_else(|| keys.bad("architectures", format!("one of {}", names())))
}

fn activation(keys: &Keys) -> Result<Activation, ConfigError> {
    match keys.text("hidden_act")?.unwrap_or("silu") {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu_pytorch_tanh" | "gelu_new" => Ok(Activation::GeluTanh),
        _ => Err(keys.bad("hidden_act", "silu or gelu_pytorch_tanh")),
    }
}

fn sliding_window(keys: &Keys, rule: WindowRule, num_layers: usize) -> Result<Option<usize>, ConfigError> {
    let window = |default: Option<usize>| match keys.map.get("sliding_window") {
        None => Ok(default),
        Some(Value::Null) => Ok(None),
        Some(_) => keys.size("sliding_window", usize::MAX).map(Some),
    };
    let uniform = |kinds: &Value| -> Result<bool, ConfigError> {
        let expected = || format!("{num_layers} entries, all full_attention or all sliding_attention");
        let kinds = kinds.as_array().ok_or_else(|| keys.bad("layer_types", expected()))?;
        let count = |kind: &str| kinds.iter().filter(|entry| entry.as_str() == Some(kind)).count();
        match (kinds.len() == num_layers, count("full_attention"), count("sliding_attention")) {
            (true, full, 0) if full == num_layers => Ok(false),
            (true, 0, sliding) if sliding == num_layers => Ok(true),
            _ => Err(keys.bad("layer_types", expected())),
        }
    };
    match rule {
        WindowRule::Never => Ok(None),
        WindowRule::Plain { default } => window(Some(default)),
        WindowRule::Switched => {
            if !keys.flag("use_sliding_window", false)? {
                return Ok(None);
            }
            let windowed = match keys.get("layer_types") {
                Some(kinds) => uniform(kinds)?,
                None => match keys.whole("max_window_layers")? {
                    Some(first) if first >= num_layers => false,
                    Some(0) => true,
                    _ => {
                        return Err(keys.bad_or_missing(
                            "max_window_layers",
                            format!("0 or at least {num_layers}: a window on some of the layers is not supported"),
                        ));
                    }
                },
            };
            if windowed { window(None) } else { Ok(None) }
        }
    }
}

/// `(theta, scaling)` from `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling` (4).
fn rope(keys: &Keys, max_positions: usize) -> Result<(f64, RopeScaling), ConfigError> {
    let outer_theta = |default| keys.number("rope_theta", Some(default), f64::MIN_POSITIVE, 1e30);
    let name = if keys.has("rope_parameters") {
        "rope_parameters"
    } else {
        "rope_scaling"
    };
    let Some(value) = keys.get(name) else {
        return Ok((outer_theta(10_000.0)?, RopeScaling::None));
    };
    let Value::Object(map) = value else {
        return Err(keys.bad(name, "an object or null"));
    };
    let rope = Keys {
        file: keys.file,
        prefix: format!("{name}."),
        map: map.clone(),
    };
    if let Some(key) = map.iter().find(|(_, value)| value.is_object()).map(|(key, _)| key) {
        return Err(rope.bad(key, "no object: rope parameters by layer type are not supported"));
    }
    let theta = if rope.has("rope_theta") {
        rope.number("rope_theta", None, f64::MIN_POSITIVE, 1e30)?
    } else {
        outer_theta(10_000.0)?
    };
    if rope.number("partial_rotary_factor", Some(1.0), 0.0, 1.0)? != 1.0 {
        return Err(rope.bad("partial_rotary_factor", "1"));
    }
    // transformers wrote `type` before it wrote `rope_type`, and sometimes both.
    let kind_key = if rope.has("rope_type") { "rope_type" } else { "type" };
    let factor = || rope.number("factor", None, 1.0, 1e6);
    let original = |default: Option<f64>| rope.number("original_max_position_embeddings", default, 1.0, MAX_POSITIONS as f64);
    let scaling = match rope.text(kind_key)?.unwrap_or("default") {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: factor()? },
        "llama3" => {
            let low_freq_factor = rope.number("low_freq_factor", None, f64::MIN_POSITIVE, 1e6)?;
            let high_freq_factor = rope.number("high_freq_factor", None, f64::MIN_POSITIVE, 1e6)?;
            if high_freq_factor <= low_freq_factor {
                return Err(rope.bad("high_freq_factor", format!("more than low_freq_factor ({low_freq_factor})")));
            }
            RopeScaling::Llama3 {
                factor: factor()?,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings: original(None)?,
            }
        }
        "yarn" => {
            let factor = factor()?;
            RopeScaling::Yarn {
                factor,
                original_max_position_embeddings: original(Some(max_positions as f64))?,
                beta_fast: rope.number("beta_fast", Some(32.0), f64::MIN_POSITIVE, 1e6)?,
                beta_slow: rope.number("beta_slow", Some(1.0), f64::MIN_POSITIVE, 1e6)?,
                truncate: rope.flag("truncate", true)?,
                attention_factor: yarn_attention_factor(&rope, factor)?,
            }
        }
        _ => return Err(rope.bad(kind_key, "one of default, linear, llama3, yarn")),
    };
    Ok((theta, scaling))
}

/// Given, or worked out as YaRN's section 3.4 and DeepSeek's `mscale` do.
fn yarn_attention_factor(rope: &Keys, factor: f64) -> Result<f64, ConfigError> {
    if rope.has("attention_factor") {
        return rope.number("attention_factor", None, f64::MIN_POSITIVE, 1e6);
    }
    let mscale = |multiplier: f64| if factor <= 1.0 { 1.0 } else { 0.1 * multiplier * factor.ln() + 1.0 };
    let numerator = rope.number("mscale", Some(0.0), 0.0, 1e6)?;
    let denominator = rope.number("mscale_all_dim", Some(0.0), 0.0, 1e6)?;
    if numerator > 0.0 && denominator > 0.0 {
        Ok(mscale(numerator) / mscale(denominator))
    } else {
        Ok(mscale(1.0))
    }
}

/// A JSON object whose errors name file and key. A key whose value is null counts as absent.
struct Keys {
    file: &'static str,
    /// What stands before each key in messages (`rope_scaling.`).
    prefix: String,
    map: Map<String, Value>,
}

impl Keys {
    fn parse(file: &'static str, bytes: &[u8]) -> Result<Self, ConfigError> {
        let bad = |reason: String| ConfigError::BadJson { file, reason };
        match serde_json::from_slice(bytes).map_err(|error| bad(format!("not valid JSON: {error}")))? {
            Value::Object(map) => Ok(Self {
                file,
                prefix: String::new(),
                map,
            }),
            _ => Err(bad("expected a JSON object".to_owned())),
        }
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    fn error(&self, key: &str, expected: impl Into<String>, got: String) -> ConfigError {
        ConfigError::BadKey {
            file: self.file,
            key: format!("{}{key}", self.prefix),
            expected: expected.into(),
            got,
        }
    }

    fn missing(&self, key: &str, expected: impl Into<String>) -> ConfigError {
        ConfigError::MissingKey {
            file: self.file,
            key: format!("{}{key}", self.prefix),
            expected: expected.into(),
        }
    }

    /// An error about the value that `key` has.
    fn bad(&self, key: &str, expected: impl Into<String>) -> ConfigError {
        const SHOWN_CHARS: usize = 100;
        let mut got = self.map.get(key).map_or_else(|| "nothing".to_owned(), Value::to_string);
        if let Some((end, _)) = got.char_indices().nth(SHOWN_CHARS) {
            got.truncate(end);
            got.push('…');
        }
        self.error(key, expected, got)
    }

    fn bad_or_missing(&self, key: &str, expected: impl Into<String>) -> ConfigError {
        if self.has(key) {
            self.bad(key, expected)
        } else {
            self.missing(key, expected)
        }
    }

    /// A whole number, if the key is there.
    fn whole(&self, key: &str) -> Result<Option<usize>, ConfigError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_u64().and_then(|number| usize::try_from(number).ok());
        number.map(Some).ok_or_else(|| self.bad(key, "a whole number"))
    }

    /// A required whole number in `1..=max`.
    fn size(&self, key: &str, max: usize) -> Result<usize, ConfigError> {
        let expected = || format!("a whole number from 1 to {max}");
        match self.get(key).map(Value::as_u64) {
            Some(Some(number)) if number >= 1 && number <= max as u64 => Ok(number as usize),
            _ => Err(self.bad_or_missing(key, expected())),
        }
    }

    /// A number in `min..=max`; `default` when absent.
    fn number(&self, key: &str, default: Option<f64>, min: f64, max: f64) -> Result<f64, ConfigError> {
        let expected = || format!("a number from {min:e} to {max:e}");
        match (self.get(key).map(Value::as_f64), default) {
            (Some(Some(number)), _) if number >= min && number <= max => Ok(number),
            (None, Some(default)) => Ok(default),
            _ => Err(self.bad_or_missing(key, expected())),
        }
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool, ConfigError> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| self.bad(key, "true or false")),
        }
    }

    fn text(&self, key: &str) -> Result<Option<&str>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => value.as_str().map(Some).ok_or_else(|| self.bad(key, "a string")),
        }
    }

    /// A token id, a list of them, or none.
    fn token_ids(&self, key: &str) -> Result<Vec<u32>, ConfigError> {
        let one = |value: &Value| {
            let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
            id.ok_or_else(|| self.bad(key, "a token id or a list of token ids"))
        };
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(Value::Array(values)) => values.iter().map(one).collect(),
            Some(value) => one(value).map(|id| vec![id]),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn llama() -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 160,
            "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5, "rope_theta": 50000.0, "hidden_act": "silu", "tie_word_embeddings": true, "torch_dtype": "bfloat16",
            "bos_token_id": 1, "eos_token_id": 2
        })
    }

    fn with(mut config: Value, changes: Value) -> Value {
        for (key, value) in changes.as_object().unwrap() {
            config[key] = value.clone();
        }
        config
    }

    fn parse(config: &Value) -> Result<DecoderConfig, ConfigError> {
        DecoderConfig::from_json(config.to_string().as_bytes(), None)
    }

    #[test]
    fn reads_llama_with_keys_of_transformers_4() {
        let config = parse(&llama()).unwrap();
        assert_eq!(
            config,
            DecoderConfig {
                architecture: "LlamaForCausalLM".into(),
                vocab_size: 1000,
                hidden_size: 64,
                intermediate_size: 160,
                num_layers: 3,
                num_heads: 8,
                num_kv_heads: 2,
                head_dim: 8,
                rms_norm_eps: 1e-5,
                rope_theta: 50000.0,
                rope_scaling: RopeScaling::None,
                activation: Activation::Silu,
                qkv_bias: false,
                o_bias: false,
                mlp_bias: false,
                qk_norm: false,
                tie_word_embeddings: true,
                sliding_window: None,
                max_position_embeddings: 512,
                eos_token_ids: vec![2],
                bos_token_id: Some(1),
            }
        );
        // 2 norms, q 64·64, k and v 64·16, o 64·64, three of 64·160 a layer; embedding and final norm once.
        assert_eq!(
            config.num_parameters(),
            3 * (2 * 64 + 2 * 64 * 64 + 2 * 64 * 16 + 3 * 64 * 160) + 1000 * 64 + 64
        );
    }

    #[test]
    fn reads_rope_in_both_spellings() {
        let scaling = json!({"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192});
        let expected = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192.0,
        };
        let old = parse(&with(
            llama(),
            json!({"rope_scaling": with(scaling.clone(), json!({"rope_type": "llama3"}))}),
        ))
        .unwrap();
        assert_eq!((old.rope_theta, &old.rope_scaling), (50000.0, &expected));
        let mut config = with(
            llama(),
            json!({"rope_parameters": with(scaling, json!({"rope_type": "llama3", "rope_theta": 1234.0}))}),
        );
        config.as_object_mut().unwrap().remove("rope_theta");
        let new = parse(&config).unwrap();
        assert_eq!((new.rope_theta, &new.rope_scaling), (1234.0, &expected));

        let linear = parse(&with(llama(), json!({"rope_scaling": {"type": "linear", "factor": 2.0}}))).unwrap();
        assert_eq!(linear.rope_scaling, RopeScaling::Linear { factor: 2.0 });
        let default = parse(&with(llama(), json!({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}))).unwrap();
        assert_eq!((default.rope_theta, default.rope_scaling), (7.0, RopeScaling::None));
    }

    #[test]
    fn yarn_states_its_own_context() {
        let config = parse(&with(
            llama(),
            json!({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}}),
        ));
        let config = config.unwrap();
        assert_eq!(config.max_position_embeddings, 2048);
        assert_eq!(
            config.rope_scaling,
            RopeScaling::Yarn {
                factor: 4.0,
                original_max_position_embeddings: 512.0,
                beta_fast: 32.0,
                beta_slow: 1.0,
                truncate: true,
                attention_factor: 0.1 * 4f64.ln() + 1.0,
            }
        );
    }

    #[test]
    fn reads_the_other_families() {
        let mistral = with(
            llama(),
            json!({"architectures": ["MistralForCausalLM"], "sliding_window": 128, "head_dim": 32}),
        );
        let config = parse(&mistral).unwrap();
        assert_eq!((config.sliding_window, config.head_dim, config.qkv_bias), (Some(128), 32, false));
        assert_eq!(parse(&with(mistral, json!({"sliding_window": null}))).unwrap().sliding_window, None);

        let qwen2 = with(
            llama(),
            json!({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": false, "sliding_window": 64, "max_window_layers": 2}),
        );
        let config = parse(&qwen2).unwrap();
        assert_eq!(
            (config.qkv_bias, config.o_bias, config.qk_norm, config.sliding_window),
            (true, false, false, None)
        );
        let all = with(qwen2.clone(), json!({"use_sliding_window": true, "max_window_layers": 0}));
        assert_eq!(parse(&all).unwrap().sliding_window, Some(64));
        let some = parse(&with(qwen2, json!({"use_sliding_window": true}))).unwrap_err().to_string();
        assert!(some.contains("max_window_layers") && some.contains("got 2"), "{some}");

        let qwen3 = parse(&with(llama(), json!({"architectures": ["Qwen3ForCausalLM"]}))).unwrap();
        assert_eq!((qwen3.qk_norm, qwen3.head_dim, qwen3.qkv_bias), (true, 128, false));
        let biased = parse(&with(llama(), json!({"attention_bias": true, "mlp_bias": true}))).unwrap();
        assert_eq!((biased.qkv_bias, biased.o_bias, biased.mlp_bias), (true, true, true));
    }

    #[test]
    fn merges_end_of_sequence_tokens() {
        let read = |config: &Value, generation: Option<Value>| {
            let generation = generation.map(|value| value.to_string());
            DecoderConfig::from_json(config.to_string().as_bytes(), generation.as_ref().map(String::as_bytes))
                .unwrap()
                .eos_token_ids
        };
        assert_eq!(read(&llama(), Some(json!({"eos_token_id": [5, 2, 7]}))), [2, 5, 7]);
        assert_eq!(read(&with(llama(), json!({"eos_token_id": [9, 8]})), None), [9, 8]);
        assert_eq!(read(&with(llama(), json!({"eos_token_id": null})), Some(json!({"eos_token_id": 4}))), [4]);
    }

    #[test]
    fn refuses_by_key_expected_and_got() {
        let check = |config: Value, parts: &[&str]| {
            let message = parse(&config).unwrap_err().to_string();
            for part in parts {
                assert!(message.contains(part), "{message:?} lacks {part:?}");
            }
        };
        let without = |key: &str| {
            let mut config = llama();
            config.as_object_mut().unwrap().remove(key);
            config
        };
        for key in [
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
        ] {
            check(without(key), &[&format!("`{key}` is missing")]);
            check(with(llama(), json!({ key: 0 })), &[&format!("`{key}`"), "from 1", "got 0"]);
            check(
                with(llama(), json!({ key: u64::MAX })),
                &[&format!("`{key}`"), "got 18446744073709551615"],
            );
            check(with(llama(), json!({ key: -1.5 })), &[&format!("`{key}`"), "got -1.5"]);
        }
        check(
            with(llama(), json!({"architectures": ["GPT2LMHeadModel"]})),
            &["`architectures`", "LlamaForCausalLM", "GPT2LMHeadModel"],
        );
        check(
            with(without("architectures"), json!({"model_type": "gpt2"})),
            &["`model_type`", "llama", "gpt2"],
        );
        check(
            with(llama(), json!({"num_key_value_heads": 3})),
            &["`num_key_value_heads`", "divisor", "got 3"],
        );
        check(
            with(llama(), json!({"hidden_size": 65})),
            &["`hidden_size`", "multiple of num_attention_heads (8)", "got 65"],
        );
        check(with(llama(), json!({"head_dim": 7})), &["`head_dim`", "even", "got 7"]);
        check(with(llama(), json!({"hidden_act": "relu"})), &["`hidden_act`", "silu", "relu"]);
        check(
            with(llama(), json!({"tie_word_embeddings": "yes"})),
            &["`tie_word_embeddings`", "true or false", "\"yes\""],
        );
        check(with(llama(), json!({"eos_token_id": "</s>"})), &["`eos_token_id`", "token id", "</s>"]);
        check(with(llama(), json!({"rope_theta": 0})), &["`rope_theta`", "got 0"]);
        check(with(llama(), json!({"rms_norm_eps": -1e-5})), &["`rms_norm_eps`", "got"]);
        check(
            with(llama(), json!({"quantization_config": {"quant_method": "gptq"}})),
            &["`quantization_config`", "gptq"],
        );
        check(
            with(llama(), json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}})),
            &["`rope_scaling.type`", "llama3", "dynamic"],
        );
        check(
            with(llama(), json!({"rope_scaling": {"type": "linear"}})),
            &["`rope_scaling.factor` is missing"],
        );
        check(
            with(llama(), json!({"rope_scaling": {"type": "linear", "factor": 0.0}})),
            &["`rope_scaling.factor`", "got 0"],
        );
        check(
            with(llama(), json!({"rope_parameters": {"full_attention": {"rope_type": "default"}}})),
            &["`rope_parameters.full_attention`"],
        );
        check(
            with(
                llama(),
                json!({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
            ),
            &["`rope_parameters.partial_rotary_factor`", "got 0.5"],
        );
        for bytes in [&b"{"[..], b"[]", b"\xff"] {
            assert!(matches!(DecoderConfig::from_json(bytes, None), Err(ConfigError::BadJson { .. })));
        }
    }
}
