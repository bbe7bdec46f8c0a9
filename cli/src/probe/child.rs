//! How a child is asked, and what became of it.
//!
//! The child prints one line of JSON for each thing it learns: its whole answer so far. The last line
//! counts, so whoever dies on the way has still said what it knew. Lines of another form are somebody
//! else's, such as a library's that prints, and are passed over. Refuses to know the questions.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::Failure;

/// How long a child that was killed may take to be gone. One that is stuck in the kernel stays.
const GRACE: Duration = Duration::from_secs(10);

/// What a child says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line<T> {
    /// This much is known; more may come.
    SoFar(T),
    /// This is all.
    Done(T),
    /// An error that the driver or the library answered, in words.
    Refused(String),
}

/// How a child ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Ended {
    /// With its whole answer.
    Done,
    /// With an error that it was answered.
    Refused,
    /// By a signal, or by itself without saying why.
    Died,
    /// By our hand: it took too long.
    TimedOut,
}

/// An answer as far as it came, and how it came to its end.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub(super) struct Finding<T> {
    pub(super) answer: Option<T>,
    pub(super) ended: Ended,
    /// In words, where it is not [`Ended::Done`].
    pub(super) why: Option<String>,
}

/// The child's end of the line.
pub(super) struct Teller<'a> {
    out: &'a mut dyn Write,
}

impl<'a> Teller<'a> {
    pub(super) fn new(out: &'a mut dyn Write) -> Self {
        Self { out }
    }

    /// This much is known, should the next call be the last.
    pub(super) fn so_far<T: Serialize>(&mut self, answer: &T) -> Result<(), Failure> {
        self.say(&Line::SoFar(answer))
    }

    /// This is all.
    pub(super) fn done<T: Serialize>(&mut self, answer: &T) -> Result<(), Failure> {
        self.say(&Line::Done(answer))
    }

    /// There is no answer.
    pub(super) fn refused(&mut self, why: &str) -> Result<(), Failure> {
        self.say(&Line::<()>::Refused(why.into()))
    }

    fn say<T: Serialize>(&mut self, line: &Line<T>) -> Result<(), Failure> {
        let line = serde_json::to_string(line).expect("plain data with string keys is always JSON");
        writeln!(self.out, "{line}").and_then(|()| self.out.flush()).map_err(Failure::Output)
    }
}

/// Starts a child and hears it out, for `limit` at most.
///
/// # Errors
/// Only what kept the child from being started: whatever it does afterwards is a finding.
pub(super) fn ask<T: DeserializeOwned>(
    command: &mut Command,
    limit: Duration,
) -> std::io::Result<Finding<T>> {
    let deadline = Instant::now() + limit;
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let stdout = child.stdout.take().expect("it was piped the line before");
    let (say, heard) = channel();
    // Ends with the pipe, and is not waited for: a child that can't be killed would keep it open.
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            if say.send(line).is_err() {
                break;
            }
        }
    });
    let mut said = Said::default();
    let in_time = said.listen(&heard, deadline);
    let status = if in_time { wait(&mut child, deadline) } else { None };
    if status.is_none() {
        // Where it is gone already, there is nobody to kill.
        let _ = child.kill();
        let gone = wait(&mut child, Instant::now() + GRACE).is_some();
        // What it said between the deadline and its end.
        said.listen(&heard, Instant::now());
        return Ok(said.timed_out(limit, gone));
    }
    Ok(said.ended(status))
}

/// The child's end, if it comes before the deadline.
fn wait(child: &mut Child, deadline: Instant) -> Option<ExitStatus> {
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
            _ => return None,
        }
    }
}

/// What a child has said so far.
#[derive(Debug)]
struct Said<T> {
    answer: Option<T>,
    done: bool,
    refused: Option<String>,
}

impl<T> Default for Said<T> {
    fn default() -> Self {
        Self { answer: None, done: false, refused: None }
    }
}

impl<T: DeserializeOwned> Said<T> {
    /// Takes what comes until the child closes its end; says whether it did so before the deadline.
    fn listen(&mut self, heard: &Receiver<String>, deadline: Instant) -> bool {
        loop {
            match heard.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => self.take(&line),
                Err(RecvTimeoutError::Disconnected) => return true,
                Err(RecvTimeoutError::Timeout) => return false,
            }
        }
    }

    fn take(&mut self, line: &str) {
        match serde_json::from_str(line) {
            Ok(Line::SoFar(answer)) => self.answer = Some(answer),
            Ok(Line::Done(answer)) => (self.answer, self.done) = (Some(answer), true),
            Ok(Line::Refused(why)) => self.refused = Some(why),
            Err(error) => tracing::debug!(line, %error, "a line that no child of a probe writes"),
        }
    }

    fn ended(self, status: Option<ExitStatus>) -> Finding<T> {
        let well = status.is_some_and(|status| status.success());
        let (ended, why) = match self.refused {
            Some(why) => (Ended::Refused, Some(why)),
            None if well && self.done => (Ended::Done, None),
            None => {
                let when =
                    if self.done { ", with all its answers given" } else { ", before it had answered" };
                (Ended::Died, Some(format!("the child ended by {}{when}", cause(status))))
            }
        };
        Finding { answer: self.answer, ended, why }
    }

    fn timed_out(self, limit: Duration, gone: bool) -> Finding<T> {
        let rest = if gone { "" } else { "; it can't be killed and is still there, stuck in the kernel" };
        let why = format!("the child was not done after {} s and was killed{rest}", limit.as_secs_f64());
        Finding { answer: self.answer, ended: Ended::TimedOut, why: Some(why) }
    }
}

fn cause(status: Option<ExitStatus>) -> String {
    let Some(status) = status else { return "an unknown cause".into() };
    #[cfg(unix)]
    if let Some(signal) = std::os::unix::process::ExitStatusExt::signal(&status) {
        let name = match signal {
            4 => " (SIGILL)",
            6 => " (SIGABRT)",
            7 => " (SIGBUS)",
            9 => " (SIGKILL, by the OOM killer perhaps)",
            11 => " (SIGSEGV)",
            15 => " (SIGTERM)",
            _ => "",
        };
        return format!("signal {signal}{name}");
    }
    match status.code() {
        Some(code) => format!("exit code {code}"),
        None => status.to_string(),
    }
}

#[cfg(unix)]
#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, limit: Duration) -> Finding<u64> {
        ask(Command::new("sh").args(["-c", script]).stderr(Stdio::null()), limit).unwrap()
    }

    const AMPLE: Duration = Duration::from_secs(60);

    #[test]
    fn the_last_line_counts_and_other_lines_do_not() {
        let found = shell(r#"echo '{"so_far":1}'; echo hello; echo '{"done":2}'; echo '{"other":3}'"#, AMPLE);
        assert_eq!(found, Finding { answer: Some(2), ended: Ended::Done, why: None });
    }

    #[test]
    fn a_child_that_dies_leaves_what_it_had_said() {
        let found = shell(r#"echo '{"so_far":7}'; kill -SEGV $$"#, AMPLE);
        assert_eq!((found.answer, found.ended), (Some(7), Ended::Died));
        assert_eq!(found.why.unwrap(), "the child ended by signal 11 (SIGSEGV), before it had answered");
        let found = shell("exit 101", AMPLE);
        assert_eq!((found.answer, found.ended), (None, Ended::Died));
        assert!(found.why.unwrap().contains("exit code 101"));
    }

    #[test]
    fn a_child_that_dies_after_its_answer_is_told_from_one_that_lives() {
        let found = shell(r#"echo '{"done":7}'; kill -ABRT $$"#, AMPLE);
        assert_eq!((found.answer, found.ended), (Some(7), Ended::Died));
        assert!(found.why.unwrap().contains("signal 6 (SIGABRT), with all its answers given"));
    }

    #[test]
    fn silence_is_no_answer() {
        let found = shell("true", AMPLE);
        assert_eq!((found.answer, found.ended), (None, Ended::Died));
    }

    #[test]
    fn a_refusal_is_kept_in_its_own_words() {
        let found = shell(r#"echo '{"so_far":3}'; echo '{"refused":"no room"}'"#, AMPLE);
        assert_eq!(
            (found.answer, found.ended, found.why.as_deref()),
            (Some(3), Ended::Refused, Some("no room"))
        );
    }

    #[test]
    fn a_child_that_hangs_is_killed() {
        for script in
            [r#"echo '{"so_far":5}'; exec sleep 100"#, r#"echo '{"done":5}'; exec >&-; exec sleep 100"#]
        {
            let start = Instant::now();
            let found = shell(script, Duration::from_millis(300));
            assert_eq!((found.answer, found.ended), (Some(5), Ended::TimedOut), "{script}");
            assert!(start.elapsed() < Duration::from_secs(50), "{script}");
        }
    }
}
