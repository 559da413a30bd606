//! The server's memory, by what Linux says of its process: at most the weights, the KV cache's budget and 200 MB.

#![cfg(target_os = "linux")]

mod process;

use std::{fs::File, io::Write, path::Path};

use process::{LIST_3, Server, base_path};
use serde_json::{Map, Value, json};

/// What the process may have beside weights and KV cache.
const REST_BYTES: u64 = 200_000_000;

#[track_caller]
fn check(server: &Server) {
    let (weights, kv) = (server.loaded("weight_bytes"), server.loaded("kv_bytes"));
    let most = server.memory_bytes("VmHWM");
    assert!(most <= weights + kv + REST_BYTES, "{most} bytes at most: weights {weights}, KV {kv}");
    assert!(most > weights, "{most} bytes hold no {weights} of weights");
}

#[test]
fn the_demo_and_its_adapters_take_little() {
    let server = Server::start(&["--mem-fraction-static", "16MiB"]);
    assert!(server.loaded("kv_bytes") <= 12 << 20);
    server.generate(&[LIST_3; 4], &[None, Some("json"), Some("table"), Some("pirate")]);
    check(&server);
    server.stop();
}

/// While a checkpoint is read, its pages count as the process's: they must not all be there beside the weights that are made of them.
#[test]
fn a_checkpoint_is_not_in_memory_twice_while_it_is_loaded() {
    let folder = tempfile::tempdir().unwrap();
    write_model(folder.path());
    let server = Server::start(&[
        "--model-path",
        folder.path().to_str().unwrap(),
        "--dtype",
        "bfloat16",
        "--mem-fraction-static",
        "16MiB",
    ]);
    assert!(
        server.loaded("weight_bytes") > REST_BYTES + (40 << 20),
        "large enough for a second copy to show"
    );
    check(&server);
    server.stop();
}

/// A model of 256 MB of zeros (a sparse file) with the demo's tokenizer.
fn write_model(folder: &Path) {
    let (hidden, intermediate, layers) = (1024, 4096, 8);
    for name in ["tokenizer.json", "tokenizer_config.json", "config.json"] {
        std::fs::copy(Path::new(&base_path()).join(name), folder.join(name)).unwrap();
    }
    let config = std::fs::read_to_string(folder.join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    let vocab = config["vocab_size"].as_u64().unwrap();
    for (key, value) in [
        ("hidden_size", hidden),
        ("intermediate_size", intermediate),
        ("num_hidden_layers", layers),
        ("num_attention_heads", 16),
        ("num_key_value_heads", 16),
        ("head_dim", 64),
    ] {
        config[key] = json!(value);
    }
    config["tie_word_embeddings"] = json!(true);
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();

    let mut tensors = vec![
        ("model.embed_tokens.weight".to_owned(), vec![vocab, hidden]),
        ("model.norm.weight".to_owned(), vec![hidden]),
    ];
    for layer in 0..layers {
        for (name, shape) in [
            ("input_layernorm", vec![hidden]),
            ("post_attention_layernorm", vec![hidden]),
            ("self_attn.q_proj", vec![hidden, hidden]),
            ("self_attn.k_proj", vec![hidden, hidden]),
            ("self_attn.v_proj", vec![hidden, hidden]),
            ("self_attn.o_proj", vec![hidden, hidden]),
            ("mlp.gate_proj", vec![intermediate, hidden]),
            ("mlp.up_proj", vec![intermediate, hidden]),
            ("mlp.down_proj", vec![hidden, intermediate]),
        ] {
            tensors.push((format!("model.layers.{layer}.{name}.weight"), shape));
        }
    }
    let mut header = Map::new();
    let mut offset = 0;
    for (name, shape) in tensors {
        let end = offset + 2 * shape.iter().product::<u64>();
        header.insert(name, json!({"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}));
        offset = end;
    }
    let header = Value::Object(header).to_string();
    let mut file = File::create(folder.join("model.safetensors")).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len(8 + header.len() as u64 + offset).unwrap();
}
