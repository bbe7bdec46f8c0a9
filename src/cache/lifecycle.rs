//! The life of a slot, but for its steps: acquire, retire, truncate.

use crate::cache::{Fence, KvCache, fence};
use crate::driver::Stream;
use crate::error::{Error, ErrorKind, Result};
use crate::slot::growth::Room;
use crate::units::{SlotId, TokenCount, wide};

/// With more fences than this on a slot, those that have fired are looked for.
const FEW_FENCES: usize = 4;

impl KvCache {
    /// Gives a new request a slot, of no tokens yet.
    ///
    /// `hint` is how many tokens it will soon hold, its prompt's for example: of the parked slots the
    /// one is adopted whose memory suits that best, so that its first step maps little or nothing.
    /// `stream` is where the request's work will run; it is alive, as [`Stream::new`] asks. What an earlier owner of the memory left
    /// running on another stream is waited for there, on the device; with `None` the calling thread
    /// waits.
    ///
    /// # Errors
    /// [`NoFreeSlot`](ErrorKind::NoFreeSlot), or the driver's refusal of a wait, among them
    /// [`CapturingStream`](ErrorKind::CapturingStream). Nothing is changed.
    pub fn acquire(&self, hint: TokenCount, stream: Option<Stream>) -> Result<SlotId> {
        self.noted(self.check_health().and_then(|()| self.acquire_checked(hint, stream)))
    }

    fn acquire_checked(&self, hint: TokenCount, stream: Option<Stream>) -> Result<SlotId> {
        let (id, adopts, fences) = {
            let mut table = self.table.lock();
            let budget = self.pool.lock().budget();
            let short = Room::new(table.left_of(budget), budget, wide(self.tensors.len())).is_short();
            let (id, adopts) = table.acquire(hint, short)?;
            let fences = table.fences(id.index()).to_vec();
            if fences.is_empty() {
                table.set_active(id.index());
                self.count_acquired(adopts);
                return Ok(id);
            }
            (id, adopts, fences)
        };
        let mut fired = Vec::new();
        let waited = match stream {
            Some(stream) => {
                fences.iter().filter(|fence| !fence.is_of(stream)).try_for_each(|fence| {
                    // Events of the callers' and of ever other streams would pile up on a slot that is adopted
                    // over and over.
                    if fences.len() > FEW_FENCES && fence.event().query()? {
                        fired.push(fence.clone());
                        return Ok(());
                    }
                    fence.event().stream_waits(stream)
                })
            }
            None => fence::wait(&fences).map(|()| fired.clone_from(&fences)),
        };
        {
            let mut table = self.table.lock();
            table.set_active(id.index());
            table.drop_fences(id.index(), fired);
            if waited.is_err() {
                table.retire(id.index(), Vec::new());
            }
        }
        drop(fences);
        self.sweep();
        waited?;
        self.count_acquired(adopts);
        Ok(id)
    }

    fn count_acquired(&self, adopts: bool) {
        self.counters.acquired.bump();
        if adopts {
            self.counters.adopted.bump();
        }
    }

    /// The request is done. Its extents stay mapped until another request adopts them or memory is
    /// short; `fences` say when the device is done with them.
    ///
    /// # Errors
    /// [`StaleSlot`](ErrorKind::StaleSlot), [`ForeignSlot`](ErrorKind::ForeignSlot),
    /// [`SlotBusy`](ErrorKind::SlotBusy), [`InvalidArgument`](ErrorKind::InvalidArgument) for no
    /// fence, [`CapturingStream`](ErrorKind::CapturingStream), and the driver's. Nothing is changed.
    pub fn retire(&self, slot: SlotId, fences: &[Fence]) -> Result<()> {
        self.noted(self.check_health().and_then(|()| {
            let fences = fence::record(&self.driver, fences)?;
            let result = {
                let mut table = self.table.lock();
                match table.check(slot) {
                    Ok(index) => {
                        table.retire(index, fences);
                        Ok(())
                    }
                    Err(error) => Err((error, fences)),
                }
            };
            self.sweep();
            result.map_err(|(error, _destroyed_here)| error)?;
            self.counters.retired.bump();
            Ok(())
        }))
    }

    /// Takes tokens away: the slot now holds that many. What held the others stays mapped, as spare
    /// memory of the slot; `fences` say when the device is done with it.
    ///
    /// # Errors
    /// As [`retire`](Self::retire), and [`InvalidArgument`](ErrorKind::InvalidArgument) for more
    /// tokens than the slot holds. Nothing is changed.
    pub fn truncate(&self, slot: SlotId, tokens: TokenCount, fences: &[Fence]) -> Result<()> {
        self.noted(self.check_health().and_then(|()| {
            let fences = fence::record(&self.driver, fences)?;
            let result = {
                let mut table = self.table.lock();
                match table.check(slot) {
                    Ok(index) if tokens <= table.tokens(index) => {
                        table.truncate(index, tokens, fences);
                        Ok(())
                    }
                    Ok(index) => {
                        let error = Error::new(
                            ErrorKind::InvalidArgument,
                            format!(
                                "slot {index} is truncated to {tokens} tokens and holds {}; step is the call for more",
                                table.tokens(index)
                            ),
                        );
                        Err((error, fences))
                    }
                    Err(error) => Err((error, fences)),
                }
            };
            self.sweep();
            result.map_err(|(error, _destroyed_here)| error)
        }))
    }

    /// The index that padded batch entries may write to, if the cache was made with one. The tokens
    /// of one page or tile are always backed there, whichever is more.
    #[must_use]
    pub fn spare_slot(&self) -> Option<u32> {
        self.config.spare_index()
    }
}
