//! `--background`, `--look-ahead` and `--reclaim`: what vattn does beside the path of requests.
//!
//! A thread of the cache's own is not offered: the server's time is simulated, so what a thread gets done
//! in it would differ from run to run.

use std::fmt;

use clap::ValueEnum;
use vattn::geometry::{self, ConfigBuilder};
use vattn::units::TokenCount;

/// What the cache itself looks ahead where nobody says.
const LOOK_AHEAD: u64 = 32;

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
    #[arg(long, default_value_t = LOOK_AHEAD, value_name = "TOKENS")]
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

impl Default for Mapper {
    fn default() -> Self {
        Self { background: Background::Caller, look_ahead: LOOK_AHEAD, reclaim: Reclaim::Deferred }
    }
}

#[cfg(test)]
mod tests {
    use vattn::geometry::{Config, Geometry};

    use super::*;

    #[test]
    fn where_nothing_is_said_the_caches_own_defaults_hold_but_for_the_thread() {
        let builder = || Config::builder(Geometry::preset("llama-3-8b").unwrap());
        let own = builder().background(geometry::Background::Caller).build().unwrap();
        assert_eq!(Mapper::default().of(builder()).build().unwrap(), own);
        let off = Mapper { background: Background::Off, look_ahead: 7, reclaim: Reclaim::Eager };
        let config = off.of(builder()).build().unwrap();
        assert_eq!(
            (config.background(), config.look_ahead(), config.reclaim()),
            (geometry::Background::Off, TokenCount::new(7), geometry::Reclaim::Eager)
        );
    }
}
