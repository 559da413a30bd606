//! `polylora adapters`: a client of a running server, and `inspect`, which needs none.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{Cursor, Read, Write},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use polylora_engine::{
    FileSource,
    adapter::{
        CoverageReport, LoraLimits, PackedDtype,
        config::CONFIG_FILE,
        load::{checkpoint_opener, load_adapter},
        tensors::{INDEX_FILE, WEIGHTS_FILE, parse_index},
    },
    backend::cpu::CpuBackend,
    decoder::DecoderConfig,
};
use serde_json::{Value, json};

use crate::{
    prompt::{PromptProcessor, TextFiles},
    pushed::TEXT_PARTS,
    text_side::BaseText,
};

/// `polylora adapters …`
#[derive(Args, Debug)]
pub struct AdaptersArgs {
    /// Without one: list.
    #[command(subcommand)]
    command: Option<AdaptersCommand>,
    /// The server.
    #[arg(long, global = true, env = "POLYLORA_URL", default_value = "http://127.0.0.1:30000", value_name = "URL")]
    url: String,
    /// Its (admin) key, if it asks for one.
    #[arg(long, global = true, env = "POLYLORA_API_KEY", hide_env_values = true, value_name = "KEY")]
    api_key: Option<String>,
    /// Print the server's answer as JSON.
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum AdaptersCommand {
    /// List the base model, every adapter and every alias.
    List,
    /// Load an adapter.
    Load {
        /// The name that clients will use.
        name: String,
        /// A folder on the server's machine, org/name[@revision] on the Hub, or demo:NAME.
        path: String,
        /// Keep it on the device.
        #[arg(long)]
        pin: bool,
        /// Put it in the place of an adapter of the same name; requests in flight end on the old one.
        #[arg(long)]
        replace: bool,
    },
    /// Load an adapter in the place of one of the same name; requests in flight end on the old one.
    Replace {
        /// The name.
        name: String,
        /// A folder on the server's machine, org/name[@revision] on the Hub, or demo:NAME.
        path: String,
        /// Only if the name has this version (hex) now.
        #[arg(long, value_name = "VERSION")]
        expected_version: Option<String>,
    },
    /// Send an adapter's files to the server; a name that is taken gets them as its new version.
    Push {
        /// The name that clients will use.
        name: String,
        /// A folder on this machine with adapter_config.json and adapter_model.safetensors, or the files that it was split into and their
        /// index.
        folder: PathBuf,
        /// Only if the name has this version (hex) now.
        #[arg(long, value_name = "VERSION")]
        expected_version: Option<String>,
    },
    /// Unload an adapter; returns when the last request on it has ended.
    Unload {
        /// Its name.
        name: String,
        /// End the requests that still run on it.
        #[arg(long)]
        force: bool,
        /// Wait no longer than this.
        #[arg(long, value_name = "SECONDS")]
        timeout: Option<f64>,
    },
    /// Keep an adapter on the device.
    Pin {
        /// Its name.
        name: String,
    },
    /// Let an adapter leave the device again.
    Unpin {
        /// Its name.
        name: String,
    },
    /// Let a name stand for an adapter, or for several with weights: `alias support v1=90 v2=10`. Requests from now on go by it.
    Alias {
        /// The name that clients will use.
        name: String,
        /// NAME, or NAME=WEIGHT; a weight is relative to the others' (default 1).
        #[arg(required = true, num_args = 1.., value_name = "ADAPTER", value_parser = parse_target)]
        targets: Vec<(String, f64)>,
    },
    /// Forget an alias; the adapters behind it stay.
    Unalias {
        /// Its name.
        name: String,
    },
    /// Check adapter files against a base model, without a server: what they change, at which rank and scale.
    Inspect {
        /// A folder with adapter_config.json and adapter_model.safetensors, or demo:NAME.
        path: String,
        /// The base model's folder. Unset: the demo model.
        #[arg(long, value_name = "DIR")]
        model_path: Option<PathBuf>,
    },
}

/// Runs the command.
///
/// # Errors
/// What the server answered, or why it could not be asked.
pub fn run(args: &AdaptersArgs) -> anyhow::Result<()> {
    let client = Client::new(&args.url, args.api_key.as_deref());
    let mut out = std::io::stdout();
    let command = args.command.as_ref().unwrap_or(&AdaptersCommand::List);
    let (answer, text) = match command {
        AdaptersCommand::List => {
            let answer = client.get("/v1/models")?;
            let table = models_table(&answer)?;
            (answer, table)
        }
        AdaptersCommand::Load { name, path, pin, replace } => {
            let body = json!({"lora_name": name, "lora_path": for_the_server(path), "pinned": pin, "replace": replace});
            let answer = client.post("/load_lora_adapter", &body)?;
            (answer, format!("loaded {name} from {path}\n"))
        }
        AdaptersCommand::Replace {
            name,
            path,
            expected_version,
        } => {
            let body = json!({"lora_name": name, "lora_path": for_the_server(path), "replace": true, "expected_version": expected_version});
            let answer = client.post("/load_lora_adapter", &body)?;
            (answer, format!("replaced {name} by {path}\n"))
        }
        AdaptersCommand::Push {
            name,
            folder,
            expected_version,
        } => {
            let answer = client.push(name, folder, expected_version.as_deref())?;
            let version = answer["adapter"]["version"].as_str().unwrap_or("-").to_owned();
            (answer, format!("pushed {name}, version {version}\n"))
        }
        AdaptersCommand::Unload { name, force, timeout } => {
            let timeout = timeout.map_or_else(String::new, |seconds| format!("&timeout_seconds={seconds}"));
            let answer = client.delete(&format!("/v1/adapters/{}?force={force}{timeout}", path_segment(name)))?;
            let text = unloaded_text(&answer);
            (answer, text)
        }
        AdaptersCommand::Pin { name } | AdaptersCommand::Unpin { name } => {
            let pinned = matches!(command, AdaptersCommand::Pin { .. });
            let answer = client.post("/pin_lora_adapter", &json!({"lora_name": name, "pinned": pinned}))?;
            (answer, format!("{} {name}\n", if pinned { "pinned" } else { "unpinned" }))
        }
        AdaptersCommand::Alias { name, targets } => {
            let entry = |(adapter, weight): &(String, f64)| json!({"adapter": adapter, "weight": weight});
            let body = json!({"targets": targets.iter().map(entry).collect::<Vec<_>>()});
            let answer = client.put(&format!("/v1/aliases/{}", path_segment(name)), &body)?;
            let text = format!("{name} stands for {}\n", shares(&answer));
            (answer, text)
        }
        AdaptersCommand::Unalias { name } => {
            let answer = client.delete(&format!("/v1/aliases/{}", path_segment(name)))?;
            (answer, format!("{name} stands for nothing any more\n"))
        }
        AdaptersCommand::Inspect { path, model_path } => inspect(path, model_path.as_ref())?,
    };
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&answer)?)?;
    } else {
        write!(out, "{text}")?;
    }
    Ok(())
}

/// What became of an unload.
fn unloaded_text(answer: &Value) -> String {
    let name = answer["name"].as_str().unwrap_or("-");
    let (waited_for, still_running) = (answer["waited_for"].as_u64().unwrap_or(0), answer["still_running"].as_u64().unwrap_or(0));
    let requests = if waited_for == 1 { "request" } else { "requests" };
    let what = if answer["aborted"] == true { "aborted" } else { "waited for" };
    match (waited_for, still_running) {
        (0, _) => format!("unloaded {name}\n"),
        (_, 0) => format!("unloaded {name}, {what} {waited_for} {requests}\n"),
        _ => format!("unloaded {name}, {what} {waited_for} {requests}: {still_running} still run\n"),
    }
}

/// `NAME=WEIGHT`; a name may have an equals sign itself, if no number follows.
fn parse_target(text: &str) -> Result<(String, f64), String> {
    let (name, weight) = match text.rsplit_once('=').map(|(name, weight)| (name, weight.parse::<f64>())) {
        Some((name, Ok(weight))) => (name, weight),
        _ => (text, 1.0),
    };
    if name.is_empty() {
        return Err("an adapter's name must not be empty (NAME or NAME=WEIGHT)".to_owned());
    }
    Ok((name.to_owned(), weight))
}

/// A name as one part of a URL's path: RFC 3986's unreserved characters, all others as `%XX`.
fn path_segment(name: &str) -> String {
    let mut segment = String::new();
    for byte in name.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => segment.push(byte.into()),
            other => segment.push_str(&format!("%{other:02X}")),
        }
    }
    segment
}

/// `sql (90 %), json (10 %)`
fn shares(alias: &Value) -> String {
    let targets = alias["targets"].as_array().map(Vec::as_slice).unwrap_or_default();
    let adapter = |target: &Value| target["adapter"].as_str().unwrap_or("-").to_owned();
    let with_share = |target: &Value| match target["share"].as_f64() {
        Some(share) if targets.len() > 1 => format!("{} ({:.4} %)", adapter(target), 100.0 * share).replace(".0000 %", " %"),
        _ => adapter(target),
    };
    targets.iter().map(with_share).collect::<Vec<_>>().join(", ")
}

/// The report as JSON and as text.
fn inspect(path: &str, model_path: Option<&PathBuf>) -> anyhow::Result<(Value, String)> {
    let files = match path.strip_prefix(crate::auth::EMBEDDED_PREFIX) {
        Some(name) => {
            let adapter = crate::demo::ADAPTERS.iter().find(|adapter| adapter.name == name);
            FileSource::Embedded(adapter.with_context(|| format!("the binary has no adapter {name:?}"))?.files)
        }
        None => FileSource::Directory(path.into()),
    };
    let base = model_path.map_or(FileSource::Embedded(crate::demo::BASE), |path| FileSource::Directory(path.clone()));
    let decoder = read_decoder_config(&base)?;
    // As a server without --chat-template does it: the version is the same, and so is what is refused.
    let text = base.contains(TextFiles::TOKENIZER).then(|| {
        let prompt = PromptProcessor::from_files(&base, None)?;
        BaseText::new(&base, None, prompt, Arc::default())
    });
    let text = text.transpose().context("the base model's tokenizer")?;
    let limits = LoraLimits {
        companion: text.map(|text| Arc::new(text).reader(&decoder)),
        features: CpuBackend::LORA_FEATURES,
        base: Some(checkpoint_opener(base, Arc::new(decoder.clone()))),
        ..LoraLimits::new(PackedDtype::Bf16)
    };
    let (adapter, report) = load_adapter(&files, &decoder, &limits)?;
    let answer = json!({
        "version": adapter.version.to_string(),
        "bytes_bf16": adapter.bytes(),
        "max_lora_rank": adapter.max_lora_rank,
        "has_own_text": adapter.companion.is_some(),
        "report": report,
    });
    let mut text = format!(
        "version {}\nlargest rank {}, {} in bf16\n\n",
        adapter.version,
        adapter.max_lora_rank,
        human_bytes(adapter.bytes() as u64)
    );
    text.push_str(&report_text(&report, decoder.num_layers));
    if adapter.companion.is_some() {
        text.push_str("a tokenizer or chat template of its own\n");
    }
    Ok((answer, text))
}

/// Reads `config.json` of a base model.
pub(super) fn read_decoder_config(base: &FileSource) -> anyhow::Result<DecoderConfig> {
    const MOST: u64 = 16 << 20;
    let config = base.read("config.json", MOST).context("config.json of the base model")?;
    let generation = base.contains("generation_config.json").then(|| base.read("generation_config.json", MOST));
    Ok(DecoderConfig::from_json(&config, generation.transpose()?.as_deref())?)
}

/// One line per kind of module: layers, ranks and scales are mostly the same for all layers.
fn report_text(report: &CoverageReport, num_layers: usize) -> String {
    let mut rows: Vec<(String, Vec<u16>, u32, f32, f32)> = Vec::new();
    for module in &report.modules {
        let (layer, name) = split_layer(&module.module);
        let same = |row: &&mut (String, Vec<u16>, u32, f32, f32)| {
            (row.0.as_str(), row.2, row.3, row.4) == (name.as_str(), module.lora_rank, module.lora_alpha, module.scaling)
        };
        match rows.iter_mut().find(same) {
            Some(row) => row.1.extend(layer),
            None => rows.push((name, layer.into_iter().collect(), module.lora_rank, module.lora_alpha, module.scaling)),
        }
    }
    let mut table = Table::new(&["module", "layers", "rank", "alpha", "scaling"]);
    for (name, layers, rank, alpha, scaling) in rows {
        table.row([name, layer_ranges(&layers), rank.to_string(), alpha.to_string(), format!("{scaling:.6}")]);
    }
    let mut text = table.to_string();
    text.push_str(&format!(
        "\n{} modules in {} of {num_layers} layers\n",
        report.modules.len(),
        report.layers.len()
    ));
    if let Some(vocab_size) = report.resized_vocab {
        text.push_str(&format!("{vocab_size} tokens\n"));
    }
    for (module, rows) in &report.token_rows {
        text.push_str(&format!("{rows} rows of {module}\n"));
    }
    for (what, entries) in [
        ("brought whole", &report.replaced_modules),
        ("without effect on inference", &report.keys_without_effect),
        ("tensors that change nothing", &report.tensors_without_effect),
    ] {
        if !entries.is_empty() {
            text.push_str(&format!("{what}: {}\n", entries.join(", ")));
        }
    }
    text
}

/// `model.layers.3.self_attn.q_proj` is `self_attn.q_proj` of layer 3.
fn split_layer(module: &str) -> (Option<u16>, String) {
    let parts = module.split_once(".layers.").and_then(|(_, rest)| rest.split_once('.'));
    match parts.and_then(|(layer, name)| Some((layer.parse().ok()?, name))) {
        Some((layer, name)) => (Some(layer), name.to_owned()),
        None => (None, module.to_owned()),
    }
}

/// `0-3, 7`
fn layer_ranges(layers: &[u16]) -> String {
    let mut ranges: Vec<(u16, u16)> = Vec::new();
    for &layer in layers {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == layer => *last = layer,
            _ => ranges.push((layer, layer)),
        }
    }
    let range = |(first, last): (u16, u16)| if first == last { first.to_string() } else { format!("{first}-{last}") };
    ranges.into_iter().map(range).collect::<Vec<_>>().join(", ")
}

/// A folder that is here is named from the root: the server need not run in the folder where the command does.
fn for_the_server(path: &str) -> String {
    let is_here = std::path::Path::new(path).is_dir();
    let absolute = std::path::absolute(path).ok().filter(|_| is_here);
    absolute
        .and_then(|path| path.into_os_string().into_string().ok())
        .unwrap_or_else(|| path.to_owned())
}

/// The answer of `/v1/models` as a table.
fn models_table(answer: &Value) -> anyhow::Result<String> {
    let models = answer["data"].as_array().context("the server's list has no `data`")?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64());
    let mut table = Table::new(&[
        "name", "kind", "state", "version", "rank", "modules", "bytes", "pinned", "leases", "requests", "hits", "last use", "from",
    ]);
    for model in models {
        let text = |value: &Value| match value {
            Value::String(text) => text.clone(),
            Value::Null => "-".to_owned(),
            Value::Array(values) => values.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(","),
            other => other.to_string(),
        };
        let more = &model["adapter"];
        // Nothing of one that was not read yet is known.
        let known = |field: &str| if more["version"].is_null() { &Value::Null } else { &more[field] };
        let kind = match (&model["parent"], &model["alias"]) {
            (Value::Null, _) => "base",
            (_, Value::Null) => "adapter",
            _ => "alias",
        };
        let from = if kind == "alias" {
            shares(&model["alias"])
        } else {
            text(&model["root"])
        };
        table.row([
            text(&model["id"]),
            kind.to_owned(),
            // --json has the reason.
            text(&more["state"]) + if more["last_error"].is_null() { "" } else { ", failed" },
            // Enough to tell versions apart; --json has all of it.
            text(&more["version"]).chars().take(12).collect(),
            text(known("lora_rank")),
            text(known("target_modules")),
            known("size_bytes").as_u64().map_or_else(|| "-".to_owned(), human_bytes),
            text(&more["pinned"]),
            text(&more["leases"]),
            text(&more["requests_total"]),
            text(&more["hits_total"]),
            more["last_used"].as_f64().map_or_else(|| "-".to_owned(), |at| age(now - at)),
            from,
        ]);
    }
    Ok(table.to_string())
}

/// `12 s ago`, `3 h ago`
fn age(seconds: f64) -> String {
    let seconds = seconds.max(0.0) as u64;
    match seconds {
        0..120 => format!("{seconds} s ago"),
        120..7_200 => format!("{} min ago", seconds / 60),
        7_200..172_800 => format!("{} h ago", seconds / 3600),
        _ => format!("{} d ago", seconds / 86_400),
    }
}

/// `1.5 MiB`
pub(super) fn human_bytes(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{bytes} B")
    } else {
        format!("{value:.1} {}", units[unit])
    }
}

/// Columns as wide as their widest cell.
pub(super) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(super) fn new(head: &[&str]) -> Self {
        Self {
            rows: vec![head.iter().map(|&cell| cell.to_owned()).collect()],
        }
    }

    pub(super) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let columns = self.rows[0].len();
        let width = |column: usize| self.rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for row in &self.rows {
            let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
            writeln!(f, "{}", cells.collect::<Vec<_>>().join("  ").trim_end())?;
        }
        Ok(())
    }
}

/// A client of a running server.
struct Client {
    agent: ureq::Agent,
    url: String,
    authorization: Option<String>,
}

impl Client {
    fn new(url: &str, api_key: Option<&str>) -> Self {
        let config = ureq::Agent::config_builder()
            // An error's body says what is wrong.
            .http_status_as_error(false)
            .timeout_connect(Some(Duration::from_secs(5)))
            .build();
        Self {
            agent: config.into(),
            url: url.trim_end_matches('/').to_owned(),
            authorization: api_key.map(|key| format!("Bearer {key}")),
        }
    }

    fn get(&self, path: &str) -> anyhow::Result<Value> {
        let mut request = self.agent.get(format!("{}{path}", self.url));
        if let Some(authorization) = &self.authorization {
            request = request.header("Authorization", authorization);
        }
        self.answer(request.call())
    }

    fn delete(&self, path: &str) -> anyhow::Result<Value> {
        let mut request = self.agent.delete(format!("{}{path}", self.url));
        if let Some(authorization) = &self.authorization {
            request = request.header("Authorization", authorization);
        }
        self.answer(request.call())
    }

    /// Sends a folder's files as `multipart/form-data`, as they are read: configuration and weights, and what it has of a tokenizer.
    fn push(&self, name: &str, folder: &Path, expected_version: Option<&str>) -> anyhow::Result<Value> {
        let boundary = uuid::Uuid::new_v4().simple().to_string();
        let mut body: Box<dyn Read> = Box::new(std::io::empty());
        for (part, name) in files_to_push(folder)? {
            let path = folder.join(&name);
            let file = File::open(&path).with_context(|| path.display().to_string())?;
            let head = format!("--{boundary}\r\nContent-Disposition: form-data; name=\"{part}\"; filename=\"{name}\"\r\n\r\n");
            body = Box::new(body.chain(Cursor::new(head)).chain(file).chain(&b"\r\n"[..]));
        }
        let mut body = body.chain(Cursor::new(format!("--{boundary}--\r\n")));
        let query = expected_version.map_or_else(String::new, |version| format!("?expected_version={}", path_segment(version)));
        let request = self.agent.post(format!("{}/v1/adapters/{}{query}", self.url, path_segment(name)));
        let mut request = request.header("Content-Type", format!("multipart/form-data; boundary={boundary}"));
        if let Some(authorization) = &self.authorization {
            request = request.header("Authorization", authorization);
        }
        self.answer(request.send(ureq::SendBody::from_reader(&mut body)))
    }

    fn post(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        self.send(self.agent.post(format!("{}{path}", self.url)), body)
    }

    fn put(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        self.send(self.agent.put(format!("{}{path}", self.url)), body)
    }

    fn send(&self, mut request: ureq::RequestBuilder<ureq::typestate::WithBody>, body: &Value) -> anyhow::Result<Value> {
        if let Some(authorization) = &self.authorization {
            request = request.header("Authorization", authorization);
        }
        self.answer(request.send_json(body))
    }

    fn answer(&self, response: Result<ureq::http::Response<ureq::Body>, ureq::Error>) -> anyhow::Result<Value> {
        let mut response = response.with_context(|| format!("no server answers at {} (--url says where)", self.url))?;
        let status = response.status();
        // As long as it is: the list of some ten thousand adapters is larger than what is read by default.
        let mut text = String::new();
        response.body_mut().as_reader().read_to_string(&mut text)?;
        if status.is_success() {
            return serde_json::from_str(&text).with_context(|| format!("the server's answer is no JSON: {text}"));
        }
        bail!(
            "{}",
            error_message(&text).unwrap_or_else(|| format!("the server answered {status}: {text}"))
        )
    }
}

/// The parts of a push of this folder, and their files.
fn files_to_push(folder: &Path) -> anyhow::Result<Vec<(&'static str, String)>> {
    let mut files = vec![("config", CONFIG_FILE.to_owned())];
    // Read from folders; a push has no part for it, and without it the adapter would have another prompt.
    if folder.join("chat_template.json").is_file() {
        bail!(
            "{}: chat_template.json can't be pushed: write its template to chat_template.jinja instead",
            folder.display()
        );
    }
    let text_parts = TEXT_PARTS.into_iter().filter(|(_, file)| folder.join(file).is_file());
    files.extend(text_parts.map(|(part, file)| (part, file.to_owned())));
    let index = folder.join(INDEX_FILE);
    if folder.join(WEIGHTS_FILE).is_file() || !index.is_file() {
        files.push(("weights", WEIGHTS_FILE.to_owned()));
        return Ok(files);
    }
    let bytes = std::fs::read(&index).with_context(|| index.display().to_string())?;
    let shards: BTreeSet<String> = parse_index(&bytes)?.into_values().collect();
    // Its own syntax would have to be escaped in the head of the part.
    if let Some(odd) = shards.iter().find(|name| name.contains(['"', '\r', '\n'])) {
        bail!("{}: {odd:?} can't be the name of a file that is sent", index.display());
    }
    files.push(("index", INDEX_FILE.to_owned()));
    files.extend(shards.into_iter().map(|shard| ("shard", shard)));
    Ok(files)
}

/// The sentence in an error body: OpenAI's, SGLang's load answer.
fn error_message(body: &str) -> Option<String> {
    let body: Value = serde_json::from_str(body).ok()?;
    let message = [&body["error"]["message"], &body["error_message"], &body["message"]];
    message.into_iter().find_map(Value::as_str).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use polylora_engine::adapter::load::ModuleCoverage;

    use super::*;

    #[test]
    fn layers_of_alike_modules_are_one_line() {
        let module = |module: &str, lora_rank, scaling| ModuleCoverage {
            module: module.to_owned(),
            lora_rank,
            lora_alpha: 32.0,
            scaling,
        };
        let report = CoverageReport {
            modules: vec![
                module("model.layers.0.self_attn.q_proj", 16, 2.0),
                module("model.layers.1.self_attn.q_proj", 16, 2.0),
                module("model.layers.2.self_attn.q_proj", 8, 4.0),
                module("model.layers.4.self_attn.q_proj", 16, 2.0),
                module("lm_head", 16, 2.0),
            ],
            layers: vec![0, 1, 2, 4],
            keys_without_effect: vec!["lora_dropout".into()],
            ..CoverageReport::default()
        };
        let expected = "\
module            layers  rank  alpha  scaling
self_attn.q_proj  0-1, 4  16    32     2.000000
self_attn.q_proj  2       8     32     4.000000
lm_head                   16    32     2.000000

5 modules in 4 of 6 layers
without effect on inference: lora_dropout
";
        assert_eq!(report_text(&report, 6), expected);
    }

    #[test]
    fn of_an_adapter_that_was_not_read_nothing_is_said_that_is_not_known() {
        let adapter = json!({"state": "registered", "version": null, "lora_rank": 0, "target_modules": [], "size_bytes": 0, "pinned": false,
            "leases": 0, "requests_total": 0, "hits_total": 0, "last_used": null});
        let answer = json!({"data": [{"id": "new", "parent": "demo", "root": "/x", "adapter": adapter}]});
        let table = models_table(&answer).unwrap();
        let row: Vec<&str> = table.lines().last().unwrap().split_whitespace().collect();
        assert_eq!(
            row,
            ["new", "adapter", "registered", "-", "-", "-", "-", "false", "0", "0", "0", "-", "/x"]
        );
    }

    #[test]
    fn a_list_of_any_length_is_read() {
        use std::io::{BufRead, BufReader};
        // As of twenty thousand adapters.
        let list = json!({"data": ["x".repeat(11 << 20)]});
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let answer = std::thread::scope(|scope| {
            scope.spawn(|| {
                let (mut stream, _) = listener.accept().unwrap();
                let head = BufReader::new(stream.try_clone().unwrap()).lines().map(Result::unwrap);
                head.take_while(|line| !line.is_empty()).for_each(drop);
                let body = list.to_string();
                let length = body.len();
                // A client that has read enough of it is not this thread's to judge.
                write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}").ok();
            });
            Client::new(&url, None).get("/v1/models")
        });
        assert!(answer.unwrap() == list);
    }

    #[test]
    fn the_sentence_is_taken_out_of_every_error_body() {
        for body in [
            r#"{"error":{"message":"no","type":"x"}}"#,
            r#"{"rid":null,"success":false,"error_message":"no","loaded_adapters":null}"#,
            r#"{"object":"error","message":"no"}"#,
        ] {
            assert_eq!(error_message(body).as_deref(), Some("no"));
        }
        assert_eq!(error_message("<html>"), None);
    }

    #[test]
    fn targets_and_paths() {
        let target = |text| parse_target(text).unwrap();
        assert_eq!(target("v1"), ("v1".into(), 1.0));
        assert_eq!(target("v1=90"), ("v1".into(), 90.0));
        assert_eq!(target("a=b"), ("a=b".into(), 1.0));
        assert_eq!(target("a=b=0.5"), ("a=b".into(), 0.5));
        parse_target("=1").unwrap_err();
        assert_eq!(path_segment("org/x y-1.2"), "org%2Fx%20y-1.2");
        let alias = json!({"targets": [{"adapter": "a", "share": 0.125}, {"adapter": "b", "share": 0.875}]});
        assert_eq!(shares(&alias), "a (12.5000 %), b (87.5000 %)");
        assert_eq!(shares(&json!({"targets": [{"adapter": "a", "share": 1.0}]})), "a");
    }

    #[test]
    fn unloads_and_ages_for_people() {
        let text = |waited_for, still_running, aborted| {
            unloaded_text(&json!({"name": "a", "waited_for": waited_for, "still_running": still_running, "aborted": aborted}))
        };
        assert_eq!(text(0, 0, true), "unloaded a\n");
        assert_eq!(text(1, 0, false), "unloaded a, waited for 1 request\n");
        assert_eq!(text(3, 0, true), "unloaded a, aborted 3 requests\n");
        assert_eq!(text(3, 2, false), "unloaded a, waited for 3 requests: 2 still run\n");
        let ages = [-5.0, 119.9, 120.0, 7_200.0, 172_800.0].map(age);
        assert_eq!(ages, ["0 s ago", "119 s ago", "2 min ago", "2 h ago", "2 d ago"]);
    }

    #[test]
    fn sizes_for_people() {
        for (bytes, text) in [(1023, "1023 B"), (1536, "1.5 KiB"), (84 << 20, "84.0 MiB"), (3 << 40, "3.0 TiB")] {
            assert_eq!(human_bytes(bytes), text);
        }
    }
}
