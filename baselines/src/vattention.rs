//! The policy of vAttention (microsoft/vattention, ASPLOS 2025) in our own words.
//!
//! Owns a pool of handles of one granule each, all created when the cache is made, and which of
//! them is mapped where. Memory is counted in **blocks**: one page (granule) in every tensor at
//! once, since all tensors of a slot grow together.
//!
//! - A page is one map and one set_access in each tensor.
//! - A new request gets the first inactive slot, unless a later one holds enough pages for the
//!   prompt and fewer than the candidate so far.
//! - Pages stay in a slot when its request leaves (deferred reclamation, the original's default).
//! - When the pool has too few pages, slots are walked from the highest index down, and what each
//!   has beyond its own length is unmapped until there are enough.
//! - The original starts a thread at each step, which maps ahead for the next tokens while the
//!   model runs: [`Mapping::Ahead`] does so, and [`Mapping::Tended`] where time is simulated.
//!   [`Mapping::Synchronous`] maps when a token needs it.
//!
//! Kinder to the original than the original is: a step here looks at the slots it names, not at
//! every slot there is; memory that does not suffice is an answer, where the original ends the
//! process; and a row that does not divide a page wastes no rest of it.
//!
//! ```text
//!   pool ── map ──► slot's blocks  [ required by its length | surplus ]
//!    ▲                                                          │
//!    └───────────────────────── unmap, on demand ◄──────────────┘
//! ```
//!
//! Invariants: a slot's blocks cover its tokens, rounded up to tiles; an inactive slot has 0
//! tokens, so all its blocks are surplus; what slots require is never more than there is, which is
//! why reclaiming always finds enough.

use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use vattn::driver::owned::{self, DriverHandle, PhysicalMemory, Reservation};
use vattn::units::{Bytes, GranuleSize, TokenCount};
use vattn::{Error, ErrorKind, Result};

use crate::paged::{admitted_already, fewer_tokens, not_admitted};
use crate::policy::{Policy, RequestId, Usage};
use crate::shape::Shape;
use crate::{narrow, wide};

/// How far ahead the thread looks, in tokens, and how many blocks it maps before it stops; the
/// first token ahead is always served. Both are the original's.
const AHEAD_TOKENS: u64 = 9;
const AHEAD_BLOCKS: u64 = 2;

/// How many handles are created at most, all of them up front: 32 TiB of 2 MiB each, and already
/// gigabytes of books.
pub const MOST_HANDLES: u64 = 1 << 24;

/// When pages are mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Mapping {
    /// In the step whose tokens need them.
    #[default]
    Synchronous,
    /// Also by a thread that each step starts and the next call joins.
    Ahead,
    /// Likewise, but the thread does its work in [`Policy::tend`]. For a simulated server, whose model
    /// takes no time to run: so the thread's calls can be told from the step's.
    Tended,
}

/// The policy. See the module.
#[derive(Debug)]
pub struct Vattention {
    pages: Home,
    mapping: Mapping,
    /// The slot of each admitted request.
    seats: Vec<Option<u32>>,
    bytes_per_token: Bytes,
    tokens: TokenCount,
    /// Blocks up to the last that holds a token or the rest of its tile, of all active slots.
    filled: u64,
    block_bytes: Bytes,
    held: Bytes,
    adopted: u64,
    /// As of when the pages last left home.
    reclaimed: u64,
    /// Blocks that are mapped in no slot, as of then.
    free: u64,
    capacity: u64,
    shape: Shape,
    granule: GranuleSize,
    largest_row: Bytes,
}

/// Where the pages are: the thread that maps ahead takes them with it, so that nobody else can
/// touch them meanwhile.
#[derive(Debug)]
enum Home {
    /// With the policy.
    Here(Box<Pages>),
    /// With the thread; it brings them back, and what went wrong.
    Away(Helper),
    /// Between the two, or lost to a thread that panicked.
    Gone,
}

/// The thread that maps ahead.
#[derive(Debug)]
struct Helper {
    thread: JoinHandle<(Box<Pages>, Result<()>)>,
    /// It waits with its work until this is dropped.
    held: Option<Sender<()>>,
}

#[derive(Debug)]
struct Pages {
    // Fields drop in this order: addresses before the memory behind them, both before the ranges.
    slots: Vec<Slot>,
    pool: Vec<PhysicalMemory>,
    tensors: Vec<Tensor>,
    granule: Bytes,
    /// Blocks that are mapped in no slot.
    free: u64,
    /// Blocks that active slots require.
    required: u64,
    reclaimed: u64,
}

#[derive(Debug)]
struct Tensor {
    reservation: Arc<Reservation>,
    stride: Bytes,
}

#[derive(Debug, Default)]
struct Slot {
    request: Option<RequestId>,
    tokens: TokenCount,
    /// Blocks that the tokens require, tiles included.
    required: u64,
    /// Every block's pages, a page for each tensor that is long enough to have one.
    blocks: Vec<Vec<Page>>,
}

#[derive(Debug)]
struct Page {
    mapping: owned::Mapping,
    memory: PhysicalMemory,
}

impl Vattention {
    /// Reserves the tensors and creates every handle that the budget holds.
    ///
    /// # Errors
    /// The driver's; [`InvalidConfig`](ErrorKind::InvalidConfig) for a budget below one granule a
    /// tensor or of more than [`MOST_HANDLES`] granules.
    pub fn new(driver: &DriverHandle, shape: &Shape, mapping: Mapping) -> Result<Self> {
        let granule = driver.info().granule;
        let tensors = wide(shape.tensors().len());
        let capacity = granule.within(shape.budget()).get() / tensors;
        if capacity == 0 {
            return Err(Error::new(
                ErrorKind::InvalidConfig,
                format!(
                    "a budget of {} is below one granule of {} for each of {tensors} tensors; raise it",
                    shape.budget(),
                    granule.bytes()
                ),
            ));
        }
        if capacity * tensors > MOST_HANDLES {
            return Err(Error::new(
                ErrorKind::InvalidConfig,
                format!(
                    "a budget of {} is {} handles of one granule of {}, above the limit of {MOST_HANDLES}; lower \
                     the budget or use a larger granule",
                    shape.budget(),
                    capacity * tensors,
                    granule.bytes()
                ),
            ));
        }
        let reserved = shape
            .tensors()
            .iter()
            .map(|tensor| {
                let size = tensor.stride * u64::from(shape.max_slots());
                Ok(Tensor { reservation: Reservation::new(driver, size)?, stride: tensor.stride })
            })
            .collect::<Result<Vec<_>>>()?;
        let pool = (0..capacity * tensors)
            .map(|_| PhysicalMemory::new(driver, granule.bytes()))
            .collect::<Result<Vec<_>>>()?;
        let pages = Box::new(Pages {
            slots: (0..shape.max_slots()).map(|_| Slot::default()).collect(),
            pool,
            tensors: reserved,
            granule: granule.bytes(),
            free: capacity,
            required: 0,
            reclaimed: 0,
        });
        Ok(Self {
            pages: Home::Here(pages),
            mapping,
            seats: Vec::new(),
            bytes_per_token: shape.bytes_per_token(),
            tokens: TokenCount::ZERO,
            filled: 0,
            block_bytes: granule.bytes() * tensors,
            held: granule.bytes() * (capacity * tensors),
            adopted: 0,
            reclaimed: 0,
            free: capacity,
            capacity,
            largest_row: shape.largest_row(),
            shape: shape.clone(),
            granule,
        })
    }

    /// Unmaps everything that no admitted request requires; the pages go back to the pool. The original
    /// has no such call: a bench asks for empty slots with it.
    ///
    /// # Errors
    /// The driver's.
    pub fn unmap_surplus(&mut self) -> Result<()> {
        let capacity = self.capacity;
        self.pages()?.reclaim(capacity)
    }

    /// Blocks with a byte of that many tokens.
    fn blocks(&self, tokens: TokenCount) -> u64 {
        self.granule.covering(self.largest_row * tokens.get()).get()
    }

    /// Blocks that have to be mapped for that many tokens.
    fn required(&self, tokens: TokenCount) -> u64 {
        self.blocks(self.shape.tiled(tokens))
    }

    /// The pages, once the thread that mapped ahead is done.
    fn pages(&mut self) -> Result<&mut Pages> {
        if !matches!(self.pages, Home::Here(_)) {
            let Home::Away(Helper { thread, held }) = std::mem::replace(&mut self.pages, Home::Gone) else {
                return Err(Error::new(ErrorKind::Unhealthy, "the thread that mapped ahead has panicked"));
            };
            drop(held);
            let Ok((pages, result)) = thread.join() else {
                return Err(Error::new(ErrorKind::Internal, "the thread that maps ahead panicked"));
            };
            self.pages = Home::Here(pages);
            result.map_err(|error| error.context("mapping ahead for the next step"))?;
        }
        match &mut self.pages {
            Home::Here(pages) => Ok(pages),
            Home::Away(_) | Home::Gone => unreachable!("the pages were just brought home"),
        }
    }

    fn seat(&self, request: RequestId) -> Result<usize> {
        match self.seats.get(request.index()) {
            Some(Some(seat)) => Ok(narrow((*seat).into())),
            _ => Err(not_admitted(request)),
        }
    }

    /// Starts the thread that maps for the tokens to come.
    fn map_ahead(&mut self) -> Result<()> {
        let (shape, granule, row) = (self.shape.clone(), self.granule, self.largest_row);
        let Home::Here(mut pages) = std::mem::replace(&mut self.pages, Home::Gone) else {
            return Err(Error::new(ErrorKind::Internal, "a step ended without its pages"));
        };
        (self.reclaimed, self.free) = (pages.reclaimed, pages.free);
        let (hold, held) = channel();
        let work = move || {
            // Nothing is ever sent: the other end goes.
            let _ = held.recv();
            let required = |tokens: TokenCount| granule.covering(row * shape.tiled(tokens).get()).get();
            let result = pages.map_ahead(shape.max_tokens(), required);
            (pages, result)
        };
        match std::thread::Builder::new().name("map ahead".into()).spawn(work) {
            Ok(thread) => {
                let held = (self.mapping == Mapping::Tended).then_some(hold);
                self.pages = Home::Away(Helper { thread, held });
                Ok(())
            }
            Err(error) => Err(Error::new(
                ErrorKind::Unsupported,
                format!("no thread can be started: {error}; use the synchronous policy"),
            )),
        }
    }
}

impl Pages {
    /// The slot for a prompt of `required` blocks; `None` if all are active.
    fn choose(&self, required: u64) -> Option<usize> {
        let mut chosen: Option<(usize, u64)> = None;
        for (index, slot) in self.slots.iter().enumerate() {
            if slot.request.is_some() {
                continue;
            }
            let has = wide(slot.blocks.len());
            chosen = match chosen {
                None => Some((index, has)),
                Some((_, best)) if has >= required && has < best => Some((index, has)),
                other => other,
            };
        }
        chosen.map(|(index, _)| index)
    }

    /// Unmaps surplus, from the highest slot down, until `blocks` are free.
    fn reclaim(&mut self, blocks: u64) -> Result<()> {
        for index in (0..self.slots.len()).rev() {
            while self.free < blocks && wide(self.slots[index].blocks.len()) > self.slots[index].required {
                let block = self.slots[index].blocks.pop().expect("it has more than it requires");
                self.free += 1;
                self.reclaimed += 1;
                for page in block {
                    // A page that stays mapped after a refusal is dropped with its memory, and counted.
                    page.mapping.unmap().map_err(|(_, error)| error)?;
                    self.pool.push(page.memory);
                }
            }
            if self.free >= blocks {
                break;
            }
        }
        Ok(())
    }

    /// Gives a slot `blocks` in all, reclaiming where the pool has too few.
    fn grow(&mut self, index: usize, blocks: u64) -> Result<()> {
        let missing = blocks.saturating_sub(wide(self.slots[index].blocks.len()));
        if missing > self.free {
            self.reclaim(missing)?;
        }
        for _ in 0..missing {
            self.map_block(index)?;
        }
        Ok(())
    }

    fn map_block(&mut self, index: usize) -> Result<()> {
        let within = self.granule * wide(self.slots[index].blocks.len());
        let mut block = Vec::with_capacity(self.tensors.len());
        for tensor in &self.tensors {
            // A tensor of smaller rows is at its end before the one of the largest is.
            if within >= tensor.stride {
                continue;
            }
            let memory = self.pool.pop().expect("a free block has a page for each tensor");
            match tensor.reservation.map(tensor.stride * wide(index) + within, &memory) {
                Ok(mapping) => block.push(Page { mapping, memory }),
                Err(error) => {
                    self.pool.push(memory);
                    for page in block {
                        page.mapping.unmap().map_err(|(_, error)| error)?;
                        self.pool.push(page.memory);
                    }
                    return Err(error.into());
                }
            }
        }
        self.slots[index].blocks.push(block);
        self.free -= 1;
        Ok(())
    }

    /// What the thread does: the next token of everybody first, then a few blocks for later ones.
    fn map_ahead(&mut self, max: TokenCount, required: impl Fn(TokenCount) -> u64) -> Result<()> {
        let missing = |slot: &Slot, ahead: u64| match slot.request {
            None => 0,
            Some(_) => required((slot.tokens + TokenCount::new(ahead)).min(max))
                .saturating_sub(wide(slot.blocks.len())),
        };
        let next: u64 = self.slots.iter().map(|slot| missing(slot, 1)).sum();
        if next > self.free {
            self.reclaim(next)?;
        }
        if next > self.free {
            return Ok(());
        }
        let mut mapped = 0;
        for ahead in 1..=AHEAD_TOKENS {
            for index in 0..self.slots.len() {
                let blocks = missing(&self.slots[index], ahead);
                if blocks <= self.free {
                    for _ in 0..blocks {
                        self.map_block(index)?;
                    }
                    mapped += blocks;
                }
                if ahead > 1 && mapped >= AHEAD_BLOCKS {
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}

impl Policy for Vattention {
    fn name(&self) -> &'static str {
        match self.mapping {
            Mapping::Synchronous => "vattention",
            Mapping::Ahead | Mapping::Tended => "vattention-ahead",
        }
    }

    fn can_ever_hold(&self, final_tokens: TokenCount) -> bool {
        final_tokens <= self.shape.max_tokens() && self.required(final_tokens) <= self.capacity
    }

    fn admit(&mut self, request: RequestId, prompt: TokenCount) -> Result<bool> {
        let seat = request.index();
        if seat >= self.seats.len() {
            self.seats.resize(seat + 1, None);
        }
        if self.seats[seat].is_some() {
            return Err(admitted_already(request));
        }
        if prompt > self.shape.max_tokens() {
            return Ok(false);
        }
        let (required, capacity) = (self.required(prompt), self.capacity);
        let pages = self.pages()?;
        if pages.required + required > capacity {
            return Ok(false);
        }
        let Some(index) = pages.choose(required) else { return Ok(false) };
        let adopts = !pages.slots[index].blocks.is_empty();
        // The slot's own pages must not be reclaimed for it, so it requires them before it grows.
        pages.slots[index].required = required;
        if let Err(error) = pages.grow(index, required) {
            pages.slots[index].required = 0;
            return Err(error);
        }
        pages.slots[index].request = Some(request);
        pages.slots[index].tokens = prompt;
        pages.required += required;
        self.seats[seat] = Some(u32::try_from(index).expect("slots are counted in u32"));
        self.tokens += prompt;
        self.filled += required;
        self.adopted += u64::from(adopts);
        Ok(true)
    }

    fn step(&mut self, totals: &[(RequestId, TokenCount)]) -> Result<bool> {
        self.pages()?;
        let Home::Here(pages) = &self.pages else { unreachable!("the pages were just brought home") };
        let (mut required, mut growing) = (pages.required, false);
        for &(request, total) in totals {
            let slot = &pages.slots[self.seat(request)?];
            if total < slot.tokens {
                return Err(fewer_tokens(request, slot.tokens, total));
            }
            if total > self.shape.max_tokens() {
                return Ok(false);
            }
            let blocks = self.required(total);
            required += blocks - slot.required;
            growing |= blocks > slot.required;
        }
        if required > self.capacity {
            return Ok(false);
        }
        let Home::Here(mut pages) = std::mem::replace(&mut self.pages, Home::Gone) else {
            unreachable!("the pages were just at home")
        };
        let mut result = Ok(());
        if growing {
            // Everybody requires first and grows then, so that nobody's pages are reclaimed that the
            // same step needs.
            for &(request, total) in totals {
                let index = self.seat(request)?;
                pages.slots[index].required = self.required(total);
            }
            for &(request, _) in totals {
                let index = self.seat(request)?;
                let blocks = pages.slots[index].required;
                result = pages.grow(index, blocks);
                if result.is_err() {
                    break;
                }
            }
        }
        if let Err(error) = result {
            for &(request, _) in totals {
                let index = self.seat(request)?;
                pages.slots[index].required = self.required(pages.slots[index].tokens);
            }
            self.pages = Home::Here(pages);
            return Err(error);
        }
        for &(request, total) in totals {
            let slot = &mut pages.slots[self.seat(request)?];
            self.filled += self.required(total) - self.required(slot.tokens);
            self.tokens += total - slot.tokens;
            slot.tokens = total;
        }
        pages.required = required;
        self.pages = Home::Here(pages);
        if self.mapping != Mapping::Synchronous {
            self.map_ahead()?;
        }
        Ok(true)
    }

    fn retire(&mut self, request: RequestId) -> Result<()> {
        let index = self.seat(request)?;
        let pages = self.pages()?;
        let slot = &mut pages.slots[index];
        pages.required -= slot.required;
        let tokens = std::mem::take(&mut slot.tokens);
        slot.required = 0;
        slot.request = None;
        self.seats[request.index()] = None;
        self.tokens -= tokens;
        self.filled -= self.required(tokens);
        Ok(())
    }

    fn tend(&mut self) -> Result<()> {
        if self.mapping == Mapping::Tended {
            self.pages()?;
        }
        Ok(())
    }

    /// What a thread that is under way maps ahead counts as parked once it is back.
    fn usage(&self) -> Usage {
        let free = match &self.pages {
            Home::Here(pages) => pages.free,
            Home::Away(_) | Home::Gone => self.free,
        };
        Usage {
            needed: self.bytes_per_token * self.tokens.get(),
            mapped: self.block_bytes * self.filled,
            parked: Some(self.block_bytes * (self.capacity - free).saturating_sub(self.filled)),
            held: self.held,
        }
    }

    fn adopted(&self) -> u64 {
        self.adopted
    }

    /// In blocks; what a thread that is under way reclaims counts once it is back.
    fn reclaimed(&self) -> u64 {
        match &self.pages {
            Home::Here(pages) => pages.reclaimed,
            Home::Away(_) | Home::Gone => self.reclaimed,
        }
    }
}

impl Drop for Vattention {
    /// Waits for the thread, so that everything is given back when this returns.
    fn drop(&mut self) {
        // What it could not map does not matter any more.
        let _ = self.pages();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::tests::sliced;
    use crate::testing::{calls, driver, is_empty};
    use vattn::driver::checked::Checked;
    use vattn::error::Verb;

    fn tokens(count: u64) -> TokenCount {
        TokenCount::new(count)
    }

    fn ids<const N: usize>() -> [RequestId; N] {
        std::array::from_fn(|index| RequestId::new(u32::try_from(index).unwrap()))
    }

    /// 32 tokens a block, 4 MiB a block.
    fn policy(blocks: u64, mapping: Mapping) -> (Vattention, Arc<Checked>) {
        let (driver, books) = driver();
        let policy = Vattention::new(&driver, &sliced(4, 1024, Bytes::mib(4 * blocks + 3)), mapping).unwrap();
        (policy, books)
    }

    #[test]
    fn everything_is_created_up_front_and_a_page_costs_a_map_and_an_access() {
        let (mut policy, books) = policy(10, Mapping::Synchronous);
        assert_eq!(calls(&books, Verb::Create), 20);
        let [a, b] = ids();
        assert!(policy.admit(a, tokens(33)).unwrap());
        assert_eq!((calls(&books, Verb::Map), calls(&books, Verb::SetAccess)), (4, 4));
        assert!(policy.step(&[(a, tokens(64))]).unwrap());
        assert_eq!(calls(&books, Verb::Map), 4);
        assert!(policy.step(&[(a, tokens(65))]).unwrap());
        assert_eq!(calls(&books, Verb::Map), 6);
        assert_eq!(policy.usage().mapped, Bytes::mib(12));
        assert_eq!(policy.usage().held, Bytes::mib(40));
        assert!(policy.can_ever_hold(tokens(320)) && !policy.can_ever_hold(tokens(321)));
        assert!(!policy.admit(b, tokens(8 * 32)).unwrap());
        assert!(policy.admit(b, tokens(7 * 32)).unwrap());
        let usage = policy.usage();
        assert!(!policy.step(&[(a, tokens(66)), (b, tokens(7 * 32 + 1))]).unwrap());
        assert_eq!(policy.usage(), usage);
        drop(policy);
        assert!(is_empty(&books));
    }

    #[test]
    fn a_request_gets_the_first_slot_or_a_later_one_with_enough_and_less() {
        let (mut policy, _) = policy(20, Mapping::Synchronous);
        let [a, b, c, d, e, f] = ids();
        for (request, blocks) in [(a, 8), (b, 1), (c, 4), (d, 5)] {
            assert!(policy.admit(request, tokens(blocks * 32)).unwrap());
        }
        assert!(!policy.admit(e, tokens(1)).unwrap(), "no slot is free");
        for request in [a, b, c, d] {
            policy.retire(request).unwrap();
        }
        // Slots hold 8, 1, 4 and 5 blocks: for 3 the best is the third, for 2 then the fourth.
        assert!(policy.admit(e, tokens(3 * 32)).unwrap());
        assert_eq!(policy.seat(e).unwrap(), 2);
        assert!(policy.admit(f, tokens(2 * 32)).unwrap());
        assert_eq!(policy.seat(f).unwrap(), 3);
        // 20 blocks: the first slot, since nobody has as many.
        assert!(policy.admit(a, tokens(15 * 32)).unwrap());
        assert_eq!(policy.seat(a).unwrap(), 0);
        assert_eq!(policy.adopted(), 3);
    }

    #[test]
    fn surplus_is_reclaimed_from_the_highest_slot_down() {
        let (mut policy, books) = policy(10, Mapping::Synchronous);
        let [a, b, c, d] = ids();
        for (request, blocks) in [(a, 2), (b, 4), (c, 4)] {
            assert!(policy.admit(request, tokens(blocks * 32)).unwrap());
        }
        policy.retire(b).unwrap();
        policy.retire(c).unwrap();
        assert!(policy.step(&[(a, tokens(5 * 32))]).unwrap());
        assert_eq!(policy.reclaimed(), 3);
        assert_eq!(policy.usage().parked, Some(Bytes::mib(20)), "what the other two left, less the three");
        assert_eq!(calls(&books, Verb::Unmap), 6);
        let pages = policy.pages().unwrap();
        assert_eq!(pages.slots.iter().map(|slot| slot.blocks.len()).collect::<Vec<_>>(), [5, 4, 1, 0]);
        assert!(policy.admit(d, tokens(5 * 32)).unwrap(), "its own pages and the other slot's");
        assert_eq!(policy.seat(d).unwrap(), 1);
        policy.retire(a).unwrap();
        drop(policy);
        assert!(is_empty(&books));
    }

    #[test]
    fn without_surplus_only_what_is_required_stays_mapped() {
        let (mut policy, books) = policy(10, Mapping::Synchronous);
        let [a, b] = ids();
        assert!(policy.admit(a, tokens(32)).unwrap());
        assert!(policy.admit(b, tokens(64)).unwrap());
        policy.retire(b).unwrap();
        policy.unmap_surplus().unwrap();
        assert_eq!((calls(&books, Verb::Map), calls(&books, Verb::Unmap)), (6, 4));
        assert!(policy.admit(b, tokens(64)).unwrap());
        assert_eq!(calls(&books, Verb::Map), 10, "the slot was empty");
    }

    #[test]
    fn the_thread_maps_the_next_token_before_it_comes() {
        let (mut policy, books) = policy(10, Mapping::Ahead);
        let [a] = ids();
        assert!(policy.admit(a, tokens(31)).unwrap());
        assert!(policy.step(&[(a, tokens(32))]).unwrap());
        policy.pages().unwrap();
        assert_eq!(calls(&books, Verb::Map), 4, "the block of token 33 is there already");
        assert_eq!(policy.usage().parked, Some(Bytes::mib(4)));
        assert!(policy.step(&[(a, tokens(33))]).unwrap());
        assert_eq!(policy.usage().mapped, Bytes::mib(8), "what is ahead counts as parked");
        policy.retire(a).unwrap();
        drop(policy);
        assert!(is_empty(&books));
    }

    #[test]
    fn a_thread_that_is_tended_makes_no_call_before() {
        let (mut policy, books) = policy(10, Mapping::Tended);
        let [a] = ids();
        assert!(policy.admit(a, tokens(31)).unwrap());
        assert!(policy.step(&[(a, tokens(32))]).unwrap());
        assert_eq!(calls(&books, Verb::Map), 2, "it waits, however long");
        policy.tend().unwrap();
        assert_eq!(calls(&books, Verb::Map), 4, "and is done when it was tended");
        assert!(policy.step(&[(a, tokens(64))]).unwrap());
        assert!(policy.step(&[(a, tokens(64))]).unwrap());
        assert_eq!(calls(&books, Verb::Map), 6, "a step that comes first has it work too");
        drop(policy);
        assert!(is_empty(&books));
    }

    #[test]
    fn a_budget_below_a_block_is_refused() {
        let (driver, books) = driver();
        let error =
            Vattention::new(&driver, &sliced(4, 64, Bytes::mib(3)), Mapping::Synchronous).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidConfig);
        assert!(is_empty(&books));
    }

    #[test]
    fn a_budget_of_too_many_handles_is_refused_before_any_is_made() {
        let (driver, books) = driver();
        let error = Vattention::new(&driver, &sliced(4, 64, Bytes::gib(1000 << 10)), Mapping::Synchronous)
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidConfig);
        let text = error.to_string();
        assert!(text.contains("524288000 handles") && text.contains("limit of 16777216"), "{text}");
        assert_eq!(calls(&books, Verb::Create) + calls(&books, Verb::Reserve), 0);
    }
}
