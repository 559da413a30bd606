//! The real server as a process over the demo model, and the demo's golden answers.

#![allow(dead_code, reason = "each test file uses its own part")]

use std::{
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::{Arc, Mutex},
    thread::JoinHandle,
};

use serde_json::{Value, json};

/// The demo's favourite question.
pub const LIST_3: &str = "List 3 countries and their capitals.";
/// A text to go on with.
pub const AI: &str = "AI is a field of computer science focused on";

/// Greedy, and long enough for every golden answer.
pub fn greedy() -> Value {
    json!({"max_new_tokens": 128, "temperature": 0})
}

/// The folder of a demo adapter.
pub fn adapter_path(name: &str) -> String {
    demo().join("adapters").join(name).display().to_string()
}

/// The demo's base model.
pub fn base_path() -> String {
    demo().join("base").display().to_string()
}

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("demo")
}

/// The golden case of a raw prompt under an adapter (`None`: the base model).
pub fn golden(adapter: Option<&str>, prompt: &str) -> Value {
    golden_case(adapter, |case| case["kind"] == "raw" && case["prompt"] == prompt)
}

/// The golden case of a chat of one user message.
pub fn golden_chat(adapter: Option<&str>, message: &str) -> Value {
    golden_case(adapter, |case| case["messages"] == json!([{"role": "user", "content": message}]))
}

/// The golden case of the same prompt as another's.
pub fn golden_like(adapter: Option<&str>, other: &Value) -> Value {
    golden_case(adapter, |case| case["prompt_ids"] == other["prompt_ids"])
}

fn golden_case(adapter: Option<&str>, is_it: impl Fn(&Value) -> bool) -> Value {
    let path = demo().join("golden").join(adapter.unwrap_or("base")).with_extension("json");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let file: Value = serde_json::from_str(&text).unwrap();
    let cases = file["cases"].as_array().unwrap();
    cases
        .iter()
        .find(|case| is_it(case))
        .unwrap_or_else(|| panic!("no such case in {}", path.display()))
        .clone()
}

/// A command of the program.
pub fn polylora(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_polylora")).args(args).output().unwrap()
}

/// A running server. Stop it with [`Server::stop`], which also checks its log; dropped, it is killed.
pub struct Server {
    /// `http://127.0.0.1:PORT`
    pub url: String,
    /// What it said on standard output before it was ready.
    pub greeting: String,
    process: Child,
    log: Arc<Mutex<String>>,
    reader: Option<JoinHandle<()>>,
}

impl Server {
    /// Starts `polylora serve` with these flags on a free port, and waits until it is ready.
    pub fn start(flags: &[&str]) -> Self {
        Self::start_as(Command::new(env!("CARGO_BIN_EXE_polylora")), flags)
    }

    /// The same by a command of one's own, which gets the arguments.
    pub fn start_as(mut command: Command, flags: &[&str]) -> Self {
        let mut process = command
            .args(["serve", "--port", "0", "--num-threads", "1"])
            .args(flags)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = Arc::new(Mutex::new(String::new()));
        let reader = std::thread::spawn({
            let (log, stderr) = (Arc::clone(&log), process.stderr.take().unwrap());
            move || {
                for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                    *log.lock().unwrap() += &(line + "\n");
                }
            }
        });
        // The start line tells the port; the blank line after the curl line ends it.
        let mut greeting = String::new();
        let mut stdout = BufReader::new(process.stdout.take().unwrap());
        while !greeting.ends_with("\n\n") || greeting.matches("curl").count() == 0 {
            if stdout.read_line(&mut greeting).unwrap() == 0 {
                process.wait().unwrap();
                reader.join().unwrap();
                panic!("the server did not start:\n{greeting}{}", log.lock().unwrap());
            }
        }
        let url = greeting.split_whitespace().find(|word| word.starts_with("http")).unwrap().to_owned();
        Self {
            url,
            greeting,
            process,
            log,
            reader: Some(reader),
        }
    }

    /// `GET`: status and body.
    pub fn get(&self, path: &str) -> (u16, Value) {
        answer(agent().get(format!("{}{path}", self.url)).call())
    }

    /// `POST` of JSON: status and body (JSON, or its text).
    pub fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        answer(agent().post(format!("{}{path}", self.url)).send_json(body))
    }

    /// `PUT` of JSON: status and body.
    pub fn put(&self, path: &str, body: &Value) -> (u16, Value) {
        answer(agent().put(format!("{}{path}", self.url)).send_json(body))
    }

    /// `DELETE`: status and body.
    pub fn delete(&self, path: &str) -> (u16, Value) {
        answer(agent().delete(format!("{}{path}", self.url)).call())
    }

    /// `POST /v1/adapters/{name}` with the files of a demo adapter.
    pub fn push(&self, name: &str, adapter: &str) -> Result<(u16, Value), ureq::Error> {
        let parts = [("config", "adapter_config.json"), ("weights", "adapter_model.safetensors")];
        self.push_files(name, Path::new(&adapter_path(adapter)), &parts)
    }

    /// The same with files of a folder, by part.
    pub fn push_files(&self, name: &str, folder: &Path, parts: &[(&str, &str)]) -> Result<(u16, Value), ureq::Error> {
        let file = |file: &str| std::fs::read(folder.join(file)).unwrap();
        let parts: Vec<(&str, Vec<u8>)> = parts.iter().map(|(part, name)| (*part, file(name))).collect();
        self.push_parts(name, &parts)
    }

    /// `POST /v1/adapters/{name}` with these files.
    pub fn push_bytes(&self, name: &str, config: &[u8], weights: &[u8]) -> Result<(u16, Value), ureq::Error> {
        self.push_parts(name, &[("config", config.to_vec()), ("weights", weights.to_vec())])
    }

    fn push_parts(&self, name: &str, parts: &[(&str, Vec<u8>)]) -> Result<(u16, Value), ureq::Error> {
        let mut body = Vec::new();
        for (part, file) in parts {
            let head = format!("--XX\r\nContent-Disposition: form-data; name=\"{part}\"; filename=\"{part}\"\r\n\r\n");
            body.extend_from_slice(head.as_bytes());
            body.extend_from_slice(file);
            body.extend_from_slice(b"\r\n");
        }
        body.extend_from_slice(b"--XX--\r\n");
        let request = agent().post(format!("{}/v1/adapters/{name}", self.url));
        let response = request.header("Content-Type", "multipart/form-data; boundary=XX").send(&body[..])?;
        Ok(answer(Ok(response)))
    }

    /// `POST` of JSON to a server that may die meanwhile; `None` if it did.
    pub fn try_post(&self, path: &str, body: &Value) -> Option<u16> {
        let response = agent().post(format!("{}{path}", self.url)).send_json(body);
        response.ok().map(|response| response.status().as_u16())
    }

    /// SIGKILL: whatever it is at, it ends.
    pub fn kill(&self) {
        self.signal("KILL");
    }

    /// `POST` with a key.
    pub fn post_as(&self, key: &str, path: &str, body: &Value) -> (u16, Value) {
        let request = agent().post(format!("{}{path}", self.url));
        answer(request.header("Authorization", format!("Bearer {key}")).send_json(body))
    }

    /// One `/generate` call with a prompt and an adapter name per row; the answers.
    pub fn generate(&self, prompts: &[&str], adapters: &[Option<&str>]) -> Vec<Value> {
        let body = json!({"text": prompts, "sampling_params": greedy(), "lora_path": adapters});
        let (status, answers) = self.post("/generate", &body);
        assert_eq!(status, 200, "{answers}");
        answers.as_array().unwrap().clone()
    }

    /// `/load_lora_adapter`.
    pub fn load(&self, name: &str, path: &str, pinned: bool) -> (u16, Value) {
        self.post("/load_lora_adapter", &json!({"lora_name": name, "lora_path": path, "pinned": pinned}))
    }

    /// `/unload_lora_adapter`.
    pub fn unload(&self, name: &str) -> (u16, Value) {
        self.post("/unload_lora_adapter", &json!({"lora_name": name}))
    }

    /// Starts a streaming `POST`; lines come as they are sent.
    pub fn stream(&self, path: &str, body: &Value) -> impl BufRead + use<> {
        let mut response = agent().post(format!("{}{path}", self.url)).send_json(body).unwrap();
        if response.status() != 200 {
            panic!("{}: {:?}", response.status(), response.body_mut().read_to_string());
        }
        BufReader::new(response.into_body().into_reader())
    }

    /// Of its process.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Sends a signal by name.
    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").args([format!("-{name}"), self.process.id().to_string()]).status();
        assert!(status.unwrap().success());
    }

    /// A size that Linux tells of the process in `/proc/PID/status`: `VmRSS`, `VmHWM` (the largest so far).
    pub fn memory_bytes(&self, field: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')).unwrap();
        line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() * 1024
    }

    /// A field of the line that it logged when the model was loaded.
    pub fn loaded(&self, field: &str) -> u64 {
        let began = std::time::Instant::now();
        let line = loop {
            // Standard output may be heard of before the log that was written earlier.
            let log = self.log();
            if let Some(line) = log.lines().find(|line| line.contains("the model is loaded")) {
                break line.to_owned();
            }
            assert!(began.elapsed().as_secs() < 60, "{log}");
            std::thread::yield_now();
        };
        let value = line.split(&format!(" {field}=")).nth(1).unwrap_or_else(|| panic!("{field}: {line}"));
        value.split_whitespace().next().unwrap().parse().unwrap()
    }

    /// What it logged so far.
    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> ExitStatus {
        let status = self.process.wait().unwrap();
        self.reader.take().into_iter().for_each(|reader| reader.join().unwrap());
        status
    }

    /// SIGTERM; it must end well, and must have had nothing to warn of.
    pub fn stop(mut self) {
        self.signal("TERM");
        let status = self.wait();
        let log = self.log();
        assert!(status.success(), "{status}\n{log}");
        let bad: Vec<_> = log.lines().filter(|line| line.contains(" WARN ") || line.contains("ERROR ")).collect();
        assert!(bad.is_empty(), "{bad:#?}");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn agent() -> ureq::Agent {
    ureq::Agent::config_builder().http_status_as_error(false).build().into()
}

fn answer(response: Result<ureq::http::Response<ureq::Body>, ureq::Error>) -> (u16, Value) {
    let mut response = response.unwrap();
    let mut text = String::new();
    response.body_mut().as_reader().read_to_string(&mut text).unwrap();
    let body = serde_json::from_str(&text).unwrap_or(Value::String(text));
    (response.status().as_u16(), body)
}
