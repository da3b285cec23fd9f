//! `org.freedesktop.DBus`: what clients ask of a bus (D-Bus specification, «Message Bus
//! Messages»).

use std::collections::HashMap;
use std::sync::Arc;

use zbus::message::Header;
use zbus::names::OwnedUniqueName;
use zbus::{DynamicType, Message, OwnedMatchRule, Variant};

use super::client::{Client, Credentials, refuse};
use super::{DRIVER, SERVICE_UNIQUE_NAME, Shared};
use crate::guarded::TOO_LONG;

const XML: &str = include_str!("driver.xml");
/// Longest match rule, in bytes.
const MAX_RULE: usize = 1024;
/// «Already running», the answer to StartServiceByName.
const ALREADY_RUNNING: u32 = 2;

const UNKNOWN_METHOD: &str = "org.freedesktop.DBus.Error.UnknownMethod";
const INVALID_ARGS: &str = "org.freedesktop.DBus.Error.InvalidArgs";
const NO_OWNER: &str = "org.freedesktop.DBus.Error.NameHasNoOwner";
const DENIED: &str = "org.freedesktop.DBus.Error.AccessDenied";
const LIMITS_EXCEEDED: &str = "org.freedesktop.DBus.Error.LimitsExceeded";
const FAILED: &str = "org.freedesktop.DBus.Error.Failed";

/// Answers a call of the client `name`.
pub(super) fn answer(
    bus: &Arc<Shared>,
    name: &OwnedUniqueName,
    client: &Client,
    call: &Message,
) -> zbus::Result<Message> {
    let header = call.header();
    let member = header.member().map(|m| m.as_str()).unwrap_or_default();
    let interface = header.interface().map_or(DRIVER, |i| i.as_str());
    match (interface, member) {
        (DRIVER, "Hello") => match client.greet() {
            true => reply(&header, &name.as_str()),
            false => refuse(&header, FAILED, "Hello was said already"),
        },
        (DRIVER, "ListNames") => reply(&header, &names(bus)),
        (DRIVER, "ListActivatableNames") => reply(&header, &[bus.service].as_slice()),
        (DRIVER, "GetId") => reply(&header, &bus.guid.as_str()),
        (DRIVER, "RequestName" | "ReleaseName") => refuse(
            &header,
            DENIED,
            &format!("this bus has one service, {}", bus.service),
        ),
        ("org.freedesktop.DBus.Monitoring", "BecomeMonitor") => {
            client.become_monitor();
            reply(&header, &())
        }
        (DRIVER, "AddMatch" | "RemoveMatch") => change_rule(client, call, member),
        (
            DRIVER,
            "NameHasOwner"
            | "GetNameOwner"
            | "ListQueuedOwners"
            | "StartServiceByName"
            | "GetConnectionUnixUser"
            | "GetConnectionUnixProcessID"
            | "GetConnectionCredentials",
        ) => about(bus, call, member),
        (DRIVER, TOO_LONG) => {
            let (size, most) = call.body().deserialize::<(u64, u64)>().unwrap_or_default();
            refuse(
                &header,
                LIMITS_EXCEEDED,
                &format!("the message has {size} bytes, at most {most} are read"),
            )
        }
        ("org.freedesktop.DBus.Peer", "Ping") => reply(&header, &()),
        ("org.freedesktop.DBus.Introspectable", "Introspect") => reply(&header, &XML),
        ("org.freedesktop.DBus.Properties", "GetAll") => reply(&header, &properties()),
        ("org.freedesktop.DBus.Properties", "Get") => {
            match call.body().deserialize::<(&str, &str)>() {
                Ok((_, property)) => match properties().remove(property) {
                    Some(value) => reply(&header, &value),
                    None => refuse(&header, INVALID_ARGS, &format!("{property} is no property")),
                },
                Err(error) => refuse(&header, INVALID_ARGS, &error.to_string()),
            }
        }
        _ => refuse(
            &header,
            UNKNOWN_METHOD,
            &format!("{interface}.{member} is not known here"),
        ),
    }
}

fn reply(call: &Header<'_>, body: &(impl serde::Serialize + DynamicType)) -> zbus::Result<Message> {
    Message::method_return(call).sender(DRIVER).build(body)
}

fn names(bus: &Shared) -> Vec<String> {
    let known = [DRIVER, bus.service, SERVICE_UNIQUE_NAME].map(str::to_owned);
    let clients = bus.clients();
    known
        .into_iter()
        .chain(clients.keys().map(ToString::to_string))
        .collect()
}

fn properties() -> HashMap<&'static str, Variant<'static>> {
    let none = || Variant::from(Vec::<String>::new());
    HashMap::from([("Features", none()), ("Interfaces", none())])
}

fn change_rule(client: &Client, call: &Message, member: &str) -> zbus::Result<Message> {
    let header = call.header();
    let body = call.body();
    let text = match body.deserialize::<&str>() {
        Ok(text) if text.len() > MAX_RULE => {
            return refuse(
                &header,
                LIMITS_EXCEEDED,
                &format!("the match rule has more than {MAX_RULE} bytes"),
            );
        }
        text => text,
    };
    match text.and_then(OwnedMatchRule::try_from) {
        Err(error) => refuse(
            &header,
            "org.freedesktop.DBus.Error.MatchRuleInvalid",
            &error.to_string(),
        ),
        Ok(rule) if member == "AddMatch" => match client.add_rule(rule) {
            true => reply(&header, &()),
            false => refuse(&header, LIMITS_EXCEEDED, "there are too many match rules"),
        },
        Ok(rule) => match client.remove_rule(&rule) {
            true => reply(&header, &()),
            false => refuse(
                &header,
                "org.freedesktop.DBus.Error.MatchRuleNotFound",
                "there is no such match rule",
            ),
        },
    }
}

/// Who is behind a name: its unique name, and credentials when they are known.
fn owner(bus: &Shared, name: &str) -> Option<(String, Credentials)> {
    let own = Credentials {
        user: bus.owner,
        process: Some(std::process::id()),
    };
    if name == DRIVER {
        return Some((DRIVER.into(), own));
    }
    if name == bus.service || name == SERVICE_UNIQUE_NAME {
        return Some((SERVICE_UNIQUE_NAME.into(), own));
    }
    let name = OwnedUniqueName::try_from(name).ok()?;
    let clients = bus.clients();
    let client = clients.get(&name)?;
    Some((name.to_string(), client.credentials))
}

/// Answers the questions about a name.
fn about(bus: &Shared, call: &Message, member: &str) -> zbus::Result<Message> {
    let header = call.header();
    let body = call.body();
    let name = match member {
        "StartServiceByName" => body.deserialize::<(&str, u32)>().map(|(name, _)| name),
        _ => body.deserialize::<&str>(),
    };
    let name = match name {
        Ok(name) => name,
        Err(error) => return refuse(&header, INVALID_ARGS, &error.to_string()),
    };
    let found = owner(bus, name);
    if member == "NameHasOwner" {
        return reply(&header, &found.is_some());
    }
    let Some((unique, who)) = found else {
        return refuse(&header, NO_OWNER, &format!("{name} is not on this bus"));
    };
    match (member, who.process) {
        ("GetNameOwner", _) => reply(&header, &unique),
        ("ListQueuedOwners", _) => reply(&header, &[unique.as_str()].as_slice()),
        ("StartServiceByName", _) => reply(&header, &ALREADY_RUNNING),
        ("GetConnectionUnixUser", _) => reply(&header, &who.user),
        ("GetConnectionUnixProcessID", Some(process)) => reply(&header, &process),
        ("GetConnectionCredentials", process) => {
            let mut known = HashMap::from([("UnixUserID", Variant::from(who.user))]);
            if let Some(process) = process {
                known.insert("ProcessID", Variant::from(process));
            }
            reply(&header, &known)
        }
        _ => refuse(
            &header,
            FAILED,
            &format!("the process of {name} is not known"),
        ),
    }
}
