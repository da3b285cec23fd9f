//! Changes of the layout, each told to everyone at most once.

use std::error::Error;
use std::mem;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::{self, ThreadId};

use thiserror::Error;

use super::{GuestMemory, Region, RegionKind};

/// What a commit changes.
#[derive(Clone, Copy, Debug)]
pub struct LayoutChange<'a> {
    /// Regions that the guest no longer has.
    pub removed: &'a [Region],
    /// Regions that are new.
    pub added: &'a [Region],
    /// Every region there is now, by address.
    pub all: &'a [Region],
}

/// Somebody who must know the layout: KVM, a device process.
pub trait LayoutListener: Send + Sync {
    /// The name for error messages.
    fn name(&self) -> String;
    /// Takes over a change, whole or not at all.
    fn commit(&self, change: &LayoutChange<'_>) -> Result<(), Box<dyn Error + Send + Sync>>;
}

/// Why a layout did not change.
#[derive(Debug, Error)]
pub enum LayoutError {
    /// Two regions would share an address.
    #[error("memory at {gpa:#x}+{size:#x} overlaps memory at {other:#x}")]
    Overlap {
        /// First address of the refused region.
        gpa: u64,
        /// Its size in bytes.
        size: u64,
        /// First address of the one that is there.
        other: u64,
    },
    /// There is nothing to remove.
    #[error("there is no memory region at {gpa:#x}")]
    Absent {
        /// The address.
        gpa: u64,
    },
    /// A nested transaction was dropped without commit.
    #[error("a part of the memory layout change was given up")]
    Aborted,
    /// A listener did not agree; the old layout is in force.
    #[error("{listener} did not take the new memory layout")]
    Refused {
        /// Who.
        listener: String,
        /// Why.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
}

struct Pending {
    owner: ThreadId,
    depth: usize,
    aborted: bool,
    regions: Vec<Region>,
}

#[derive(Default)]
struct Layout {
    regions: Vec<Region>,
    pending: Option<Pending>,
}

/// The memory of the machine.
pub struct Memory {
    view: RwLock<Arc<GuestMemory>>,
    layout: Mutex<Layout>,
    idle: Condvar,
    listeners: Mutex<Vec<Arc<dyn LayoutListener>>>,
}

impl Default for Memory {
    fn default() -> Self {
        Self {
            view: RwLock::new(Arc::new(GuestMemory::new())),
            layout: Mutex::default(),
            idle: Condvar::new(),
            listeners: Mutex::default(),
        }
    }
}

impl Memory {
    /// The memory as the guest sees it now, without that of devices.
    pub fn guest(&self) -> Arc<GuestMemory> {
        Arc::clone(&self.view.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The regions in force, by address.
    pub fn regions(&self) -> Vec<Region> {
        self.layout().regions.clone()
    }

    /// Tells `listener` the layout in force, and every change from now on.
    pub fn subscribe(&self, listener: Arc<dyn LayoutListener>) -> Result<(), LayoutError> {
        let all = self.layout().regions.clone();
        if !all.is_empty() {
            tell(
                &*listener,
                &LayoutChange {
                    removed: &[],
                    added: &all,
                    all: &all,
                },
            )?;
        }
        self.listeners
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(listener);
        Ok(())
    }

    /// Starts to change the layout.
    pub fn begin(&self) -> Transaction<'_> {
        let me = thread::current().id();
        let mut layout = self
            .idle
            .wait_while(self.layout(), |l| {
                l.pending.as_ref().is_some_and(|p| p.owner != me)
            })
            .unwrap_or_else(PoisonError::into_inner);
        let regions = layout.regions.clone();
        layout
            .pending
            .get_or_insert(Pending {
                owner: me,
                depth: 0,
                aborted: false,
                regions,
            })
            .depth += 1;
        Transaction {
            memory: self,
            open: true,
        }
    }

    fn layout(&self) -> MutexGuard<'_, Layout> {
        self.layout.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Leaves one level of the transaction. The outermost puts the layout in force,
    /// and only then may another thread begin.
    fn leave(&self, abort: bool) -> Result<(), LayoutError> {
        let (wanted, aborted) = {
            let mut layout = self.layout();
            let Some(pending) = layout.pending.as_mut() else {
                return Ok(());
            };
            pending.depth -= 1;
            pending.aborted |= abort;
            if pending.depth > 0 {
                return Ok(());
            }
            (mem::take(&mut pending.regions), pending.aborted)
        };
        let result = if aborted {
            Err(LayoutError::Aborted)
        } else {
            self.apply(wanted)
        };
        self.layout().pending = None;
        self.idle.notify_all();
        result
    }

    fn apply(&self, wanted: Vec<Region>) -> Result<(), LayoutError> {
        let old = self.regions();
        let removed: Vec<_> = old
            .iter()
            .filter(|r| !wanted.contains(r))
            .cloned()
            .collect();
        let added: Vec<_> = wanted
            .iter()
            .filter(|r| !old.contains(r))
            .cloned()
            .collect();
        if removed.is_empty() && added.is_empty() {
            return Ok(());
        }
        let change = LayoutChange {
            removed: &removed,
            added: &added,
            all: &wanted,
        };
        let listeners = self
            .listeners
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        for (told, listener) in listeners.iter().enumerate() {
            if let Err(refusal) = tell(&**listener, &change) {
                let back = LayoutChange {
                    removed: &added,
                    added: &removed,
                    all: &old,
                };
                for listener in listeners[..told].iter().rev() {
                    if let Err(error) = tell(&**listener, &back) {
                        tracing::error!(%error, "the old memory layout could not be restored");
                    }
                }
                return Err(refusal);
            }
        }
        let ours = wanted.iter().filter(|r| r.kind() != RegionKind::Device);
        let regions = ours.map(Region::mapping).collect();
        // Regions of a layout are sorted and do not overlap, which is all this checks.
        let view = GuestMemory::from_arc_regions(regions).unwrap_or_default();
        *self.view.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(view);
        self.layout().regions = wanted;
        Ok(())
    }
}

fn tell(listener: &dyn LayoutListener, change: &LayoutChange<'_>) -> Result<(), LayoutError> {
    listener
        .commit(change)
        .map_err(|source| LayoutError::Refused {
            listener: listener.name(),
            source,
        })
}

/// A change of the layout that is being put together.
#[must_use = "a transaction that is not committed changes nothing"]
pub struct Transaction<'a> {
    memory: &'a Memory,
    open: bool,
}

impl Transaction<'_> {
    /// Adds a region.
    pub fn add(&mut self, region: Region) -> Result<(), LayoutError> {
        let mut layout = self.memory.layout();
        let Some(pending) = layout.pending.as_mut() else {
            return Err(LayoutError::Aborted);
        };
        if let Some(other) = pending.regions.iter().find(|r| r.overlaps(&region)) {
            let (gpa, size, other) = (region.gpa(), region.size(), other.gpa());
            return Err(LayoutError::Overlap { gpa, size, other });
        }
        let at = pending.regions.partition_point(|r| r.gpa() < region.gpa());
        pending.regions.insert(at, region);
        Ok(())
    }

    /// Removes the region that starts at `gpa`.
    pub fn remove(&mut self, gpa: u64) -> Result<(), LayoutError> {
        let mut layout = self.memory.layout();
        let Some(pending) = layout.pending.as_mut() else {
            return Err(LayoutError::Aborted);
        };
        let at = pending.regions.iter().position(|r| r.gpa() == gpa);
        pending
            .regions
            .remove(at.ok_or(LayoutError::Absent { gpa })?);
        Ok(())
    }

    /// Ends the transaction. The outermost one puts the layout in force.
    pub fn commit(mut self) -> Result<(), LayoutError> {
        self.open = false;
        self.memory.leave(false)
    }
}

impl Drop for Transaction<'_> {
    fn drop(&mut self) {
        if self.open {
            // The outermost level reports it; here nobody could.
            let _ = self.memory.leave(true);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Ram;
    use super::*;
    use vm_memory::{Bytes, GuestAddress};

    #[derive(Default)]
    struct Recorder {
        heard: Mutex<Vec<(usize, usize, usize)>>,
        refuse: std::sync::atomic::AtomicBool,
    }
    impl LayoutListener for Recorder {
        fn name(&self) -> String {
            "recorder".into()
        }
        fn commit(&self, c: &LayoutChange<'_>) -> Result<(), Box<dyn Error + Send + Sync>> {
            if self.refuse.load(std::sync::atomic::Ordering::SeqCst) {
                return Err("no".into());
            }
            let heard = (c.removed.len(), c.added.len(), c.all.len());
            self.heard.lock().unwrap().push(heard);
            Ok(())
        }
    }
    impl Recorder {
        fn heard(&self) -> Vec<(usize, usize, usize)> {
            self.heard.lock().unwrap().clone()
        }
    }

    fn region(gpa: u64) -> Region {
        let ram = Ram::allocate(1 << 20, None).unwrap();
        let file = Arc::clone(ram.regions().unwrap()[0].file());
        Region::map(gpa, 1 << 20, file, 0).unwrap()
    }

    fn with_listener() -> (Memory, Arc<Recorder>) {
        let memory = Memory::default();
        let recorder = Arc::new(Recorder::default());
        memory.subscribe(recorder.clone()).unwrap();
        (memory, recorder)
    }

    #[test]
    fn many_changes_are_one_commit() {
        let (memory, recorder) = with_listener();
        let mut outer = memory.begin();
        outer.add(region(0x20_0000)).unwrap();
        let mut inner = memory.begin();
        inner.add(region(0)).unwrap();
        inner.commit().unwrap();
        assert_eq!(recorder.heard(), [], "only the outermost commit tells");
        outer.commit().unwrap();
        assert_eq!(recorder.heard(), [(0, 2, 2)]);
        let guest = memory.guest();
        guest.write_obj(7u32, GuestAddress(0x20_0000)).unwrap();
        assert!(guest.write_obj(7u32, GuestAddress(0x10_0000)).is_err());
    }

    #[test]
    fn a_change_that_changes_nothing_is_not_told() {
        let (memory, recorder) = with_listener();
        let mut tx = memory.begin();
        tx.add(region(0)).unwrap();
        tx.remove(0).unwrap();
        tx.commit().unwrap();
        assert_eq!(recorder.heard(), []);
    }

    #[test]
    fn dropping_undoes_and_fails_what_is_around() {
        let (memory, recorder) = with_listener();
        let outer = memory.begin();
        {
            let mut inner = memory.begin();
            inner.add(region(0)).unwrap();
        }
        assert!(matches!(outer.commit(), Err(LayoutError::Aborted)));
        assert_eq!(recorder.heard(), []);
        assert!(memory.regions().is_empty());
        memory.begin().commit().unwrap();
    }

    #[test]
    fn one_refusal_leaves_the_old_layout_everywhere() {
        let (memory, first) = with_listener();
        let second = Arc::new(Recorder::default());
        memory.subscribe(second.clone()).unwrap();
        second
            .refuse
            .store(true, std::sync::atomic::Ordering::SeqCst);
        let mut tx = memory.begin();
        tx.add(region(0)).unwrap();
        let refused = tx.commit().unwrap_err();
        assert_eq!(
            refused.to_string(),
            "recorder did not take the new memory layout"
        );
        assert_eq!(first.heard(), [(0, 1, 1), (1, 0, 0)], "told back");
        assert!(memory.regions().is_empty());
    }

    #[test]
    fn overlaps_and_absent_regions_are_named() {
        let (memory, _) = with_listener();
        let mut tx = memory.begin();
        tx.add(region(0x10_0000)).unwrap();
        assert!(matches!(
            tx.add(region(0x1f_f000)),
            Err(LayoutError::Overlap { .. })
        ));
        assert!(matches!(
            tx.remove(0x20_0000),
            Err(LayoutError::Absent { gpa: 0x20_0000 })
        ));
        tx.commit().unwrap();
    }

    #[test]
    fn who_subscribes_late_hears_all() {
        let (memory, _) = with_listener();
        let mut tx = memory.begin();
        tx.add(region(0)).unwrap();
        tx.commit().unwrap();
        let late = Arc::new(Recorder::default());
        memory.subscribe(late.clone()).unwrap();
        assert_eq!(late.heard(), [(0, 1, 1)]);
    }

    #[test]
    fn another_thread_waits_for_the_transaction() {
        let (memory, recorder) = with_listener();
        let mut tx = memory.begin();
        tx.add(region(0)).unwrap();
        thread::scope(|scope| {
            let other = scope.spawn(|| {
                let mut tx = memory.begin();
                tx.add(region(0x10_0000)).unwrap();
                tx.commit()
            });
            tx.commit().unwrap();
            other.join().unwrap().unwrap();
        });
        assert_eq!(recorder.heard(), [(0, 1, 1), (0, 1, 2)]);
    }
}
