//! `--background`, `--look-ahead` and `--reclaim`: what vattn does beside the path of requests.
//!
//! A thread of the cache's own is not offered: the server's time is simulated, so what a thread gets done
//! in it would differ from run to run.

use std::fmt;

use clap::ValueEnum;
use vattn::geometry::{self, ConfigBuilder};
use vattn::units::TokenCount;

/// Who does what no request has to wait for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum Background {
    /// The server, once an iteration, while the model runs
    Caller,
    /// Nobody: each call does all of its work before it returns
    Off,
}

/// When memory is unmapped that requests gave up.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum Reclaim {
    /// When another request needs it: until then one may take it over as it is
    Deferred,
    /// At once
    Eager,
}

/// The options.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::Args)]
pub(crate) struct Mapper {
    /// Who maps and unmaps for vattn what no request has to wait for; other policies have their own
    /// ways
    #[arg(long, value_enum, default_value_t = Background::Caller)]
    background: Background,
    /// With how many tokens to go vattn maps what a request will grow into; 0 maps nothing ahead,
    /// and so does --background off
    #[arg(long, default_value_t = 64, value_name = "TOKENS")]
    look_ahead: u64,
    /// When vattn unmaps the memory that requests gave up
    #[arg(long, value_enum, default_value_t = Reclaim::Deferred)]
    reclaim: Reclaim,
}

impl Mapper {
    /// The cache's options with these.
    pub(crate) fn of(self, config: ConfigBuilder) -> ConfigBuilder {
        config
            .background(match self.background {
                Background::Caller => geometry::Background::Caller,
                Background::Off => geometry::Background::Off,
            })
            .look_ahead(TokenCount::new(self.look_ahead))
            .reclaim(match self.reclaim {
                Reclaim::Deferred => geometry::Reclaim::Deferred,
                Reclaim::Eager => geometry::Reclaim::Eager,
            })
    }
}

impl fmt::Display for Mapper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.background {
            Background::Caller => write!(f, "caller, {} tokens ahead", self.look_ahead)?,
            Background::Off => f.write_str("off")?,
        }
        match self.reclaim {
            Reclaim::Deferred => Ok(()),
            Reclaim::Eager => f.write_str(", reclaim eager"),
        }
    }
}

#[cfg(test)]
pub(crate) const OFF: Mapper =
    Mapper { background: Background::Off, look_ahead: 0, reclaim: Reclaim::Deferred };
