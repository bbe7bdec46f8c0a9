//! What requests wait for of the driver's time, worked out by hand.

use std::cell::Cell;

use super::*;
use crate::device::DriverCalls;

/// An ideal policy whose calls map so much, a millisecond a map.
#[derive(Debug)]
struct Priced<'a> {
    ideal: Ideal,
    maps: &'a Cell<u64>,
    admit: u64,
    step: u64,
    retire: u64,
    /// Of each iteration; nothing later.
    tend: Vec<u64>,
}

impl<'a> Priced<'a> {
    fn new(ideal: Ideal, maps: &'a Cell<u64>, tend: &[u64]) -> Self {
        // Maps in the order of the calls.
        Self { ideal, maps, admit: 4, step: 3, retire: 2, tend: tend.iter().rev().copied().collect() }
    }

    fn map(&self, count: u64) {
        self.maps.set(self.maps.get() + count);
    }
}

impl Policy for Priced<'_> {
    fn name(&self) -> &'static str {
        "priced"
    }
    fn can_ever_hold(&self, tokens: TokenCount) -> bool {
        self.ideal.can_ever_hold(tokens)
    }
    fn admit(&mut self, request: RequestId, prompt: TokenCount) -> Result<bool> {
        self.map(self.admit);
        self.ideal.admit(request, prompt)
    }
    fn step(&mut self, totals: &[(RequestId, TokenCount)]) -> Result<bool> {
        self.map(self.step);
        self.ideal.step(totals)
    }
    fn retire(&mut self, request: RequestId) -> Result<()> {
        self.map(self.retire);
        self.ideal.retire(request)
    }
    fn tend(&mut self) -> Result<()> {
        let maps = self.tend.pop().unwrap_or(0);
        self.map(maps);
        self.ideal.log(|| format!("tend {maps}"));
        Ok(())
    }
    fn usage(&self) -> Usage {
        self.ideal.usage()
    }
    fn adopted(&self) -> u64 {
        0
    }
    fn reclaimed(&self) -> u64 {
        0
    }
}

/// Serves with a policy that made ten maps before.
fn priced(ideal: Ideal, tend: &[u64], requests: &[Request]) -> (Split, u64, Vec<String>) {
    let maps = Cell::new(10);
    let clock = || Spent {
        calls: DriverCalls { map: maps.get(), ..DriverCalls::default() },
        modelled: Duration::from_millis(maps.get()),
    };
    let mut policy = Priced::new(ideal, &maps, tend);
    let outcome = serve(&mut policy, requests, SETTINGS, &clock, &mut |_| {}, None).unwrap();
    (outcome.split, maps.get() - 10, policy.ideal.log.unwrap())
}

#[test]
fn a_policy_is_tended_while_the_model_runs_and_nobody_waits_for_that() {
    // Two iterations of prefill, then two tokens.
    let (split, maps, log) = priced(Ideal::logged(100, 9), &[1, 20, 25, 7], &[request(0, 11, 2)]);
    assert_eq!(
        log,
        ["admit 0 11", "tend 1", "tend 20", "step {0: 12}", "tend 25", "step {0: 13}", "tend 7", "retire 0"]
    );
    let ms = Duration::from_millis;
    assert_eq!((split.on_path, split.off_path), (ms(4 + 3 + 3 + 2), ms(1 + 20 + 25 + 7)));
    assert_eq!((split.longest_stall, split.calls_off_path.map, maps), (ms(4), 53, 65));
}

#[test]
fn what_is_not_done_when_the_model_is_the_next_call_waits_for() {
    // The step after the second iteration waits for 9 ms, and the retirement for 1 ms.
    let (split, maps, _) = priced(Ideal::logged(100, 9), &[0, 34, 0, 26], &[request(0, 11, 2)]);
    let ms = Duration::from_millis;
    assert_eq!((split.on_path, split.off_path), (ms(12 + 9 + 1), ms(25 + 25)));
    assert_eq!((split.longest_stall, split.calls_off_path.map, maps), (ms(3 + 9), 60, 72));
}

#[test]
fn preemptions_and_refusals_are_waited_for_too() {
    let requests = [request(0, 4, 4), request(0, 4, 2), request(1, 1, 1)];
    let (split, maps, log) = priced(Ideal::logged(10, 9), &[1; 99], &requests);
    let tended = wide(log.iter().filter(|line| line.starts_with("tend")).count());
    assert!(log.iter().any(|line| line.ends_with("does not fit")));
    assert_eq!((split.calls_off_path.map, split.off_path), (tended, Duration::from_millis(tended)));
    assert_eq!(split.on_path + split.off_path, Duration::from_millis(maps));
}

#[test]
fn reading_the_clock_is_no_part_of_a_step() {
    let pause = Duration::from_millis(20);
    let slow = || {
        std::thread::sleep(pause);
        Spent::default()
    };
    let mut policy = Ideal::logged(100, 9);
    let outcome = serve(&mut policy, &[request(0, 1, 3)], SETTINGS, &slow, &mut |_| {}, None).unwrap();
    let shortest = outcome.step_ns.iter().min().copied().unwrap();
    assert!(Duration::from_nanos(shortest) < pause, "{shortest} ns");
}
