//! A stream ends well only with its end mark, however its bytes arrive.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use rbee_client::{ClientError, HiveClient, QueenClient};
use rbee_wire::{ErrorCode, Event, JobRequest};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

/// A server that answers its first connection with these bytes, piece by piece, then closes or stays silent.
async fn server(pieces: &'static [&'static str], stay: Duration) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        let (mut socket, _) = listener.accept().await.unwrap();
        let mut request = [0u8; 4096];
        let _ = socket.read(&mut request).await.unwrap();
        for piece in pieces {
            socket.write_all(piece.as_bytes()).await.unwrap();
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        tokio::time::sleep(stay).await;
    });
    url
}

const HEAD: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n";

async fn events(pieces: &'static [&'static str], stay: Duration) -> (Vec<Event>, Option<ClientError>) {
    let client = QueenClient::new(&server(pieces, stay).await, None);
    let stream = client.run_job(&JobRequest::Status {}).await.unwrap();
    let mut stream = stream.with_idle_limit(Duration::from_millis(200));
    let mut seen = Vec::new();
    while let Some(event) = stream.next().await {
        match event {
            Ok(event) => seen.push(event.event),
            Err(error) => return (seen, Some(error)),
        }
    }
    (seen, None)
}

#[tokio::test]
async fn a_whole_stream_ends_well() {
    let pieces = &[HEAD, "id: 0\nda", "ta: {\"type\":\"done\"}\n", "\n: keep-alive\ndata: [DO", "NE]\n\n"];
    let (seen, error) = events(pieces, Duration::ZERO).await;
    assert!(error.is_none(), "{error:?}");
    assert!(matches!(seen[..], [Event::Done(_)]));
}

#[tokio::test]
async fn a_stream_that_is_cut_is_an_error_even_after_done() {
    let (seen, error) = events(&[HEAD, "data: {\"type\":\"done\"}\n\n"], Duration::ZERO).await;
    assert_eq!(seen.len(), 1);
    assert!(matches!(error, Some(ClientError::Broken { .. })), "{error:?}");
}

#[tokio::test]
async fn silence_is_an_error() {
    let (_, error) = events(&[HEAD, ": keep-alive\n"], Duration::from_secs(5)).await;
    assert!(matches!(error, Some(ClientError::Idle { .. })), "{error:?}");
}

#[tokio::test]
async fn a_refusal_keeps_the_other_ends_words() {
    let answer = "HTTP/1.1 429 Too Many Requests\r\nconnection: close\r\n\r\n{\"error\":{\"code\":\"QUEUE_FULL\",\
                  \"message\":\"m\",\"retryable\":true}}";
    let client = HiveClient::new(&server(Box::leak(Box::new([answer])), Duration::ZERO).await, None);
    let error = client.info().await.unwrap_err();
    assert_eq!(error.refusal().unwrap().code, ErrorCode::QueueFull);
}

#[tokio::test]
async fn nobody_there_is_told_apart() {
    let client = QueenClient::new("http://127.0.0.1:1", None);
    assert!(matches!(client.info().await, Err(ClientError::Unreachable { .. })));
}
