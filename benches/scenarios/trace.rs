//! Requests: the first of a trace, or made-up ones where it is not there.

use std::path::PathBuf;
use std::time::Duration;

const AZURE: &str = "azure_llm_2023_conv.csv";
const SYNC_VS_ASYNC: &str = "sync_vs_async.csv";

#[derive(Clone, Copy, Debug)]
pub(crate) struct Request {
    /// After the first one.
    pub(crate) arrival: Duration,
    pub(crate) prompt: u64,
    pub(crate) output: u64,
}

/// A request that is made up: 40 to about 3,600 tokens, short ones more often, and 30 to 400 to come.
pub(crate) fn made_up(number: u64) -> Request {
    let spread = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    let (tens, rest) = (spread % 100, (spread / 100) % 100);
    Request {
        arrival: Duration::from_millis(number * 187),
        prompt: 40 + tens * tens * tens / 280 + rest,
        output: 30 + (spread / 10_000) % 370,
    }
}

/// The first requests of the Azure conversation trace, and where they are from.
pub(crate) fn first(count: usize) -> (String, Vec<Request>) {
    read(AZURE, count, azure)
}

/// Those of the trace with which vAttention's artifact shows what it costs to allocate as one goes along.
pub(crate) fn first_without_times(count: usize) -> (String, Vec<Request>) {
    read(SYNC_VS_ASYNC, count, without_time)
}

fn read(file: &str, count: usize, line: fn(&str) -> Option<Request>) -> (String, Vec<Request>) {
    let folder = std::env::var_os("VATTN_TRACES").map_or("../shared/traces".into(), PathBuf::from);
    let read = std::fs::read_to_string(folder.join(file));
    match read.map_err(|error| error.to_string()).and_then(|text| parse(&text, count, line)) {
        Ok(requests) => (format!("{} requests of {file}", requests.len()), requests),
        Err(why) => {
            println!("SKIP {file}: {why} (VATTN_TRACES names its folder); made-up requests take its place");
            let requests: Vec<_> = (0..20_000).take(count).map(made_up).collect();
            (format!("{} made-up requests", requests.len()), requests)
        }
    }
}

fn parse(text: &str, count: usize, request: fn(&str) -> Option<Request>) -> Result<Vec<Request>, String> {
    let mut requests = Vec::new();
    for line in text.lines().skip(1).take(count) {
        let request = request(line).ok_or_else(|| format!("\"{line}\" is no request"))?;
        requests.push(request);
    }
    let start = requests.first().ok_or("there is no request in it")?.arrival;
    requests.iter_mut().for_each(|request| request.arrival = request.arrival.saturating_sub(start));
    Ok(requests)
}

/// The trace lasts an hour of one day, so that the clock alone tells the order.
fn azure(line: &str) -> Option<Request> {
    let mut fields = line.split(',');
    let (_, clock) = fields.next()?.split_once(' ')?;
    let mut seconds = 0.0;
    for part in clock.split(':') {
        seconds = seconds * 60.0 + part.parse::<f64>().ok()?;
    }
    let arrival = Duration::try_from_secs_f64(seconds).ok()?;
    let mut number = || fields.next()?.trim().parse().ok();
    Some(Request { arrival, prompt: number()?, output: number()? })
}

/// All of them are there at the start.
fn without_time(line: &str) -> Option<Request> {
    let mut fields = line.split(',').map(|field| field.trim().parse().ok());
    Some(Request { arrival: Duration::ZERO, prompt: fields.next()??, output: fields.next()?? })
}
