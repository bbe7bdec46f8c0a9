//! What a series must not lose, whatever it is made of.

use proptest::prelude::*;
use vattn_baselines::Usage;

use super::*;
use crate::device::DriverCalls;

fn spent(map: u64, modelled: u64) -> Spent {
    Spent { calls: DriverCalls { map, ..DriverCalls::default() }, modelled: Duration::from_nanos(modelled) }
}

fn sample(at: u64, needed: u64, step: u64) -> Sample {
    let bytes = Bytes::new;
    Sample {
        at,
        pace: Pace::Step(step),
        usage: Usage {
            needed: bytes(needed),
            mapped: bytes(needed + 1),
            parked: Some(bytes(2)),
            held: bytes(needed + 4),
        },
        active: needed,
        waiting: needed / 2,
    }
}

/// A series of steps of 10 ns from samples of (gap, needed, calls, wall time), and their times.
fn series(samples: &[(u64, u64, u64, u64)]) -> (Series, Vec<u64>) {
    let mut series = Series::new(10, spent(7, 70));
    let (mut at, mut made) = (0, 7);
    let mut times = Vec::new();
    for (gap, needed, new, step) in samples {
        made += new;
        series.record(&sample(at, *needed, *step), spent(made, made * 10));
        times.push(at);
        at += 10 + gap;
    }
    (series, times)
}

#[test]
fn neighbours_become_one_when_there_are_too_many() {
    let samples: Vec<_> = (0..3000).map(|number| (0, number, 1, 5)).collect();
    let (series, _) = series(&samples);
    assert_eq!((series.width, series.buckets.len()), (20, 1500));
    let bucket = series.buckets[700].as_ref().unwrap();
    assert_eq!(bucket.gauges.needed, Range { least: 1400, most: 1401, last: 1401 });
    assert_eq!((bucket.calls[2], bucket.driver.most(), bucket.driver.mean()), (2, Some(10), Some(10)));
    assert_eq!((series.calls_before()[2], series.calls_during()[2]), (7, 3000));
}

#[test]
fn a_jump_of_time_keeps_what_was_there_last() {
    let (series, _) = series(&[(0, 5, 0, 1), (80, 3, 0, 1), (0, 9, 0, 1)]);
    let columns = series.columns(120, 100);
    let needed: Vec<u64> = columns.columns.iter().map(|column| column.gauges.needed.most).collect();
    assert_eq!(needed, [5, 3, 3, 3, 3, 3, 3, 3, 3, 3, 9]);
    assert_eq!(columns.columns[5].step.most(), None);
}

#[test]
fn ten_years_at_once_are_a_series_too() {
    let (series, _) = series(&[(315_360_000_000_000_000, 5, 1, 1), (u64::MAX / 4, 3, 1, 1), (0, 3, 1, 1)]);
    assert!(series.buckets.len() <= MOST);
    assert_eq!(series.calls_during()[2], 3);
}

#[test]
fn a_median_is_right_to_an_eighth_and_a_mean_exactly() {
    let mut spread = Spread::default();
    assert_eq!((spread.median(), spread.mean(), spread.most()), (None, None, None));
    spread.add(0);
    assert_eq!((spread.median(), spread.mean(), spread.most()), (Some(0), Some(0), Some(0)));
    for ns in [1000, 1000, 8000] {
        spread.add(ns);
    }
    let median = spread.median().unwrap();
    assert!((875..=1125).contains(&median), "{median}");
    assert_eq!((spread.mean(), spread.most()), (Some(2500), Some(8000)));
    spread.add(u64::MAX);
    assert_eq!(spread.most(), Some(u64::MAX));
}

proptest! {
    #[test]
    fn peaks_and_sums_survive_and_points_are_bounded(
        samples in proptest::collection::vec(
            (prop_oneof![20 => Just(0_u64), 1 => 0..100_000_u64], 0..1_000_000_u64, 0..9_u64, 0..1_000_000_u64),
            1..4000,
        ),
        most in 1..700_usize,
    ) {
        let (series, times) = series(&samples);
        prop_assert!(series.buckets.len() <= MOST);
        let columns = series.columns(u64::MAX, most);
        prop_assert!(columns.columns.len() <= most);
        let all = |figure: fn(&Bucket) -> u64| columns.columns.iter().map(figure).collect::<Vec<u64>>();
        let needed: Vec<u64> = samples.iter().map(|sample| sample.1).collect();
        let highest = needed.iter().max().copied();
        prop_assert_eq!(all(|column| column.gauges.needed.most).into_iter().max(), highest);
        prop_assert_eq!(all(|column| column.gauges.needed.least).into_iter().min(), needed.iter().min().copied());
        prop_assert_eq!(all(|column| column.gauges.held.most).into_iter().max(), highest.map(|most| most + 4));
        prop_assert_eq!(all(|column| column.gauges.kept.unwrap().most).into_iter().max(), highest.map(|most| most + 3));
        prop_assert_eq!(all(|column| column.calls[2]).iter().sum::<u64>(), samples.iter().map(|sample| sample.2).sum::<u64>());
        prop_assert_eq!(
            columns.columns.iter().filter_map(|column| column.step.most()).max(),
            samples.iter().map(|sample| sample.3).max()
        );
        // Every sample lies where and in what its column says.
        for (at, needed) in times.iter().zip(&needed) {
            let range = columns.columns[usize::try_from(at / columns.width).unwrap()].gauges.needed;
            prop_assert!((range.least..=range.most).contains(needed));
        }
    }

    #[test]
    fn a_median_is_right_to_an_eighth_wherever_it_is(mut times in proptest::collection::vec(4..u64::MAX, 1..50)) {
        let mut spread = Spread::default();
        times.iter().for_each(|ns| spread.add(*ns));
        times.sort_unstable();
        let right = times[(times.len() - 1) / 2];
        prop_assert!(spread.median().unwrap().abs_diff(right) <= right / 8 + 1);
    }
}
