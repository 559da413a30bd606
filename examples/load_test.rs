//! Load for any server of the OpenAI API: what it costs, how fast it is, how many streams it holds.
//!
//!     ulimit -n 20000
//!     cargo run --release --example mock_server &                               # or any server; see its --token-interval-ms
//!     cargo run --release --example load_test -- cost --floor                   # CPU of the server for a token and for a request
//!     cargo run --release --example load_test -- rate --streams 64              # requests and events a second
//!     cargo run --release --example load_test -- paced --floor                  # CPU for a token that comes alone; a paced server
//!     cargo run --release --example load_test -- first-token --streams 1000     # beside that many streams; a paced server
//!     cargo run --release --example load_test -- open --streams 10000           # memory with so many open; a server that holds them
//!
//! The client is written for little work of its own: HTTP/1.1 by hand, one connection for each stream, one thread for all of them, events
//! counted by their prefix. CPU and memory are those of the server's process: of `--pid`, which tells its own work from the kernel's for
//! it, otherwise what its `/metrics` say. With `--floor` the mock server's `/floor` is measured in turns with it: the same bytes without a
//! gateway.

use std::{
    io::{Read, Write},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
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
    /// What is asked.
    #[arg(long, global = true, default_value = "/v1/chat/completions")]
    path: String,
    /// Measures the mock server's `/floor`, too.
    #[arg(long, global = true)]
    floor: bool,
    /// How often each figure is taken; medians are shown.
    #[arg(long, global = true, default_value_t = 5)]
    rounds: usize,
    #[command(subcommand)]
    measure: Measure,
}

#[derive(Subcommand, Clone)]
enum Measure {
    /// CPU for a token and for a request, from requests of two lengths.
    Cost {
        /// Requests of each length, in each round.
        #[arg(long, default_value_t = 4000)]
        requests: usize,
        /// Asked at once.
        #[arg(long, default_value_t = 32)]
        streams: usize,
    },
    /// CPU for a token of a stream whose tokens come one by one.
    Paced {
        /// Streams that run.
        #[arg(long, default_value_t = 1000)]
        streams: usize,
        /// Tokens of each.
        #[arg(long, default_value_t = 1000)]
        tokens: usize,
        /// How long each round counts.
        #[arg(long, default_value_t = 3)]
        seconds: u64,
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
        /// Requests that are measured in each round, one after the other.
        #[arg(long, default_value_t = 500)]
        requests: usize,
        /// Each on a connection of its own, which counts.
        #[arg(long)]
        connect: bool,
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

/// What a process has used.
#[derive(Clone, Copy)]
struct Usage {
    user_seconds: f64,
    /// In the kernel for it; `None` where only the sum is known, which is then `user_seconds`.
    kernel_seconds: Option<f64>,
    resident_bytes: f64,
}

/// CPU for each of something, microseconds.
#[derive(Clone, Copy)]
struct Cost {
    user: f64,
    kernel: Option<f64>,
}

impl Usage {
    /// The CPU used since, for each of `count`.
    fn each_since(&self, before: &Self, count: f64) -> Cost {
        let kernel = self.kernel_seconds.zip(before.kernel_seconds);
        Cost {
            user: (self.user_seconds - before.user_seconds) / count * 1e6,
            kernel: kernel.map(|(after, before)| (after - before) / count * 1e6),
        }
    }
}

impl Cost {
    fn total(self) -> f64 {
        self.user + self.kernel.unwrap_or(0.0)
    }
}

impl std::fmt::Display for Cost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.2} µs", self.total())?;
        match self.kernel {
            Some(kernel) => write!(f, " ({:.2} in user space, {kernel:.2} in the kernel)", self.user),
            None => Ok(()),
        }
    }
}

/// The median round, by its sum.
fn median(mut rounds: Vec<Cost>) -> Cost {
    rounds.sort_by(|left, right| left.total().total_cmp(&right.total()));
    rounds[rounds.len() / 2]
}

/// One line for each path, and what the gateway adds to the floor.
fn print_costs(what: &str, paths: &[Args], costs: &[Cost]) {
    for (args, cost) in paths.iter().zip(costs) {
        println!("{:<22} CPU {what}: {cost}", args.path);
    }
    if let [gateway, floor] = costs {
        println!(
            "{:<22} CPU {what}: {:.2} µs, {:.2} times the floor",
            "above the floor",
            gateway.total() - floor.total(),
            gateway.total() / floor.total()
        );
    }
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
            "POST {} HTTP/1.1\r\nHost: {}\r\nAuthorization: Bearer {}\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            self.path,
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

    /// What is measured: the path, and the floor if that was asked for.
    fn paths(&self) -> Vec<Self> {
        let floor = self.floor.then(|| Self {
            path: "/floor".to_owned(),
            ..self.clone()
        });
        std::iter::once(self.clone()).chain(floor).collect()
    }

    /// What the server has used.
    async fn usage(&self) -> anyhow::Result<Usage> {
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
        Ok(Usage {
            user_seconds: value("process_cpu_seconds_total")?,
            kernel_seconds: None,
            resident_bytes: value("process_resident_memory_bytes")?,
        })
    }

    /// Streams that begin anew when they have ended, and the number of events that they have got.
    async fn background(&self, streams: usize, tokens: usize) -> anyhow::Result<(JoinSet<anyhow::Result<()>>, Arc<AtomicU64>)> {
        let events = Arc::new(AtomicU64::new(0));
        let mut running = JoinSet::new();
        for index in 0..streams {
            let mut connection = self.connect().await.with_context(|| format!("connection {index}; ulimit -n?"))?;
            let (request, events) = (self.request(tokens), Arc::clone(&events));
            running.spawn(async move {
                loop {
                    connection.ask_counting(&request, &events).await?;
                }
            });
        }
        while events.load(Relaxed) < 2 * streams as u64 {
            tokio::time::sleep(Duration::from_millis(20)).await;
            if let Some(ended) = running.try_join_next() {
                ended??;
            }
        }
        Ok((running, events))
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
        self.ask_counting(request, &AtomicU64::new(0)).await
    }

    /// The same; counts events as they come.
    async fn ask_counting(&mut self, request: &[u8], events: &AtomicU64) -> anyhow::Result<Answer> {
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
            events.fetch_add(new, Relaxed);
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

fn usage_of(pid: u32) -> anyhow::Result<Usage> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = stat.rsplit_once(')').context("stat")?.1.split_whitespace().collect();
    let number = |index: usize| fields.get(index).and_then(|field| field.parse::<f64>().ok()).context("stat");
    Ok(Usage {
        user_seconds: number(11)? / 100.0,
        kernel_seconds: Some(number(12)? / 100.0),
        resident_bytes: number(21)? * 4096.0,
    })
}

fn percentile(sorted: &[Duration], percent: usize) -> f64 {
    sorted[(sorted.len() * percent / 100).min(sorted.len() - 1)].as_secs_f64() * 1e3
}

// The client gets by with one core: the others are the server's.
#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    match args.measure.clone() {
        Measure::Cost { requests, streams } => cost(&args, requests, streams).await,
        Measure::Paced { streams, tokens, seconds } => paced(&args, streams, tokens, Duration::from_secs(seconds)).await,
        Measure::Rate { requests, streams, tokens } => rate(&args, requests, streams, tokens).await,
        Measure::FirstToken {
            streams,
            tokens,
            requests,
            connect,
        } => first_token(&args, streams, tokens, requests, connect).await,
        Measure::Open { streams } => open(&args, streams).await,
    }
}

/// CPU of the server for each token and for each request of one token.
async fn cost_of(args: &Args, requests: usize, streams: usize) -> anyhow::Result<(Cost, Cost)> {
    let mut costs = Vec::new();
    let mut events = Vec::new();
    for tokens in [1, 257] {
        let before = args.usage().await?;
        let (came, ..) = args.run(requests, streams, tokens).await?;
        costs.push(args.usage().await?.each_since(&before, requests as f64));
        events.push(came as f64 / requests as f64);
    }
    let tokens = events[1] - events[0];
    ensure!(
        tokens > 1.0,
        "answers of 257 tokens have {} events: does the server generate so many?",
        events[1]
    );
    let token = Cost {
        user: (costs[1].user - costs[0].user) / tokens,
        kernel: costs[1].kernel.zip(costs[0].kernel).map(|(long, short)| (long - short) / tokens),
    };
    Ok((token, costs[0]))
}

async fn cost(args: &Args, requests: usize, streams: usize) -> anyhow::Result<()> {
    let paths = args.paths();
    let (mut tokens, mut calls) = (vec![Vec::new(); paths.len()], vec![Vec::new(); paths.len()]);
    for args in &paths {
        // Connections, caches, and the allocator.
        args.run(requests / 4, streams, 64).await?;
    }
    for _ in 0..args.rounds {
        for (index, args) in paths.iter().enumerate() {
            let (token, call) = cost_of(args, requests, streams).await?;
            tokens[index].push(token);
            calls[index].push(call);
        }
    }
    let medians = |costs: Vec<Vec<Cost>>| costs.into_iter().map(median).collect::<Vec<_>>();
    print_costs("per token, ready at once", &paths, &medians(tokens));
    print_costs("per request of 1 token", &paths, &medians(calls));
    Ok(())
}

async fn paced(args: &Args, streams: usize, tokens: usize, round: Duration) -> anyhow::Result<()> {
    let paths = args.paths();
    let mut costs = Vec::new();
    for args in &paths {
        let (mut running, events) = args.background(streams, tokens).await?;
        let mut rounds = Vec::new();
        let (mut before, mut counted) = (args.usage().await?, events.load(Relaxed));
        for _ in 0..args.rounds {
            tokio::time::sleep(round).await;
            let (after, count) = (args.usage().await?, events.load(Relaxed));
            rounds.push(after.each_since(&before, (count - counted) as f64));
            (before, counted) = (after, count);
        }
        if let Some(ended) = running.try_join_next() {
            ended??;
        }
        costs.push(median(rounds));
    }
    print_costs(&format!("per token, {streams} streams"), &paths, &costs);
    Ok(())
}

async fn rate(args: &Args, requests: usize, streams: usize, tokens: usize) -> anyhow::Result<()> {
    for args in args.paths() {
        args.run(requests / 4, streams, tokens).await?;
        let before = args.usage().await;
        let (events, firsts, took) = args.run(requests, streams, tokens).await?;
        let seconds = took.as_secs_f64();
        println!(
            "{}: {:.0} requests/s, {:.0} events/s, {streams} streams of {tokens} tokens",
            args.path,
            requests as f64 / seconds,
            events as f64 / seconds
        );
        println!(
            "    first text p50 {:.2} ms, p99 {:.2} ms",
            percentile(&firsts, 50),
            percentile(&firsts, 99)
        );
        if let (Ok(before), Ok(after)) = (before, args.usage().await) {
            let cost = after.each_since(&before, requests as f64);
            println!(
                "    server CPU: {:.2} cores, {cost} per request",
                cost.total() * requests as f64 / seconds / 1e6
            );
        }
    }
    Ok(())
}

async fn first_token(args: &Args, streams: usize, tokens: usize, requests: usize, connect: bool) -> anyhow::Result<()> {
    for args in args.paths() {
        let alone = args.probe(requests * args.rounds, connect).await?;
        let (mut running, events) = args.background(streams, tokens).await?;
        let (before, counted, began) = (args.usage().await?, events.load(Relaxed), Instant::now());
        let beside = args.probe(requests * args.rounds, connect).await?;
        let seconds = began.elapsed().as_secs_f64();
        let cores = args.usage().await?.each_since(&before, seconds * 1e6).total();
        let rate = (events.load(Relaxed) - counted) as f64 / seconds;
        if let Some(ended) = running.try_join_next() {
            ended??;
        }
        for (what, times) in [("alone".to_owned(), alone), (format!("beside {streams} streams"), beside)] {
            println!(
                "{}: first token {what}: p50 {:.2} ms, p90 {:.2} ms, p99 {:.2} ms",
                args.path,
                percentile(&times, 50),
                percentile(&times, 90),
                percentile(&times, 99)
            );
        }
        println!("    server CPU beside them: {cores:.2} cores, {rate:.0} events/s");
    }
    Ok(())
}

impl Args {
    /// Times to the first text of requests of one token, one after the other, sorted. A thread of its own asks, so that no other stream's
    /// bytes come before its own, at times that have nothing to do with the server's steps.
    async fn probe(&self, requests: usize, connect: bool) -> anyhow::Result<Vec<Duration>> {
        let (authority, request) = (self.authority().to_owned(), self.request(1));
        let mut times = tokio::task::spawn_blocking(move || {
            let dial = || -> std::io::Result<_> {
                let stream = std::net::TcpStream::connect(&authority)?;
                stream.set_nodelay(true)?;
                Ok(stream)
            };
            let mut stream = dial()?;
            let mut buffer = vec![0; 1 << 14];
            let mut times = Vec::with_capacity(requests);
            for number in 0..requests {
                // The golden ratio's multiples are spread evenly.
                std::thread::sleep(Duration::from_micros(
                    1000 + (number as f64 * 0.618_034).fract().mul_add(3000.0, 0.0) as u64,
                ));
                let began = Instant::now();
                if connect {
                    stream = dial()?;
                }
                stream.write_all(&request)?;
                let mut text = Vec::new();
                let mut first = None;
                while !text.ends_with(b"0\r\n\r\n") {
                    let bytes = stream.read(&mut buffer)?;
                    ensure!(bytes > 0, "the server closed the connection: {}", String::from_utf8_lossy(&text));
                    text.extend_from_slice(&buffer[..bytes]);
                    if first.is_none() && count(&text, b"data: {", 0) >= 2 {
                        first = Some(began.elapsed());
                    }
                }
                let is_whole = text.starts_with(b"HTTP/1.1 200") && count(&text, b"data: [DONE]", 0) > 0;
                ensure!(is_whole, "{}", String::from_utf8_lossy(&text));
                times.push(first.context("no text came")?);
            }
            Ok(times)
        })
        .await??;
        times.sort();
        Ok(times)
    }
}

async fn open(args: &Args, streams: usize) -> anyhow::Result<()> {
    let empty = args.usage().await?.resident_bytes;
    let request = args.request(1000);
    let mut connections = Vec::new();
    for index in 0..streams {
        let mut connection = args.connect().await.with_context(|| format!("connection {index}; ulimit -n?"))?;
        connection.begin(&request).await?;
        connection.buffer = Vec::new();
        connections.push(connection);
    }
    let full = args.usage().await?.resident_bytes;
    println!(
        "{streams} open streams: {:.0} MB resident, {:.0} MB before, {:.1} KB a stream",
        full / 1e6,
        empty / 1e6,
        (full - empty) / streams as f64 / 1e3
    );
    Ok(())
}
