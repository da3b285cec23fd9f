//! Who may do what: polkit decides on the system bus; on a private bus, whoever may call at
//! all may do everything.

use std::collections::HashMap;

use api::{Caller, Error};
use zbus::{Connection, Message};
use zbus_polkit::policykit1::{AuthorityProxy, CheckAuthorizationFlags, Subject};

/// What somebody wants to do, as polkit knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Make a machine, and forget one.
    Create,
    /// Start, stop, pause, reset.
    Manage,
    /// See and type on its console, and read logs.
    OpenConsole,
    /// Replace the process of a device.
    RestartDevice,
    /// Move a machine away, and decide where it is.
    Migrate,
    /// Await a machine from another broker.
    ReceiveMigration,
}

impl Action {
    /// Its name in the policy.
    pub fn id(self) -> &'static str {
        match self {
            Self::Create => "org.godwit.Vmm1.create",
            Self::Manage => "org.godwit.Vmm1.manage",
            Self::OpenConsole => "org.godwit.Vmm1.open-console",
            Self::RestartDevice => "org.godwit.Vmm1.restart-device",
            Self::Migrate => "org.godwit.Vmm1.migrate",
            Self::ReceiveMigration => "org.godwit.Vmm1.receive-migration",
        }
    }
}

/// Who decides.
#[derive(Debug)]
pub enum Policy {
    /// The private bus has decided who may call.
    Private,
    /// polkit, on the system bus.
    Polkit(AuthorityProxy<'static>),
}

impl Policy {
    /// polkit on this connection.
    ///
    /// # Errors
    /// The connection is broken.
    pub async fn polkit(connection: &Connection) -> zbus::Result<Self> {
        AuthorityProxy::new(connection).await.map(Self::Polkit)
    }

    /// Refuses a caller that may not do this with the machine.
    ///
    /// # Errors
    /// It may not, or not without a person's confirmation.
    pub async fn check(
        &self,
        caller: &Caller,
        action: Action,
        machine: &str,
        verb: &str,
    ) -> Result<(), Error> {
        let Self::Polkit(authority) = self else {
            return Ok(());
        };
        let denied = |why: &str| {
            let id = action.id();
            Error::AccessDenied(format!("{verb} {machine}: {why} ({id})"))
        };
        let Some(sender) = &caller.sender else {
            return Err(denied("the caller has no name on the bus"));
        };
        let subject = subject(sender).map_err(|error| denied(&error))?;
        let details = HashMap::from([("machine", machine), ("verb", verb)]);
        let flags = if caller.interactive {
            CheckAuthorizationFlags::ALLOW_USER_INTERACTION
        } else {
            CheckAuthorizationFlags::empty()
        };
        let answer = authority
            .check_authorization(&subject, action.id(), &details, flags, "")
            .await
            .map_err(|error| denied(&format!("polkit does not answer: {error}")))?;
        if answer.is_authorized {
            Ok(())
        } else if answer.is_challenge {
            let advice = if caller.interactive {
                "and no polkit agent runs that could ask for it: start pkttyagent, or be root"
            } else {
                "which this call does not allow to ask for: allow interactive authorization"
            };
            Err(Error::InteractiveAuthorizationRequired(format!(
                "{verb} {machine} needs a confirmation, {advice} ({})",
                action.id()
            )))
        } else {
            Err(denied("polkit does not allow it"))
        }
    }
}

/// The caller as polkit wants it, which takes it from the header of a message.
fn subject(sender: &str) -> Result<Subject, String> {
    let message = Message::method_call("/", "Check")
        .sender(sender)
        .build(&())
        .map_err(|error| error.to_string())?;
    Subject::new_for_message_header(&message.header()).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHIPPED: &str = include_str!("../../packaging/polkit/org.godwit.Vmm1.policy");

    #[test]
    fn every_action_is_in_the_policy_that_is_shipped() {
        let actions = [
            Action::Create,
            Action::Manage,
            Action::OpenConsole,
            Action::RestartDevice,
        ];
        for action in actions {
            let line = format!("<action id=\"{}\">", action.id());
            assert!(SHIPPED.contains(&line), "{line}");
        }
        assert_eq!(SHIPPED.matches("<action ").count(), actions.len());
    }
}
