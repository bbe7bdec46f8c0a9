//! Is any wake-up lost, does anybody wait for ever, and does the thread always end, in every order?
//!
//! Loom fails a model in which a thread waits that nobody will notify. What is asked for is kept beside
//! the mapper, under a lock, as the cache keeps it. Run with
//!
//! ```text
//! RUSTFLAGS="--cfg loom" cargo test -p vattn --release --lib loom
//! ```

use loom::thread;

use super::*;
use crate::sync::Ranked;

/// What is asked for, and what has been done.
#[derive(Debug, Default)]
struct Tasks {
    asked: u64,
    done: u64,
    turns: u64,
}

struct Shared {
    tasks: Arc<Ranked<Tasks, 3>>,
    mapper: Mapper,
}

impl Shared {
    /// A mapper that does all there is in a turn, and then says what `next` does of the turns so far.
    fn new(next: impl Fn(u64) -> Turn + Send + 'static) -> Arc<Self> {
        let tasks = Arc::new(Ranked::new(Tasks::default()));
        let its = Arc::clone(&tasks);
        let turn = move || {
            let mut tasks = its.lock();
            tasks.done = tasks.asked;
            tasks.turns += 1;
            next(tasks.turns)
        };
        Arc::new(Self { tasks, mapper: Mapper::spawn("model", turn, |_| {}).unwrap() })
    }

    fn ask(&self) {
        self.tasks.lock().asked += 1;
        self.mapper.wake();
    }

    /// Asks, waits, and finds that done.
    fn ask_and_wait(&self) {
        let asked = {
            let mut tasks = self.tasks.lock();
            tasks.asked += 1;
            tasks.asked
        };
        self.mapper.wake();
        self.mapper.wait_until_idle();
        let tasks = self.tasks.lock();
        assert!(tasks.done >= asked, "{} of {asked} are done", tasks.done);
    }
}

/// Up to so many switches of threads that neither asked for.
fn model(preemptions: usize, run: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(run);
}

#[test]
fn what_is_asked_for_is_done_when_the_wait_is_over() {
    model(3, || {
        let shared = Shared::new(|_| Turn::Idle);
        shared.ask_and_wait();
        assert_eq!(shared.tasks.lock().turns, 1);
        shared.ask_and_wait();
        assert_eq!(shared.tasks.lock().turns, 2);
    });
}

#[test]
fn two_who_ask_at_once_are_both_seen_to() {
    model(3, || {
        let shared = Shared::new(|_| Turn::Idle);
        let other = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || shared.ask_and_wait())
        };
        shared.ask_and_wait();
        other.join().unwrap();
        let tasks = shared.tasks.lock();
        assert_eq!(tasks.done, 2);
        assert!((1..=2).contains(&tasks.turns), "{tasks:?}");
    });
}

#[test]
fn one_waits_while_the_other_goes_on_asking() {
    model(3, || {
        let shared = Shared::new(|_| Turn::Idle);
        let other = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                shared.ask();
                shared.ask();
            })
        };
        shared.mapper.wait_until_idle();
        other.join().unwrap();
        shared.mapper.wait_until_idle();
        assert_eq!(shared.tasks.lock().done, 2);
    });
}

#[test]
fn it_goes_on_after_a_pause_and_is_woken_out_of_one() {
    model(2, || {
        let shared = Shared::new(|turns| match turns {
            1 => Turn::Again,
            2 => Turn::Later(Duration::from_millis(1)),
            _ => Turn::Idle,
        });
        let other = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || shared.ask())
        };
        shared.ask_and_wait();
        other.join().unwrap();
        shared.mapper.wait_until_idle();
        let tasks = shared.tasks.lock();
        assert_eq!(tasks.done, 2);
        assert!((3..=4).contains(&tasks.turns), "{tasks:?}");
    });
}

#[test]
fn a_drop_ends_it_whatever_it_was_asked_for() {
    model(3, || {
        let shared = Shared::new(|turns| if turns == 1 { Turn::Again } else { Turn::Idle });
        let tasks = Arc::clone(&shared.tasks);
        let other = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || shared.ask())
        };
        shared.ask();
        // Whoever is the last to let go joins the thread.
        drop(shared);
        other.join().unwrap();
        assert!(tasks.lock().turns <= 3);
        // The closure is dropped with the thread: who is left is this one alone.
        assert_eq!(Arc::strong_count(&tasks), 1);
    });
}

#[test]
fn a_drop_ends_a_pause() {
    model(3, || {
        let shared =
            Shared::new(|turns| if turns < 3 { Turn::Later(Duration::from_secs(3600)) } else { Turn::Idle });
        shared.ask();
        drop(shared);
    });
}
