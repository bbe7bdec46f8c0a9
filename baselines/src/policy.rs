//! The trait that a server drives, and its contract.

use std::fmt;

use vattn::Result;
use vattn::units::{Bytes, TokenCount};

/// A request's number. Numbers are dense: a policy may index a table by them, so a server counts
/// from 0. A number is given again only after its request was retired.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RequestId(u32);

impl RequestId {
    /// The request with that number.
    #[must_use]
    pub const fn new(number: u32) -> Self {
        Self(number)
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }

    /// The number as an index into a table.
    #[must_use]
    pub fn index(self) -> usize {
        usize::try_from(self.0).expect("u32 fits a 64-bit usize")
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// How much memory is used, at one moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Usage {
    /// What the tokens of admitted requests fill, with no rounding at all.
    pub needed: Bytes,
    /// Memory of admitted requests, up to the last unit that holds a byte of their tokens, or of the
    /// tile that the last token is in. What they have beyond that is parked and not counted.
    pub mapped: Bytes,
    /// Memory that is mapped and holds nobody's tokens; `None` where everything is mapped once and for
    /// all, so that there is nothing to tell apart.
    pub parked: Option<Bytes>,
    /// All that was created and not released.
    pub held: Bytes,
}

/// How a KV cache manages memory, as a server sees it.
///
/// **Whole or not at all.** A call that returns `false` or an error has changed nothing that the
/// server can see: the same requests are admitted with the same tokens.
///
/// **`false` is not an error.** It means that there is no slot or no room *now*; the server waits,
/// or retires somebody. An error means that the driver refused or the server broke the contract,
/// and ends the run.
///
/// **Determinism.** The answers depend on the calls so far and on nothing else.
///
/// **Time.** [`step`](Self::step) is called once an iteration with every decoding request, so its
/// cost where nothing has to be mapped is what the policy costs in steady state;
/// [`usage`](Self::usage) is called as often and walks nothing. [`tend`](Self::tend) comes after the
/// step, while the model runs, so nobody waits for what it does in time.
///
/// **The end.** Dropping a policy gives everything back to the driver, whoever is still admitted.
pub trait Policy: fmt::Debug {
    /// The policy's name, as an option of the command line spells it.
    fn name(&self) -> &'static str;

    /// Whether a request that grows to `final_tokens` could ever be held if it were alone. A server
    /// rejects one that can't; for one that can, [`admit`](Self::admit) and [`step`](Self::step)
    /// succeed as long as nobody else is admitted.
    fn can_ever_hold(&self, final_tokens: TokenCount) -> bool;

    /// Admits a request with all of its prompt backed, ready to be written. `false`: no slot is
    /// free or the prompt does not fit now.
    ///
    /// # Errors
    /// The driver's; [`InvalidArgument`](vattn::ErrorKind::InvalidArgument) for a request that is
    /// admitted already.
    fn admit(&mut self, request: RequestId, prompt: TokenCount) -> Result<bool>;

    /// Backs the named requests up to their new totals; others stay as they are. `false`: not all
    /// of them fit.
    ///
    /// # Errors
    /// The driver's; [`InvalidArgument`](vattn::ErrorKind::InvalidArgument) for a request that is
    /// not admitted; [`FewerTokens`](vattn::ErrorKind::FewerTokens) for a total below the last one.
    fn step(&mut self, totals: &[(RequestId, TokenCount)]) -> Result<bool>;

    /// The request is done with its memory, and no kernel uses it any more.
    ///
    /// # Errors
    /// The driver's; [`InvalidArgument`](vattn::ErrorKind::InvalidArgument) for a request that is
    /// not admitted.
    fn retire(&mut self, request: RequestId) -> Result<()>;

    /// What the policy does beside the path of requests: once an iteration, after the step and before
    /// anybody retires, while the model runs. What takes longer than that delays the next call. By
    /// default there is nothing to do.
    ///
    /// # Errors
    /// The driver's.
    fn tend(&mut self) -> Result<()> {
        Ok(())
    }

    /// How much memory is used now. Walks nothing.
    fn usage(&self) -> Usage;

    /// How many requests were admitted into memory that an earlier one had left mapped.
    fn adopted(&self) -> u64;

    /// How many mapped units were taken away from where they lay to serve somebody else.
    fn reclaimed(&self) -> u64;
}
