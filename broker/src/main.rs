//! `godwit-broker`: the D-Bus service `org.godwit.Vmm1`.

use std::env;
use std::fs::Permissions;
use std::io::IsTerminal as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use api::private_bus::PrivateBus;
use broker::broker::Broker;
use broker::folder::Folder;
use broker::host::Host;
use broker::launch::Launcher;
use broker::launch::systemd::Systemd;
use broker::metrics::{self, Metrics};
use broker::migration::{Arrivals, Uri, peer};
use broker::policy::Policy;
use broker::publish;
use broker::service::{self, ManagerObject};
use broker::visit;
use clap::{Parser, ValueEnum};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::geteuid;
use sd_notify::NotifyState;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tracing_subscriber::EnvFilter;
use zbus::Connection;
use zbus::connection::Builder;
use zbus::fdo::RequestNameFlags;

/// How long a call of the broker to polkit, systemd or a core may take.
const CALL_DEADLINE: Duration = Duration::from_secs(90);

/// How often logs are looked at.
const LOG_INTERVAL: Duration = Duration::from_secs(5);

/// Makes and watches virtual machines, as the D-Bus service org.godwit.Vmm1.
#[derive(Debug, Parser)]
#[command(name = "godwit-broker", version)]
struct Options {
    /// Serve a private bus on the socket `bus` in the runtime folder, for this user and root
    /// (the default)
    #[arg(long, conflicts_with = "system")]
    embedded: bool,
    /// Serve the system bus; polkit decides who may do what
    #[arg(long)]
    system: bool,
    /// How processes are started
    #[arg(long, value_enum, default_value_t = Launch::Direct)]
    launch: Launch,
    /// Folder for sockets and the state of what runs
    /// [default: $XDG_RUNTIME_DIR/godwit, or /run/godwit]
    #[arg(long, value_name = "DIR")]
    runtime_dir: Option<PathBuf>,
    /// Folder for logs and machines that were made by calls [default: that of --runtime-dir]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Folder with a definition NAME.toml for each declared machine [default, where
    /// --runtime-dir has its default too: $XDG_CONFIG_HOME/godwit/machines, or
    /// /etc/godwit/machines with --system]
    #[arg(long, value_name = "DIR")]
    config_dir: Option<PathBuf>,
    /// Where machines of other brokers may come in: tcp://HOST:PORT or unix:/PATH
    #[arg(long, value_name = "URI")]
    migration_listen: Vec<Uri>,
    /// Secret that this broker and those that it trusts have, for tcp: 16 bytes or more in a file
    /// that nobody else may read
    #[arg(long, value_name = "FILE")]
    migration_key: Option<PathBuf>,
    /// Folder with the programs godwit-vmm, godwit-blk and so on [default: this program's]
    #[arg(long, value_name = "DIR")]
    program_dir: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Launch {
    /// As children of the broker
    Direct,
    /// As units of systemd
    Systemd,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let filter = EnvFilter::try_from_env("GODWIT_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    match run(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("godwit-broker: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: Options) -> Result<()> {
    let (_, most) =
        getrlimit(Resource::RLIMIT_NOFILE).context("the descriptor limit is unknown")?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)
        .context("the descriptor limit cannot be raised")?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("no threads are to be had")?;
    let result = runtime.block_on(serve(options));
    // Whatever waits must not hold the end up.
    runtime.shutdown_background();
    result
}

fn default_runtime_dir() -> PathBuf {
    match env::var_os("XDG_RUNTIME_DIR") {
        Some(folder) if !folder.is_empty() => PathBuf::from(folder).join("godwit"),
        _ => PathBuf::from("/run/godwit"),
    }
}

/// Where declared machines are. A broker that was put elsewhere does not take over those of the
/// usual one.
fn config_dir(options: &Options, runtime_dir: &Path) -> Result<Option<PathBuf>> {
    let given = options.config_dir.clone();
    let usual = runtime_dir == default_runtime_dir();
    let folder = given.or_else(|| usual.then(|| default_config_dir(options.system)).flatten());
    let absolute = |folder: PathBuf| {
        std::path::absolute(&folder).with_context(|| format!("--config-dir {}", folder.display()))
    };
    folder.map(absolute).transpose()
}

fn default_config_dir(system: bool) -> Option<PathBuf> {
    if system {
        return Some("/etc/godwit/machines".into());
    }
    let set = |name| env::var_os(name).filter(|value| !value.is_empty());
    let config = set("XDG_CONFIG_HOME").map(PathBuf::from);
    let config = config.or_else(|| set("HOME").map(|home| PathBuf::from(home).join(".config")));
    config.map(|config| config.join("godwit/machines"))
}

async fn serve(options: Options) -> Result<()> {
    let runtime_dir = options
        .runtime_dir
        .clone()
        .unwrap_or_else(default_runtime_dir);
    let runtime_dir = std::path::absolute(&runtime_dir)
        .with_context(|| format!("--runtime-dir {}", runtime_dir.display()))?;
    let state_dir = options.state_dir.as_ref().unwrap_or(&runtime_dir);
    let state_dir = std::path::absolute(state_dir)
        .with_context(|| format!("--state-dir {}", state_dir.display()))?;
    let folder = Folder::open(&runtime_dir, &state_dir).with_context(|| {
        format!(
            "--runtime-dir {}, --state-dir {}",
            runtime_dir.display(),
            state_dir.display()
        )
    })?;
    let programs = match &options.program_dir {
        Some(folder) => std::path::absolute(folder)
            .with_context(|| format!("--program-dir {}", folder.display()))?,
        None => own_folder()?,
    };
    let mut terminate = signal(SignalKind::terminate()).context("signals cannot be heard")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("signals cannot be heard")?;

    let (publisher, changes) = publish::channel();
    let system = match options.system {
        true => Some(system_bus().await?),
        false => None,
    };
    let policy = match &system {
        Some(connection) => Policy::polkit(connection).await.context("no polkit")?,
        None => Policy::Private,
    };
    let (visit, visits) = mpsc::unbounded_channel();
    let launcher = match options.launch {
        Launch::Direct => Launcher::Direct,
        Launch::Systemd => systemd(system.as_ref(), &runtime_dir, &programs, visit).await?,
    };
    let metrics = Metrics::default();
    let metrics_path = folder.join("metrics");
    let metrics_listener = listen(&metrics_path)?;
    let bus_path = folder.join("bus");
    let migration_key = options.migration_key.as_deref().map(|path| {
        peer::read_key(path).with_context(|| format!("--migration-key {}", path.display()))
    });
    let host = Host {
        migration_key: migration_key.transpose()?,
        arrivals: Arrivals::load(&folder),
        folder,
        programs,
        launcher,
        publisher,
        metrics: metrics.clone(),
    };
    let broker = Broker::new(host, policy, config_dir(&options, &runtime_dir)?);
    tokio::spawn(bound_logs(Arc::clone(&broker)));
    tokio::spawn(visit::receive(Arc::clone(&broker), visits));
    let counted = Arc::clone(&broker);
    let count = move || Arc::clone(&counted).census();
    tokio::spawn(metrics::serve(metrics_listener, metrics, count));
    let manager = ManagerObject {
        broker: Arc::clone(&broker),
        metrics_socket: metrics_path.display().to_string(),
    };

    match system {
        Some(connection) => {
            let server = connection.object_server();
            server
                .at(api::path::MANAGER, zbus::fdo::ObjectManager)
                .await?;
            server
                .at(api::path::MANAGER, api::manager::Manager(manager))
                .await?;
            tokio::spawn(service::publish(
                Arc::clone(&broker),
                connection.clone(),
                changes,
            ));
            broker.take_up().await;
            open_doors(&broker, &options.migration_listen).await?;
            connection
                .request_name_with_flags(api::SERVICE, RequestNameFlags::DO_NOT_QUEUE)
                .await
                .with_context(|| format!("the name {} is not to be had", api::SERVICE))?;
            ready();
            wait(&mut terminate, &mut interrupt).await;
        }
        None => {
            let (bus, builder) = PrivateBus::new(api::SERVICE, geteuid().as_raw())?;
            let connection = service::manager(builder, manager)
                .method_timeout(CALL_DEADLINE)
                .build()
                .await
                .context("no connection to the own bus")?;
            tokio::spawn(service::publish(Arc::clone(&broker), connection, changes));
            broker.take_up().await;
            open_doors(&broker, &options.migration_listen).await?;
            // From here on somebody can call.
            let listener = listen(&bus_path)?;
            tokio::spawn(bus.listen(listener));
            ready();
            wait(&mut terminate, &mut interrupt).await;
        }
    }
    // Machines run on; the next broker finds them.
    Ok(())
}

async fn wait(
    terminate: &mut tokio::signal::unix::Signal,
    interrupt: &mut tokio::signal::unix::Signal,
) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

/// Lets machines of other brokers come in.
async fn open_doors(broker: &Arc<Broker>, uris: &[Uri]) -> Result<()> {
    for uri in uris {
        let listener = peer::Listener::bind(uri, broker.migration_key())
            .await
            .with_context(|| format!("--migration-listen {uri}"))?;
        tracing::info!(uri = %listener.uri, "machines may come");
        tokio::spawn(peer::serve(Arc::clone(broker), listener));
    }
    Ok(())
}

/// Keeps logs short, for ever: who writes to them is not trusted with the disk.
async fn bound_logs(broker: Arc<Broker>) {
    loop {
        tokio::time::sleep(LOG_INTERVAL).await;
        let broker = Arc::clone(&broker);
        // It cannot panic, and is not cancelled.
        let _ = tokio::task::spawn_blocking(move || broker.bound_logs()).await;
    }
}

fn ready() {
    // Outside of systemd there is nobody to tell.
    let _ = sd_notify::notify(&[NotifyState::Ready]);
    tokio::spawn(stay_alive());
    tracing::info!("ready");
}

/// Tells systemd's watchdog, if it wants to know, that what serves calls is not stuck.
async fn stay_alive() {
    let Some(patience) = sd_notify::watchdog_enabled() else {
        return;
    };
    let mut tick = tokio::time::interval(patience / 2);
    loop {
        tick.tick().await;
        let _ = sd_notify::notify(&[NotifyState::Watchdog]);
    }
}

fn own_folder() -> Result<PathBuf> {
    let own = env::current_exe().context("this program's path is unknown: give --program-dir")?;
    own.parent()
        .map(Path::to_owned)
        .context("this program is in no folder: give --program-dir")
}

/// The launcher that starts units on the bus that is connected to, or else on the system bus.
async fn systemd(
    system: Option<&Connection>,
    runtime_dir: &Path,
    programs: &Path,
    visits: mpsc::UnboundedSender<String>,
) -> Result<Launcher> {
    anyhow::ensure!(
        geteuid().is_root(),
        "--launch systemd starts units of the system, which is for root"
    );
    let connection = match system {
        Some(connection) => connection.clone(),
        None => system_bus().await?,
    };
    let systemd = Systemd::new(&connection, runtime_dir, programs, visits).await;
    systemd.map(Launcher::Systemd).context("--launch systemd")
}

async fn system_bus() -> Result<Connection> {
    Builder::system()
        .method_timeout(CALL_DEADLINE)
        .build()
        .await
        .context("no system bus: start dbus, or use --embedded")
}

/// Listens at `path`, for this user alone. A socket that a dead broker left is replaced: the
/// folder's lock says that it is dead.
fn listen(path: &Path) -> Result<UnixListener> {
    let said = || format!("{} cannot be listened on", path.display());
    if path.exists() {
        std::fs::remove_file(path).with_context(said)?;
    }
    let listener = UnixListener::bind(path).with_context(said)?;
    std::fs::set_permissions(path, Permissions::from_mode(0o600)).with_context(said)?;
    Ok(listener)
}
