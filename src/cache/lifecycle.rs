//! The life of a slot, but for its steps: acquire, retire, truncate.

use crate::cache::core::Core;
use crate::cache::{Fence, fence};
use crate::driver::Stream;
use crate::error::{Error, ErrorKind, Result};
use crate::slot::growth::Room;
use crate::units::{SlotId, TokenCount, wide};

/// With more fences than this on a slot, those that have fired are looked for.
const FEW_FENCES: usize = 4;

impl Core {
    pub(super) fn acquire(&self, hint: TokenCount, stream: Option<Stream>) -> Result<SlotId> {
        self.noted(self.check_health().and_then(|()| self.acquire_checked(hint, stream)))
    }

    fn acquire_checked(&self, hint: TokenCount, stream: Option<Stream>) -> Result<SlotId> {
        let (id, adopts, fences) = {
            let mut table = self.table.lock();
            let budget = self.pool.lock().budget();
            let tensors = wide(self.tensors.len());
            let short = Room::new(table.left_of(budget), budget, tensors, table.in_use()).is_short();
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
        self.let_go_unpinned();
        if let Err(error) = waited {
            self.let_go(id);
            return Err(error);
        }
        self.count_acquired(adopts);
        Ok(id)
    }

    fn count_acquired(&self, adopts: bool) {
        self.counters.acquired.bump();
        if adopts {
            self.counters.adopted.bump();
        }
    }

    pub(super) fn retire(&self, slot: SlotId, fences: &[Fence]) -> Result<()> {
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
            self.let_go(slot);
            Ok(())
        }))
    }

    pub(super) fn truncate(&self, slot: SlotId, tokens: TokenCount, fences: &[Fence]) -> Result<()> {
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
            result.map_err(|(error, _destroyed_here)| error)?;
            self.let_go(slot);
            Ok(())
        }))
    }
}
