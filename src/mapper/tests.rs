#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::mpsc;

use super::*;

/// Longer than any wait in here may last.
const DEADLINE: Duration = Duration::from_secs(30);
/// A pause that no test outlasts.
const LONG: Duration = Duration::from_secs(24 * 3600);

/// Runs it on a thread of its own, and fails if it is not done in time.
fn in_time<T: Send + 'static>(run: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, result) = mpsc::channel();
    let thread = std::thread::spawn(move || done.send(run()));
    match result.recv_timeout(DEADLINE) {
        Ok(value) => value,
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("it hangs"),
        Err(mpsc::RecvTimeoutError::Disconnected) => {
            std::panic::resume_unwind(thread.join().expect_err("it ended without a result"))
        }
    }
}

/// A turn that stops in the middle, at a gate, and is let go.
struct Stop {
    came: mpsc::Receiver<()>,
    go: mpsc::Sender<()>,
}

impl Stop {
    fn new() -> (Self, impl FnMut() + Send) {
        let (arrive, came) = mpsc::channel();
        let (go, gone) = mpsc::channel();
        let pass = move || {
            arrive.send(()).unwrap();
            gone.recv_timeout(DEADLINE).unwrap();
        };
        (Self { came, go }, pass)
    }

    fn wait(&self) {
        self.came.recv_timeout(DEADLINE).unwrap();
    }

    fn open(&self) {
        self.go.send(()).unwrap();
    }
}

type Turns = Arc<AtomicU64>;

/// A mapper that counts its turns before it takes them.
fn counting(mut turn: impl FnMut(u64) -> Turn + Send + 'static) -> (Mapper, Turns) {
    let turns = Turns::default();
    let counted = Arc::clone(&turns);
    let mapper = Mapper::spawn("test", move || turn(counted.fetch_add(1, SeqCst) + 1), |_| {}).unwrap();
    (mapper, turns)
}

/// Waits until the thread is in a pause, and has not been woken out of it.
fn until_it_pauses(state: &Monitor<State>) {
    let pauses = |state: &State| state.doing == Doing::Pausing && !state.woken;
    while !pauses(&state.lock()) {
        std::thread::yield_now();
    }
}

#[test]
fn it_sleeps_until_it_is_woken_and_takes_one_turn_then() {
    in_time(|| {
        let (mapper, turns) = counting(|_| Turn::Idle);
        mapper.wait_until_idle();
        assert_eq!(turns.load(SeqCst), 0, "nobody woke it");
        for wakes in 1..=100 {
            mapper.wake();
            mapper.wait_until_idle();
            assert_eq!((turns.load(SeqCst), mapper.state.lock().doing), (wakes, Doing::Resting));
        }
        let rests = mapper.state.lock().rests;
        // Whoever waits for it does not set it to work.
        (0..100).for_each(|_| mapper.wait_until_idle());
        assert_eq!((turns.load(SeqCst), mapper.state.lock().rests), (100, rests));
    });
}

#[test]
fn many_wake_ups_before_a_turn_are_one_turn() {
    in_time(|| {
        let (stop, mut pass) = Stop::new();
        let (mapper, turns) = counting(move |turn| {
            if turn == 1 {
                pass();
            }
            Turn::Idle
        });
        mapper.wake();
        stop.wait();
        (0..1000).for_each(|_| mapper.wake());
        stop.open();
        mapper.wait_until_idle();
        assert_eq!(turns.load(SeqCst), 2, "one that it was in, and one for the thousand");
    });
}

#[test]
fn a_wake_up_during_a_turn_is_not_lost() {
    in_time(|| {
        let (stop, mut pass) = Stop::new();
        let (asked, done) = (Turns::default(), Turns::default());
        let (its_asked, its_done) = (Arc::clone(&asked), Arc::clone(&done));
        let (mapper, _) = counting(move |_| {
            // What is asked for after this look is for the next turn.
            let seen = its_asked.load(SeqCst);
            pass();
            its_done.store(seen, SeqCst);
            Turn::Idle
        });
        asked.store(1, SeqCst);
        mapper.wake();
        for more in 2..50 {
            stop.wait();
            asked.store(more, SeqCst);
            mapper.wake();
            stop.open();
        }
        stop.wait();
        stop.open();
        mapper.wait_until_idle();
        assert_eq!(done.load(SeqCst), asked.load(SeqCst));
    });
}

#[test]
fn it_goes_on_by_itself_while_something_is_left() {
    in_time(|| {
        let (mapper, turns) = counting(|turn| match turn {
            1..5 => Turn::Again,
            5..10 => Turn::Later(Duration::from_micros(100)),
            _ => Turn::Idle,
        });
        mapper.wake();
        mapper.wait_until_idle();
        assert_eq!(turns.load(SeqCst), 10);
    });
}

#[test]
fn a_wake_up_ends_a_pause() {
    in_time(|| {
        let (mapper, turns) = counting(|turn| if turn < 20 { Turn::Later(LONG) } else { Turn::Idle });
        for turn in 1..20 {
            mapper.wake();
            until_it_pauses(&mapper.state);
            assert_eq!(turns.load(SeqCst), turn);
        }
        mapper.wake();
        mapper.wait_until_idle();
        assert_eq!(turns.load(SeqCst), 20);
    });
}

#[test]
fn a_wait_ends_while_others_never_stop_waking_it() {
    in_time(|| {
        let (mapper, turns) = counting(|_| Turn::Idle);
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while !over.load(SeqCst) {
                        mapper.wake();
                    }
                });
            }
            for _ in 0..200 {
                let before = turns.load(SeqCst);
                mapper.wake();
                mapper.wait_until_idle();
                assert!(turns.load(SeqCst) > before);
            }
            over.store(true, SeqCst);
        });
    });
}

/// Drops a mapper while its thread is somewhere, lets it go on with `then`, and expects it to be over.
fn is_joined(bring: impl FnOnce(&Mapper), then: impl FnOnce(), turn: impl FnMut() -> Turn + Send + 'static) {
    let over = Arc::new(AtomicBool::new(false));
    struct Over(Arc<AtomicBool>);
    impl Drop for Over {
        fn drop(&mut self) {
            self.0.store(true, SeqCst);
        }
    }
    let guard = Over(Arc::clone(&over));
    let mut turn = turn;
    let turn = move || {
        let _ = &guard;
        turn()
    };
    let mapper = Mapper::spawn("test", turn, |_| {}).unwrap();
    bring(&mapper);
    let state = Arc::clone(&mapper.state);
    let dropping = std::thread::spawn(move || drop(mapper));
    while !state.lock().ended {
        std::thread::yield_now();
    }
    then();
    dropping.join().unwrap();
    assert!(over.load(SeqCst), "the thread let go of what it works on before the drop was over");
    assert_eq!(state.lock().doing, Doing::Gone);
    assert_eq!(Arc::strong_count(&state), 1, "the thread is no more");
}

#[test]
fn a_drop_ends_and_joins_it_wherever_it_is() {
    in_time(|| {
        let nothing = || {};
        for _ in 0..50 {
            // It may not even have begun.
            is_joined(|_| {}, nothing, || Turn::Idle);
            is_joined(Mapper::wake, nothing, || Turn::Idle);
            is_joined(Mapper::wake, nothing, || Turn::Again);
        }
        let after_a_turn = |mapper: &Mapper| {
            mapper.wake();
            mapper.wait_until_idle();
        };
        is_joined(after_a_turn, nothing, || Turn::Idle);
        let in_a_pause = |mapper: &Mapper| {
            mapper.wake();
            until_it_pauses(&mapper.state);
        };
        is_joined(in_a_pause, nothing, || Turn::Later(LONG));
        is_joined(after_a_turn, nothing, || panic!("over"));
        for next in [Turn::Idle, Turn::Again, Turn::Later(LONG)] {
            let (stop, mut pass) = Stop::new();
            let in_a_turn = |mapper: &Mapper| {
                mapper.wake();
                stop.wait();
                mapper.wake();
            };
            let took = Arc::new(AtomicU64::new(0));
            let taken = Arc::clone(&took);
            let turn = move || {
                took.fetch_add(1, SeqCst);
                pass();
                next
            };
            is_joined(in_a_turn, || stop.open(), turn);
            assert_eq!(taken.load(SeqCst), 1, "it took no turn after the one that it was in");
        }
    });
}

#[test]
fn a_panic_is_told_and_nobody_waits_for_what_is_no_more() {
    in_time(|| {
        // In all ways: before anybody waits, and while somebody wakes it and waits.
        for way in 0..4 {
            let (stop, mut pass) = Stop::new();
            let (tell, told) = mpsc::channel();
            let turn = move || {
                pass();
                if way % 2 == 0 { panic!("plain words") } else { panic!("words with a {}", "number") }
            };
            let mapper = Mapper::spawn("test", turn, move |words| tell.send(words).unwrap()).unwrap();
            mapper.wake();
            stop.wait();
            std::thread::scope(|scope| {
                let waiting = (way >= 2).then(|| {
                    // Nobody will see to this one.
                    mapper.wake();
                    scope.spawn(|| mapper.wait_until_idle())
                });
                stop.open();
                if let Some(waiting) = waiting {
                    waiting.join().unwrap();
                }
                mapper.wait_until_idle();
            });
            // Whoever waited finds that it was told.
            let expected = if way % 2 == 0 { "plain words" } else { "words with a number" };
            assert_eq!(told.try_recv().as_deref(), Ok(expected));
            for _ in 0..10 {
                mapper.wake();
                mapper.wait_until_idle();
            }
            assert_eq!(mapper.state.lock().doing, Doing::Gone);
        }
    });
}

#[test]
fn a_panic_of_whoever_is_told_of_one_hangs_nobody() {
    in_time(|| {
        let mapper = Mapper::spawn("test", || panic!("first"), |_| panic!("second")).unwrap();
        mapper.wake();
        mapper.wait_until_idle();
        mapper.wake();
        drop(mapper);
    });
}

#[test]
fn it_has_the_name_it_was_given() {
    in_time(|| {
        let (tell, told) = mpsc::channel();
        let turn = move || {
            tell.send(std::thread::current().name().map(str::to_owned)).unwrap();
            Turn::Idle
        };
        let mapper = Mapper::spawn("a name", turn, |_| {}).unwrap();
        mapper.wake();
        assert_eq!(told.recv_timeout(DEADLINE).unwrap().as_deref(), Some("a name"));
    });
}
