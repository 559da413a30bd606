//! An adapter with tokens of its own over HTTP: its tokenizer, its chat template and its end of answers, beside the base model's, against
//! what transformers + PEFT make of the same texts (`tests/fixtures/make_fixtures.py tokens`).

mod process;

use std::{
    io::BufRead,
    path::{Path, PathBuf},
};

use process::Server;
use serde_json::{Value, json};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn own_tokens() -> PathBuf {
    fixtures().join("added-tokens")
}

fn copy(from: &Path, to: &Path, names: &[&str]) {
    for name in names {
        std::fs::copy(from.join(name), to.join(name)).unwrap();
    }
}

const TOKENIZER_FILES: [&str; 3] = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"];
const ADAPTER_FILES: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];

/// The parts of a push: configuration and weights, then what belongs to its texts.
const PARTS: [(&str, &str); 5] = [
    ("config", "adapter_config.json"),
    ("weights", "adapter_model.safetensors"),
    ("tokenizer", "tokenizer.json"),
    ("tokenizer_config", "tokenizer_config.json"),
    ("chat_template", "chat_template.jinja"),
];

/// The base model with its tokenizer, in a folder that goes with the value.
fn base() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    copy(&fixtures().join("tiny-llama3"), folder.path(), &["config.json", "model.safetensors"]);
    copy(&own_tokens().join("tokenizer"), folder.path(), &TOKENIZER_FILES);
    folder
}

/// A plain adapter of the base model with files beside it.
fn plain_adapter(others: &[(&str, Vec<u8>)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let adapters = Path::new(env!("CARGO_MANIFEST_DIR")).join("engine/tests/golden/adapters");
    copy(&adapters.join("plain_f16"), folder.path(), &ADAPTER_FILES);
    for (name, bytes) in others {
        std::fs::write(folder.path().join(name), bytes).unwrap();
    }
    folder
}

fn server(base: &Path) -> Server {
    let own = format!("own={}", own_tokens().join("adapter").display());
    let model = base.to_str().unwrap();
    let flags = [
        "--model-path",
        model,
        "--served-model-name",
        "tiny",
        "--dtype",
        "float32",
        "--lora-paths",
        &own,
    ];
    Server::start(&[&flags[..], &["--max-lora-rank", "16", "--lora-target-modules", "all"]].concat())
}

fn golden() -> Value {
    serde_json::from_str(&std::fs::read_to_string(own_tokens().join("golden.json")).unwrap()).unwrap()
}

/// Past every end, with the two best of each step.
fn settings() -> Value {
    json!({"max_new_tokens": 24, "temperature": 0, "ignore_eos": true, "skip_special_tokens": false})
}

/// The cases of the adapter and of the base model, in turns: text, adapter, what is expected.
fn cases(golden: &Value) -> Vec<(String, Option<&'static str>, Value)> {
    let of = |key: &str, adapter: Option<&'static str>| {
        let cases = golden[key].as_array().unwrap().clone().into_iter();
        cases.map(move |case| (case["prompt"].as_str().unwrap().to_owned(), adapter, case))
    };
    of("adapter", Some("own"))
        .zip(of("base", None))
        .flat_map(|(own, base)| [own, base])
        .collect()
}

#[test]
fn texts_are_read_and_written_with_the_tokens_of_whoever_answers() {
    let (base, golden) = (base(), golden());
    let server = server(base.path());
    let cases = cases(&golden);
    let (texts, adapters): (Vec<_>, Vec<_>) = cases.iter().map(|(text, adapter, _)| (text.clone(), *adapter)).unzip();
    let body = json!({"text": texts, "lora_path": adapters, "sampling_params": settings(), "return_logprob": true, "top_logprobs_num": 5,
        "return_text_in_logprobs": true, "return_prompt_token_ids": true});
    let (status, answers) = server.post("/generate", &body);
    assert_eq!(status, 200, "{answers}");
    for ((text, adapter, expected), answer) in cases.iter().zip(answers.as_array().unwrap()) {
        let what = format!("{text:?} on {adapter:?}");
        assert_eq!(answer["prompt_token_ids"], expected["prompt_ids"], "{what}");
        assert_eq!(answer["output_ids"], expected["output_ids"], "{what}");
        assert_eq!(answer["text"], expected["output_text"], "{what}");
        let top = answer["meta_info"]["output_top_logprobs"].as_array().unwrap();
        for (got, expected) in top.iter().zip(expected["top_logprobs"].as_array().unwrap()) {
            for (got, expected) in got.as_array().unwrap().iter().zip(expected.as_array().unwrap()) {
                let difference = (got[0].as_f64().unwrap() - expected[1].as_f64().unwrap()).abs();
                assert!(difference < 1e-3, "{what}: expected {expected}, got {got}");
                assert!(expected[0] != 258 || got[1] != 258 || got[2] == "red", "{what}: {got}");
            }
        }
        // One by one, without control tokens.
        let mut sampling = settings();
        sampling["skip_special_tokens"] = json!(true);
        let (_, alone) = server.post("/generate", &json!({"text": text, "lora_path": adapter, "sampling_params": sampling}));
        assert_eq!(
            (&alone["text"], &alone["output_ids"]),
            (&expected["output_text_without_special"], &expected["output_ids"]),
            "{what}"
        );
        // As OpenAI's completions, streamed.
        let model = adapter.unwrap_or("tiny");
        let body = json!({"model": model, "prompt": text, "max_tokens": 24, "temperature": 0, "ignore_eos": true, "skip_special_tokens": false,
            "stream": true});
        let streamed: String = server
            .stream("/v1/completions", &body)
            .lines()
            .filter_map(|line| serde_json::from_str(line.unwrap().strip_prefix("data: ")?).ok())
            .filter_map(|chunk: Value| Some(chunk["choices"][0]["text"].as_str()?.to_owned()))
            .collect();
        assert_eq!(json!(streamed), expected["output_text"], "{what}");
    }
    // The echo and the texts of log-probabilities are the adapter's.
    let body = json!({"model": "own", "prompt": "red <tool>", "max_tokens": 4, "temperature": 0, "ignore_eos": true, "logprobs": 2, "echo": true,
        "skip_special_tokens": false});
    let (_, answer) = server.post("/v1/completions", &body);
    let tokens = answer["choices"][0]["logprobs"]["tokens"].as_array().unwrap();
    assert_eq!(tokens[..3], [json!("red"), json!(" "), json!("<tool>")], "{answer}");
    server.stop();
}

#[test]
fn a_chat_has_the_adapters_template_and_its_end() {
    let (base, golden) = (base(), golden());
    let server = server(base.path());
    let messages = &golden["chat"]["messages"];
    let tokenize = |model: &str| server.post("/tokenize", &json!({"model": model, "messages": messages})).1["tokens"].clone();
    assert_eq!(tokenize("own"), golden["chat"]["prompt_ids"]);
    let of_base = tokenize("tiny");
    assert_ne!(of_base, golden["chat"]["prompt_ids"]);
    let text = |model: &str, tokens: &Value| server.post("/detokenize", &json!({"model": model, "tokens": tokens})).1["text"].clone();
    assert_eq!(text("own", &golden["chat"]["prompt_ids"]), golden["chat"]["rendered"]);
    assert_eq!(text("tiny", &of_base), json!("user:is it red?</s>A:"));

    let chat = |model: &str, more: Value| {
        let mut body = json!({"model": model, "messages": messages, "max_tokens": 24, "temperature": 0, "logprobs": true, "top_logprobs": 3});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let (status, answer) = server.post("/v1/chat/completions", &body);
        assert_eq!(status, 200, "{answer}");
        answer
    };
    // The fixture's answer has the adapter's end second; the base model's is `</s>`.
    let output = golden["chat"]["output_ids"].as_array().unwrap();
    assert_eq!(output[1], 257);
    let answer = chat("own", json!({}));
    let choice = &answer["choices"][0];
    assert_eq!((&choice["finish_reason"], &choice["matched_stop"]), (&json!("stop"), &json!(257)));
    assert_eq!(answer["usage"]["prompt_tokens"], golden["chat"]["prompt_ids"].as_array().unwrap().len());
    let whole = chat("own", json!({"ignore_eos": true, "skip_special_tokens": false}));
    assert_eq!(whole["choices"][0]["message"]["content"], golden["chat"]["output_text"]);
    let tokens = whole["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert!(
        tokens.iter().any(|token| token["token"] == "<end>") && tokens.iter().any(|token| token["token"] == " blue"),
        "{tokens:?}"
    );
    server.stop();
}

#[test]
fn token_ids_are_those_of_the_vocabulary_of_the_row() {
    let base = base();
    let server = server(base.path());
    let ids = |ids: Value, adapter: Option<&str>| {
        let body = json!({"input_ids": ids, "lora_path": adapter, "sampling_params": {"max_new_tokens": 1, "temperature": 0}});
        server.post("/generate", &body)
    };
    assert_eq!(ids(json!([5, 259]), Some("own")).0, 200);
    let (status, answer) = ids(json!([5, 260]), Some("own"));
    assert!(
        status == 400 && answer.to_string().contains("260 is outside the vocabulary of 260"),
        "{answer}"
    );
    let (status, answer) = ids(json!([5, 259]), None);
    assert!(
        status == 400 && answer.to_string().contains("259 is outside the vocabulary of 256"),
        "{answer}"
    );
    let biased = |model: &str, token: &str| {
        let body = json!({"model": model, "prompt": "x", "max_tokens": 2, "temperature": 0, "logit_bias": {token: 100}, "ignore_eos": true});
        server.post("/v1/completions", &body)
    };
    assert_eq!(biased("own", "258").1["choices"][0]["text"], "redred");
    assert_eq!(biased("own", "260").0, 400);
    assert_eq!(biased("tiny", "258").0, 400);
    let detokenize = |model: &str| server.post("/detokenize", &json!({"model": model, "tokens": [258, 259]}));
    assert_eq!(detokenize("own").1["text"], "red blue");
    assert_eq!(detokenize("tiny").0, 400);
    server.stop();
}

#[test]
fn grammars_know_the_adapters_tokens() {
    let base = base();
    let server = server(base.path());
    let form = |adapter: Option<&str>, bias: Value| {
        let sampling = json!({"max_new_tokens": 24, "temperature": 0, "regex": "(red| blue){3}", "logit_bias": bias});
        let body = json!({"text": "a", "lora_path": adapter, "sampling_params": sampling});
        let (status, answer) = server.post("/generate", &body);
        assert_eq!(status, 200, "{answer}");
        answer
    };
    let own = form(Some("own"), json!({"258": 50, "259": 50}));
    let output: Vec<u64> = own["output_ids"].as_array().unwrap().iter().filter_map(Value::as_u64).collect();
    assert!(output.iter().take(3).all(|id| [258, 259].contains(id)), "{own}");
    let of_base = form(None, json!({}));
    for text in [&own["text"], &of_base["text"]] {
        let rest = text.as_str().unwrap().replace("red", "").replace(" blue", "");
        assert!(rest.is_empty(), "{text}");
    }
    assert!(
        of_base["output_ids"].as_array().unwrap().iter().all(|id| id.as_u64() < Some(256)),
        "{of_base}"
    );
    server.stop();
}

/// A base tokenizer's JSON, changed.
fn changed_tokenizer(change: impl FnOnce(&mut Value)) -> Vec<u8> {
    let bytes = std::fs::read(own_tokens().join("tokenizer/tokenizer.json")).unwrap();
    let mut json: Value = serde_json::from_slice(&bytes).unwrap();
    change(&mut json);
    serde_json::to_vec(&json).unwrap()
}

fn added(id: u32, content: &str) -> Value {
    json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true})
}

#[test]
fn a_tokenizer_that_cannot_be_right_is_refused_by_file_and_ids() {
    let base = base();
    let server = server(base.path());
    let load = |files: &[(&str, Vec<u8>)]| {
        let folder = plain_adapter(files);
        let (status, answer) = server.load("plain", folder.path().to_str().unwrap(), false);
        if status == 200 {
            server.unload("plain");
        }
        (status, answer["error_message"].as_str().unwrap_or_default().to_owned())
    };
    let refused = |files: &[(&str, Vec<u8>)], words: &[&str]| {
        let (status, message) = load(files);
        assert_eq!(status, 400, "{message}");
        for word in words {
            assert!(message.contains(word), "{message:?} does not contain {word:?}");
        }
    };
    refused(&[("tokenizer.json", b"{".to_vec())], &["tokenizer.json"]);
    refused(&[("tokenizer_config.json", b"[1".to_vec())], &["tokenizer_config.json"]);
    refused(
        &[("chat_template.jinja", b"{% if %}".to_vec())],
        &["chat_template.jinja", "chat template", "line 1"],
    );
    let folder = plain_adapter(&[("chat_template.jinja", b"{% if %}".to_vec())]);
    let parts = [PARTS[0], PARTS[1], ("chat_template", "chat_template.jinja")];
    let (status, answer) = server.push_files("plain", folder.path(), &parts).unwrap();
    assert_eq!((status, &answer["error"]["param"]), (400, &json!("chat_template")), "{answer}");
    assert!(answer["error"]["message"].as_str().unwrap().contains("chat_template.jinja"), "{answer}");
    let beyond = changed_tokenizer(|json| json["added_tokens"].as_array_mut().unwrap().push(added(256, "<pad>")));
    refused(
        &[("tokenizer.json", beyond)],
        &["tokenizer.json", "\"<pad>\" as 256", "rows for 256 tokens"],
    );
    let swapped = changed_tokenizer(|json| {
        let vocab = json["model"]["vocab"].as_object_mut().unwrap();
        let (a, b) = (vocab["a"].clone(), vocab["b"].clone());
        vocab.insert("a".into(), b);
        vocab.insert("b".into(), a);
    });
    refused(
        &[("tokenizer.json", swapped)],
        &["tokenizer.json", "is \"b\", the base model's is \"a\"", "2 in all"],
    );
    refused(
        &[("added_tokens.json", b"{\"<x>\": 300}".to_vec())],
        &["added_tokens.json", "\"<x>\"", "300"],
    );
    refused(
        &[("tokenizer_config.json", b"{\"eos_token\": \"<none>\"}".to_vec())],
        &["eos_token", "\"<none>\""],
    );
    // Harmless: copies in whatever spelling, another padding token, a control token with another name.
    let copies = TOKENIZER_FILES.map(|name| (name, std::fs::read(own_tokens().join("tokenizer").join(name)).unwrap()));
    let renamed = changed_tokenizer(|json| {
        json["added_tokens"][0]["content"] = json!("<begin>");
        let vocab = json["model"]["vocab"].as_object_mut().unwrap();
        let id = vocab.remove("<s>").unwrap();
        vocab.insert("<begin>".into(), id);
    });
    for files in [
        &copies[..],
        &[("tokenizer.json", changed_tokenizer(|_| {}))],
        &[("tokenizer_config.json", b"{\"pad_token\": \"</s>\", \"padding_side\": \"left\"}".to_vec())],
        &[("tokenizer.json", renamed)],
    ] {
        let (status, message) = load(files);
        assert_eq!(status, 200, "{message}");
    }
    server.stop();
}

#[test]
fn versions_and_pushed_adapters_have_the_tokenizer_in_them() {
    let base = base();
    let server = server(base.path());
    let prompt = |model: &str| {
        let body = json!({"model": model, "messages": [{"role": "user", "content": "hi"}]});
        let (status, answer) = server.post("/tokenize", &body);
        assert_eq!(status, 200, "{answer}");
        server.post("/detokenize", &json!({"model": model, "tokens": answer["tokens"]})).1["text"].clone()
    };
    let version = |name: &str| server.get(&format!("/v1/adapters/{name}")).1["version"].clone();
    let first = plain_adapter(&[]);
    assert_eq!(server.load("plain", first.path().to_str().unwrap(), false).0, 200);
    let (plain_version, of_base) = (version("plain"), prompt("plain"));
    assert_eq!(of_base, prompt("tiny"));
    // The same weights with another template are another version, which takes the place of the first at once.
    let second = plain_adapter(&[("chat_template.jinja", b"{{ messages[0].content }}!".to_vec())]);
    let replace = json!({"lora_name": "plain", "lora_path": second.path(), "replace": true});
    assert_eq!(server.post("/load_lora_adapter", &replace).0, 200);
    assert!(plain_version.is_string() && version("plain") != plain_version);
    assert_eq!(prompt("plain"), "hi!");
    let replace = json!({"lora_name": "plain", "lora_path": first.path(), "replace": true});
    assert_eq!(server.post("/load_lora_adapter", &replace).0, 200);
    assert_eq!((version("plain"), prompt("plain")), (plain_version, of_base));
    // An alias answers as what it stands for.
    let (status, answer) = server.put("/v1/aliases/talk", &json!({"adapter": "own"}));
    assert_eq!(status, 200, "{answer}");
    assert_eq!(prompt("talk"), prompt("own"));

    let (status, answer) = server.push_files("pushed", &own_tokens().join("adapter"), &PARTS).unwrap();
    assert_eq!(status, 200, "{answer}");
    assert_eq!(version("pushed"), version("own"), "the same content is the same version");
    assert_eq!(prompt("pushed"), prompt("own"));
    // Without its tokenizer it is answered with the base model's.
    let (status, answer) = server.push_files("pushed", &own_tokens().join("adapter"), &PARTS[..2]).unwrap();
    assert_eq!(status, 200, "{answer}");
    assert_eq!(prompt("pushed"), prompt("tiny"));
    let combined = server.post("/v1/completions", &json!({"model": "own+plain", "prompt": "x", "max_tokens": 1}));
    assert!(combined.0 == 400 && combined.1.to_string().contains("tokens of its own"), "{combined:?}");
    server.stop();
}

#[test]
fn folders_of_adapters_and_restarts_keep_the_tokenizer() {
    let (base, adapters, state) = (base(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let folder = adapters.path().join("found");
    std::fs::create_dir(&folder).unwrap();
    copy(&own_tokens().join("adapter"), &folder, &[&ADAPTER_FILES[..], &TOKENIZER_FILES].concat());
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    let (model, adapters, state) = (path(base.path()), path(adapters.path()), path(state.path()));
    let flags = [
        "--model-path",
        &model,
        "--served-model-name",
        "tiny",
        "--dtype",
        "float32",
        "--lora-dir",
        &adapters,
        "--state-dir",
        &state,
    ];
    let golden = golden();
    let check = |server: &Server, name: &str| {
        let expected = &golden["chat"];
        let (_, tokens) = server.post("/tokenize", &json!({"model": name, "messages": expected["messages"]}));
        assert_eq!(tokens["tokens"], expected["prompt_ids"], "{name}");
        let body = json!({"model": name, "messages": expected["messages"], "max_tokens": 24, "temperature": 0, "ignore_eos": true,
            "skip_special_tokens": false});
        let (_, answer) = server.post("/v1/chat/completions", &body);
        assert_eq!(answer["choices"][0]["message"]["content"], expected["output_text"], "{name}: {answer}");
    };
    let mut server = Server::start(&flags);
    check(&server, "found");
    let (status, answer) = server.push_files("pushed", &own_tokens().join("adapter"), &PARTS).unwrap();
    assert_eq!(status, 200, "{answer}");
    check(&server, "pushed");
    server.kill();
    server.wait();
    let server = Server::start(&flags);
    check(&server, "pushed");
    check(&server, "found");
    server.stop();
}
