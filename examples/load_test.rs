//! Load for any server of the OpenAI API: what it costs, how fast it is, how many streams it holds.
//!
//!     ulimit -n 20000
//!     cargo run --release --example mock_server &                               # or any server; see its --token-interval-ms
//!     cargo run --release --example load_test -- cost                           # CPU of the server for a token and for a request
//!     cargo run --release --example load_test -- rate --streams 64              # requests and events a second
//!     cargo run --release --example load_test -- first-token --streams 1000     # beside that many streams; a paced server
//!     cargo run --release --example load_test -- open --streams 10000           # memory with so many open; a server that holds them
//!
//! The client is written for little work of its own: HTTP/1.1 by hand, one connection for each stream, events counted by their prefix.
//! CPU and memory are those of the server's process (`--pid`, otherwise what its `/metrics` say).

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use clap::{Parser, Subcommand};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
};

#[derive(Parser, Clone)]
struct Args {
    /// The server, without a path.
    #[arg(long, global = true, default_value = "http://127.0.0.1:30001")]
    url: String,
    /// Its process, if its /metrics do not have process_cpu_seconds_total and process_resident_memory_bytes.
    #[arg(long, global = true)]
    pid: Option<u32>,
    /// The model that is asked for.
    #[arg(long, global = true, default_value = "demo:json")]
    model: String,
    /// Sent as a bearer token.
    #[arg(long, global = true, default_value = "none")]
    api_key: String,
    #[command(subcommand)]
    measure: Measure,
}

#[derive(Subcommand, Clone)]
enum Measure {
    /// CPU for a token and for a request, from requests of two lengths.
    Cost {
        /// Requests of each length.
        #[arg(long, default_value_t = 4000)]
        requests: usize,
        /// Asked at once.
        #[arg(long, default_value_t = 32)]
        streams: usize,
    },
    /// Requests and events a second.
    Rate {
        /// In all.
        #[arg(long, default_value_t = 4000)]
        requests: usize,
        /// Asked at once.
        #[arg(long, default_value_t = 64)]
        streams: usize,
        /// Tokens of each answer.
        #[arg(long, default_value_t = 64)]
        tokens: usize,
    },
    /// Time to the first token of a request that comes while others stream.
    FirstToken {
        /// Streams that run all the time.
        #[arg(long, default_value_t = 1000)]
        streams: usize,
        /// Tokens of each of those.
        #[arg(long, default_value_t = 1000)]
        tokens: usize,
        /// Requests that are measured, one after the other.
        #[arg(long, default_value_t = 1000)]
        requests: usize,
    },
    /// Memory with many streams open.
    Open {
        /// Streams.
        #[arg(long, default_value_t = 10_000)]
        streams: usize,
    },
}

/// One connection to the server.
struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
}

/// One answer, as it came.
#[derive(Default)]
struct Answer {
    events: u64,
    first_event: Duration,
}

impl Args {
    fn authority(&self) -> &str {
        self.url.trim_start_matches("http://").trim_end_matches('/')
    }

    fn request(&self, tokens: usize) -> Vec<u8> {
        let body = serde_json::json!({
            "model": self.model, "messages": [{"role": "user", "content": "List 3 countries and their capitals."}],
            "temperature": 0, "max_tokens": tokens, "stream": true,
        })
        .to_string();
        format!(
            "POST /v1/chat/completions HTTP/1.1\r\nHost: {}\r\nAuthorization: Bearer {}\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            self.authority(),
            self.api_key,
            body.len()
        )
        .into_bytes()
    }

    async fn connect(&self) -> anyhow::Result<Connection> {
        let stream = TcpStream::connect(self.authority()).await.context("is the server there?")?;
        stream.set_nodelay(true)?;
        Ok(Connection {
            stream,
            buffer: vec![0; 1 << 14],
        })
    }

    /// CPU seconds and resident bytes of the server.
    async fn usage(&self) -> anyhow::Result<(f64, f64)> {
        if let Some(pid) = self.pid {
            return usage_of(pid).context("reading /proc");
        }
        let mut stream = TcpStream::connect(self.authority()).await?;
        let request = format!("GET /metrics HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", self.authority());
        stream.write_all(request.as_bytes()).await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        let value = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            line.and_then(|value| value.parse::<f64>().ok())
                .with_context(|| format!("/metrics has no {name}: give --pid"))
        };
        Ok((value("process_cpu_seconds_total")?, value("process_resident_memory_bytes")?))
    }

    /// Asks so often, so many at once; what came, and how long it took.
    async fn run(&self, requests: usize, streams: usize, tokens: usize) -> anyhow::Result<(u64, Vec<Duration>, Duration)> {
        let left = Arc::new(AtomicU64::new(requests as u64));
        let began = Instant::now();
        let mut workers = JoinSet::new();
        for _ in 0..streams.min(requests) {
            let (args, left) = (self.clone(), Arc::clone(&left));
            workers.spawn(async move {
                let request = args.request(tokens);
                let mut connection = args.connect().await?;
                let (mut events, mut firsts) = (0, Vec::new());
                while left.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)).is_ok() {
                    let answer = connection.ask(&request).await?;
                    events += answer.events;
                    firsts.push(answer.first_event);
                }
                anyhow::Ok((events, firsts))
            });
        }
        let (mut events, mut firsts) = (0, Vec::new());
        while let Some(worker) = workers.join_next().await {
            let (more, these) = worker??;
            events += more;
            firsts.extend(these);
        }
        firsts.sort();
        Ok((events, firsts, began.elapsed()))
    }
}

impl Connection {
    /// Sends a request and reads its answer to the end.
    async fn ask(&mut self, request: &[u8]) -> anyhow::Result<Answer> {
        let began = Instant::now();
        self.stream.write_all(request).await?;
        let mut answer = Answer::default();
        let mut tail: Vec<u8> = Vec::new();
        loop {
            let bytes = self.stream.read(&mut self.buffer).await?;
            ensure!(bytes > 0, "the server closed the connection: {}", String::from_utf8_lossy(&tail));
            // What may be cut by the border between two reads is looked at again.
            let seen = tail.len();
            tail.extend_from_slice(&self.buffer[..bytes]);
            if answer.events == 0 && seen == 0 {
                ensure!(tail.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&tail));
            }
            let new = count(&tail, b"data: {", seen);
            // The first event has the role, the second the first text; a server may send both at once.
            if answer.events < 2 && answer.events + new >= 2 {
                answer.first_event = began.elapsed();
            }
            answer.events += new;
            if tail.ends_with(b"0\r\n\r\n") {
                ensure!(
                    count(&tail, b"data: [DONE]", 0) > 0,
                    "the stream did not end well: {}",
                    String::from_utf8_lossy(&tail)
                );
                return Ok(answer);
            }
            let keep = tail.len().min(64);
            tail.drain(..tail.len() - keep);
        }
    }

    /// Sends a request and reads until its first event.
    async fn begin(&mut self, request: &[u8]) -> anyhow::Result<()> {
        self.stream.write_all(request).await?;
        let mut text = Vec::new();
        while count(&text, b"data: {", 0) == 0 {
            let bytes = self.stream.read(&mut self.buffer).await?;
            ensure!(bytes > 0, "the server closed the connection");
            text.extend_from_slice(&self.buffer[..bytes]);
        }
        ensure!(text.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&text));
        Ok(())
    }
}

/// How often `needle` ends after the first `seen` bytes.
fn count(text: &[u8], needle: &[u8], seen: usize) -> u64 {
    let from = seen.saturating_sub(needle.len() - 1);
    text[from..].windows(needle.len()).filter(|window| *window == needle).count() as u64
}

fn usage_of(pid: u32) -> anyhow::Result<(f64, f64)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = stat.rsplit_once(')').context("stat")?.1.split_whitespace().collect();
    let number = |index: usize| fields.get(index).and_then(|field| field.parse::<f64>().ok()).context("stat");
    Ok(((number(11)? + number(12)?) / 100.0, number(21)? * 4096.0))
}

fn percentile(sorted: &[Duration], percent: usize) -> f64 {
    sorted[(sorted.len() * percent / 100).min(sorted.len() - 1)].as_secs_f64() * 1e3
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    match args.measure.clone() {
        Measure::Cost { requests, streams } => cost(&args, requests, streams).await,
        Measure::Rate { requests, streams, tokens } => rate(&args, requests, streams, tokens).await,
        Measure::FirstToken { streams, tokens, requests } => first_token(&args, streams, tokens, requests).await,
        Measure::Open { streams } => open(&args, streams).await,
    }
}

async fn cost(args: &Args, requests: usize, streams: usize) -> anyhow::Result<()> {
    // Connections, caches, and the allocator.
    args.run(requests / 4, streams, 64).await?;
    let mut seconds = Vec::new();
    let mut events = Vec::new();
    for tokens in [1, 257] {
        let before = args.usage().await?.0;
        let (came, ..) = args.run(requests, streams, tokens).await?;
        seconds.push(args.usage().await?.0 - before);
        events.push(came);
    }
    if events[1] <= events[0] + requests as u64 {
        bail!(
            "answers of 257 tokens have {} events in all: does the server generate so many?",
            events[1]
        );
    }
    let token = (seconds[1] - seconds[0]) / (events[1] - events[0]) as f64;
    println!("server CPU per token:              {:.2} µs", token * 1e6);
    println!(
        "server CPU per request of 1 token: {:.1} µs (tokenizing and the connection included)",
        seconds[0] / requests as f64 * 1e6
    );
    Ok(())
}

async fn rate(args: &Args, requests: usize, streams: usize, tokens: usize) -> anyhow::Result<()> {
    args.run(requests / 4, streams, tokens).await?;
    let before = args.usage().await.map(|usage| usage.0);
    let (events, firsts, took) = args.run(requests, streams, tokens).await?;
    let seconds = took.as_secs_f64();
    println!(
        "{:.0} requests/s, {:.0} events/s, {streams} streams of {tokens} tokens",
        requests as f64 / seconds,
        events as f64 / seconds
    );
    println!("first text p50 {:.2} ms, p99 {:.2} ms", percentile(&firsts, 50), percentile(&firsts, 99));
    if let (Ok(before), Ok((after, _))) = (before, args.usage().await) {
        println!(
            "server CPU: {:.2} cores, {:.1} µs per request",
            (after - before) / seconds,
            (after - before) / requests as f64 * 1e6
        );
    }
    Ok(())
}

async fn first_token(args: &Args, streams: usize, tokens: usize, requests: usize) -> anyhow::Result<()> {
    let mut alone = args.run(requests.min(200), 1, 1).await?.1;
    alone.sort();
    let mut others = JoinSet::new();
    for _ in 0..streams {
        let args = args.clone();
        others.spawn(async move {
            let request = args.request(tokens);
            let mut connection = args.connect().await?;
            loop {
                connection.ask(&request).await?;
            }
            #[expect(unreachable_code, reason = "the type of the task's result")]
            anyhow::Ok(())
        });
    }
    // They have all begun.
    let mut firsts = args.run(streams.min(2000), 1, 1).await?.1;
    firsts.clear();
    let before = args.usage().await?.0;
    let began = Instant::now();
    let mut connection = args.connect().await?;
    let request = args.request(1);
    for _ in 0..requests {
        firsts.push(connection.ask(&request).await?.first_event);
    }
    let cores = (args.usage().await?.0 - before) / began.elapsed().as_secs_f64();
    if let Some(ended) = others.try_join_next() {
        ended??;
    }
    firsts.sort();
    println!(
        "first token alone:                p50 {:.2} ms, p99 {:.2} ms",
        percentile(&alone, 50),
        percentile(&alone, 99)
    );
    println!(
        "first token beside {streams} streams: p50 {:.2} ms, p99 {:.2} ms",
        percentile(&firsts, 50),
        percentile(&firsts, 99)
    );
    println!("server CPU: {cores:.2} cores");
    Ok(())
}

async fn open(args: &Args, streams: usize) -> anyhow::Result<()> {
    let empty = args.usage().await?.1;
    let request = args.request(1000);
    let mut connections = Vec::new();
    for index in 0..streams {
        let mut connection = args.connect().await.with_context(|| format!("connection {index}; ulimit -n?"))?;
        connection.begin(&request).await?;
        connection.buffer = Vec::new();
        connections.push(connection);
    }
    let full = args.usage().await?.1;
    println!(
        "{streams} open streams: {:.0} MB resident, {:.0} MB before, {:.1} KB a stream",
        full / 1e6,
        empty / 1e6,
        (full - empty) / streams as f64 / 1e3
    );
    Ok(())
}
