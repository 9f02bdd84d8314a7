//! What arrives on a socket before it is a request, on every route that takes a body: lengths that lie, bodies without an
//! end, two requests in one, numbers no field has, and clients that take their time or do not read.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use rbee_testkit::http::{Http, Request, post, small_window};
use rbee_testkit::process::raise_open_files;
use rbee_testkit::{Cluster, HandWorker, Setup, patience, wait_for};
use rbee_wire::routes::{self, Route};
use rbee_wire::worker::ReadyReply;
use serde_json::{Value, json};

use crate::{infer, prompt, with};

/// Largest body that a daemon reads, as `rbee-service` has it.
const MAX_BODY: usize = 24 << 20;

/// The head of a post, to be followed by whatever.
fn head(server: &Http, path: &str, more: &str) -> String {
    let bearer = server.bearer.as_ref().map(|bearer| format!("Authorization: Bearer {bearer}\r\n")).unwrap_or_default();
    format!("POST {path} HTTP/1.1\r\nHost: localhost\r\n{bearer}Content-Type: application/json\r\n{more}\r\n")
}

/// A worker whose bearer is known, beside the cluster's own.
fn worker(cluster: &Cluster) -> HandWorker {
    let worker = cluster.worker_by_hand(&[]);
    serves(&worker);
    worker
}

/// Waits until a worker would take a request, or would still.
fn serves(worker: &HandWorker) {
    wait_for("the worker to be ready", patience(Duration::from_secs(1)), || {
        let ready: ReadyReply = worker.http.get(routes::WORKER_READY).json();
        if ready.ready { Ok(()) } else { Err(format!("{ready:?}")) }
    });
}

/// Every route of every daemon that reads a body.
fn posts(cluster: &Cluster, worker: &HandWorker) -> Vec<(Http, &'static Route)> {
    let servers =
        [(cluster.queen(), routes::QUEEN), (cluster.hive(), routes::HIVE), (worker.http.clone(), routes::WORKER)];
    let posts = |(server, table): (Http, &'static [Route])| {
        table.iter().filter(|route| route.method == "POST").map(move |route| (server.clone(), route))
    };
    servers.into_iter().flat_map(posts).collect()
}

/// What comes until the server closes, and whether it did within the limit.
fn listen(socket: &mut TcpStream, limit: Duration) -> (String, bool) {
    let deadline = Instant::now() + limit;
    let (mut all, mut piece) = (Vec::new(), [0; 4096]);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return (String::from_utf8_lossy(&all).into_owned(), false);
        }
        socket.set_read_timeout(Some(left)).unwrap();
        match socket.read(&mut piece) {
            Ok(0) => return (String::from_utf8_lossy(&all).into_owned(), true),
            Ok(count) => all.extend_from_slice(&piece[..count]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(_) => return (String::from_utf8_lossy(&all).into_owned(), true),
        }
    }
}

/// Sends raw bytes and listens until the server closes.
fn talk(address: SocketAddr, bytes: &[u8], limit: Duration) -> (String, bool) {
    let mut socket = TcpStream::connect(address).unwrap();
    let _ = socket.write_all(bytes);
    listen(&mut socket, limit)
}

fn is_well(cluster: &Cluster) {
    let told = cluster.job(&infer(&prompt("health"), 3)).whole();
    assert_eq!(told.tokens().len(), 3);
}

#[test]
fn a_length_that_lies_is_refused_or_cut_off_and_nothing_runs() {
    let cluster = Setup::sim("").warm();
    let known = cluster.jobs().len();
    let body = json!({ "operation": "infer", "prompt": prompt("lies"), "detach": true }).to_string();
    let worker = worker(&cluster);
    for (server, route) in posts(&cluster, &worker) {
        for length in [MAX_BODY as u64 + 1, 1 << 40, u64::MAX] {
            let began = Instant::now();
            let lies = head(&server, route.path, &format!("Content-Length: {length}\r\n"));
            let (said, closed) = talk(server.address, lies.as_bytes(), patience(Duration::from_secs(1)));
            assert!(closed && said.starts_with("HTTP/1.1 4"), "{} {length}: {said}", route.path);
            assert!(said.starts_with("HTTP/1.1 413") || length == u64::MAX, "{} {length}: {said}", route.path);
            assert!(began.elapsed() < patience(Duration::from_secs(1)));
        }
        // More is promised than comes.
        let mut socket = TcpStream::connect(server.address).unwrap();
        let lies = head(&server, route.path, &format!("Content-Length: {}\r\n", body.len() + 1));
        socket.write_all(format!("{lies}{body}").as_bytes()).unwrap();
        socket.shutdown(Shutdown::Write).unwrap();
        let (said, closed) = listen(&mut socket, patience(Duration::from_secs(1)));
        assert!(closed && (said.is_empty() || said.starts_with("HTTP/1.1 400")), "{}: {said}", route.path);
    }
    assert_eq!(cluster.jobs().len(), known);
    serves(&worker);
    is_well(&cluster);
}

/// Sends chunks until the server has had enough; gives its status, and how long it took after the limit was sent.
fn endless(server: &Http, path: &str) -> (u16, Duration) {
    let mut socket = TcpStream::connect(server.address).unwrap();
    socket.write_all(head(server, path, "Transfer-Encoding: chunked\r\n").as_bytes()).unwrap();
    let mut listening = socket.try_clone().unwrap();
    let answered = thread::spawn(move || listen(&mut listening, Duration::from_secs(60)));
    let chunk = [format!("{:x}\r\n", 64 << 10).as_bytes(), &[b' '; 64 << 10], b"\r\n"].concat();
    let (mut sent, mut over) = (0, Instant::now());
    while socket.write_all(&chunk).is_ok() && !answered.is_finished() {
        sent += 64 << 10;
        if sent <= MAX_BODY {
            over = Instant::now();
        }
    }
    let took = over.elapsed();
    let (said, closed) = answered.join().unwrap();
    assert!(closed, "{path}: the connection stays open: {said}");
    let status = said.get(9..12).and_then(|status| status.parse().ok());
    (status.unwrap_or_else(|| panic!("{path}: no answer after {sent} bytes: {said:?}")), took)
}

#[test]
fn a_body_without_an_end_is_refused_and_200_of_them_cost_no_more_than_ten() {
    raise_open_files();
    let cluster = Setup::sim("").warm();
    let worker = worker(&cluster);
    for (server, route) in posts(&cluster, &worker) {
        let (status, took) = endless(&server, route.path);
        assert_eq!(status, 413, "{}", route.path);
        assert!(took < patience(Duration::from_secs(1)), "{}: {took:?}", route.path);
    }
    serves(&worker);
    let queen = cluster.the("queen-rbee");
    let before = queen.peak();
    thread::scope(|scope| {
        for _ in 0..200 {
            // What there is no room for now may come again.
            scope.spawn(|| assert!(matches!(endless(&cluster.queen(), routes::JOBS).0, 413 | 503)));
        }
    });
    let rise = queen.peak().saturating_sub(before);
    // Room for two is shared; as they grow they are copied, and each connection has buffers.
    let most = 10 * MAX_BODY as u64;
    assert!(rise <= most, "{} MiB for 200 endless bodies, and {} are enough", rise >> 20, most >> 20);
    is_well(&cluster);
}

#[test]
fn broken_json_and_unknown_fields_are_refused_on_every_route_that_reads_a_body() {
    let cluster = Setup::sim("").warm();
    let known = cluster.jobs().len();
    let deep = format!("{{\"a\":{}", "[".repeat(100_000));
    let bodies: [&[u8]; 13] = [
        b"{\"frobnicate\":1}",
        b"{",
        b"[]",
        b"null",
        b"\"x\"",
        b"{\"a\":1e400}",
        b"{\"a\":NaN}",
        b"{\"a\":\"\\ud800\"}",
        b"{\"a\":1,\"a\":1}",
        b"{} {}",
        b"{\"a\":1,}",
        b"{\"a\":\"\xff\"}",
        deep.as_bytes(),
    ];
    let worker = worker(&cluster);
    for (server, route) in posts(&cluster, &worker) {
        for body in bodies {
            let shown = String::from_utf8_lossy(&body[..body.len().min(40)]).into_owned();
            let answer = server.send(Request::new("POST", route.path).body(body));
            assert_eq!(answer.status(), 400, "{} {shown}: {}", route.path, answer.text());
            let code = answer.json::<Value>()["error"]["code"].to_string().to_uppercase();
            assert!(code.contains("INVALID_REQUEST"), "{} {shown}: {code}", route.path);
        }
    }
    assert_eq!(cluster.jobs().len(), known);
    // Nobody asked them to stop.
    for server in [cluster.queen(), cluster.hive()] {
        assert_eq!(server.get(routes::READY).status(), 200);
    }
    serves(&worker);
}

#[test]
fn numbers_outside_their_range_are_refused_at_once_on_every_surface() {
    let cluster = Setup::sim("").warm();
    let known = cluster.jobs().len();
    let text = prompt("ranges");
    let surfaces = [
        (routes::JOBS, json!({ "operation": "infer", "prompt": text })),
        (routes::CHAT_COMPLETIONS, json!({ "messages": [{ "role": "user", "content": text }] })),
        (routes::COMPLETIONS, json!({ "prompt": text })),
        (routes::INFERENCE, json!({ "prompt": text })),
    ];
    let worker = worker(&cluster);
    let queen = cluster.queen();
    let huge =
        ["2147483648", "9223372036854775808", "18446744073709551616", "-1", "-9223372036854775808", "1e400", "0.5"];
    let mut took = Vec::new();
    for (path, good) in &surfaces {
        let refused = |fields: &str| {
            let body = good.to_string();
            let body = format!("{},{fields}}}", body.strip_suffix('}').unwrap());
            let (server, body) = match *path {
                routes::INFERENCE => {
                    (&worker.http, format!(r#"{{"job_id":"j","request_id":"r","generation":{body}}}"#))
                }
                _ => (&queen, body),
            };
            let began = Instant::now();
            let answer = server.send(Request::new("POST", path).body(body));
            is_refused(&answer, path, fields);
            began.elapsed()
        };
        for field in ["n", "max_tokens", "min_tokens"] {
            took.extend(huge.map(|value| refused(&format!("\"{field}\":{value}"))));
        }
        let zero = [refused("\"n\":0"), refused("\"max_tokens\":0")];
        took.extend(zero);
        took.push(refused("\"min_tokens\":5,\"max_tokens\":4"));
        if *path == routes::COMPLETIONS {
            // There it is a number of alternatives.
            took.extend(huge.map(|value| refused(&format!("\"logprobs\":{value}"))));
        } else {
            took.push(refused("\"min_tokens\":5,\"max_tokens\":null"));
            took.extend(huge.map(|value| refused(&format!("\"logprobs\":true,\"top_logprobs\":{value}"))));
            took.push(refused("\"logprobs\":true,\"top_logprobs\":21"));
        }
        for bias in
            ["{\"1\":100.5}", "{\"1\":-101}", "{\"4294967296\":1}", "{\"-1\":1}", "{\"1.5\":1}", "{\"1\":1e400}"]
        {
            took.push(refused(&format!("\"logit_bias\":{bias}")));
        }
    }
    took.sort_unstable();
    let median = took[took.len() / 2];
    assert!(median < Duration::from_millis(20), "{median:?}, and the longest {:?}", took.last());
    assert_eq!(cluster.jobs().len(), known, "nothing is queued");
    serves(&worker);
}

fn is_refused(answer: &rbee_testkit::http::Answer, path: &str, fields: &str) {
    assert_eq!(answer.status(), 400, "{path} {fields}: {}", answer.text());
}

#[test]
fn two_requests_in_one_are_one_or_none() {
    let cluster = Setup::sim("").warm();
    let known = cluster.jobs().len();
    let body =
        json!({ "operation": "infer", "prompt": prompt("smugglers"), "max_tokens": 1, "detach": true }).to_string();
    let queen = cluster.queen();
    let second = format!("{}{body}", head(&queen, routes::JOBS, &format!("Content-Length: {}\r\n", body.len())));
    let worker = worker(&cluster);
    // A first that no route takes: what reads it as chunks may answer it, and must then close.
    let chunk = "1\r\n{\r\n0\r\n\r\n";
    let (none, all, after_chunk) = (0, second.len(), second.len() + chunk.len());
    for (what, headers, between) in [
        ("CL then TE", format!("Content-Length: {after_chunk}\r\nTransfer-Encoding: chunked\r\n"), chunk),
        ("TE then CL", format!("Transfer-Encoding: chunked\r\nContent-Length: {}\r\n", chunk.len()), chunk),
        ("TE of no kind", "Transfer-Encoding: xchunked\r\n".into(), "0\r\n\r\n"),
        ("TE twice", "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n".into(), "0\r\n\r\n"),
        ("TE folded", "Transfer-Encoding:\r\n chunked\r\n".into(), "0\r\n\r\n"),
        ("TE and a space", format!("Transfer-Encoding : chunked\r\nContent-Length: {after_chunk}\r\n"), "0\r\n\r\n"),
        ("TE, chunk ends bare", "Transfer-Encoding: chunked\r\n".into(), "0\n\n"),
        ("TE, chunk extension bare", "Transfer-Encoding: chunked\r\n".into(), "2;x\n{}\r\n0\r\n\r\n"),
        ("two CL", format!("Content-Length: {none}\r\nContent-Length: {all}\r\n"), ""),
        ("a list of CL", "Content-Length: 0, 0\r\n".into(), ""),
        ("a sign", "Content-Length: +0\r\n".into(), ""),
        ("a space", format!("Content-Length : {all}\r\n"), ""),
        ("obs-fold", format!("X: a\r\n Content-Length: {all}\r\n"), ""),
        ("bare CR", format!("X: a\rContent-Length: {all}\r\n"), ""),
        ("NUL", "X: a\0b\r\n".into(), ""),
    ] {
        for (server, Route { path, .. }) in posts(&cluster, &worker) {
            let bytes = format!("{}{between}{second}", head(&server, path, &headers));
            let (said, closed) = talk(server.address, bytes.as_bytes(), patience(Duration::from_secs(1)));
            assert!(closed, "{what} on {path}: the connection stays open: {said}");
            assert!(said.starts_with("HTTP/1.1 400"), "{what} on {path}: {said}");
            assert_eq!(said.matches("HTTP/1.1 ").count(), 1, "{what} on {path}: {said}");
        }
    }
    // Equal lengths may be taken for one (RFC 9110, 8.6), and then what follows is a request of its own, of a caller who may make it.
    // A line may end in a bare LF (RFC 9112, 2.2); then it ends a header like any other, here one that says that the rest is a body.
    let bytes = format!(
        "{}{second}",
        head(&queen, routes::JOBS, &format!("X: a\nContent-Length: {all}\r\nConnection: close\r\n"))
    );
    let (said, closed) = talk(cluster.queen, bytes.as_bytes(), patience(Duration::from_secs(1)));
    assert!(closed && said.starts_with("HTTP/1.1 400") && said.matches("HTTP/1.1 ").count() == 1, "{said}");
    // A host in the first line is the host that is asked for.
    let foreign =
        format!("GET http://evil.example{} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", routes::INFO);
    let (said, _) = talk(cluster.queen, foreign.as_bytes(), patience(Duration::from_secs(1)));
    assert!(said.starts_with("HTTP/1.1 403"), "{said}");
    assert_eq!(cluster.jobs().len(), known, "the second never runs");
    is_well(&cluster);
}

/// The time of the slowest of many small requests, one after the other.
fn slowest(cluster: &Cluster, count: usize) -> Duration {
    let ask = |_| {
        let began = Instant::now();
        assert_eq!(cluster.queen().get(routes::INFO).status(), 200);
        began.elapsed()
    };
    let mut took: Vec<Duration> = (0..count).map(ask).collect();
    took.sort_unstable();
    // The best of the worst: one pause of a busy machine is not the server's.
    took[count * 95 / 100]
}

#[test]
fn who_sends_slowly_is_cut_off_in_time_and_disturbs_nobody() {
    raise_open_files();
    let cluster = Setup::sim("").warm();
    let alone = slowest(&cluster, 200);
    let began = Instant::now();
    let connect = |bytes: &str| {
        let mut socket = TcpStream::connect(cluster.queen).unwrap();
        socket.write_all(bytes.as_bytes()).unwrap();
        socket
    };
    // Headers that come a byte in a while, bodies that do, and bodies that stop.
    let headers: Vec<TcpStream> = (0..500).map(|_| connect("POST /v1/jobs HTTP/1.1\r\nHost: loc")).collect();
    let long = head(&cluster.queen(), routes::JOBS, "Content-Length: 100000\r\n");
    let dripping: Vec<TcpStream> = (0..50).map(|_| connect(&long)).collect();
    let stopped: Vec<TcpStream> = (0..50).map(|_| connect(&format!("{long}{{"))).collect();
    let among = slowest(&cluster, 200);
    assert!(among < (alone * 3 / 2).max(patience(Duration::from_millis(2))), "{among:?} among them, {alone:?} alone");
    let is_closed = |socket: &mut TcpStream| {
        socket.set_nonblocking(true).unwrap();
        let mut piece = [0; 4096];
        loop {
            match socket.read(&mut piece) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(error) => return error.kind() != ErrorKind::WouldBlock,
            }
        }
    };
    let mut open = [headers, dripping, stopped];
    let mut closed_after = [None; 3];
    while closed_after.contains(&None) {
        assert!(began.elapsed() < Duration::from_secs(60), "{:?}", open.each_ref().map(Vec::len));
        thread::sleep(Duration::from_secs(2));
        for sockets in &mut open[..2] {
            sockets.iter_mut().for_each(|socket| drop(socket.write(b"a")));
        }
        for (sockets, after) in open.iter_mut().zip(&mut closed_after) {
            sockets.retain_mut(|socket| !is_closed(socket));
            if sockets.is_empty() && after.is_none() {
                *after = Some(began.elapsed());
            }
        }
    }
    let [headers, dripping, stopped] = closed_after.map(Option::unwrap);
    // Ten and thirty seconds, and what the test itself takes.
    assert!(headers < Duration::from_secs(10 + 5), "{headers:?}");
    assert!(
        dripping < Duration::from_secs(30 + 10) && stopped < Duration::from_secs(30 + 10),
        "{dripping:?} {stopped:?}"
    );
    is_well(&cluster);
}

#[test]
fn listeners_that_do_not_read_cost_little_and_are_dropped() {
    raise_open_files();
    let cluster = Setup::sim("").warm();
    let job = cluster.post(&with(infer(&prompt("deaf ears"), 40_000), json!({ "detach": true })));
    let path = format!("/v1/jobs/{job}/stream");
    let length = cluster.queen().listen(&path, None).rest().whole().tokens().len();
    assert_eq!(length, 40_000);
    let queen = cluster.the("queen-rbee");
    let before = queen.resident();
    let deaf: Vec<TcpStream> = (0..200)
        .map(|_| {
            let mut socket = small_window(cluster.queen);
            socket.write_all(&Request::new("GET", &path).bytes(cluster.queen)).unwrap();
            socket
        })
        .collect();
    wait_for("all to be listened to", Duration::from_secs(10), || match cluster.job_view(&job).listeners {
        200 => Ok(()),
        other => Err(format!("{other} listen")),
    });
    thread::sleep(Duration::from_secs(1));
    let each = queen.resident().saturating_sub(before) / 200;
    assert!(each <= 128 << 10, "{} KiB each", each >> 10);
    is_well(&cluster);
    wait_for("all to be dropped", Duration::from_secs(30 + 15), || match cluster.job_view(&job).listeners {
        0 => Ok(()),
        other => Err(format!("{other} listen")),
    });
    // The dropped ones see a connection that broke, and never an end.
    let mut one = deaf.into_iter().next().unwrap();
    let (said, closed) = listen(&mut one, Duration::from_secs(10));
    assert!(closed && !said.contains("[DONE]"));
    let known = Http::new(cluster.queen).send(post(routes::JOBS, &json!({ "operation": "status" })));
    assert_eq!(known.status(), 202);
}
