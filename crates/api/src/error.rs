//! The names of what can go wrong.

use std::fmt;

use zbus::message::Header;
use zbus::names::ErrorName;
use zbus::{DBusError, Message};

/// Declares the error, its D-Bus names and both ways between them at once.
macro_rules! errors {
    ($($(#[$doc:meta])+ $variant:ident = $name:literal,)+) => {
        /// A failure as the caller sees it: a name and one sentence.
        ///
        /// Where D-Bus has a standard name (`org.freedesktop.DBus.Error.…`) it is used, and
        /// `org.godwit.Vmm1.Error.…` otherwise.
        #[derive(Clone, Debug)]
        pub enum Error {
            /// The connection itself failed, or the other side has a name that is unknown here.
            ZBus(zbus::Error),
            $($(#[$doc])+ $variant(String),)+
        }

        impl Error {
            /// Its name on the bus.
            fn as_name(&self) -> &'static str {
                match self {
                    Self::ZBus(_) => "org.freedesktop.DBus.Error.Failed",
                    $(Self::$variant(_) => $name,)+
                }
            }

            /// Its sentence.
            fn sentence(&self) -> Option<&str> {
                match self {
                    Self::ZBus(error) => error.description(),
                    $(Self::$variant(text) => Some(text),)+
                }
            }

            /// The error of a name and a sentence that came over the bus.
            fn from_name(name: &str, sentence: &str) -> Option<Self> {
                match name {
                    $($name => Some(Self::$variant(sentence.to_owned())),)+
                    _ => None,
                }
            }
        }

        #[cfg(test)]
        const ALL: &[fn(String) -> Error] = &[$(Error::$variant,)+];
    };
}

errors! {
    /// There is no machine of this name.
    NoSuchMachine = "org.godwit.Vmm1.Error.NoSuchMachine",
    /// There is no device of this name in the machine.
    NoSuchDevice = "org.godwit.Vmm1.Error.NoSuchDevice",
    /// There is no such job, or not any more.
    NoSuchJob = "org.godwit.Vmm1.Error.NoSuchJob",
    /// There is a machine of this name already.
    MachineExists = "org.godwit.Vmm1.Error.MachineExists",
    /// A definition is impossible, or a key of it is unknown.
    InvalidDefinition = "org.godwit.Vmm1.Error.InvalidDefinition",
    /// The machine is not in a state in which this can be done.
    InvalidState = "org.godwit.Vmm1.Error.InvalidState",
    /// Something else is being done with the machine.
    JobInProgress = "org.godwit.Vmm1.Error.JobInProgress",
    /// What the definition names (an image, a tap, a kernel) cannot be had.
    ResourceUnavailable = "org.godwit.Vmm1.Error.ResourceUnavailable",
    /// The machine did not start, or its core failed.
    MachineFailed = "org.godwit.Vmm1.Error.MachineFailed",
    /// A device did not do its part.
    DeviceFailed = "org.godwit.Vmm1.Error.DeviceFailed",
    /// The machine cannot move, or does not fit its destination.
    NotMigratable = "org.godwit.Vmm1.Error.NotMigratable",
    /// The machine did not move.
    MigrationFailed = "org.godwit.Vmm1.Error.MigrationFailed",
    /// The machine is paused where it was, and may run at the destination.
    Undecided = "org.godwit.Vmm1.Error.Undecided",
    /// Nobody, or nobody who is trusted, answers at the destination.
    DestinationUnreachable = "org.godwit.Vmm1.Error.DestinationUnreachable",
    /// It was cancelled.
    Cancelled = "org.godwit.Vmm1.Error.Cancelled",
    /// Something took longer than it may.
    TimedOut = "org.godwit.Vmm1.Error.TimedOut",
    /// A fault of the program itself.
    Internal = "org.godwit.Vmm1.Error.Internal",
    /// An argument is impossible.
    InvalidArgs = "org.freedesktop.DBus.Error.InvalidArgs",
    /// The caller may not do this.
    AccessDenied = "org.freedesktop.DBus.Error.AccessDenied",
    /// The caller may do this when a person confirms it, and it allowed no question.
    InteractiveAuthorizationRequired =
        "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired",
    /// More is asked for than is kept or done at one time.
    LimitsExceeded = "org.freedesktop.DBus.Error.LimitsExceeded",
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self, self.sentence()) {
            (Self::ZBus(error), _) => error.fmt(f),
            (_, Some(text)) => f.write_str(text),
            (_, None) => f.write_str(self.as_name()),
        }
    }
}

impl std::error::Error for Error {}

impl DBusError for Error {
    fn create_reply(&self, call: &Header<'_>) -> zbus::Result<Message> {
        Message::error(call, self.name()).build(&(self.to_string(),))
    }

    fn name(&self) -> ErrorName<'_> {
        match self {
            Self::ZBus(zbus::Error::MethodError(name, _, _)) => name.clone().into(),
            Self::ZBus(zbus::Error::FDO(standard)) => standard.name(),
            _ => ErrorName::from_static_str_unchecked(self.as_name()),
        }
    }

    fn description(&self) -> Option<&str> {
        self.sentence()
    }
}

impl From<zbus::Error> for Error {
    fn from(error: zbus::Error) -> Self {
        let known = match &error {
            zbus::Error::MethodError(name, text, _) => {
                Self::from_name(name, text.as_deref().unwrap_or_default())
            }
            // The standard names, which zbus takes apart first.
            zbus::Error::FDO(standard) => {
                Self::from_name(&standard.name(), standard.description().unwrap_or_default())
            }
            _ => None,
        };
        known.unwrap_or(Self::ZBus(error))
    }
}

impl From<zbus::fdo::Error> for Error {
    fn from(error: zbus::fdo::Error) -> Self {
        Self::ZBus(zbus::Error::FDO(Box::new(error)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call() -> Message {
        Message::method_call("/", "Test")
            .serial(std::num::NonZeroU32::MIN)
            .build(&())
            .unwrap()
    }

    #[test]
    fn every_error_survives_its_way_over_the_bus() {
        let call = call();
        for make in ALL {
            let sent = make("a sentence".into());
            let reply = sent.create_reply(&call.header()).unwrap();
            let got = Error::from(zbus::Error::from(reply));
            assert_eq!(got.as_name(), sent.as_name());
            assert_eq!(got.to_string(), "a sentence");
        }
    }

    #[test]
    fn a_foreign_error_keeps_its_name() {
        let call = call();
        let reply = Message::error(&call.header(), "org.example.Other")
            .build(&("oh",))
            .unwrap();
        let got = Error::from(zbus::Error::from(reply));
        assert_eq!(got.name().as_str(), "org.example.Other");
        assert!(got.to_string().contains("oh"), "{got}");
    }
}
