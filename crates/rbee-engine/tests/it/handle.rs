use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use proptest::test_runner::{Config, TestRunner};
use rbee_engine::handle::STREAM_CAPACITY;
use rbee_engine::sim::{Work, expected_tokens};
use rbee_engine::{Ended, EngineError, EngineHandle, Finish, Overloaded, TokenStream};
use tokio::time::{sleep, timeout};

use super::*;

const PATIENCE: Duration = Duration::from_secs(20);

fn start(config: EngineConfig, pace: impl FnMut(Work) + Send + 'static) -> EngineHandle {
    let steps = StepCounter::default();
    let runner = SimRunner::new(SimModel::default(), 4096, 16, 4096, steps.clone(), Box::new(pace));
    EngineHandle::start(Engine::new(Box::new(runner), config).unwrap(), steps).unwrap()
}

fn slow(_: Work) {
    std::thread::sleep(Duration::from_millis(2));
}

async fn rest(stream: &mut TokenStream) -> Vec<Output> {
    let mut outputs = Vec::new();
    while let Some(output) = timeout(PATIENCE, stream.next()).await.expect("the stream hangs") {
        outputs.push(output);
    }
    let ends = outputs.iter().filter(|o| o.is_terminal()).count();
    assert_eq!((ends, outputs.last().map(Output::is_terminal)), (1, Some(true)), "{outputs:?}");
    outputs
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    for _ in 0..2_000 {
        if condition() {
            return;
        }
        sleep(Duration::from_millis(5)).await;
    }
    panic!("never: {what}");
}

fn is_free(handle: &EngineHandle) -> bool {
    let stats = handle.stats();
    (stats.slots_used, stats.waiting, stats.kv_blocks_used, stats.working) == (0, 0, 0, false)
}

#[tokio::test]
async fn requests_join_and_each_gets_its_own_tokens() {
    let handle = start(EngineConfig { slots: 8, step_tokens: 64, prefill_chunk: 16, queue: 56, ..CONFIG }, |_| {});
    let mut tasks = Vec::new();
    for i in 1..=64u32 {
        let handle = handle.clone();
        tasks.push(tokio::spawn(async move {
            let prompt = vec![i; i as usize];
            let mut stream = handle.submit(request(&prompt, 100)).unwrap();
            assert_eq!(ids(&rest(&mut stream).await, 0), expected_tokens(0, &prompt, 100));
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    assert!(is_free(&handle), "{:?}", handle.stats());
    let stats = handle.stats();
    assert_eq!((stats.prompt_tokens, stats.generated_tokens), (64 * 65 / 2, 6400));
    assert!(stats.steps >= 100);
}

#[tokio::test]
async fn a_full_engine_refuses_at_once_and_a_dropped_stream_makes_room() {
    let handle = start(EngineConfig { slots: 1, queue: 1, ..CONFIG }, slow);
    let running = handle.submit(request(&[1], 4000)).unwrap();
    let queued = handle.submit(request(&[2], 4000)).unwrap();
    assert_eq!(handle.submit(request(&[3], 5)).err(), Some(Overloaded::Full { live: 2, capacity: 2 }));
    until("the first runs and the second waits", || handle.stats().slots_used == 1 && handle.stats().waiting == 1)
        .await;
    drop(queued);
    until("the queue is empty", || handle.stats().waiting == 0).await;
    assert_eq!(handle.stats().slots_used, 1);
    drop(running);
    until("all is free", || is_free(&handle)).await;
    assert_eq!(ids(&rest(&mut handle.submit(request(&[3], 5)).unwrap()).await, 0).len(), 5);
}

#[tokio::test]
async fn a_canceller_ends_a_stream_that_somebody_else_reads() {
    let handle = start(CONFIG, slow);
    let mut stream = handle.submit(request(&[1], 4000)).unwrap();
    let canceller = stream.canceller();
    while !matches!(stream.next().await, Some(Output::Token { index: 3, .. })) {}
    canceller.cancel();
    match rest(&mut stream).await.last() {
        Some(Output::Done { finish, completion_tokens, .. }) => {
            assert_eq!(finish, &[Finish::Cancelled]);
            assert!((4..100).contains(completion_tokens));
        }
        other => panic!("{other:?}"),
    }
    assert!(is_free(&handle));
    canceller.cancel();
}

#[tokio::test]
async fn a_request_that_cannot_run_fails_in_its_stream() {
    let handle = start(EngineConfig { slots: 1, queue: 0, ..CONFIG }, |_| {});
    let mut stream = handle.submit(request(&[1; 5000], 1)).unwrap();
    let error = EngineError::ContextLength { prompt: 5000, max_tokens: Some(1), context: 4096 };
    assert_eq!(rest(&mut stream).await, [Output::Failed(error)]);
    assert_eq!(rest(&mut handle.submit(request(&[1], 1)).unwrap()).await.len(), 4);
}

#[tokio::test]
async fn a_stream_that_nobody_reads_ends_typed_and_frees_its_slot() {
    let handle = start(CONFIG, |_| {});
    let mut stream = handle.submit(request(&[1], 4000)).unwrap();
    until("it is ended", || is_free(&handle)).await;
    let outputs = rest(&mut stream).await;
    assert_eq!(outputs.len(), STREAM_CAPACITY + 1);
    let got = ids(&outputs, 0);
    assert_eq!(got, expected_tokens(0, &[1], got.len()));
    let slow = EngineError::SlowConsumer { capacity: STREAM_CAPACITY };
    assert_eq!(outputs.last(), Some(&Output::Failed(slow)));
}

#[tokio::test]
async fn a_panic_in_a_step_leaves_no_healthy_looking_corpse() {
    let fuse = Arc::new(AtomicBool::new(false));
    let lit = Arc::clone(&fuse);
    let handle = start(EngineConfig { slots: 1, ..CONFIG }, move |work| {
        slow(work);
        assert!(!lit.load(Ordering::SeqCst), "the tensors are on fire");
    });
    let mut running = handle.submit(request(&[1], 4000)).unwrap();
    let mut queued = handle.submit(request(&[2], 4000)).unwrap();
    while !matches!(running.next().await, Some(Output::Token { .. })) {}
    assert!(!handle.is_dead());
    fuse.store(true, Ordering::SeqCst);
    for stream in [&mut running, &mut queued] {
        match rest(stream).await.last() {
            Some(Output::Failed(EngineError::Internal(why))) => assert!(why.contains("on fire"), "{why}"),
            other => panic!("{other:?}"),
        }
        assert!(handle.is_dead());
        assert_eq!(handle.submit(request(&[1], 1)).err(), Some(Overloaded::Dead));
    }
    assert!(matches!(timeout(PATIENCE, handle.ended()).await.unwrap(), Ended::Dead(_)));
}

#[tokio::test]
async fn a_failed_forward_pass_ends_the_engine() {
    let engine = hooked(CONFIG, |batch, _| {
        if batch.chunks[0].start > 4 { Err(RunnerError::Forward("device lost".into())) } else { Ok(()) }
    });
    let handle = EngineHandle::start(engine, StepCounter::default()).unwrap();
    let mut stream = handle.submit(request(&[1], 50)).unwrap();
    let outputs = rest(&mut stream).await;
    let error = EngineError::Forward("device lost".into());
    assert_eq!(ids(&outputs, 0), expected_tokens(0, &[1], 5));
    assert_eq!(outputs.last(), Some(&Output::Failed(error.clone())));
    assert!(handle.is_dead());
    assert_eq!(timeout(PATIENCE, handle.ended()).await.unwrap(), Ended::Dead(error));
}

#[tokio::test]
async fn draining_finishes_what_runs_and_takes_no_more() {
    let handle = start(EngineConfig { slots: 1, ..CONFIG }, slow);
    let mut running = handle.submit(request(&[1], 30)).unwrap();
    let mut queued = handle.submit(request(&[2], 30)).unwrap();
    handle.drain();
    assert_eq!(handle.submit(request(&[3], 1)).err(), Some(Overloaded::Draining));
    for (stream, first) in [(&mut running, 1), (&mut queued, 2)] {
        assert_eq!(ids(&rest(stream).await, 0), expected_tokens(0, &[first], 30));
    }
    assert_eq!(timeout(PATIENCE, handle.ended()).await.unwrap(), Ended::Drained);
    assert!(!handle.is_dead());
    assert_eq!(handle.submit(request(&[3], 1)).err(), Some(Overloaded::Draining));
    // An idle engine drains as well.
    let idle = start(CONFIG, |_| {});
    idle.drain();
    assert_eq!(timeout(PATIENCE, idle.ended()).await.unwrap(), Ended::Drained);
}

#[tokio::test]
async fn shutting_down_ends_every_stream() {
    let handle = start(EngineConfig { slots: 1, ..CONFIG }, slow);
    let mut streams: Vec<_> = (1..=5).map(|i| handle.submit(request(&[i], 4000)).unwrap()).collect();
    while !matches!(streams[0].next().await, Some(Output::Token { .. })) {}
    handle.shutdown();
    for stream in &mut streams {
        assert_eq!(rest(stream).await.last(), Some(&Output::Failed(EngineError::ShutDown)));
    }
    assert_eq!(timeout(PATIENCE, handle.ended()).await.unwrap(), Ended::ShutDown);
    assert!(is_free(&handle));
}

#[tokio::test]
async fn the_thread_ends_with_its_last_handle() {
    let alive = Arc::new(());
    let held = Arc::clone(&alive);
    let handle = start(CONFIG, move |_| {
        let _ = &held;
    });
    let mut stream = handle.submit(request(&[1], 50)).unwrap();
    drop(handle);
    assert_eq!(ids(&rest(&mut stream).await, 0).len(), 50, "a stream outlives the handle");
    drop(stream);
    until("the runner is dropped", || Arc::strong_count(&alive) == 1).await;
}

/// Readers that stop, cancel or vanish at any point, and then a drain, a shutdown or a panic: every
/// stream that is read to its end has exactly one terminal output and the right tokens before it.
#[test]
fn every_stream_ends_exactly_once_whatever_happens() {
    use proptest::prelude::*;

    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let reader = (1u32..256, 1usize..60, 0usize..80, 0u8..4);
    let strategy = (prop::collection::vec(reader, 1..24), 0u8..3, 0u64..6);
    let mut runner = TestRunner::new(Config { failure_persistence: None, ..Config::with_cases(60) });
    let result = runner.run(&strategy, |(readers, end, end_after)| {
        runtime.block_on(async {
            let fuse = Arc::new(AtomicBool::new(false));
            let lit = Arc::clone(&fuse);
            let handle = start(EngineConfig { slots: 3, queue: 9, ..CONFIG }, move |_| {
                assert!(!lit.load(Ordering::SeqCst), "told to panic");
                std::thread::sleep(Duration::from_micros(50));
            });
            let mut tasks = Vec::new();
            for (first, max_tokens, patience, manner) in readers {
                let handle = handle.clone();
                tasks.push(tokio::spawn(async move {
                    let Ok(mut stream) = handle.submit(request(&[first; 9], max_tokens)) else { return };
                    let mut seen = Vec::new();
                    while seen.len() < patience
                        && let Some(output) = timeout(PATIENCE, stream.next()).await.expect("the stream hangs")
                    {
                        seen.push(output);
                    }
                    match manner {
                        0 => return,
                        1 => stream.canceller().cancel(),
                        _ => {}
                    }
                    while let Some(output) = timeout(PATIENCE, stream.next()).await.expect("the stream hangs") {
                        seen.push(output);
                    }
                    assert_eq!(seen.iter().filter(|o| o.is_terminal()).count(), 1);
                    assert!(seen.last().unwrap().is_terminal());
                    let got = ids(&seen, 0);
                    assert_eq!(got, expected_tokens(0, &[first; 9], got.len()));
                    if let Some(Output::Done { finish, completion_tokens, .. }) = seen.last() {
                        assert_eq!(*completion_tokens, got.len());
                        assert_eq!(finish[0] == Finish::Length, got.len() == max_tokens);
                    }
                }));
            }
            sleep(Duration::from_millis(end_after)).await;
            match end {
                0 => handle.drain(),
                1 => handle.shutdown(),
                _ => fuse.store(true, Ordering::SeqCst),
            }
            for task in tasks {
                task.await.map_err(|e| TestCaseError::fail(e.to_string()))?;
            }
            handle.drain();
            timeout(PATIENCE, handle.ended()).await.map_err(|_| TestCaseError::fail("no end"))?;
            until("all is free", || is_free(&handle)).await;
            Ok(())
        })
    });
    result.unwrap();
}
