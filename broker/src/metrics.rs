//! What the broker counts, in OpenMetrics, by HTTP on a Unix socket.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};

/// A scraper that is slower than this is let go.
const DEADLINE: Duration = Duration::from_secs(10);
/// Longest request that is read, in bytes.
const MAX_REQUEST: usize = 8192;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    kind: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct JobLabels {
    kind: &'static str,
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ProcessLabels {
    machine: String,
    process: String,
    kind: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabel {
    state: &'static str,
}

/// The counters.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    started: Counter,
    failed: Counter,
    ended: Counter,
    device_ends: Family<KindLabel, Counter>,
    device_restarts: Family<KindLabel, Counter>,
    jobs: Family<JobLabels, Counter>,
    requests: Counter,
}

impl Metrics {
    pub(crate) fn machine_started(&self) {
        self.started.inc();
    }

    pub(crate) fn machine_ended(&self, failed: bool) {
        self.ended.inc();
        if failed {
            self.failed.inc();
        }
    }

    pub(crate) fn device_ended(&self, kind: &str) {
        let label = KindLabel { kind: kind.into() };
        self.device_ends.get_or_create(&label).inc();
    }

    pub(crate) fn device_restarted(&self, kind: &str) {
        let label = KindLabel { kind: kind.into() };
        self.device_restarts.get_or_create(&label).inc();
    }

    pub(crate) fn job_ended(&self, kind: &'static str, result: &'static str) {
        self.jobs.get_or_create(&JobLabels { kind, result }).inc();
    }

    pub(crate) fn request(&self) {
        self.requests.inc();
    }

    /// A registry of all, with what there is now.
    fn registry(&self, census: Census) -> Registry {
        let mut registry = Registry::with_prefix("godwit_broker");
        let counters = [
            ("machines_started", "Machines started", &self.started),
            ("machines_ended", "Machines that ended", &self.ended),
            (
                "machines_failed",
                "Machines that ended by a failure",
                &self.failed,
            ),
            ("requests", "Changes that callers asked for", &self.requests),
        ];
        for (name, help, counter) in counters {
            registry.register(name, help, counter.clone());
        }
        registry.register(
            "device_ends",
            "Device processes that ended by themselves",
            self.device_ends.clone(),
        );
        registry.register(
            "device_restarts",
            "Device processes that took over from another",
            self.device_restarts.clone(),
        );
        registry.register("jobs", "Jobs that ended", self.jobs.clone());
        registry.register_collector(Box::new(census));
        registry
    }
}

/// What there is at one moment.
#[derive(Debug, Default)]
pub struct Census {
    /// Machines in each state.
    pub machines: Vec<(&'static str, i64)>,
    /// Devices in each state.
    pub devices: Vec<(&'static str, i64)>,
    /// Processes of all machines.
    pub processes: Vec<Counted>,
}

/// A process and its counters.
#[derive(Clone, Debug)]
pub struct Counted {
    /// Its machine.
    pub machine: String,
    /// `core`, or the name of the device.
    pub process: String,
    /// `core`, or the kind of the device.
    pub kind: String,
    /// By the names that they have on the bus.
    pub counters: BTreeMap<String, u64>,
}

/// Of the counters of processes: the name on the bus, the name of the metric, what it is, whether
/// it only grows, and by what it is divided.
const OF_PROCESSES: [(&str, &str, &str, MetricType, f64); 8] = [
    (
        "requests",
        "device_requests",
        "Requests that a device answered",
        MetricType::Counter,
        1.0,
    ),
    (
        "failed_requests",
        "device_failed_requests",
        "Requests that a device answered with an error",
        MetricType::Counter,
        1.0,
    ),
    (
        "bytes_to_guest",
        "device_to_guest_bytes",
        "Bytes that the guest received",
        MetricType::Counter,
        1.0,
    ),
    (
        "bytes_from_guest",
        "device_from_guest_bytes",
        "Bytes that the guest gave",
        MetricType::Counter,
        1.0,
    ),
    (
        "reconnects",
        "device_takeovers",
        "Processes that took over a device",
        MetricType::Counter,
        1.0,
    ),
    (
        "cpu_usec",
        "process_cpu_seconds",
        "CPU time of a process",
        MetricType::Counter,
        1e6,
    ),
    (
        "resident_bytes",
        "process_resident_bytes",
        "Memory of a process, with the guest's",
        MetricType::Gauge,
        1.0,
    ),
    (
        "own_bytes",
        "process_own_bytes",
        "Memory of a process, without the guest's",
        MetricType::Gauge,
        1.0,
    ),
];

impl Collector for Census {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let families = [
            ("machines", "Machines by state", &self.machines),
            ("devices", "Devices by state", &self.devices),
        ];
        for (name, help, counts) in families {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for (state, count) in counts {
                let label = StateLabel { state };
                ConstGauge::new(*count).encode(family.encode_family(&label)?)?;
            }
        }
        for (counter, name, help, metric, unit) in OF_PROCESSES {
            let mut family = encoder.encode_descriptor(name, help, None, metric)?;
            for process in &self.processes {
                let Some(&count) = process.counters.get(counter) else {
                    continue;
                };
                let label = ProcessLabels {
                    machine: process.machine.clone(),
                    process: process.process.clone(),
                    kind: process.kind.clone(),
                };
                let value = count as f64 / unit;
                let encoder = family.encode_family(&label)?;
                match metric {
                    MetricType::Counter => ConstCounter::new(value).encode(encoder)?,
                    _ => ConstGauge::new(value).encode(encoder)?,
                }
            }
        }
        Ok(())
    }
}

/// Answers whoever asks, for ever, with what `count` counts at each look.
pub async fn serve<C>(listener: UnixListener, metrics: Metrics, count: impl Fn() -> C)
where
    C: Future<Output = Census> + Send + 'static,
{
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(DEADLINE).await;
            continue;
        };
        let (metrics, count) = (metrics.clone(), count());
        tokio::spawn(async move {
            // One that is slow or wrong is let go.
            let _ = tokio::time::timeout(DEADLINE, answer(stream, &metrics, count)).await;
        });
    }
}

async fn answer(
    mut stream: UnixStream,
    metrics: &Metrics,
    count: impl Future<Output = Census>,
) -> io::Result<()> {
    let mut request = Vec::new();
    let mut part = [0; 512];
    while !request.windows(4).any(|window| window == b"\r\n\r\n") {
        let read = stream.read(&mut part).await?;
        request.extend_from_slice(&part[..read]);
        if read == 0 || request.len() > MAX_REQUEST {
            return Ok(());
        }
    }
    let mut text = String::new();
    encode(&mut text, &metrics.registry(count.await)).map_err(io::Error::other)?;
    let head = format!(
        "HTTP/1.0 200 OK\r\n\
         Content-Type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n\
         Content-Length: {}\r\n\r\n",
        text.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(text.as_bytes()).await
}
