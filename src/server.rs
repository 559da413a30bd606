//! Connections: accept, TLS, timeouts, drain. What is served on them is a [`Router`] that knows nothing of this.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::Router;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::{conn::auto, graceful::GracefulShutdown},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpSocket, TcpStream},
    runtime::{self, Runtime},
    time::{Instant, Sleep},
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        self,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    },
};

use crate::config::TlsFiles;

/// How connections are treated.
#[derive(Clone)]
pub struct ServerSettings {
    /// HTTPS, if given.
    pub tls: Option<Arc<rustls::ServerConfig>>,
    /// For a TLS handshake and for a request's head; an idle connection is closed after it.
    pub read_timeout: Duration,
    /// A peer that takes no byte for so long is cut off.
    pub write_timeout: Duration,
}

/// Reads a certificate chain and its key.
///
/// # Errors
/// A sentence that names the flag and the file.
pub fn load_tls(files: &TlsFiles) -> Result<Arc<rustls::ServerConfig>, String> {
    let certificate_error = |reason: String| format!("--ssl-certfile {}: {reason}", files.certificate.display());
    let key_error = |reason: String| format!("--ssl-keyfile {}: {reason}", files.key.display());
    let chain = CertificateDer::pem_file_iter(&files.certificate)
        .map_err(|error| certificate_error(error.to_string()))?
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| certificate_error(error.to_string()))?;
    if chain.is_empty() {
        return Err(certificate_error("no certificate in it".to_owned()));
    }
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|error| key_error(error.to_string()))?;
    // The provider is named: two of them may be linked in, and rustls then has no default.
    let mut config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| certificate_error(error.to_string()))?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(|error| certificate_error(format!("does not fit the key {}: {error}", files.key.display())))?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// The runtime for connections.
///
/// # Errors
/// The system gives no threads.
pub fn runtime() -> io::Result<Runtime> {
    // A step of the engine wakes every stream at once. After so many of them a thread looks for new requests: by default they would wait
    // for 61 writes, which is milliseconds.
    const TASKS_BETWEEN_POLLS: u32 = 8;
    runtime::Builder::new_multi_thread()
        .enable_all()
        .event_interval(TASKS_BETWEEN_POLLS)
        .build()
}

/// Bytes of a request's head: its line and its headers. More is a 431.
const MAX_HEAD_BYTES: usize = 64 << 10;

/// Serves until `shutdown` resolves; then accepts no more, closes idle connections and waits for the others until `drained`
/// resolves (or they have all ended).
pub async fn serve(
    listener: TcpListener,
    router: Router,
    settings: ServerSettings,
    shutdown: impl Future<Output = ()>,
    drained: impl Future<Output = ()>,
) {
    let connections = GracefulShutdown::new();
    let mut shutdown = std::pin::pin!(shutdown);
    loop {
        let stream = tokio::select! {
            accepted = accept(&listener) => accepted,
            () = &mut shutdown => break,
        };
        let (router, settings, watcher) = (router.clone(), settings.clone(), connections.watcher());
        // Nothing to keep the handle for: the watcher knows of the connection, and its errors are the peer's.
        drop(tokio::spawn(async move {
            let peer = stream.peer_addr().ok();
            if let Err(error) = serve_connection(stream, router, settings, watcher).await {
                tracing::debug!(?peer, error, "a connection ended early");
            }
        }));
    }
    drop(listener);
    tokio::select! {
        () = connections.shutdown() => {}
        () = drained => {}
    }
}

/// The next connection. Errors are of that connection or of a lack of file handles: both pass.
async fn accept(listener: &TcpListener) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return stream,
            Err(error) if is_of_the_connection(&error) => {}
            Err(error) => {
                tracing::error!(%error, "no connection can be accepted; trying again in a second");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

fn is_of_the_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

async fn serve_connection(
    stream: TcpStream,
    router: Router,
    settings: ServerSettings,
    watcher: hyper_util::server::graceful::Watcher,
) -> Result<(), String> {
    // Tokens are small writes that should leave at once.
    let _ = stream.set_nodelay(true);
    let stream = WriteTimeout::new(stream, settings.write_timeout);
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(settings.read_timeout)
        .max_buf_size(MAX_HEAD_BYTES);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_header_list_size(MAX_HEAD_BYTES as u32)
        .keep_alive_interval(settings.read_timeout)
        .keep_alive_timeout(settings.read_timeout);
    let service = TowerToHyperService::new(router);
    let result = match settings.tls {
        Some(tls) => {
            let handshake = tokio::time::timeout(settings.read_timeout, TlsAcceptor::from(tls).accept(stream)).await;
            let stream = handshake.map_err(|_| "no TLS handshake in time")?.map_err(|error| error.to_string())?;
            watcher.watch(builder.serve_connection(TokioIo::new(stream), service).into_owned()).await
        }
        None => watcher.watch(builder.serve_connection(TokioIo::new(stream), service).into_owned()).await,
    };
    result.map_err(|error| error.to_string())
}

/// An address that is taken, but where nothing is accepted yet: who connects is refused, not left waiting.
pub struct BoundSocket {
    socket: TcpSocket,
    host: String,
    port: u16,
}

/// Takes an address. `host` is a name or an address.
///
/// # Errors
/// A sentence that names the flags.
pub async fn bind(host: &str, port: u16) -> Result<BoundSocket, String> {
    let mut last_error = io::Error::from(io::ErrorKind::AddrNotAvailable);
    let addresses = tokio::net::lookup_host((host, port))
        .await
        .map_err(|error| format!("--host {host}: {error}"))?;
    for address in addresses {
        match bind_address(address) {
            Ok(socket) => {
                let host = host.to_owned();
                return Ok(BoundSocket { socket, host, port });
            }
            Err(error) => last_error = error,
        }
    }
    Err(bind_error(host, port, &last_error))
}

fn bind_address(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // A server that was just stopped leaves its port in TIME_WAIT.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    Ok(socket)
}

impl BoundSocket {
    /// Starts to accept.
    ///
    /// # Errors
    /// A sentence that names the flags.
    pub fn listen(self) -> Result<(TcpListener, SocketAddr), String> {
        const BACKLOG: u32 = 4096;
        let listener = self.socket.listen(BACKLOG).map_err(|error| bind_error(&self.host, self.port, &error))?;
        let address = listener.local_addr().map_err(|error| bind_error(&self.host, self.port, &error))?;
        Ok((listener, address))
    }
}

fn bind_error(host: &str, port: u16, error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::AddrInUse => format!("--port {port}: something else listens on {host}:{port}; choose another, or 0 for a free one"),
        io::ErrorKind::PermissionDenied => format!("--port {port}: not allowed to listen there: {error}"),
        _ => format!("--host {host} --port {port}: {error}"),
    }
}

/// A stream whose writes fail when the peer takes nothing for `timeout`: a slow reader is cut off, not waited for.
struct WriteTimeout<S> {
    inner: S,
    timeout: Duration,
    /// Runs while a write waits.
    deadline: Option<Pin<Box<Sleep>>>,
}

impl<S> WriteTimeout<S> {
    fn new(inner: S, timeout: Duration) -> Self {
        Self {
            inner,
            timeout,
            deadline: None,
        }
    }

    /// Passes a write's outcome on, or an error when it has waited too long.
    fn limit<T>(&mut self, context: &mut Context<'_>, outcome: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if outcome.is_ready() {
            self.deadline = None;
            return outcome;
        }
        let timeout = self.timeout;
        let deadline = self
            .deadline
            .get_or_insert_with(|| Box::pin(tokio::time::sleep_until(Instant::now() + timeout)));
        ready!(deadline.as_mut().poll(context));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the peer takes nothing")))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for WriteTimeout<S> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for WriteTimeout<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.inner).poll_write(context, bytes);
        self.limit(context, outcome)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.inner).poll_write_vectored(context, bytes);
        self.limit(context, outcome)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let outcome = Pin::new(&mut self.inner).poll_flush(context);
        self.limit(context, outcome)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let outcome = Pin::new(&mut self.inner).poll_shutdown(context);
        self.limit(context, outcome)
    }
}

#[cfg(test)]
mod tests {
    use axum::{body::Body, routing::get};
    use bytes::Bytes;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        sync::{oneshot, watch},
    };

    use super::*;

    /// A server over `router`; dropping `stop` shuts it down, dropping `cut` ends the drain.
    struct Running {
        address: SocketAddr,
        stop: Option<oneshot::Sender<()>>,
        cut: Option<oneshot::Sender<()>>,
        done: tokio::task::JoinHandle<()>,
    }

    async fn start(router: Router, settings: ServerSettings) -> Running {
        let (listener, address) = bind("127.0.0.1", 0).await.unwrap().listen().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let (cut, is_cut) = oneshot::channel::<()>();
        let wait = |receiver: oneshot::Receiver<()>| async {
            let _ = receiver.await;
        };
        let done = tokio::spawn(serve(listener, router, settings, wait(stopped), wait(is_cut)));
        Running {
            address,
            stop: Some(stop),
            cut: Some(cut),
            done,
        }
    }

    fn settings() -> ServerSettings {
        ServerSettings {
            tls: None,
            read_timeout: Duration::from_secs(60),
            write_timeout: Duration::from_secs(60),
        }
    }

    async fn request(stream: &mut (impl AsyncRead + AsyncWrite + Unpin), path: &str) {
        let head = format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
    }

    async fn read_to_end(stream: &mut (impl AsyncRead + Unpin)) -> String {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).await.unwrap();
        String::from_utf8(bytes).unwrap()
    }

    /// A body that sends `part`, then waits until `gate` is true, then sends `end`.
    fn gated(gate: watch::Receiver<bool>) -> Router {
        Router::new().route(
            "/slow",
            get(move || {
                let mut gate = gate.clone();
                async move {
                    let rest = async move {
                        gate.wait_for(|open| *open).await.unwrap();
                        Ok(Bytes::from("end"))
                    };
                    let parts = futures::stream::once(async { Ok::<_, io::Error>(Bytes::from("part")) });
                    Body::from_stream(futures::StreamExt::chain(parts, futures::stream::once(rest)))
                }
            }),
        )
    }

    async fn read_until(stream: &mut (impl AsyncRead + Unpin), needle: &str) {
        let mut seen = Vec::new();
        while !String::from_utf8_lossy(&seen).contains(needle) {
            assert_ne!(stream.read_buf(&mut seen).await.unwrap(), 0, "ended before {needle:?}");
        }
    }

    #[tokio::test]
    async fn shutdown_closes_idle_connections_and_lets_streams_end() {
        let (open, gate) = watch::channel(false);
        let mut server = start(gated(gate), settings()).await;
        let mut idle = TcpStream::connect(server.address).await.unwrap();
        let mut busy = TcpStream::connect(server.address).await.unwrap();
        request(&mut busy, "/slow").await;
        read_until(&mut busy, "part").await;

        drop(server.stop.take());
        assert_eq!(read_to_end(&mut idle).await, "");
        assert!(!server.done.is_finished());
        open.send_replace(true);
        assert!(read_to_end(&mut busy).await.contains("end"));
        server.done.await.unwrap();
        assert!(TcpStream::connect(server.address).await.is_err(), "the port is given back");
        drop(server.cut);
    }

    #[tokio::test]
    async fn what_still_runs_when_the_drain_ends_is_not_waited_for() {
        let (_open, gate) = watch::channel(false);
        let mut server = start(gated(gate), settings()).await;
        let mut busy = TcpStream::connect(server.address).await.unwrap();
        request(&mut busy, "/slow").await;
        read_until(&mut busy, "part").await;
        drop(server.stop.take());
        drop(server.cut.take());
        server.done.await.unwrap();
    }

    #[tokio::test]
    async fn a_head_that_never_ends_closes_the_connection() {
        let mut settings = settings();
        settings.read_timeout = Duration::from_millis(50);
        let server = start(Router::new(), settings).await;
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nHost:").await.unwrap();
        read_to_end(&mut stream).await;
    }

    #[tokio::test]
    async fn a_head_that_is_too_large_reaches_no_route() {
        let server = start(Router::new().route("/", get(|| async { "answered" })), settings()).await;
        for (bytes, is_answered) in [(MAX_HEAD_BYTES / 2, true), (MAX_HEAD_BYTES + 1000, false)] {
            let mut stream = TcpStream::connect(server.address).await.unwrap();
            let head = format!("GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Large: {}\r\n\r\n", "x".repeat(bytes));
            stream.write_all(head.as_bytes()).await.unwrap();
            let mut answer = Vec::new();
            // Closed with some of the head unread, the connection may be reset before the 431 is read.
            let end = stream.read_to_end(&mut answer).await;
            let answer = String::from_utf8_lossy(&answer);
            if is_answered {
                assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("answered"), "{answer}");
            } else {
                assert!(answer.starts_with("HTTP/1.1 431") || end.is_err(), "{answer}");
            }
        }
    }

    #[tokio::test]
    async fn a_reader_that_takes_nothing_is_cut_off_and_its_body_dropped() {
        let (dropped, mut is_dropped) = watch::channel(());
        let router = Router::new().route(
            "/flood",
            get(move || {
                let dropped = dropped.clone();
                async move {
                    let flood = futures::stream::repeat_with(move || {
                        let _held = &dropped;
                        Ok::<_, io::Error>(Bytes::from(vec![b'x'; 1 << 16]))
                    });
                    Body::from_stream(flood)
                }
            }),
        );
        let mut settings = settings();
        settings.write_timeout = Duration::from_millis(50);
        let mut server = start(router, settings).await;
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        request(&mut stream, "/flood").await;
        read_until(&mut stream, "xxx").await;
        // Nothing more is read. The server ends, without its drain being cut, only if the connection was given up.
        drop(server.stop.take());
        server.done.await.unwrap();
        // Every sender is gone: the routers and the endless body.
        assert!(is_dropped.changed().await.is_err());
        drop(server.cut);
    }

    #[tokio::test]
    async fn https_with_a_certificate_from_files() {
        let folder = tempfile::tempdir().unwrap();
        let files = TlsFiles {
            certificate: folder.path().join("cert.pem"),
            key: folder.path().join("key.pem"),
        };
        let certified = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        std::fs::write(&files.certificate, certified.cert.pem()).unwrap();
        std::fs::write(&files.key, certified.signing_key.serialize_pem()).unwrap();
        let mut settings = settings();
        settings.tls = Some(load_tls(&files).unwrap());
        let server = start(Router::new().route("/", get(|| async { "over tls" })), settings).await;

        let mut roots = rustls::RootCertStore::empty();
        roots.add(certified.cert.der().clone()).unwrap();
        let client = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let stream = TcpStream::connect(server.address).await.unwrap();
        let connector = tokio_rustls::TlsConnector::from(Arc::new(client));
        let mut stream = connector.connect("localhost".try_into().unwrap(), stream).await.unwrap();
        request(&mut stream, "/").await;
        read_until(&mut stream, "over tls").await;
    }

    #[test]
    fn bad_tls_files_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let one = rcgen::generate_simple_self_signed(["a".to_owned()]).unwrap();
        let other = rcgen::generate_simple_self_signed(["b".to_owned()]).unwrap();
        std::fs::write(path("cert.pem"), one.cert.pem()).unwrap();
        std::fs::write(path("other.pem"), other.signing_key.serialize_pem()).unwrap();
        std::fs::write(path("empty.pem"), "").unwrap();
        for (certificate, key, reason) in [
            ("missing.pem", "other.pem", "--ssl-certfile"),
            ("empty.pem", "other.pem", "no certificate in it"),
            ("cert.pem", "empty.pem", "--ssl-keyfile"),
            ("cert.pem", "other.pem", "does not fit the key"),
        ] {
            let error = load_tls(&TlsFiles {
                certificate: path(certificate),
                key: path(key),
            })
            .unwrap_err();
            assert!(error.contains(reason), "{error}");
        }
    }

    #[tokio::test]
    async fn a_taken_port_is_named() {
        let (_held, address) = bind("127.0.0.1", 0).await.unwrap().listen().unwrap();
        let error = bind("127.0.0.1", address.port()).await.err().unwrap();
        assert!(
            error.starts_with(&format!("--port {}: something else listens", address.port())),
            "{error}"
        );
    }
}
