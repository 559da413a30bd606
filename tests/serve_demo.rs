//! The server as users run it, over the demo model: SGLang's documented walk-through, the OpenAI form, start, drain, keys, and the
//! command line's own client. Texts are compared with the golden files that transformers and PEFT wrote.

mod process;

use std::{io::BufRead, process::Output};

use process::{AI, LIST_3, Server, adapter_path, base_path, golden, golden_chat, golden_like, greedy, polylora};
use serde_json::{Value, json};

/// Checks one `/generate` call: `adapters` are the demo's, `names` what this server calls them.
#[track_caller]
fn check(server: &Server, prompts: &[&str], adapters: &[Option<&str>], names: &[Option<&str>]) {
    let answers = server.generate(prompts, names);
    assert_eq!(answers.len(), prompts.len());
    for (index, answer) in answers.iter().enumerate() {
        let expected = golden(adapters[index], prompts[index]);
        assert_eq!(answer["text"], expected["output_text"], "row {index}");
        assert_eq!(answer["output_ids"], expected["output_ids"], "row {index}");
        assert_eq!(answer["meta_info"]["lora"], json!(names[index]), "row {index}");
    }
}

#[track_caller]
fn assert_loaded(answer: (u16, Value), names: &[&str]) {
    let (status, body) = answer;
    assert_eq!(status, 200, "{body}");
    assert_eq!((&body["success"], &body["error_message"]), (&json!(true), &json!("")));
    let mut loaded: Vec<_> = body["loaded_adapters"].as_object().unwrap().keys().map(String::as_str).collect();
    loaded.sort_unstable();
    assert_eq!(loaded, names);
}

#[track_caller]
fn assert_refused(answer: (u16, Value), reason: &str) {
    let (status, body) = answer;
    assert_eq!(status, 400, "{body}");
    assert_eq!(body["success"], false);
    assert!(body["error_message"].as_str().unwrap().contains(reason), "{body}");
}

#[test]
fn without_flags_the_demo_is_served_and_its_curl_line_works() {
    let server = Server::start(&[]);
    assert!(server.greeting.contains("the embedded demo model"), "{}", server.greeting);
    let line = server.greeting.lines().find(|line| line.trim_start().starts_with("curl")).unwrap();
    let body = line.split("-d '").nth(1).unwrap().strip_suffix('\'').unwrap();
    let body: Value = serde_json::from_str(body).unwrap();
    let adapter = body["model"].as_str().unwrap().strip_prefix("demo:").unwrap();
    let (status, answer) = server.post("/v1/chat/completions", &body);
    assert_eq!(status, 200, "{answer}");
    assert_eq!(
        answer["choices"][0]["message"]["content"],
        golden_chat(Some(adapter), LIST_3)["output_text"]
    );
    server.stop();
}

#[test]
fn a_single_adapter_beside_the_base_in_one_batch() {
    let lora = format!("lora0={}", adapter_path("json"));
    let server = Server::start(&["--model-path", &base_path(), "--lora-paths", &lora, "--max-loras-per-batch", "2"]);
    check(&server, &[LIST_3, AI], &[Some("json"), None], &[Some("lora0"), None]);
    let (status, answer) = server.post("/generate", &json!({"text": LIST_3, "sampling_params": greedy(), "lora_path": "lora0"}));
    assert_eq!((status, &answer["text"]), (200, &golden(Some("json"), LIST_3)["output_text"]));
    let (status, answer) = server.post("/generate", &json!({"text": LIST_3, "sampling_params": greedy()}));
    assert_eq!((status, &answer["text"]), (200, &golden(None, LIST_3)["output_text"]));
    server.stop();
}

#[test]
fn without_lora_a_batch_of_the_base_model_is_answered() {
    let server = Server::start(&["--enable-lora=false"]);
    check(&server, &[LIST_3, AI], &[None, None], &[None, None]);
    let (status, answer) = server.post("/generate", &json!({"text": [LIST_3, AI], "sampling_params": greedy()}));
    assert_eq!((status, &answer[0]["text"]), (200, &golden(None, LIST_3)["output_text"]));
    let (status, answer) = server.post(
        "/generate",
        &json!({"text": [LIST_3, AI], "lora_path": [null, "json"], "sampling_params": greedy()}),
    );
    assert_eq!(status, 400, "{answer}");
    assert!(answer.to_string().contains("--enable-lora"), "{answer}");
    server.stop();
}

#[test]
fn several_adapters_and_more_than_one_batch_may_have() {
    let server = Server::start(&["--max-loras-per-batch", "2"]);
    let names = [Some("lines"), None, Some("table"), Some("json"), None, Some("pirate")];
    check(&server, &[LIST_3; 6], &names, &names);
    check(
        &server,
        &[AI, LIST_3, AI],
        &[None, Some("json"), Some("json")],
        &[None, Some("json"), Some("json")],
    );
    server.stop();
}

#[test]
fn load_generate_unload_and_another_under_the_same_name() {
    let server = Server::start(&[
        "--model-path",
        &base_path(),
        "--enable-lora",
        "--max-lora-rank",
        "256",
        "--lora-target-modules",
        "all",
        "--max-loras-per-batch",
        "2",
        "--max-loaded-loras",
        "2",
    ]);
    assert_loaded(server.load("lora0", &adapter_path("pirate"), false), &["lora0"]);
    assert_loaded(server.load("lora1", &adapter_path("table"), false), &["lora0", "lora1"]);
    check(
        &server,
        &[LIST_3, LIST_3],
        &[Some("pirate"), Some("table")],
        &[Some("lora0"), Some("lora1")],
    );
    assert_loaded(server.unload("lora0"), &["lora1"]);
    let (status, answer) = server.post("/generate", &json!({"text": LIST_3, "sampling_params": greedy(), "lora_path": "lora0"}));
    assert!(
        status == 404 && answer.to_string().contains("never been loaded: lora0"),
        "{status} {answer}"
    );
    // Nothing of the first adapter may be left under its name, the prefix cache included.
    assert_loaded(server.load("lora0", &adapter_path("json"), false), &["lora0", "lora1"]);
    check(
        &server,
        &[LIST_3, LIST_3],
        &[Some("json"), Some("table")],
        &[Some("lora0"), Some("lora1")],
    );
    assert_refused(server.load("lora1", &adapter_path("table"), false), "already loaded");
    server.stop();
}

/// The notebook "LoRA Serving" of SGLang's documentation, cell by cell: its flags and its requests, over the demo's model and adapters.
#[test]
fn sglang_s_walk_through_line_by_line() {
    /// Prompts and `lora_path` as they stand there; what each is to answer.
    #[track_caller]
    fn generate(server: &Server, names: &[Option<&str>], adapters: &[Option<&str>]) {
        let body = json!({
            "text": vec![LIST_3; names.len()],
            "sampling_params": {"max_new_tokens": 32, "temperature": 0},
            "lora_path": names,
        });
        let (status, answers) = server.post("/generate", &body);
        assert_eq!(status, 200, "{answers}");
        let answers = answers.as_array().unwrap();
        assert_eq!(answers.len(), names.len());
        for ((answer, name), adapter) in answers.iter().zip(names).zip(adapters) {
            let golden = golden(*adapter, LIST_3);
            let expected = golden["output_ids"].as_array().unwrap();
            let expected = &expected[..expected.len().min(32)];
            assert_eq!(answer["output_ids"].as_array().unwrap(), expected, "{name:?}");
            let text = answer["text"].as_str().unwrap();
            assert!(
                golden["output_text"].as_str().unwrap().starts_with(text) && text.len() > 20,
                "{name:?}: {text}"
            );
            assert_eq!(answer["meta_info"]["lora"], json!(name));
        }
    }
    let (base, lines, table, upper) = (base_path(), adapter_path("lines"), adapter_path("table"), adapter_path("upper"));
    let load = |server: &Server, body: Value| server.post("/load_lora_adapter", &body);
    let log = ["--log-level", "warning"];

    // Serving a single adapter.
    let paths = format!("lora0={table}");
    let flags = [
        "--model-path",
        &base,
        "--enable-lora",
        "--lora-paths",
        &paths,
        "--max-loras-per-batch",
        "1",
    ];
    let server = Server::start(&[&flags[..], &log].concat());
    generate(&server, &[Some("lora0"), None], &[Some("table"), None]);
    server.stop();

    // Serving several.
    let paths = [format!("lora0={table}"), format!("lora1={lines}")];
    let flags = [
        "--model-path",
        &base,
        "--enable-lora",
        "--lora-paths",
        &paths[0],
        &paths[1],
        "--max-loras-per-batch",
        "2",
    ];
    let server = Server::start(&[&flags[..], &log].concat());
    generate(&server, &[Some("lora0"), Some("lora1")], &[Some("table"), Some("lines")]);
    server.stop();

    // Loading and unloading while serving.
    let flags = "--enable-lora --cuda-graph-max-bs 2 --max-loras-per-batch 2 --max-lora-rank 256 --lora-target-modules all --log-level warning";
    let flags: Vec<&str> = ["--model-path", &base].into_iter().chain(flags.split(' ')).collect();
    let server = Server::start(&flags);
    assert_loaded(load(&server, json!({"lora_name": "lora0", "lora_path": lines})), &["lora0"]);
    assert_loaded(load(&server, json!({"lora_name": "lora1", "lora_path": table})), &["lora0", "lora1"]);
    generate(&server, &[Some("lora0"), Some("lora1")], &[Some("lines"), Some("table")]);
    assert_loaded(server.post("/unload_lora_adapter", &json!({"lora_name": "lora0"})), &["lora1"]);
    assert_loaded(load(&server, json!({"lora_name": "lora0", "lora_path": upper})), &["lora0", "lora1"]);
    generate(&server, &[Some("lora0"), Some("lora1")], &[Some("upper"), Some("table")]);
    server.stop();

    // Pinned ones, at the start and while serving.
    let pinned = format!(r#"{{"lora_name":"lora0","lora_path":"{lines}","pinned":true}}"#);
    let unpinned = format!(r#"{{"lora_name":"lora1","lora_path":"{table}"}}"#);
    let other = format!("lora2={upper}");
    let flags = "--enable-lora --cuda-graph-max-bs 8 --max-loras-per-batch 3 --max-lora-rank 256 --lora-target-modules all --lora-paths";
    let flags = ["--model-path", &base]
        .into_iter()
        .chain(flags.split(' '))
        .chain([&*pinned, &unpinned, &other])
        .chain(log);
    let server = Server::start(&flags.collect::<Vec<_>>());
    assert_loaded(server.post("/unload_lora_adapter", &json!({"lora_name": "lora1"})), &["lora0", "lora2"]);
    let body = json!({"lora_name": "lora1", "lora_path": table, "pinned": true});
    assert_loaded(load(&server, body), &["lora0", "lora1", "lora2"]);
    generate(
        &server,
        &[Some("lora0"), Some("lora1"), Some("lora2")],
        &[Some("lines"), Some("table"), Some("upper")],
    );
    server.stop();

    // Kernels by name.
    let paths = [format!("lora1={lines}"), format!("lora2={table}")];
    let flags = [
        "--model-path",
        &base,
        "--enable-lora",
        "--lora-backend",
        "csgmv",
        "--max-loras-per-batch",
        "16",
        "--lora-paths",
    ];
    let server = Server::start(&[&flags[..], &[&*paths[0], &paths[1]]].concat());
    generate(&server, &[Some("lora1"), Some("lora2")], &[Some("lines"), Some("table")]);
    server.stop();
}

#[test]
fn pinned_at_start_and_at_run_time_in_both_spellings() {
    let pinned = json!({"lora_name": "lora0", "lora_path": adapter_path("lines"), "pinned": true}).to_string();
    let plain = format!("lora1={}", adapter_path("json"));
    let server = Server::start(&[
        "--model-path",
        &base_path(),
        "--lora-paths",
        &pinned,
        &plain,
        "--max-loras-per-batch",
        "3",
        "--lora-target-modules",
        "all",
    ]);
    assert_loaded(server.load("lora2", &adapter_path("pirate"), true), &["lora0", "lora1", "lora2"]);
    assert_refused(server.load("lora3", &adapter_path("table"), true), "starvation");
    assert_loaded(server.load("lora3", &adapter_path("table"), false), &["lora0", "lora1", "lora2", "lora3"]);
    let adapters = [Some("lines"), Some("json"), Some("pirate"), Some("table"), None];
    let names = [Some("lora0"), Some("lora1"), Some("lora2"), Some("lora3"), None];
    check(&server, &[LIST_3; 5], &adapters, &names);
    let (_, models) = server.get("/v1/models");
    let pins = |name: &str| models["data"].as_array().unwrap().iter().find(|card| card["id"] == name).unwrap()["adapter"]["pinned"].clone();
    assert_eq!(
        ["lora0", "lora1", "lora2", "lora3"].map(pins),
        [true, false, true, false].map(Value::Bool)
    );
    server.stop();
}

/// What `/server_info` says of the limits on adapters.
fn limits(server: &Server) -> (Value, Value) {
    let (status, info) = server.get("/server_info");
    assert_eq!(status, 200, "{info}");
    (info["max_lora_rank"].clone(), info["lora_target_modules"].clone())
}

#[test]
fn limits_on_adapters_are_inferred_from_those_of_the_start() {
    let lines = format!("lines={}", adapter_path("lines"));
    let pirate = format!("pirate={}", adapter_path("pirate"));
    let flags = ["--model-path", &base_path(), "--lora-paths", &lines, &pirate];
    let server = Server::start(&flags);
    let modules = json!(["down_proj", "k_proj", "o_proj", "q_proj", "v_proj"]);
    assert_eq!(limits(&server), (json!(32), modules.clone()));
    // Rank 64 on modules that are allowed; rank 16 on modules of which one is not.
    assert_refused(server.load("a", &adapter_path("json"), false), "incompatible");
    assert_refused(server.load("a", &adapter_path("json"), false), "expected at most 32, got 64");
    assert_refused(server.load("a", &adapter_path("table"), false), "got `gate_proj`");
    let replace = json!({"lora_name": "pirate", "lora_path": adapter_path("json"), "replace": true});
    assert_refused(server.post("/load_lora_adapter", &replace), "incompatible");
    check(
        &server,
        &[LIST_3, LIST_3],
        &[Some("lines"), Some("pirate")],
        &[Some("lines"), Some("pirate")],
    );
    server.stop();

    // One limit by flag, the other inferred.
    let server = Server::start(&[&flags[..], &["--max-lora-rank", "64"]].concat());
    assert_eq!(limits(&server), (json!(64), modules));
    assert_loaded(server.load("a", &adapter_path("json"), false), &["a", "lines", "pirate"]);
    assert_refused(server.load("b", &adapter_path("table"), false), "--lora-target-modules");
    server.stop();
}

#[test]
fn without_adapters_at_start_or_with_a_folder_of_them_nothing_is_inferred() {
    let folder = tempfile::tempdir().unwrap();
    let lines = format!("lines={}", adapter_path("lines"));
    for flags in [
        &["--enable-lora"][..],
        &["--lora-dir", folder.path().to_str().unwrap(), "--lora-paths", &lines],
    ] {
        let server = Server::start(&[&["--model-path", &base_path()], flags].concat());
        assert_eq!(limits(&server), (Value::Null, Value::Null), "{flags:?}");
        assert_eq!(server.load("flags", &adapter_path("flags"), false).0, 200);
        server.stop();
    }
}

#[test]
fn adapters_outside_the_limits_are_refused_at_start_and_at_first_use() {
    let json_adapter = format!("json={}", adapter_path("json"));
    let output = polylora(&[
        "serve",
        "--port",
        "0",
        "--model-path",
        &base_path(),
        "--max-lora-rank",
        "32",
        "--lora-paths",
        &json_adapter,
    ]);
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains(&format!("--lora-paths {json_adapter}")) && said.contains("incompatible"),
        "{said}"
    );

    let folder = std::path::Path::new(&adapter_path("json")).parent().unwrap().display().to_string();
    let mut server = Server::start(&[
        "--model-path",
        &base_path(),
        "--lora-dir",
        &folder,
        "--lora-target-modules",
        "q_proj",
        "v_proj",
    ]);
    // Alone and beside others: the error says which it is, and where the request names it.
    let generate = |lora_path: Value| json!({"text": vec![LIST_3; 2], "lora_path": lora_path, "sampling_params": greedy()});
    for (path, body, param) in [
        ("/generate", generate(json!("json")), "lora_path"),
        ("/generate", generate(json!(["lines", "json"])), "lora_path"),
        ("/v1/completions", json!({"model": "base:json", "prompt": LIST_3}), "model"),
        // Of a sum, the part.
        ("/v1/completions", json!({"model": "base:lines+json", "prompt": LIST_3}), "model"),
        ("/generate", generate(json!([null, "lines*0.5+json"])), "lora_path"),
    ] {
        let (status, answer) = server.post(path, &body);
        assert_eq!((status, &answer["error"]["param"]), (400, &json!(param)), "{answer}");
        let message = answer["error"]["message"].as_str().unwrap();
        assert!(message.starts_with("adapter 'json': LoRA adapter is incompatible"), "{message}");
    }
    check(&server, &[LIST_3], &[Some("lines")], &[Some("lines")]);
    let (_, card) = server.get("/v1/adapters/json");
    assert!(
        card["requests_total"].as_u64().unwrap() >= 3,
        "those that were not tried again count, too: {card}"
    );
    server.signal("TERM");
    assert!(server.wait().success());
    assert!(
        server.log().contains("a registered adapter can't be loaded name=json"),
        "{}",
        server.log()
    );
}

/// One key of adapter_config.json at a time, on the model that PEFT was asked with (`engine/tests/golden/make_corpus.py`).
#[test]
fn every_odd_key_of_an_adapter_does_what_it_does_in_peft_or_is_a_400_that_names_it() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |path: &str| -> Value { serde_json::from_slice(&std::fs::read(root.join(path)).unwrap()).unwrap() };
    let corpus = read("engine/tests/golden/corpus.json");
    let plain = read("engine/tests/golden/adapters/corpus/adapter_config.json");
    let weights = std::fs::read(root.join("engine/tests/golden/adapters/corpus/adapter_model.safetensors")).unwrap();
    // The model has no tokenizer, and a server asks for one.
    let model = tempfile::tempdir().unwrap();
    let fixture = format!("tests/fixtures/{}", corpus["base"].as_str().unwrap());
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(root.join(&fixture).join(file), model.path().join(file)).unwrap();
    }
    let vocab: serde_json::Map<String, Value> = (0..256).map(|id| (format!("w{id}"), json!(id))).collect();
    let tokenizer = json!({"version": "1.0", "pre_tokenizer": {"type": "WhitespaceSplit"}, "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"}});
    std::fs::write(model.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let server = Server::start(&["--model-path", model.path().to_str().unwrap(), "--enable-lora", "--dtype", "float32"]);
    let (mut refused, mut outputs) = (std::collections::BTreeSet::new(), std::collections::BTreeSet::new());
    for case in corpus["cases"].as_array().unwrap() {
        let key = case["key"].as_str().unwrap();
        let mut config = plain.clone();
        config[key] = case["value"].clone();
        let (status, answer) = server.push_bytes("odd", config.to_string().as_bytes(), &weights).unwrap();
        if status == 400 {
            let error = &answer["error"];
            assert_eq!(error["param"], "config", "{answer}");
            assert!(error["message"].as_str().unwrap().contains(&format!("`{key}`")), "{key}: {answer}");
            refused.insert(key);
            continue;
        }
        assert_eq!(status, 200, "{key}: {answer}");
        let body = json!({"input_ids": corpus["prompt_ids"], "lora_path": "odd", "sampling_params": {"temperature": 0, "max_new_tokens": 6}});
        let (status, answer) = server.post("/generate", &body);
        assert_eq!(
            (status, &answer["output_ids"]),
            (200, &case["output_ids"]),
            "{key} = {}: {answer}",
            case["value"]
        );
        outputs.insert(answer["output_ids"].to_string());
        assert_eq!(server.unload("odd").0, 200);
    }
    let expected = "alora_invocation_tokens arrow_config bias init_lora_weights kasa_config layer_replication layers_pattern \
        megatron_config modules_to_save monteclora_config new_name_of_next_year peft_type target_parameters task_type \
        use_bdlora use_new_lora_of_next_year use_qalora";
    assert_eq!(refused.into_iter().collect::<Vec<_>>(), expected.split_whitespace().collect::<Vec<_>>());
    assert!(outputs.len() >= 4, "{outputs:?}");
    server.stop();
}

#[test]
fn an_adapter_that_the_device_has_no_room_for_is_refused() {
    // A quarter is for adapters: less than json's.
    let server = Server::start(&["--model-path", &base_path(), "--enable-lora", "--mem-fraction-static", "1MiB"]);
    assert_loaded(server.load("lines", &adapter_path("lines"), false), &["lines"]);
    let refused = server.load("json", &adapter_path("json"), false);
    assert_refused(refused.clone(), "incompatible");
    assert_refused(refused, "--mem-fraction-static");
    server.stop();
}

#[test]
fn a_folder_of_adapters_is_served_by_their_names() {
    let folder = std::path::Path::new(&adapter_path("json")).parent().unwrap().display().to_string();
    let server = Server::start(&["--model-path", &base_path(), "--lora-dir", &folder]);
    let (_, models) = server.get("/v1/models");
    let card = |models: &Value| {
        models["data"]
            .as_array()
            .unwrap()
            .iter()
            .find(|card| card["id"] == "json")
            .unwrap()
            .clone()
    };
    assert_eq!(card(&models)["adapter"]["state"], "registered", "nothing is read before it is used");
    check(
        &server,
        &[LIST_3, LIST_3, AI],
        &[Some("json"), Some("table"), None],
        &[Some("json"), Some("table"), None],
    );
    let (_, models) = server.get("/v1/models");
    assert_ne!(card(&models)["adapter"]["state"], "registered");
    server.stop();
}

#[test]
fn the_openai_form() {
    let lora = format!("lora0={}", adapter_path("json"));
    let server = Server::start(&["--model-path", &base_path(), "--served-model-name", "my-model", "--lora-paths", &lora]);
    for (model, adapter) in [("my-model:lora0", Some("json")), ("lora0", Some("json")), ("my-model", None)] {
        let body = json!({"model": model, "prompt": LIST_3, "max_tokens": 128, "temperature": 0});
        let (status, answer) = server.post("/v1/completions", &body);
        assert_eq!(status, 200, "{answer}");
        assert_eq!(answer["choices"][0]["text"], golden(adapter, LIST_3)["output_text"], "{model}");
        let body = json!({"model": model, "messages": [{"role": "user", "content": LIST_3}], "temperature": 0});
        let (status, answer) = server.post("/v1/chat/completions", &body);
        assert_eq!(status, 200, "{answer}");
        assert_eq!(
            answer["choices"][0]["message"]["content"],
            golden_chat(adapter, LIST_3)["output_text"],
            "{model}"
        );
        assert_eq!(answer["model"], model);
    }
    let (status, answer) = server.post("/v1/completions", &json!({"model": "nope", "prompt": "x"}));
    assert_eq!((status, &answer["error"]["code"]), (404, &json!("model_not_found")));
    server.stop();
}

#[test]
fn an_alias_answers_as_its_adapter_alone_and_in_a_combination() {
    let server = Server::start(&[]);
    let put = |body: Value| {
        let (status, answer) = server.put("/v1/aliases/support", &body);
        assert_eq!(status, 200, "{answer}");
    };
    for adapter in ["json", "table"] {
        put(json!({"adapter": adapter}));
        check(&server, &[LIST_3], &[Some(adapter)], &[Some(adapter)]);
        let answers = server.generate(
            &[LIST_3, LIST_3, LIST_3, AI],
            &[Some("support"), Some("support*1"), None, Some("support")],
        );
        for answer in &answers[..2] {
            assert_eq!(answer["text"], golden(Some(adapter), LIST_3)["output_text"]);
            assert_eq!(answer["meta_info"]["lora"], adapter);
        }
        assert_eq!(answers[2]["text"], golden(None, LIST_3)["output_text"]);
        let answers = server.generate(
            &[LIST_3, LIST_3],
            &[Some("support*0.5+flags*0.5"), Some(&format!("{adapter}*0.5+flags*0.5"))],
        );
        assert_eq!(answers[0]["output_ids"], answers[1]["output_ids"]);
        let body = json!({"model": "demo:support", "messages": [{"role": "user", "content": LIST_3}], "temperature": 0});
        let (_, answer) = server.post("/v1/chat/completions", &body);
        assert_eq!(
            answer["choices"][0]["message"]["content"],
            golden_chat(Some(adapter), LIST_3)["output_text"]
        );
    }
    server.stop();
}

fn ids<'a>(list: &'a Value, field: &str) -> Vec<&'a str> {
    list["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| entry[field].as_str().unwrap())
        .collect()
}

#[test]
fn what_was_changed_at_run_time_is_there_after_a_kill() {
    let folder = tempfile::tempdir().unwrap();
    let flags = ["--state-dir", folder.path().to_str().unwrap()];
    let mut server = Server::start(&flags);
    assert_loaded(server.load("zz-mine", &adapter_path("pirate"), true), &DEMO_AND_MINE);
    let (status, answer) = server.push("zz-pushed", "table").unwrap();
    assert_eq!(status, 200, "{answer}");
    check(&server, &[LIST_3], &[Some("table")], &[Some("zz-pushed")]);
    // One of the command line's is replaced, one pinned, one unloaded.
    let (status, answer) = server.push("yaml", "json").unwrap();
    assert_eq!(status, 200, "{answer}");
    assert_eq!(server.post("/pin_lora_adapter", &json!({"lora_name": "sql", "pinned": true})).0, 200);
    assert_eq!(server.unload("flags").0, 200);
    let targets = json!({"targets": [{"adapter": "zz-mine", "weight": 3}, {"adapter": "zz-pushed"}]});
    assert_eq!(server.put("/v1/aliases/support", &targets).0, 200);
    let aliases = server.get("/v1/aliases").1;
    let before = server.generate(&[LIST_3; 4], &[Some("support"); 4]);
    server.kill();
    server.wait();

    let server = Server::start(&flags);
    let adapters = ["pirate", "table", "json", "flags"];
    let names = [Some("zz-mine"), Some("zz-pushed"), Some("yaml"), Some("flags")];
    check(&server, &[LIST_3; 4], &adapters.map(Some), &names);
    assert_eq!(server.get("/v1/aliases").1["data"][0]["name"], aliases["data"][0]["name"]);
    assert_eq!(server.get("/v1/aliases").1["data"][0]["targets"][0]["share"], 0.75);
    assert!(
        before
            .iter()
            .all(|answer| ["zz-mine", "zz-pushed"].contains(&answer["meta_info"]["lora"].as_str().unwrap()))
    );
    let list = server.get("/v1/adapters").1;
    let entries = list["data"].as_array().unwrap();
    let pinned: Vec<_> = entries
        .iter()
        .filter(|entry| entry["pinned"] == true)
        .map(|entry| &entry["name"])
        .collect();
    assert_eq!(pinned.len(), 2, "{pinned:?}");
    assert!(pinned.contains(&&json!("zz-mine")) && pinned.contains(&&json!("sql")), "{pinned:?}");
    // The new ones can be changed like any other.
    let entry = entries.iter().find(|entry| entry["name"] == "zz-pushed").unwrap();
    let expected = entry["version"].as_str().unwrap();
    let (status, answer) = server.push(&format!("zz-pushed?expected_version={expected}"), "pirate").unwrap();
    assert_eq!(status, 200, "{answer}");
    check(&server, &[LIST_3], &[Some("pirate")], &[Some("zz-pushed")]);
    server.stop();

    // Another server can't have the folder meanwhile; a damaged state is set aside.
    let server = Server::start(&flags);
    let output = polylora(&[&["serve", "--port", "0"][..], &flags].concat());
    assert!(stderr(&output).contains("another server uses it"), "{}", stderr(&output));
    server.stop();
    let state = folder.path().join("state");
    let bytes = std::fs::read(&state).unwrap();
    std::fs::write(&state, &bytes[..bytes.len() / 2]).unwrap();
    let mut server = Server::start(&flags);
    assert_eq!(ids(&server.get("/v1/adapters").1, "name").len(), 8);
    assert_eq!(server.get("/v1/aliases").1["data"], json!([]));
    check(&server, &[LIST_3], &[Some("yaml")], &[Some("yaml")]);
    server.signal("TERM");
    assert!(server.wait().success());
    assert!(
        server.log().contains("the state is damaged") && server.log().contains("moved to"),
        "{}",
        server.log()
    );
}

/// A server whose files may have so many blocks of 512 bytes, until that is raised: to a program a full disk looks the same.
#[cfg(target_os = "linux")]
fn with_little_disk(blocks: u32, flags: &[&str]) -> Server {
    let mut shell = std::process::Command::new("sh");
    let script = format!("trap '' XFSZ; ulimit -S -f {blocks}; exec \"$@\"");
    shell.args(["-c", &script, "sh", env!("CARGO_BIN_EXE_polylora")]);
    Server::start_as(shell, flags)
}

#[cfg(target_os = "linux")]
fn give_more_disk(server: &Server) {
    let status = std::process::Command::new("prlimit")
        .args(["--pid", &server.id().to_string(), "--fsize=unlimited:"])
        .status();
    assert!(status.unwrap().success());
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_refuses_whole_changes_and_none_is_half_there() {
    let folder = tempfile::tempdir().unwrap();
    let flags = ["--state-dir", folder.path().to_str().unwrap()];
    let mut server = with_little_disk(16, &flags);
    // Neither a new name nor a new version, and no file of either.
    for name in ["new", "yaml"] {
        let (status, answer) = server.push(name, "json").unwrap();
        assert_eq!((status, &answer["error"]["code"]), (507, &json!("storage_full")), "{answer}");
        assert!(answer["error"]["message"].as_str().unwrap().contains("no room"), "{answer}");
        assert_eq!(std::fs::read_dir(folder.path().join("adapters")).unwrap().count(), 0);
    }
    assert_eq!(server.get("/v1/adapters/new").0, 404);
    check(&server, &[LIST_3], &[Some("yaml")], &[Some("yaml")]);
    // The state is written as long as it fits; then each change says that it is not, and the last whole one stays.
    let alias = |number: usize| {
        let name = format!("alias-{number:02}-{}", "x".repeat(200));
        server.put(&format!("/v1/aliases/{name}"), &json!({"adapter": "table"}))
    };
    let saved = (0..100).take_while(|number| alias(*number).0 == 200).count();
    assert!((1..100).contains(&saved), "{saved}");
    let (status, answer) = alias(saved + 1);
    assert_eq!((status, &answer["error"]["code"]), (500, &json!("state_not_saved")), "{answer}");
    assert_eq!(server.get("/v1/aliases").1["data"].as_array().unwrap().len(), saved + 2, "in effect");
    let copy = tempfile::tempdir().unwrap();
    std::fs::copy(folder.path().join("state"), copy.path().join("state")).unwrap();
    let restarted = Server::start(&["--state-dir", copy.path().to_str().unwrap()]);
    assert_eq!(restarted.get("/v1/aliases").1["data"].as_array().unwrap().len(), saved);
    restarted.stop();
    // With room again the same push works, and brings along what was not written.
    give_more_disk(&server);
    let (status, answer) = server.push("new", "json").unwrap();
    assert_eq!(status, 200, "{answer}");
    check(&server, &[LIST_3], &[Some("json")], &[Some("new")]);
    server.kill();
    server.wait();
    let server = Server::start(&flags);
    check(&server, &[LIST_3], &[Some("json")], &[Some("new")]);
    assert_eq!(server.get("/v1/aliases").1["data"].as_array().unwrap().len(), saved + 2);
    server.stop();
}

fn folders_in(directory: &std::path::Path) -> usize {
    std::fs::read_dir(directory).unwrap().count()
}

#[test]
fn pushed_adapters_without_a_state_folder_are_on_disk_and_go_with_their_server() {
    let temporary = tempfile::tempdir().unwrap();
    let start = |flags: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_polylora"));
        command.env("TMPDIR", temporary.path());
        Server::start_as(command, flags)
    };
    let limits = [
        "--max-loras-per-batch",
        "2",
        "--max-loaded-loras",
        "2",
        "--enable-lora",
        "--model-path",
        &base_path(),
    ];
    let mut server = start(&limits);
    let names = ["table", "json", "lines", "upper"];
    for name in names {
        assert_eq!(server.push(name, name).unwrap().0, 200);
    }
    // Two of them are in memory; the others are read again when they are asked for.
    for name in names.iter().chain(&names) {
        check(&server, &[LIST_3], &[Some(name)], &[Some(name)]);
    }
    let metrics = server.get("/metrics").1;
    let loads = metrics
        .as_str()
        .unwrap()
        .lines()
        .filter(|line| line.starts_with("polylora_adapter_loads_total{") && line.contains("\"ok\""));
    let loads: u64 = loads.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum();
    assert_eq!(loads, 12, "4 pushes, and 8 times from disk: {metrics}");
    assert_eq!(folders_in(temporary.path()), 1);
    // One that is killed leaves them; the next to start removes them, and no other's.
    server.kill();
    server.wait();
    assert_eq!(folders_in(temporary.path()), 1);
    let first = start(&[]);
    assert_eq!(folders_in(temporary.path()), 0);
    assert_eq!(first.push("mine", "table").unwrap().0, 200);
    let second = start(&[]);
    assert_eq!(folders_in(temporary.path()), 1);
    check(&first, &[LIST_3], &[Some("table")], &[Some("mine")]);
    second.stop();
    first.stop();
    assert_eq!(folders_in(temporary.path()), 0);
}

#[test]
fn an_adapter_that_was_split_is_pushed_by_the_command_line() {
    let split = tempfile::tempdir().unwrap();
    let source = std::path::PathBuf::from(adapter_path("table"));
    std::fs::copy(source.join("adapter_config.json"), split.path().join("adapter_config.json")).unwrap();
    let bytes = std::fs::read(source.join("adapter_model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut map = serde_json::Map::new();
    for part in 0..3 {
        let file = format!("adapter_model-{:05}-of-00003.safetensors", part + 1);
        let of_part: Vec<_> = tensors
            .tensors()
            .into_iter()
            .enumerate()
            .filter(|(index, _)| index % 3 == part)
            .map(|(_, tensor)| tensor)
            .collect();
        map.extend(of_part.iter().map(|(name, _)| (name.clone(), json!(file))));
        std::fs::write(split.path().join(&file), safetensors::serialize(of_part, None).unwrap()).unwrap();
    }
    let index = json!({"metadata": {}, "weight_map": map}).to_string();
    std::fs::write(split.path().join("adapter_model.safetensors.index.json"), index).unwrap();
    let server = Server::start(&[]);
    let version = server.get("/v1/adapters/table").1["version"].clone();
    let output = polylora(&["adapters", "--url", &server.url, "push", "split", split.path().to_str().unwrap()]);
    assert!(output.status.success(), "{}", stderr(&output));
    check(&server, &[LIST_3, AI], &[Some("table"), Some("table")], &[Some("split"), Some("split")]);
    assert_eq!(
        server.get("/v1/adapters/split").1["version"],
        version,
        "the same content however it is split"
    );
    server.stop();
}

/// Sums of adapters with weights, against PEFT's.
#[test]
fn combinations_give_peft_s_answers() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/golden/combinations.json");
    let golden: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let cases = golden["cases"].as_array().unwrap();
    let sums: std::collections::BTreeSet<&str> = cases.iter().map(|case| case["lora_path"].as_str().unwrap()).collect();
    assert!(sums.len() >= 3 && sums.iter().all(|sum| sum.contains('+')), "{sums:?}");
    let server = Server::start(&[]);
    let column = |field: &str| cases.iter().map(|case| case[field].clone()).collect::<Vec<_>>();
    let body = json!({"input_ids": column("prompt_ids"), "lora_path": column("lora_path"), "return_logprob": true,
        "sampling_params": {"temperature": 0, "max_new_tokens": 96}});
    let (status, answers) = server.post("/generate", &body);
    assert_eq!(status, 200, "{answers}");
    for (answer, case) in answers.as_array().unwrap().iter().zip(cases) {
        let what = format!("{}: {}", case["lora_path"], case["prompt"]);
        assert_eq!(answer["output_ids"], case["output_ids"], "{what}");
        assert_eq!(answer["meta_info"]["lora"], case["lora_path"]);
        let chosen = answer["meta_info"]["output_token_logprobs"].as_array().unwrap();
        for (got, expected) in chosen.iter().zip(case["top_logprobs"].as_array().unwrap()) {
            let (got, expected) = (got[0].as_f64().unwrap(), expected[0][1].as_f64().unwrap());
            // The server computes in bfloat16.
            assert!(
                (got - expected).abs() < 0.05 + 0.02 * expected.abs(),
                "{what}: {got}, expected {expected}"
            );
        }
    }
    // Both adapters show in each sum: neither alone gives these answers.
    for sum in sums {
        for part in sum.split('+').map(|part| part.split('*').next().unwrap()) {
            let mut of_sum = cases.iter().filter(|case| case["lora_path"] == sum);
            assert!(
                of_sum.any(|case| golden_like(Some(part), case)["output_ids"] != case["output_ids"]),
                "{sum} is no other than {part}"
            );
        }
    }
    // And by the model's name on an OpenAI route.
    let case = cases.iter().find(|case| case["kind"] == "chat").unwrap();
    let body = json!({"model": format!("demo:{}", case["lora_path"].as_str().unwrap()), "messages": case["messages"], "temperature": 0});
    let (status, answer) = server.post("/v1/chat/completions", &body);
    assert_eq!(
        (status, &answer["choices"][0]["message"]["content"]),
        (200, &case["output_text"]),
        "{answer}"
    );
    server.stop();
}

const DEMO_AND_MINE: [&str; 9] = ["flags", "json", "lines", "pirate", "sql", "table", "upper", "yaml", "zz-mine"];

/// What a client of the loop below has made of a server.
#[derive(Clone, Debug, Default, PartialEq)]
struct Made {
    adapters: std::collections::BTreeSet<String>,
    aliases: std::collections::BTreeSet<String>,
}

impl Made {
    fn seen(server: &Server) -> Self {
        let own = |path: &str| {
            let (status, list) = server.get(path);
            assert_eq!(status, 200, "{list}");
            let names = ids(&list, "name").into_iter().map(str::to_owned);
            names.filter(|name| name.starts_with("n-")).collect()
        };
        Self {
            adapters: own("/v1/adapters"),
            aliases: own("/v1/aliases"),
        }
    }

    /// Asks for the `step`-th change; what is there if it is carried out, and whether it was answered.
    fn change(&self, server: &Server, step: usize) -> (Self, bool) {
        let (mut after, name) = (self.clone(), format!("n-{step:04}"));
        let agent = ureq::Agent::config_builder().http_status_as_error(false).build().new_agent();
        let status = match step % 6 {
            0 | 1 => {
                after.adapters.insert(name.clone());
                server.push(&name, "json").ok().map(|answer| answer.0)
            }
            2 => {
                after.adapters.insert(name.clone());
                server.try_post("/load_lora_adapter", &json!({"lora_name": name, "lora_path": "demo:sql"}))
            }
            3 | 4 => {
                after.aliases.insert(name.clone());
                let request = agent.put(format!("{}/v1/aliases/{name}", server.url));
                let response = request.send_json(json!({"adapter": "table"}));
                response.ok().map(|response| response.status().as_u16())
            }
            _ => {
                let first = after.adapters.pop_first().unwrap();
                server.try_post("/unload_lora_adapter", &json!({"lora_name": first}))
            }
        };
        assert!(status.is_none_or(|status| status == 200), "step {step}: {status:?}");
        (after, status.is_some())
    }
}

#[test]
fn a_kill_at_any_moment_loses_nothing_that_was_answered() {
    let folder = tempfile::tempdir().unwrap();
    let flags = ["--state-dir", folder.path().to_str().unwrap()];
    let (mut made, mut step) = (Made::default(), 0);
    for round in 0..6 {
        let server = Server::start(&flags);
        assert_eq!(Made::seen(&server), made, "round {round}");
        let (answered, is_answered) = std::sync::mpsc::channel();
        let (last, next) = std::thread::scope(|scope| {
            let client = scope.spawn(|| {
                loop {
                    let (after, is_answered) = made.change(&server, step);
                    step += 1;
                    if !is_answered {
                        return (made.clone(), after);
                    }
                    made = after;
                    let _ = answered.send(());
                }
            });
            // While the one after these is on its way.
            is_answered.iter().take(3 * round + 2).for_each(drop);
            server.kill();
            client.join().unwrap()
        });
        drop(server);
        // The one that was on its way has happened whole or not at all.
        let server = Server::start(&flags);
        made = Made::seen(&server);
        assert!(made == last || made == next, "round {round}: {made:?} is neither {last:?} nor {next:?}");
        for name in &made.adapters {
            let (status, answer) = server.post("/generate", &json!({"text": LIST_3, "lora_path": name, "sampling_params": greedy()}));
            assert_eq!(status, 200, "{answer}");
        }
        server.stop();
        let folders = std::fs::read_dir(folder.path().join("adapters")).unwrap().count();
        assert!(folders <= made.adapters.len(), "round {round}: {folders} folders of {:?}", made.adapters);
    }
    assert!(step > 30, "{step}");
}

/// A request that runs until it is full, streamed.
fn endless() -> Value {
    json!({"text": LIST_3, "lora_path": "json", "stream": true, "sampling_params": {"max_new_tokens": 400, "ignore_eos": true, "temperature": 0}})
}

/// The payloads of a stream that has begun.
fn payloads(stream: impl BufRead) -> Vec<String> {
    let lines = stream.lines().map(Result::unwrap);
    lines.filter_map(|line| line.strip_prefix("data: ").map(str::to_owned)).collect()
}

#[test]
fn sigterm_lets_a_running_stream_finish_and_takes_no_more() {
    let mut server = Server::start(&[]);
    let mut stream = server.stream("/generate", &endless());
    let mut first = String::new();
    stream.read_line(&mut first).unwrap();
    assert!(first.starts_with("data: "), "{first}");
    server.signal("TERM");
    let payloads = payloads(stream);
    assert_eq!(payloads.last().map(String::as_str), Some("[DONE]"));
    let last: Value = serde_json::from_str(&payloads[payloads.len() - 2]).unwrap();
    assert_eq!(last["meta_info"]["finish_reason"], json!({"type": "length", "length": 400}), "{last}");
    assert!(server.wait().success());
    let log = server.log();
    assert!(log.contains("stopping: no new requests") && log.contains("stopped"), "{log}");
    assert!(std::net::TcpStream::connect(server.url.strip_prefix("http://").unwrap()).is_err());
}

#[test]
fn after_the_drain_timeout_a_stream_ends_with_an_error() {
    let mut server = Server::start(&["--drain-timeout", "0"]);
    let mut stream = server.stream("/generate", &endless());
    let mut first = String::new();
    stream.read_line(&mut first).unwrap();
    server.signal("INT");
    let payloads = payloads(stream);
    let error = payloads.iter().find(|payload| payload.contains("\"error\"")).expect("an error event");
    assert!(error.contains("shutting down"), "{error}");
    assert!(!payloads.iter().any(|payload| payload.contains("\"type\":\"length\"")));
    assert!(server.wait().success());
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn what_stops_the_start_is_said_in_a_sentence() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let empty = tempfile::tempdir().unwrap();
    let missing = format!("lora0={}", empty.path().display());
    for (flags, status, reason) in [
        (vec!["--port", &port], 1, format!("--port {port}: something else listens")),
        (
            vec!["--model-path", "/does/not/exist"],
            1,
            "--model-path \"/does/not/exist\" is neither a folder".to_owned(),
        ),
        (vec!["--lora-paths", &missing], 1, format!("--lora-paths {missing}: adapter_config.json")),
        (vec!["--lora-paths", "x=demo:nope"], 1, "the embedded adapters are".to_owned()),
        (
            vec!["--context-length", "1000000"],
            1,
            "--context-length 1000000: the model was made for".to_owned(),
        ),
        (vec!["--device", "cuda"], 1, "without the `cuda` feature".to_owned()),
        (vec!["--log-level", "a=b=c"], 1, "--log-level".to_owned()),
        (
            vec!["--max-loras-per-batch", "0"],
            2,
            "--max-loras-per-batch must be at least 1".to_owned(),
        ),
    ] {
        let any_port = if flags[0] == "--port" { &[][..] } else { &["--port", "0"] };
        let output = polylora(&[&["serve", "--num-threads", "1"], any_port, &flags].concat());
        assert_eq!(output.status.code(), Some(status), "{flags:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(&reason), "{flags:?}: {}", stderr(&output));
    }
}

#[test]
fn a_size_is_served_without_its_weights() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(format!("{}/config.json", base_path()), folder.path().join("config.json")).unwrap();
    let path = folder.path().display().to_string();
    let adapter = format!("sql={}", adapter_path("sql"));
    let server = Server::start(&[
        "--model-path",
        &path,
        "--served-model-name",
        "size",
        "--load-format",
        "dummy",
        "--lora-paths",
        &adapter,
    ]);
    let body = json!({"input_ids": [[5, 6, 7], [5, 6, 7]], "lora_path": [null, "sql"],
        "sampling_params": {"max_new_tokens": 6, "temperature": 0, "ignore_eos": true}, "return_logprob": true});
    let (status, answer) = server.post("/generate", &body);
    assert_eq!(status, 200, "{answer}");
    let logprob = |row: usize| answer[row]["meta_info"]["output_token_logprobs"][0][0].as_f64().unwrap();
    assert!((0..2).all(|row| answer[row]["output_ids"].as_array().unwrap().len() == 6), "{answer}");
    assert!(logprob(0) < 0.0 && logprob(0) != logprob(1), "{answer}");
    server.stop();
}

#[test]
fn keys_from_a_file_decide_who_may_do_what() {
    let folder = tempfile::tempdir().unwrap();
    let hash = |key: &str| polylora::auth::sha256_hex(key);
    let keys = format!(
        "[[keys]]\nname = \"ops\"\nsha256 = \"{}\"\nrole = \"admin\"\n\n[[keys]]\nname = \"team\"\nsha256 = \"{}\"\nadapters = [\"js*\"]\nbase_model = false\nrequests_per_minute = 2\n",
        hash("sk-ops"),
        hash("sk-team")
    );
    let path = folder.path().join("keys.toml");
    std::fs::write(&path, keys).unwrap();
    let server = Server::start(&["--api-keys-file", path.to_str().unwrap()]);
    assert!(server.greeting.contains("Authorization: Bearer YOUR_KEY"));
    let ask = |model: &str| json!({"model": model, "prompt": LIST_3, "max_tokens": 1});
    let (status, answer) = server.post("/v1/completions", &ask("demo"));
    assert_eq!((status, &answer["error"]["code"]), (401, &json!("invalid_api_key")));
    assert_eq!(server.post_as("sk-wrong", "/v1/completions", &ask("demo")).0, 401);
    assert_eq!(server.get("/health").0, 200);
    assert_eq!(server.post_as("sk-ops", "/v1/completions", &ask("demo")).0, 200);
    let load = json!({"lora_name": "new", "lora_path": "demo:json"});
    assert_eq!(server.post_as("sk-team", "/load_lora_adapter", &load).0, 403);
    assert_eq!(server.post_as("sk-ops", "/load_lora_adapter", &load).0, 200);
    // Refusals count as requests, too: two a minute.
    let statuses = ["demo:json", "demo:table", "demo:json"].map(|model| server.post_as("sk-team", "/v1/completions", &ask(model)).0);
    assert_eq!(statuses, [200, 404, 429]);
    assert!(!server.log().contains("sk-"));
    server.stop();
}

#[test]
fn https_and_json_logs() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let certified = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    std::fs::write(path("cert.pem"), certified.cert.pem()).unwrap();
    std::fs::write(path("key.pem"), certified.signing_key.serialize_pem()).unwrap();
    let server = Server::start(&[
        "--ssl-certfile",
        &path("cert.pem"),
        "--ssl-keyfile",
        &path("key.pem"),
        "--log-format",
        "json",
    ]);
    assert!(server.url.starts_with("https://"), "{}", server.url);
    assert!(server.greeting.contains("curl --insecure https://"));
    let tls = ureq::tls::TlsConfig::builder().disable_verification(true).build();
    let agent: ureq::Agent = ureq::Agent::config_builder().tls_config(tls).build().into();
    let mut answer = agent.get(format!("{}/v1/models", server.url)).call().unwrap();
    let models: Value = answer.body_mut().read_json().unwrap();
    assert_eq!(models["data"][0]["id"], "demo");
    for line in server.log().lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        assert_eq!(line["level"], "INFO", "{line}");
    }
    server.stop();
}

#[test]
fn metrics_show_the_adapters_of_the_traffic() {
    let server = Server::start(&[]);
    server.generate(&[LIST_3, LIST_3, AI], &[Some("json"), Some("json"), None]);
    let (status, text) = server.get("/metrics");
    let text = text.as_str().unwrap();
    assert_eq!(status, 200);
    for line in [
        "polylora_requests_total{adapter=\"json\",outcome=\"stop\"} 2",
        "polylora_requests_total{adapter=\"(base)\",outcome=\"stop\"} 1",
        "polylora_adapter_load_seconds_count{stage=\"pack\"} 8",
        "vllm:num_requests_running{model_name=\"demo\",engine=\"0\"} 0",
        "polylora_http_requests_total{route=\"/generate\",model=\"demo\",adapter=\"(several)\",status=\"200\"} 1",
        "polylora_adapter_loads_total{adapter=\"json\",outcome=\"ok\"} 1",
        "polylora_adapter_uploads_total{adapter=\"json\"} 1",
        "polylora_adapter_evictions_total{adapter=\"json\",tier=\"device\"} 0",
        "polylora_adapter_load_seconds_count{stage=\"fetch\"} 8",
        "polylora_adapter_load_seconds_count{stage=\"upload\"} 1",
    ] {
        assert!(text.lines().any(|have| have == line), "{line}\n{text}");
    }
    server.stop();
}

#[test]
fn the_command_line_manages_a_running_server() {
    let server = Server::start(&[]);
    let run = |args: &[&str]| polylora(&[&["adapters", "--url", &server.url], args].concat());
    let stdout = |output: &Output| {
        assert!(output.status.success(), "{}", stderr(output));
        String::from_utf8(output.stdout.clone()).unwrap()
    };
    assert_eq!(
        stdout(&run(&["load", "mine", &adapter_path("table")])),
        format!("loaded mine from {}\n", adapter_path("table"))
    );
    check(&server, &[LIST_3], &[Some("table")], &[Some("mine")]);
    let list = stdout(&run(&[]));
    assert_eq!(list, stdout(&run(&["list"])), "what it does without a word");
    let row = list.lines().find(|line| line.starts_with("mine ")).unwrap_or_else(|| panic!("{list}"));
    assert!(row.contains("adapter") && row.ends_with(&adapter_path("table")), "{row}");
    let json: Value = serde_json::from_str(&stdout(&run(&["list", "--json"]))).unwrap();
    assert_eq!(json["data"][0]["id"], "demo");
    let again = run(&["load", "mine", &adapter_path("table")]);
    assert!(!again.status.success() && stderr(&again).contains("already loaded"), "{}", stderr(&again));
    assert_eq!(stdout(&run(&["load", "mine", "demo:json", "--replace"])), "loaded mine from demo:json\n");
    check(&server, &[LIST_3], &[Some("json")], &[Some("mine")]);
    let pushed = stdout(&run(&["push", "mine", &adapter_path("table")]));
    let version = pushed.trim_end().strip_prefix("pushed mine, version ").unwrap();
    check(&server, &[LIST_3], &[Some("table")], &[Some("mine")]);
    let list = stdout(&run(&["list"]));
    let row = list.lines().find(|line| line.starts_with("mine ")).unwrap();
    assert!(
        row.contains(&version[..12]) && row.contains(" s ago ") && row.contains(" pushed:"),
        "{row}"
    );
    let conflict = run(&["replace", "mine", "demo:json", "--expected-version", "00"]);
    assert!(stderr(&conflict).contains("has version"), "{}", stderr(&conflict));
    assert_eq!(
        stdout(&run(&["replace", "mine", "demo:json", "--expected-version", version])),
        "replaced mine by demo:json\n"
    );
    let missing = run(&["push", "mine", "/does/not/exist"]);
    assert!(stderr(&missing).contains("/does/not/exist/adapter_config.json"), "{}", stderr(&missing));
    check(&server, &[LIST_3], &[Some("json")], &[Some("mine")]);
    let is_pinned = || {
        let list: Value = serde_json::from_str(&stdout(&run(&["list", "--json"]))).unwrap();
        let cards = list["data"].as_array().unwrap();
        cards.iter().find(|card| card["id"] == "mine").unwrap()["adapter"]["pinned"].clone()
    };
    assert_eq!(is_pinned(), false);
    assert_eq!(stdout(&run(&["pin", "mine"])), "pinned mine\n");
    assert_eq!(is_pinned(), true);
    assert_eq!(stdout(&run(&["unpin", "mine"])), "unpinned mine\n");
    assert_eq!(is_pinned(), false);
    assert_eq!(
        stdout(&run(&["alias", "a/b", "mine=3", "json=1"])),
        "a/b stands for mine (75 %), json (25 %)\n"
    );
    let list = stdout(&run(&["list"]));
    let row = list.lines().find(|line| line.starts_with("a/b ")).unwrap_or_else(|| panic!("{list}"));
    assert!(row.contains(" alias ") && row.ends_with("mine (75 %), json (25 %)"), "{row}");
    let held = run(&["unload", "mine"]);
    assert!(stderr(&held).contains("the alias 'a/b' points at it"), "{}", stderr(&held));
    assert_eq!(stdout(&run(&["alias", "a/b", "json"])), "a/b stands for json\n");
    assert_eq!(stdout(&run(&["unload", "mine", "--force", "--timeout", "5"])), "unloaded mine\n");
    assert_eq!(stdout(&run(&["unalias", "a/b"])), "a/b stands for nothing any more\n");
    let unknown = run(&["unalias", "a/b"]);
    assert!(stderr(&unknown).contains("The alias 'a/b' does not exist"), "{}", stderr(&unknown));
    let gone = run(&["unload", "mine"]);
    assert!(!gone.status.success() && stderr(&gone).contains("mine"), "{}", stderr(&gone));
    server.stop();
    let nobody = run_nobody();
    assert!(
        !nobody.status.success() && stderr(&nobody).contains("no server answers"),
        "{}",
        stderr(&nobody)
    );
}

/// Asks a port where nobody listens.
fn run_nobody() -> Output {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    polylora(&["adapters", "--url", &format!("http://127.0.0.1:{port}"), "list"])
}

#[test]
fn inspect_reports_coverage_without_a_server() {
    let output = polylora(&["adapters", "inspect", &adapter_path("json"), "--model-path", &base_path(), "--json"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let config = std::fs::read_to_string(format!("{}/adapter_config.json", adapter_path("json"))).unwrap();
    let config: Value = serde_json::from_str(&config).unwrap();
    assert_eq!(report["max_lora_rank"], config["r"]);
    assert!(!report["report"]["modules"].as_array().unwrap().is_empty());
    let embedded = polylora(&["adapters", "inspect", "demo:json", "--json"]);
    assert_eq!(serde_json::from_slice::<Value>(&embedded.stdout).unwrap(), report);
    let text = String::from_utf8(polylora(&["adapters", "inspect", "demo:json"]).stdout).unwrap();
    assert!(text.contains("scaling") && text.contains("q_proj"), "{text}");

    let missing = polylora(&["adapters", "inspect", "/does/not/exist"]);
    assert!(
        !missing.status.success() && stderr(&missing).contains("adapter_config.json"),
        "{}",
        stderr(&missing)
    );
}

#[test]
fn bench_measures_a_small_model() {
    // Of the model no more than its size.
    let size = tempfile::tempdir().unwrap();
    std::fs::copy(format!("{}/config.json", base_path()), size.path().join("config.json")).unwrap();
    let bench = ["bench", "--model-path", size.path().to_str().unwrap()];
    let refused = polylora(&bench);
    assert!(stderr(&refused).contains("neither model.safetensors nor"), "{}", stderr(&refused));
    let args = [
        "--load-format",
        "dummy",
        "--batch-size",
        "1",
        "4",
        "--prompt-tokens",
        "16",
        "--output-tokens",
        "8",
        "--num-adapters",
        "3",
        "--lora-rank",
        "4",
        "16",
        "--base-rows",
        "1",
        "--repeat",
        "1",
        "--num-threads",
        "1",
        "--json",
        "-",
    ];
    let output = polylora(&[&bench[..], &args].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    let results: Value = serde_json::from_slice(&output.stdout).unwrap();
    let rows = results["results"].as_array().unwrap();
    let adapters: Vec<_> = rows
        .iter()
        .map(|row| (row["batch"].as_u64(), row["distinct_adapters"].as_u64()))
        .collect();
    assert_eq!(adapters, [(Some(1), Some(0)), (Some(4), Some(3))]);
    for row in rows {
        for figure in ["output_tokens_per_second", "prefill_tokens_per_second", "decode_tokens_per_second"] {
            assert!(row[figure].as_f64().unwrap() > 0.0, "{row}");
        }
    }
}

#[test]
fn a_key_is_hashed_for_the_keys_file() {
    use std::{io::Write, process::Stdio};
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_polylora"));
    let mut process = command.arg("hash-key").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    process.stdin.take().unwrap().write_all(b"abc\n").unwrap();
    let output = process.wait_with_output().unwrap();
    let hash = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad\n";
    assert_eq!(String::from_utf8(output.stdout).unwrap(), hash);
}

#[test]
fn what_comes_into_the_folder_of_adapters_and_what_goes_is_noticed_while_serving() {
    let folder = tempfile::TempDir::new().unwrap();
    copy_adapter("table", folder.path());
    let server = Server::start(&["--lora-dir", folder.path().to_str().unwrap(), "--model-path", &base_path()]);
    let wait_for = |names: &[&str]| {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(120);
        loop {
            let list = server.get("/v1/adapters").1;
            if ids(&list, "name").into_iter().collect::<std::collections::BTreeSet<_>>() == names.iter().copied().collect() {
                break;
            }
            assert!(std::time::Instant::now() < deadline, "{list}");
            server.generate(&[LIST_3], &[None]);
        }
    };
    check(&server, &[LIST_3], &[Some("table")], &[Some("table")]);
    copy_adapter("json", folder.path());
    wait_for(&["json", "table"]);
    check(&server, &[LIST_3, LIST_3], &[Some("json"), Some("table")], &[Some("json"), Some("table")]);
    std::fs::remove_dir_all(folder.path().join("table")).unwrap();
    wait_for(&["json"]);
    let (status, answer) = server.post("/v1/completions", &json!({"model": "table", "prompt": LIST_3}));
    assert_eq!((status, &answer["error"]["code"]), (404, &json!("model_not_found")));
    check(&server, &[LIST_3], &[Some("json")], &[Some("json")]);
    server.stop();
}

#[test]
fn what_is_pinned_is_on_the_device_before_anyone_asks_also_after_a_kill() {
    let (adapters, state) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for name in ["table", "json"] {
        copy_adapter(name, adapters.path());
    }
    let folder = |folder: &tempfile::TempDir| folder.path().display().to_string();
    let start = || {
        Server::start(&[
            "--model-path",
            &base_path(),
            "--lora-dir",
            &folder(&adapters),
            "--state-dir",
            &folder(&state),
        ])
    };
    let states = |server: &Server| ["json", "table"].map(|name| server.get(&format!("/v1/adapters/{name}")).1["state"].clone());
    let wait = |server: &Server| {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(120);
        while states(server) != [json!("registered"), json!("device")] {
            assert!(std::time::Instant::now() < deadline, "{:?}", states(server));
        }
    };
    let mut server = start();
    assert_eq!(states(&server), [json!("registered"), json!("registered")]);
    assert_eq!(server.post("/pin_lora_adapter", &json!({"lora_name": "table", "pinned": true})).0, 200);
    wait(&server);
    server.kill();
    server.wait();
    let server = start();
    wait(&server);
    server.stop();
}

/// Ten thousand names by Zipf's law over HTTP. (`engine/tests/thousands_of_adapters.rs` has bytes of their own for each, and looks at the counters.)
#[cfg(unix)]
#[test]
fn ten_thousand_names_of_a_folder_have_their_golden_answers_and_take_no_memory() {
    const NUM_NAMES: usize = 10_000;
    let adapters = ["flags", "json", "lines", "pirate", "sql", "table", "upper", "yaml"];
    let folder = tempfile::tempdir().unwrap();
    for number in 0..NUM_NAMES {
        let (own, adapter) = (
            folder.path().join(format!("adapter-{number}")),
            adapter_path(adapters[number % adapters.len()]),
        );
        std::fs::create_dir(&own).unwrap();
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            std::os::unix::fs::symlink(format!("{adapter}/{file}"), own.join(file)).unwrap();
        }
    }
    let directory = folder.path().to_str().unwrap();
    let limits = [
        "--max-loaded-loras",
        "200",
        "--max-loras-per-batch",
        "16",
        "--mem-fraction-static",
        "64MiB",
    ];
    let server = Server::start(&[&["--model-path", &base_path(), "--lora-dir", directory], &limits[..]].concat());
    assert_eq!(ids(&server.get("/v1/adapters").1, "name").len(), NUM_NAMES);
    let golden = adapters.map(|adapter| golden(Some(adapter), LIST_3));
    // Name `i` in proportion to `1 / (i + 1)`.
    let until: Vec<f64> = (1..=NUM_NAMES)
        .scan(0.0, |sum, place| {
            *sum += 1.0 / place as f64;
            Some(*sum)
        })
        .collect();
    let (mut state, mut asked) = (1u64, std::collections::BTreeSet::new());
    let mut run = |num_calls: usize| {
        for _ in 0..num_calls {
            let numbers: Vec<usize> = std::iter::repeat_with(|| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let drawn = (state >> 11) as f64 / (1u64 << 53) as f64 * until[NUM_NAMES - 1];
                until.partition_point(|sum| *sum <= drawn)
            })
            .take(24)
            .collect();
            let names: Vec<String> = numbers.iter().map(|number| format!("adapter-{number}")).collect();
            let answers = server.generate(
                &vec![LIST_3; names.len()],
                &names.iter().map(|name| Some(name.as_str())).collect::<Vec<_>>(),
            );
            for ((answer, name), number) in answers.iter().zip(&names).zip(&numbers) {
                assert_eq!(answer["output_ids"], golden[number % adapters.len()]["output_ids"], "{name}");
                assert_eq!(answer["meta_info"]["lora"], json!(name));
            }
            asked.extend(numbers);
        }
        asked.len()
    };
    assert!(run(25) > 200, "host memory is full");
    let before = server.memory_bytes("VmRSS");
    assert!(run(50) > 600);
    let grown = server.memory_bytes("VmRSS").saturating_sub(before);
    assert!(grown < 32 << 20, "{grown} bytes more");
    let list = server.get("/v1/adapters").1;
    assert!(list["data"].as_array().unwrap().iter().all(|adapter| adapter["leases"] == 0));
    assert_eq!(
        server.load("another", &adapter_path("sql"), false).1["loaded_adapters"]
            .as_object()
            .unwrap()
            .len(),
        NUM_NAMES + 1
    );
    check(&server, &[LIST_3], &[Some("sql")], &[Some("another")]);
    assert_eq!(server.unload("another").1["loaded_adapters"].as_object().unwrap().len(), NUM_NAMES);
    let metrics = server.get("/metrics").1;
    let left = metrics
        .as_str()
        .unwrap()
        .lines()
        .find_map(|line| line.strip_prefix("polylora_host_adapter_evictions_total "));
    assert!(left.unwrap().parse::<u64>().unwrap() > 400, "{left:?}");
    server.stop();
}

/// Puts a copy of a demo adapter into a folder of adapters.
fn copy_adapter(name: &str, folder: &std::path::Path) {
    let own = folder.join(name);
    std::fs::create_dir(&own).unwrap();
    for file in std::fs::read_dir(adapter_path(name)).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), own.join(file.file_name())).unwrap();
    }
}

#[test]
fn adapters_of_a_folder_combine_and_are_replaced_by_version() {
    let folder = tempfile::TempDir::new().unwrap();
    for name in ["table", "json", "sql"] {
        copy_adapter(name, folder.path());
    }
    let server = Server::start(&["--lora-dir", folder.path().to_str().unwrap(), "--max-loaded-loras", "8"]);
    check(&server, &[LIST_3, AI], &[Some("table"), None], &[Some("table"), None]);
    check(&server, &[LIST_3, LIST_3], &[Some("sql"), Some("json")], &[Some("sql"), Some("json")]);
    // A sum in which one adapter counts and the other doesn't is that one, to the last bit that the golden file can show.
    let sums = [Some("table+json*0"), Some("table*0+json"), Some("json*1")];
    let answers = server.generate(&[LIST_3, LIST_3, LIST_3], &sums);
    for (answer, (expected, sum)) in answers
        .iter()
        .zip([("table", "table+json*0"), ("json", "table*0+json"), ("json", "json")])
    {
        assert_eq!(answer["output_ids"], golden(Some(expected), LIST_3)["output_ids"], "{sum}");
        assert_eq!(answer["meta_info"]["lora"], sum);
    }
    let chat = |model: &str| {
        let body = json!({"model": model, "temperature": 0, "messages": [{"role": "user", "content": LIST_3}]});
        server.post("/v1/chat/completions", &body)
    };
    let (status, answer) = chat("demo:json+table*0");
    assert_eq!(status, 200, "{answer}");
    let expected = &golden_chat(Some("json"), LIST_3)["output_text"];
    assert_eq!(answer["choices"][0]["message"]["content"], *expected);
    for (bad, status) in [("json+nobody", 404), ("json*x", 400), ("json+", 400), ("../table", 404)] {
        assert_eq!(chat(&format!("demo:{bad}")).0, status, "{bad}");
    }
    // A swap that expects another version is a conflict, and changes nothing.
    let path = adapter_path("table");
    let load = |expected: &Value| {
        let body = json!({"lora_name": "json", "lora_path": path, "replace": true, "expected_version": expected});
        server.post("/load_lora_adapter", &body)
    };
    let (status, answer) = load(&json!("0".repeat(64)));
    assert_eq!(status, 409, "{answer}");
    assert!(answer["error_message"].as_str().unwrap().contains("has version"), "{answer}");
    check(&server, &[LIST_3], &[Some("json")], &[Some("json")]);
    let (_, models) = server.get("/v1/models");
    let card = models["data"]
        .as_array()
        .unwrap()
        .iter()
        .find(|card| card["id"] == "json")
        .unwrap()
        .clone();
    let (status, answer) = load(&card["adapter"]["version"]);
    assert_eq!(status, 200, "{answer}");
    check(&server, &[LIST_3], &[Some("table")], &[Some("json")]);
    server.stop();
}
