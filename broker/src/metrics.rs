//! What the broker counts, in OpenMetrics, by HTTP on a Unix socket.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric as _};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};

/// A scraper that is slower than this is let go.
const DEADLINE: Duration = Duration::from_secs(2);
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

    /// A registry of all, with what `count` counts at each look: machines and devices by
    /// state.
    pub fn registry(&self, count: impl Fn() -> Census + Send + Sync + 'static) -> Registry {
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
        registry.register_collector(Box::new(Count(Box::new(count))));
        registry
    }
}

/// How many there are in each state.
#[derive(Debug, Default)]
pub struct Census {
    /// Machines.
    pub machines: Vec<(&'static str, i64)>,
    /// Devices.
    pub devices: Vec<(&'static str, i64)>,
}

struct Count(Box<dyn Fn() -> Census + Send + Sync>);

impl fmt::Debug for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Count")
    }
}

impl Collector for Count {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let census = (self.0)();
        let families = [
            ("machines", "Machines by state", census.machines),
            ("devices", "Devices by state", census.devices),
        ];
        for (name, help, counts) in families {
            let gauge = ConstGauge::new(0i64);
            let mut family = encoder.encode_descriptor(name, help, None, gauge.metric_type())?;
            for (state, count) in counts {
                let label = StateLabel { state };
                ConstGauge::new(count).encode(family.encode_family(&label)?)?;
            }
        }
        Ok(())
    }
}

/// Answers whoever asks, for ever.
pub async fn serve(listener: UnixListener, registry: Registry) {
    let registry = Arc::new(registry);
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(DEADLINE).await;
            continue;
        };
        let registry = Arc::clone(&registry);
        tokio::spawn(async move {
            // One that is slow or wrong is let go.
            let _ = tokio::time::timeout(DEADLINE, answer(stream, &registry)).await;
        });
    }
}

async fn answer(mut stream: UnixStream, registry: &Registry) -> io::Result<()> {
    let mut request = Vec::new();
    let mut part = [0; 512];
    while !request.windows(4).any(|window| window == b"\r\n\r\n") {
        let count = stream.read(&mut part).await?;
        request.extend_from_slice(&part[..count]);
        if count == 0 || request.len() > MAX_REQUEST {
            return Ok(());
        }
    }
    let mut text = String::new();
    encode(&mut text, registry).map_err(io::Error::other)?;
    let head = format!(
        "HTTP/1.0 200 OK\r\n\
         Content-Type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n\
         Content-Length: {}\r\n\r\n",
        text.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(text.as_bytes()).await
}
