//! `godwit top`: what machines and devices use, again and again.
//!
//! A look asks the broker for the counters of every process; two looks give rates. The first
//! table comes after one interval.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal as _, Read as _, Write as _};
use std::time::{Duration, Instant};

use console::Term;
use serde::Serialize;
use tokio::sync::oneshot;

use crate::connection::{Broker, Counters};
use crate::error::Result;
use crate::job::Interrupts;
use crate::options::Top;
use crate::render::{self, Column, Output, table};
use crate::terminal::Keys;
use crate::view;

/// Counter of CPU time, in microseconds.
const CPU: &str = "cpu_usec";
/// Bytes that are present, with the guest's.
const RESIDENT: &str = "resident_bytes";
/// Bytes that are present, without the guest's.
const OWN: &str = "own_bytes";
/// What goes up and down.
const LEVELS: [&str; 4] = [RESIDENT, OWN, "mapped_bytes", "prefaulted_bytes"];

/// One process and what it uses, as JSON too.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Row {
    machine: String,
    /// Nothing for the core.
    device: Option<String>,
    kind: String,
    state: String,
    process: Option<u32>,
    /// CPU time over time, in percent of one CPU; `null` before two looks.
    cpu_percent: Option<f64>,
    /// Bytes of its own and of guest memory that are present.
    resident_bytes: Option<u64>,
    /// Bytes of its own.
    own_bytes: Option<u64>,
    reconnects: u32,
    /// All its counters.
    counters: Counters,
    /// What each counter grew by, a second.
    rates: BTreeMap<String, f64>,
}

pub async fn run(broker: &Broker, output: Output, top: Top) -> Result<()> {
    let live = !output.is_json() && io::stdout().is_terminal();
    let count = match top.count {
        None if !live => 1,
        None => u64::MAX,
        Some(count) => count,
    };
    let interval = Duration::from_secs_f64(top.interval);
    let mut interrupts = Interrupts::new()?;
    let mut quit = Quit::new();
    let screen = live.then(Screen::enter).transpose()?;
    let mut before = look(broker, &top.names).await?;
    let mut looks = 0;
    while looks < count {
        tokio::select! {
            () = tokio::time::sleep(interval) => {}
            _ = interrupts.next() => break,
            () = quit.pressed() => break,
        }
        let now = look(broker, &top.names).await?;
        let rows = rows(&before, &now);
        let human = |rows: &[Row]| text(rows, output.legend);
        match &screen {
            Some(screen) => screen.show(&human(&rows))?,
            None => output.print(rows.as_slice(), human)?,
        }
        before = now;
        looks += 1;
    }
    Ok(())
}

/// All that is known at one moment.
struct Look {
    at: Instant,
    machines: Vec<(view::Machine, BTreeMap<Option<String>, Counters>)>,
}

async fn look(broker: &Broker, names: &[String]) -> Result<Look> {
    let all = broker.machines().await?;
    if let Some(missing) = names
        .iter()
        .find(|name| all.iter().all(|machine| machine.name != **name))
    {
        // It says which, and that it is not there.
        broker.machine(missing).await?;
    }
    let mut machines = Vec::new();
    for machine in all {
        if !names.is_empty() && !names.contains(&machine.name) {
            continue;
        }
        let mut counters = BTreeMap::new();
        if machine.process.is_some() {
            let of_core = broker.machine_statistics(&machine.name).await?;
            counters.insert(None, of_core);
            for device in &machine.devices {
                let of_device = broker.device_statistics(&machine.name, &device.id).await?;
                counters.insert(Some(device.id.clone()), of_device);
            }
        }
        machines.push((machine, counters));
    }
    Ok(Look {
        at: Instant::now(),
        machines,
    })
}

fn rows(before: &Look, now: &Look) -> Vec<Row> {
    let seconds = now.at.duration_since(before.at).as_secs_f64();
    let mut rows = Vec::new();
    for (machine, counters) in &now.machines {
        let earlier = before
            .machines
            .iter()
            .find(|(other, _)| other.name == machine.name);
        let of = |device: Option<&view::Device>| {
            let id = device.map(|device| device.id.clone());
            let process = device.map_or(machine.process, |device| device.process);
            let counters = counters.get(&id).cloned().unwrap_or_default();
            let earlier = earlier.and_then(|(_, counters)| counters.get(&id));
            let rates = rates(earlier, &counters, seconds);
            Row {
                machine: machine.name.clone(),
                kind: device.map_or("core", |device| &device.kind).into(),
                state: device
                    .map_or(&machine.state, |device| &device.state)
                    .clone(),
                process,
                // Microseconds a second are millionths.
                cpu_percent: rates.get(CPU).map(|rate| rate / 10_000.0),
                resident_bytes: counters.get(RESIDENT).copied(),
                own_bytes: counters.get(OWN).copied(),
                reconnects: device.map_or(0, |device| device.reconnects),
                device: id,
                counters,
                rates,
            }
        };
        rows.push(of(None));
        rows.extend(machine.devices.iter().map(|device| of(Some(device))));
    }
    rows
}

/// Growth a second. A counter that fell belongs to a new process, and has no rate yet.
fn rates(before: Option<&Counters>, now: &Counters, seconds: f64) -> BTreeMap<String, f64> {
    let Some(before) = before.filter(|_| seconds > 0.0) else {
        return BTreeMap::new();
    };
    let rate = |(name, now): (&String, &u64)| {
        let grown = now.checked_sub(*before.get(name)?)?;
        Some((name.clone(), grown as f64 / seconds))
    };
    let moving = now
        .iter()
        .filter(|(name, _)| !LEVELS.contains(&name.as_str()));
    moving.filter_map(rate).collect()
}

fn text(rows: &[Row], legend: bool) -> String {
    let columns = [
        Column::Left("MACHINE"),
        Column::Left("DEVICE"),
        Column::Left("KIND"),
        Column::Left("STATE"),
        Column::Right("PID"),
        Column::Right("CPU%"),
        Column::Right("OWN"),
        Column::Right("WITH GUEST"),
        Column::Right("REQUESTS/s"),
        Column::Right("TO GUEST/s"),
        Column::Right("FROM GUEST/s"),
        Column::Right("RECONNECTS"),
    ];
    let line = |row: &Row| {
        let rate = |name: &str| row.rates.get(name).copied();
        let reconnects = row.device.as_ref().map(|_| row.reconnects.to_string());
        vec![
            row.machine.clone(),
            row.device.clone().unwrap_or_default(),
            row.kind.clone(),
            row.state.clone(),
            row.process
                .map(|process| process.to_string())
                .unwrap_or_default(),
            row.cpu_percent
                .map(|cpu| format!("{cpu:.1}"))
                .unwrap_or_default(),
            row.own_bytes
                .map(|bytes| short(bytes as f64, 1024.0))
                .unwrap_or_default(),
            row.resident_bytes
                .map(|bytes| short(bytes as f64, 1024.0))
                .unwrap_or_default(),
            rate("requests")
                .map(|rate| short(rate, 1000.0))
                .unwrap_or_default(),
            rate("bytes_to_guest")
                .map(|rate| short(rate, 1024.0))
                .unwrap_or_default(),
            rate("bytes_from_guest")
                .map(|rate| short(rate, 1024.0))
                .unwrap_or_default(),
            reconnects.unwrap_or_default(),
        ]
    };
    table(legend, &columns, rows.iter().map(line), "process")
}

/// A number in three or four characters.
fn short(mut number: f64, step: f64) -> String {
    for unit in ["", "K", "M", "G"] {
        if number < step {
            let digits = usize::from(number < 10.0 && !unit.is_empty());
            return format!("{number:.digits$}{unit}");
        }
        number /= step;
    }
    format!("{number:.1}T")
}

/// The terminal's other screen; what was there before comes back.
struct Screen;

impl Screen {
    fn enter() -> Result<Self> {
        render::write(b"\x1b[?1049h\x1b[?25l")?;
        Ok(Self)
    }

    fn show(&self, text: &str) -> Result<()> {
        let (lines, columns) = Term::stdout().size();
        let shown = fit(text, lines.into(), columns.into());
        // Line by line over what was there, so that nothing flickers.
        let shown = shown.join("\x1b[K\r\n");
        render::write(format!("\x1b[H{shown}\x1b[J").as_bytes())
    }
}

/// As much of a text as a terminal has room for: one that wraps or scrolls cannot be written over.
fn fit(text: &str, lines: usize, columns: usize) -> Vec<String> {
    let fits = |line: &str| line.chars().take(columns).collect();
    text.lines().take(lines).map(fits).collect()
}

impl Drop for Screen {
    fn drop(&mut self) {
        // The terminal may be gone.
        let mut stdout = io::stdout();
        let _ = stdout
            .write_all(b"\x1b[?25h\x1b[?1049l")
            .and_then(|()| stdout.flush());
    }
}

/// The key q, where there is a keyboard. Its thread ends with the process.
struct Quit {
    _keys: Option<Keys>,
    pressed: Option<oneshot::Receiver<()>>,
}

impl Quit {
    fn new() -> Self {
        let keys = Keys::enter(io::stdin()).ok().flatten();
        let pressed = keys.is_some().then(|| {
            let (sender, pressed) = oneshot::channel();
            std::thread::spawn(move || {
                // Without q the sender is lost, which is no key.
                if io::stdin()
                    .lock()
                    .bytes()
                    .map_while(io::Result::ok)
                    .any(|key| key == b'q')
                {
                    let _ = sender.send(());
                }
            });
            pressed
        });
        Self {
            _keys: keys,
            pressed,
        }
    }

    /// Waits for it; for ever without a keyboard.
    async fn pressed(&mut self) {
        if let Some(pressed) = &mut self.pressed
            && pressed.await.is_ok()
        {
            return;
        }
        self.pressed = None;
        std::future::pending().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::tests::a_machine;

    fn counters(pairs: &[(&str, u64)]) -> Counters {
        pairs
            .iter()
            .map(|(name, count)| ((*name).into(), *count))
            .collect()
    }

    fn look(seconds: u64, core: &[(&str, u64)], disk: &[(&str, u64)]) -> Look {
        let counters = BTreeMap::from([
            (None, counters(core)),
            (Some("disk0".into()), counters(disk)),
        ]);
        // Only the difference of two moments matters.
        static START: std::sync::LazyLock<Instant> = std::sync::LazyLock::new(Instant::now);
        Look {
            at: *START + Duration::from_secs(seconds),
            machines: vec![(a_machine(), counters)],
        }
    }

    #[test]
    fn two_looks_give_rates() {
        let before = look(
            0,
            &[("cpu_usec", 0)],
            &[("requests", 100), ("resident_bytes", 5)],
        );
        let now = look(
            2,
            &[("cpu_usec", 3_000_000), ("resident_bytes", 1 << 20)],
            &[("requests", 4100), ("resident_bytes", 9)],
        );
        let rows = rows(&before, &now);
        assert_eq!(rows[0].kind, "core");
        assert_eq!(rows[0].cpu_percent, Some(150.0));
        assert_eq!(rows[1].device.as_deref(), Some("disk0"));
        assert_eq!(rows[1].rates, BTreeMap::from([("requests".into(), 2000.0)]));
        let text = text(&rows, true);
        assert!(
            text.contains("150.0") && text.contains("1.0M") && text.contains("2.0K"),
            "{text}"
        );
        assert!(text.ends_with("2 processes\n"), "{text}");
    }

    #[test]
    fn a_new_process_has_no_rate_yet() {
        let before = look(0, &[], &[("requests", 100)]);
        let now = look(1, &[("cpu_usec", 5)], &[("requests", 3)]);
        let rows = rows(&before, &now);
        assert_eq!(rows[0].cpu_percent, None);
        assert!(rows[1].rates.is_empty());
    }

    #[test]
    fn what_has_no_room_is_left_out() {
        assert_eq!(fit("abc\nde\n\nf\n", 3, 2), ["ab", "de", ""]);
        assert_eq!(fit("äöü\n", 9, 2), ["äö"]);
    }

    #[test]
    fn numbers_are_short() {
        for (number, text) in [
            (0.0, "0"),
            (999.0, "999"),
            (1500.0, "1.5K"),
            (25_000.0, "25K"),
            (4e12, "4.0T"),
        ] {
            assert_eq!(short(number, 1000.0), text);
        }
    }
}
