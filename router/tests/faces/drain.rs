//! What a drain waits for.

use std::time::Duration;

use axum::Router;
use axum::routing::get;
use quire_router::config::ServerConfig;
use quire_router::error::ApiError;
use quire_router::generation::Input;
use quire_router::listener::Listener;
use quire_router::metrics::Listener as Kind;
use quire_router::shutdown::{Shutdown, Signals, drain};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::Server;

/// More than the buffers of any socket.
const BIG: usize = 64 << 20;

/// An answer that is complete but not read yet is not cut while the limit is far.
#[tokio::test]
async fn a_slow_reader_gets_the_whole_answer() {
    let server = Server::saying("x");
    let shutdown = Shutdown::default();
    let address = "127.0.0.1:0".parse().expect("an address");
    let listener = Listener::bind(Kind::Http, address, &ServerConfig::default()).await.expect("a free port");
    let address = listener.address().expect("bound");
    let app = Router::new().route("/big", get(async || vec![b'x'; BIG]));
    tokio::spawn(listener.serve(app, shutdown.clone()));
    // Connections that say nothing hold up nothing.
    let _silent = TcpStream::connect(address).await.expect("connects");
    let mut client = TcpStream::connect(address).await.expect("connects");
    client.write_all(b"GET /big HTTP/1.1\r\nhost: quire\r\n\r\n").await.expect("sends");
    let mut start = vec![0; 4096];
    client.read_exact(&mut start).await.expect("an answer begins");
    let draining = tokio::spawn(async move {
        let mut signals = Signals::catch().expect("signals");
        drain(&shutdown, &server.lifecycle, &mut signals, Duration::from_secs(600)).await;
    });
    // Longer than the moment that is given where the limit has passed.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).await.expect("the answer ends");
    assert!(start.len() + rest.len() > BIG, "{} bytes came", start.len() + rest.len());
    draining.await.expect("the drain ends once everything is said");
}

#[test]
fn tokenizing_is_in_flight() {
    // One thread for blocking work, which the test holds: otherwise that work may be done before anyone looks.
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(1).build().expect("a runtime");
    runtime.block_on(async {
        let server = Server::saying("x");
        let text = |text: String| Input::Text { text, add_special_tokens: false };
        let input = || text("Once upon a time ".repeat(100));
        let (release, held) = std::sync::mpsc::channel::<()>();
        let holder = tokio::task::spawn_blocking(move || held.recv());
        {
            let mut tokenizing = Box::pin(server.service.tokenize(input()));
            let mut detokenizing = Box::pin(server.service.detokenize(vec![100]));
            assert!(futures::poll!(&mut tokenizing).is_pending());
            assert!(futures::poll!(&mut detokenizing).is_pending());
            assert_eq!(server.service.num_inflight(), 2);
            // A few words wait for no thread.
            assert!(futures::poll!(Box::pin(server.service.tokenize(text("Once".to_owned())))).is_ready());
            release.send(()).expect("the thread is held");
            holder.await.expect("no panic").expect("released");
            tokenizing.await.expect("tokens");
            detokenizing.await.expect("text");
        }
        assert_eq!(server.service.num_inflight(), 0);
        server.service.begin_drain();
        assert!(matches!(server.service.tokenize(input()).await, Err(ApiError::Unavailable { .. })));
    });
}
