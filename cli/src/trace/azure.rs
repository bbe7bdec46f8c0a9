//! The Azure Public Dataset's LLM inference traces (Patel et al., ISCA 2024).

use crate::trace::{Request, Wrong, tokens};

pub(crate) const COLUMNS: [&str; 3] = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"];

pub(crate) fn request([time, context, generated]: [&str; 3]) -> Result<Request, Wrong> {
    let arrival = nanoseconds(time)
        .ok_or_else(|| Wrong::new("TIMESTAMP to be like 2023-11-16 18:15:46.6805900", format!("'{time}'")))?;
    Ok(Request {
        arrival,
        prompt: tokens(COLUMNS[1], context, 1)?,
        output: tokens(COLUMNS[2], generated, 0)?,
    })
}

/// Nanoseconds since 1970 of a UTC time; a later year of the dataset adds `+00:00`.
fn nanoseconds(text: &str) -> Option<u64> {
    let text = text.strip_suffix("+00:00").or(text.strip_suffix('Z')).unwrap_or(text);
    let (date, time) = text.split_once([' ', 'T'])?;
    let [year, month, day] = numbers(date, '-')?;
    let (clock, fraction) = time.split_once('.').unwrap_or((time, "0"));
    let [hour, minute, second] = numbers(clock, ':')?;
    let in_range = (1970..=2200).contains(&year)
        && (1..=12).contains(&month)
        && (1..=31).contains(&day)
        && hour < 24
        && minute < 60
        && second <= 60;
    if !in_range || fraction.is_empty() || fraction.len() > 9 || !fraction.bytes().all(|b| b.is_ascii_digit())
    {
        return None;
    }
    let fraction: u64 = format!("{fraction:0<9}").parse().ok()?;
    let seconds = ((days(year, month, day) * 24 + hour) * 60 + minute) * 60 + second;
    Some(seconds * 1_000_000_000 + fraction)
}

fn numbers(text: &str, separator: char) -> Option<[u64; 3]> {
    let mut parts = text.split(separator).map(|part| part.parse().ok());
    let numbers = [parts.next()??, parts.next()??, parts.next()??];
    parts.next().is_none().then_some(numbers)
}

/// Days since 1970-01-01 in the Gregorian calendar, counting years from March as Hinnant's
/// `days_from_civil` does, so that the leap day is a year's last.
fn days(year: u64, month: u64, day: u64) -> u64 {
    let year = if month <= 2 { year - 1 } else { year };
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    year * 365 + year / 4 - year / 100 + year / 400 + of_year - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_exact() {
        assert_eq!(nanoseconds("1970-01-01 00:00:00"), Some(0));
        assert_eq!(nanoseconds("2000-03-01 00:00:00.5"), Some(951_868_800_500_000_000));
        assert_eq!(nanoseconds("2023-11-16 18:15:46.6805900"), Some(1_700_158_546_680_590_000));
        assert_eq!(
            nanoseconds("2024-05-10T00:00:00.009930+00:00").map(|time| time % 1_000_000_000),
            Some(9_930_000)
        );
        for text in ["", "2023-11-16", "2023-13-16 18:15:46", "2023-11-16 18:15", "2023-11-16 18:15:46.x"] {
            assert_eq!(nanoseconds(text), None, "{text}");
        }
    }
}
