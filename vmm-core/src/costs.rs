//! What is to be done before a machine stops and not while it stands still, counted wherever this
//! process does it.

use std::sync::atomic::{AtomicU64, Ordering};

use migration::report::Costs;
use nix::sys::resource::{UsageWho, getrusage};
use tracing::{Event, Subscriber};
use tracing_subscriber::layer::{Context, Layer};

/// Something that is counted.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    const fn zero() -> Self {
        Self(AtomicU64::new(0))
    }

    /// It was done once more.
    pub fn add(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Tables of guest memory, and changes of them, that devices were told.
pub static MEMORY_TABLES: Count = Count::zero();
/// Changes of KVM's memory slots.
pub static MEMORY_SLOTS: Count = Count::zero();
/// Eventfds tied to interrupts, or untied.
pub static INTERRUPTS: Count = Count::zero();
/// Eventfds tied to doorbells, or untied.
pub static DOORBELLS: Count = Count::zero();
/// Tables of interrupt routes.
pub static ROUTES: Count = Count::zero();
/// Rings whose place or eventfds devices were told.
pub static RINGS: Count = Count::zero();
/// Messages to devices.
pub static MESSAGES: Count = Count::zero();
/// Files opened.
pub static FILES: Count = Count::zero();
static LOG_LINES: Count = Count::zero();

/// Counts so far.
pub fn now() -> Costs {
    let faults = getrusage(UsageWho::RUSAGE_SELF).map_or(0, |usage| {
        usage.minor_page_faults() + usage.major_page_faults()
    });
    Costs {
        memory_tables: MEMORY_TABLES.get(),
        memory_slots: MEMORY_SLOTS.get(),
        interrupts: INTERRUPTS.get(),
        doorbells: DOORBELLS.get(),
        routes: ROUTES.get(),
        rings: RINGS.get(),
        files: FILES.get(),
        log_lines: LOG_LINES.get(),
        messages: MESSAGES.get(),
        page_faults: u64::try_from(faults).unwrap_or(0),
    }
}

/// Counts the lines that are logged.
#[derive(Debug)]
pub struct LogLines;

impl<S: Subscriber> Layer<S> for LogLines {
    fn on_event(&self, _event: &Event<'_>, _context: Context<'_, S>) {
        LOG_LINES.add();
    }
}
