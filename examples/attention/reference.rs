//! What the kernels ought to give, worked out on the host in double precision, from what was asked alone.
//!
//! Owns the content of every place, which `kernels.cu` computes the same way, and attention by its definition.
//! Refuses to know about the cache.

use std::thread;

use crate::{DIM, GROUP, HEADS, OUTPUT, Query};

const _: () = assert!(DIM == 128 && HEADS * GROUP == 32);

/// The elements of a head of one token.
type Row = [f64; 128];

/// Kinds of content, as `kernels.cu` numbers them.
const QUERY: u32 = 0;
const KEY: u32 = 1;
const VALUE: u32 = 2;

fn mixed(hash: u32, word: u32) -> u32 {
    let hash = (hash ^ word).wrapping_mul(0x9e37_79b1);
    hash ^ (hash >> 15)
}

/// Multiples of 1/128 in [-1, 1), which bfloat16 has exactly.
fn content(seed: u32, kind: u32, layer: u32, token: u32, head: u32) -> Row {
    let hash = [seed, layer << 8 | kind, token, head].into_iter().fold(0, mixed);
    let mut row = [0.0; 128];
    for (dim, element) in (0..).zip(&mut row) {
        *element = f64::from(mixed(hash, dim) >> 24) / 128.0 - 1.0;
    }
    row
}

fn attention(query: &Row, keys: &[Row], values: &[Row]) -> Row {
    let score = |key: &Row| query.iter().zip(key).map(|(q, k)| q * k).sum::<f64>() / f64::from(DIM).sqrt();
    let weights: Vec<_> = keys.iter().map(|key| score(key).exp()).collect();
    let mut sum = [0.0; 128];
    for (weight, value) in weights.iter().zip(values) {
        sum.iter_mut().zip(value).for_each(|(sum, element)| *sum += weight * element);
    }
    let total: f64 = weights.iter().sum();
    sum.map(|element| element / total)
}

/// The outputs of one query in one layer, a row for each query head.
fn outputs(layer: u32, query: &Query) -> Vec<Row> {
    let of = |kind, token, head| content(query.seed, kind, layer, token, head);
    let of_all = |kind, head| (0..query.tokens).map(|token| of(kind, token, head)).collect::<Vec<_>>();
    let of_group = |head: u32| {
        let (keys, values) = (of_all(KEY, head), of_all(VALUE, head));
        (head * GROUP..(head + 1) * GROUP)
            .map(move |asking| attention(&of(QUERY, query.tokens - 1, asking), &keys, &values))
    };
    (0..HEADS).flat_map(of_group).collect()
}

/// The largest of some errors. What is not a number is larger than all.
fn largest(errors: impl IntoIterator<Item = f64>) -> f64 {
    errors.into_iter().max_by(f64::total_cmp).unwrap_or(f64::NAN)
}

fn error(layer: u32, query: &Query, found: &[f32]) -> f64 {
    let expected = outputs(layer, query).into_iter().flatten();
    largest(expected.zip(found).map(|(expected, found)| (expected - f64::from(*found)).abs()))
}

/// The largest error of all that was asked, by layer and query, worked out by all processors.
pub(crate) fn compare(asked: &[(u32, Query)], found: &[f32]) -> f64 {
    let each = asked.len().div_ceil(thread::available_parallelism().map_or(1, usize::from)).max(1);
    let compare = |(asked, found): (&[(u32, Query)], &[f32])| {
        let found = found.chunks_exact(OUTPUT);
        largest(asked.iter().zip(found).map(|((layer, query), found)| error(*layer, query, found)))
    };
    thread::scope(|scope| {
        let parts = asked.chunks(each).zip(found.chunks(each * OUTPUT));
        let threads: Vec<_> = parts.map(|part| scope.spawn(move || compare(part))).collect();
        largest(threads.into_iter().map(|thread| thread.join().unwrap_or(f64::NAN)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BOUND;

    #[test]
    fn attention_weighs_values_by_the_exponential_of_the_scores() {
        let axis = |at: usize, length: f64| {
            let mut row = [0.0; 128];
            row[at] = length;
            row
        };
        let query = axis(0, 128.0_f64.sqrt());
        // Scores of ln 3, 0 and 0: three fifths of the first value, a fifth of the others.
        let keys = [axis(0, 3.0_f64.ln()), axis(1, 7.0), axis(0, 0.0)];
        let output = attention(&query, &keys, &[axis(0, 1.0), axis(5, 2.0), axis(5, 3.0)]);
        assert!((output[0] - 0.6).abs() < 1e-12 && (output[5] - 1.0).abs() < 1e-12, "{output:?}");
        assert_eq!(output.iter().filter(|element| **element == 0.0).count(), 126);
    }

    #[test]
    fn content_is_exact_in_bfloat16_and_differs_from_place_to_place() {
        let places = [(1, KEY, 0, 0, 0), (2, KEY, 0, 0, 0), (1, VALUE, 0, 0, 0), (1, KEY, 1, 0, 0)];
        let rows = places.map(|(seed, kind, layer, token, head)| content(seed, kind, layer, token, head));
        let rows = [rows.as_slice(), &[content(1, KEY, 0, 1, 0), content(1, KEY, 0, 0, 1)]].concat();
        for (number, row) in rows.iter().enumerate() {
            for element in row {
                let half = f64::from(*element) * 128.0;
                assert!(half.fract() == 0.0 && (-128.0..128.0).contains(&half), "{element}");
            }
            for other in &rows[..number] {
                let same = row.iter().zip(other).filter(|(one, other)| one == other).count();
                assert!(same < 8, "{same} elements of 128 are the same");
            }
        }
    }

    #[test]
    fn one_wrong_token_is_far_beyond_the_bound_however_long_the_request() {
        let query = Query { slot: 0, tokens: 1111, seed: 3 };
        let of = |kind, token| content(query.seed, kind, 2, token, 0);
        let of_all = |kind| (0..query.tokens).map(|token| of(kind, token)).collect::<Vec<_>>();
        let (asked, keys, mut values) = (of(QUERY, query.tokens - 1), of_all(KEY), of_all(VALUE));
        let right = attention(&asked, &keys, &values);
        for (token, at) in [(0, 0), (700, 700), (1110, 1110)] {
            let was = std::mem::replace(&mut values[at], content(!query.seed, VALUE, 2, token, 0));
            let wrong = attention(&asked, &keys, &values);
            values[at] = was;
            let error = largest(right.iter().zip(wrong).map(|(right, wrong)| (right - wrong).abs()));
            assert!(error > 10.0 * BOUND, "token {token}: {error}");
        }
    }

    #[test]
    fn what_is_not_a_number_is_the_largest_error() {
        let query = Query { slot: 0, tokens: 5, seed: 0 };
        let mut found = vec![0.0; OUTPUT];
        for (found, expected) in found.iter_mut().zip(outputs(3, &query).into_iter().flatten()) {
            *found = expected.to_string().parse().unwrap();
        }
        let both = [found.clone(), found.clone()].concat();
        assert!(compare(&[(3, query), (3, query)], &both) < 1e-7);
        found[4000] = f32::NAN;
        assert!(compare(&[(3, query), (3, query)], &[both[..OUTPUT].to_vec(), found].concat()).is_nan());
    }
}
