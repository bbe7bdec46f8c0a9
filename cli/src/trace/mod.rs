//! Requests: where they come from and what one is.
//!
//! Owns the formats, which are told apart by content, and the generated trace. Refuses to know who
//! serves the requests. Whatever the source, a [`Trace`] is sorted by arrival and starts at 0.

mod azure;
mod generated;
mod mooncake;
mod vattention;

use std::borrow::Cow;
use std::fmt;
use std::path::{Path, PathBuf};

pub(crate) use generated::{description, generate};

/// One request of a trace.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Request {
    /// Nanoseconds after the first request.
    pub(crate) arrival: u64,
    /// Tokens of the prompt, at least one.
    pub(crate) prompt: u64,
    /// Tokens to be generated.
    pub(crate) output: u64,
}

/// Requests in order of arrival.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Trace {
    /// What it is called in reports.
    pub(crate) name: String,
    pub(crate) requests: Vec<Request>,
}

impl Trace {
    /// Sorts by arrival, those of one time as they were, and lets the first arrive at 0.
    fn new(name: String, mut requests: Vec<Request>) -> Self {
        requests.sort_by_key(|request| request.arrival);
        let start = requests.first().map_or(0, |request| request.arrival);
        for request in &mut requests {
            request.arrival -= start;
        }
        Self { name, requests }
    }

    /// Keeps the first requests only.
    pub(crate) fn limit(&mut self, requests: usize) {
        self.requests.truncate(requests);
    }
}

/// Why a trace can't be used.
#[derive(Debug)]
pub(crate) enum TraceError {
    /// The file can't be read.
    Io(PathBuf, std::io::Error),
    /// No known format begins like this.
    Unknown { file: PathBuf, found: String },
    /// A line is not what its format says.
    Line { file: PathBuf, line: u64, wrong: Wrong },
    /// There is no request in it.
    Empty(PathBuf),
}

/// What was expected on a line and what was found there.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Wrong {
    pub(crate) expected: String,
    pub(crate) found: String,
}

impl Wrong {
    fn new(expected: impl Into<String>, found: impl Into<String>) -> Self {
        Self { expected: expected.into(), found: shorten(&found.into()) }
    }
}

impl fmt::Display for TraceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(file, error) => write!(f, "{}: {error}", file.display()),
            Self::Unknown { file, found } => write!(
                f,
                "{}: not a trace: expected a header with {} (Azure) or {} (vAttention), or a JSON object \
                 a line with {} (Mooncake); found {found}",
                file.display(),
                azure::COLUMNS.join(","),
                vattention::COLUMNS.join(","),
                mooncake::FIELDS,
            ),
            Self::Line { file, line, wrong } => write!(
                f,
                "{}:{line}: expected {}, found {}; correct the line or take it out",
                file.display(),
                wrong.expected,
                wrong.found
            ),
            Self::Empty(file) => {
                write!(f, "{}: there is no request in it; a trace needs at least one", file.display())
            }
        }
    }
}

impl std::error::Error for TraceError {}

/// Reads a trace of any known format.
pub(crate) fn read(path: &Path) -> Result<Trace, TraceError> {
    let bytes = std::fs::read(path).map_err(|error| TraceError::Io(path.into(), error))?;
    let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
    let requests = parse(&bytes).map_err(|problem| match problem {
        Problem::Unknown(found) => TraceError::Unknown { file: path.into(), found },
        Problem::Line(line, wrong) => TraceError::Line { file: path.into(), line, wrong },
    })?;
    if requests.is_empty() {
        return Err(TraceError::Empty(path.into()));
    }
    Ok(Trace::new(name, requests))
}

/// A trace error that does not know its file yet.
#[derive(PartialEq, Eq, Debug)]
enum Problem {
    Unknown(String),
    Line(u64, Wrong),
}

/// Requests as they stand in the text, of the format that its first line shows.
fn parse(bytes: &[u8]) -> Result<Vec<Request>, Problem> {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let Some((_, header)) = lines(bytes).next() else { return Ok(Vec::new()) };
    let names: Vec<&str> = fields(&header).collect();
    let requests = if header.starts_with('{') {
        mooncake::parse(bytes)?
    } else if azure::COLUMNS.iter().all(|column| names.contains(column)) {
        columns(bytes, azure::COLUMNS, azure::request)?
    } else if vattention::COLUMNS.iter().all(|column| names.contains(column)) {
        columns(bytes, vattention::COLUMNS, vattention::request)?
    } else {
        return Err(Problem::Unknown(format!("'{}'", shorten(&header))));
    };
    check_times(&requests)?;
    Ok(requests.into_iter().map(|(_, request)| request).collect())
}

/// Refuses a time that is too long after the earliest one.
fn check_times(requests: &[(u64, Request)]) -> Result<(), Problem> {
    let Some((first, earliest)) = requests.iter().min_by_key(|(_, request)| request.arrival) else {
        return Ok(());
    };
    for (line, request) in requests {
        let after = request.arrival - earliest.arrival;
        if after > MOST_TIME {
            let second = 1_000_000_000;
            return Err(Problem::Line(
                *line,
                Wrong::new(
                    format!(
                        "a time at most 10 years ({} s) after the earliest, which is on line {first}",
                        MOST_TIME / second
                    ),
                    format!("one {} s after it", after.div_ceil(second)),
                ),
            ));
        }
    }
    Ok(())
}

/// The lines that are not blank, with their numbers from 1 and no space around.
fn lines(bytes: &[u8]) -> impl Iterator<Item = (u64, Cow<'_, str>)> {
    let lines = (1..).zip(bytes.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii));
    lines.filter(|(_, line)| !line.is_empty()).map(|(number, line)| (number, String::from_utf8_lossy(line)))
}

/// What stands between the commas. None of the formats has a comma inside quotes.
fn fields(line: &str) -> impl Iterator<Item = &str> {
    line.split(',').map(|field| field.trim().trim_matches('"'))
}

/// Reads comma-separated lines below a header, and of each the columns that are asked for.
fn columns<const N: usize>(
    bytes: &[u8],
    wanted: [&str; N],
    request: impl Fn([&str; N]) -> Result<Request, Wrong>,
) -> Result<Vec<(u64, Request)>, Problem> {
    let mut lines = lines(bytes);
    let (_, header) = lines.next().expect("the caller read it");
    let header: Vec<&str> = fields(&header).collect();
    let places =
        wanted.map(|name| header.iter().position(|column| *column == name).expect("the caller looked"));
    let mut requests = Vec::new();
    for (line, text) in lines {
        let found: Vec<&str> = fields(&text).collect();
        if found.len() != header.len() {
            let expected = format!("{} fields ({})", header.len(), shorten(&header.join(",")));
            return Err(Problem::Line(line, Wrong::new(expected, format!("{}: '{text}'", found.len()))));
        }
        let values = places.map(|place| found[place]);
        requests.push((line, request(values).map_err(|wrong| Problem::Line(line, wrong))?));
    }
    Ok(requests)
}

/// A count of tokens: a whole number, perhaps written as `12.0`.
fn tokens(column: &str, text: &str, least: u64) -> Result<u64, Wrong> {
    let digits = match text.split_once('.') {
        Some((whole, rest)) if rest.bytes().all(|byte| byte == b'0') => whole,
        _ => text,
    };
    match digits.parse() {
        Ok(count) if (least..=MOST_TOKENS).contains(&count) => Ok(count),
        _ => Err(Wrong::new(
            format!("{column} to be a whole number from {least} to {MOST_TOKENS}"),
            format!("'{text}'"),
        )),
    }
}

/// More than any model reads; keeps sums far from 2^64.
const MOST_TOKENS: u64 = 1 << 40;

/// Nanoseconds from the first arrival to the last, 10 years of 365 days: more than any trace has, and
/// far below the 584 years at which the server's clock ends.
const MOST_TIME: u64 = 10 * 365 * 24 * 3600 * 1_000_000_000;

/// The first 100 characters, fit for a terminal: what would not print (control characters above all,
/// which terminals obey) is written as its escape.
fn shorten(text: &str) -> String {
    let mut short = String::new();
    for (index, character) in text.chars().enumerate() {
        if index == 100 {
            short.push('…');
            break;
        }
        match character {
            // Escaping these would only make readable text harder to read.
            '\'' | '"' => short.push(character),
            _ => short.extend(character.escape_debug()),
        }
    }
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrong(text: &str) -> (u64, Wrong) {
        match parse(text.as_bytes()) {
            Err(Problem::Line(line, wrong)) => (line, wrong),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn azure_lines_are_read_and_sorted() {
        let text = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n\
                    2023-11-16 18:15:50.9951690,396,109\r\n\
                    2023-11-16 18:15:46.6805900,374,44\r\n\r\n  \r\n";
        let trace = Trace::new("t".into(), parse(text.as_bytes()).unwrap());
        let first = Request { arrival: 0, prompt: 374, output: 44 };
        let second = Request { arrival: 4_314_579_000, prompt: 396, output: 109 };
        assert_eq!(trace.requests, [first, second]);
    }

    #[test]
    fn vattention_lines_have_no_times() {
        let text = "\u{feff}num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n71989,386,72375,186.5\n5,0,5,inf";
        let requests = parse(text.as_bytes()).unwrap();
        assert_eq!(requests[0], Request { arrival: 0, prompt: 71989, output: 386 });
        assert_eq!(requests[1], Request { arrival: 0, prompt: 5, output: 0 });
    }

    #[test]
    fn mooncake_lines_are_objects() {
        let text = "{\"timestamp\": 3000, \"input_length\": 7, \"output_length\": 2, \"hash_ids\": [0]}\r\n\r\n\
                    {\"timestamp\": 3000.5, \"input_length\": 8, \"output_length\": 1}\n\n";
        let requests = parse(text.as_bytes()).unwrap();
        assert_eq!(requests[0], Request { arrival: 3_000_000_000, prompt: 7, output: 2 });
        assert_eq!(requests[1], Request { arrival: 3_000_500_000, prompt: 8, output: 1 });
    }

    #[test]
    fn a_malformed_line_is_named_with_what_was_expected_and_found() {
        let azure = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,1,2\n";
        let (line, error) = wrong(&format!("{azure}\n2023-11-16 18:15:46,x,2\n"));
        assert_eq!(line, 4);
        assert_eq!(error.found, "'x'");
        assert!(error.expected.starts_with("ContextTokens to be a whole number from 1"), "{error:?}");
        let (line, error) = wrong(&format!("{azure}2023-11-16 18:15:46,3\n"));
        assert_eq!((line, error.found.as_str()), (3, "2: '2023-11-16 18:15:46,3'"));
        let (line, error) = wrong(&format!("{azure}yesterday,3,4\n"));
        assert_eq!((line, error.found.as_str()), (3, "'yesterday'"));
        let (line, error) = wrong("num_prefill_tokens,num_decode_tokens\n1,2\n0,2\n");
        assert_eq!((line, error.found.as_str()), (3, "'0'"));
        let (line, error) =
            wrong("{\"timestamp\":0,\"input_length\":1,\"output_length\":1}\n{\"timestamp\":0}\n");
        assert_eq!(line, 2);
        assert!(error.found.contains("missing field `input_length`"), "{error:?}");
        let (line, _) = wrong("{\"timestamp\":-5,\"input_length\":1,\"output_length\":1}\n");
        assert_eq!(line, 1);
    }

    #[test]
    fn times_are_at_most_ten_years_apart() {
        let mooncake = |milliseconds: &str| {
            format!("{{\"timestamp\":{milliseconds},\"input_length\":1,\"output_length\":1}}\n")
        };
        let (ten_years, far) = ("315360000005", "18446744073709");
        let text = mooncake(far) + &mooncake("5");
        let (line, error) = wrong(&text);
        let limit = "a time at most 10 years (315360000 s) after the earliest, which is on line";
        assert_eq!((line, error.expected), (1, format!("{limit} 2")));
        assert_eq!(error.found, "one 18446744074 s after it");
        assert_eq!(parse((mooncake("5") + &mooncake(ten_years)).as_bytes()).unwrap().len(), 2);
        assert_eq!(wrong(&(mooncake("4.5") + &mooncake(ten_years))).0, 2);
        assert_eq!(parse(mooncake(far).as_bytes()).unwrap().len(), 1, "the first is when it all begins");
        for beyond in ["18446744073710", "18446744073709551615", "1e300", "-1"] {
            let (line, error) = wrong(&mooncake(beyond));
            assert_eq!((line, error.expected.ends_with("from 0 to 18446744073709")), (1, true), "{error:?}");
        }

        let azure = |last: &str| {
            format!("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,1,2\n{last} 18:15:46,1,2\n")
        };
        assert_eq!(parse(azure("2033-11-13").as_bytes()).unwrap().len(), 2);
        let (line, error) = wrong(&azure("2033-11-14"));
        assert_eq!((line, error.expected), (3, format!("{limit} 2")));
        assert_eq!(error.found, "one 315446400 s after it");
    }

    #[test]
    fn other_files_are_refused() {
        assert_eq!(parse(b"a,b\n1,2\n"), Err(Problem::Unknown("'a,b'".into())));
        assert_eq!(parse(b"\n \n"), Ok(vec![]));
    }

    #[test]
    fn what_is_found_is_shown_without_its_control_characters() {
        let shown = "'\\u{1b}[2J\\u{7}a\\u{9b}\\u{202e}\\0\u{fffd}é it's \"b\"'";
        let found = "\u{1b}[2J\u{7}a\u{9b}\u{202e}\0".bytes().chain([0xff]).chain("é it's \"b\"".bytes());
        assert_eq!(parse(&found.collect::<Vec<u8>>()), Err(Problem::Unknown(shown.into())));
        assert_eq!(shorten(&"\u{1b}".repeat(101)), "\\u{1b}".repeat(100) + "…");
        let text = "num_prefill_tokens,num_decode_tokens,\u{1b}]0;t\u{7}\n1,2\u{1b}c\n";
        let (_, error) = wrong(text);
        assert!(!format!("{}{}", error.expected, error.found).contains(char::is_control), "{error:?}");
        let (_, error) = wrong("{\"timestamp\":\"\u{9b}2J\"}\n");
        assert!(!error.found.contains(char::is_control), "{error:?}");
    }
}
