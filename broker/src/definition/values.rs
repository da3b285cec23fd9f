//! Single values of a definition, checked. An error says the value and what is possible.

use uuid::Uuid;

use crate::name::MachineName;

/// Longest path, in bytes (PATH_MAX less the zero).
const MAX_PATH: usize = 4095;
/// Longest command line that any kernel takes, in bytes.
const MAX_CMDLINE: usize = 65535;
/// Longest interface name, in bytes (IFNAMSIZ less the zero).
const MAX_INTERFACE: usize = 15;
/// Longest word, in bytes.
const MAX_WORD: usize = 36;

/// A value for a message, not too long.
fn shown(text: &str) -> String {
    let short: String = text.chars().take(80).collect();
    format!("{short:?}")
}

/// An absolute path.
pub(super) fn path(text: &str) -> Result<String, String> {
    if text.len() > MAX_PATH || text.contains('\0') || !text.starts_with('/') {
        return Err(format!("{}: give an absolute path", shown(text)));
    }
    if text.split('/').any(|part| part == "..") {
        return Err(format!("{}: give a path without ..", shown(text)));
    }
    Ok(text.to_owned())
}

/// A kernel command line.
pub(super) fn cmdline(text: &str) -> Result<String, String> {
    if text.len() > MAX_CMDLINE || text.chars().any(char::is_control) {
        return Err(format!(
            "{}: give at most {MAX_CMDLINE} bytes without control characters",
            shown(text)
        ));
    }
    Ok(text.to_owned())
}

/// A number of bytes with a unit.
pub(super) fn size(text: &str) -> Result<u64, String> {
    let wrong = || format!("{}: give a number with K, M, G or T, as 512M", shown(text));
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &text[digits.len()..] {
        "" => 0,
        "K" | "KiB" => 10,
        "M" | "MiB" => 20,
        "G" | "GiB" => 30,
        "T" | "TiB" => 40,
        _ => return Err(wrong()),
    };
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    number.checked_mul(1 << shift).ok_or_else(wrong)
}

/// A size of huge pages.
pub(super) fn hugepages(text: &str) -> Result<String, String> {
    match text {
        "2M" | "1G" => Ok(text.to_owned()),
        _ => Err(format!("{}: give 2M or 1G", shown(text))),
    }
}

/// What vCPUs show of the host's processor.
pub(super) fn cpu(text: &str) -> Result<String, String> {
    match text {
        "host" | "x86-64-v1" | "x86-64-v2" | "x86-64-v3" | "x86-64-v4" => Ok(text.to_owned()),
        _ => Err(format!(
            "{}: give host, x86-64-v1, x86-64-v2, x86-64-v3 or x86-64-v4",
            shown(text)
        )),
    }
}

/// A UUID.
pub(super) fn uuid(text: &str) -> Result<String, String> {
    Uuid::try_parse(text)
        .map(|uuid| uuid.to_string())
        .map_err(|_| format!("{}: give a UUID", shown(text)))
}

/// A disk's serial number.
pub(super) fn serial(text: &str) -> Result<String, String> {
    if text.len() > 20 || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(format!(
            "{}: give at most 20 printable ASCII characters without spaces",
            shown(text)
        ));
    }
    Ok(text.to_owned())
}

/// Name of a network interface.
pub(super) fn interface(text: &str) -> Result<String, String> {
    let plain = text
        .bytes()
        .all(|byte| byte.is_ascii_graphic() && !b"/:%".contains(&byte));
    if text.is_empty() || text.len() > MAX_INTERFACE || !plain || text == "." || text == ".." {
        return Err(format!(
            "{}: give an interface's name of 1 to {MAX_INTERFACE} characters without '/', ':' or blanks",
            shown(text)
        ));
    }
    Ok(text.to_owned())
}

/// The address of a PCI device as sysfs has it; domain 0 need not be given.
pub(super) fn pci_address(text: &str) -> Result<String, String> {
    let wrong = || format!("{}: give a PCI address, as 0000:01:00.0", shown(text));
    let full = match text.matches(':').count() {
        1 => format!("0000:{text}"),
        _ => text.to_owned(),
    };
    let hex = |text: &str, digits: usize| {
        let plain = text.len() == digits && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        u32::from_str_radix(text, 16).ok().filter(|_| plain)
    };
    let parts: Vec<&str> = full.split([':', '.']).collect();
    let [domain, bus, slot, function] = parts[..] else {
        return Err(wrong());
    };
    let numbers = [hex(domain, 4), hex(bus, 2), hex(slot, 2), hex(function, 1)];
    let [
        Some(domain),
        Some(bus),
        Some(slot @ 0..32),
        Some(function @ 0..8),
    ] = numbers
    else {
        return Err(wrong());
    };
    // What separates them is seen here.
    Some(format!("{domain:04x}:{bus:02x}:{slot:02x}.{function}"))
        .filter(|address| address.eq_ignore_ascii_case(&full))
        .ok_or_else(wrong)
}

/// A unicast MAC address.
pub(super) fn mac(text: &str) -> Result<String, String> {
    let wrong = || {
        format!(
            "{}: give six hexadecimal bytes, as 52:54:00:12:34:56",
            shown(text)
        )
    };
    let parts: Vec<_> = text.split(':').collect();
    let valid = parts.len() == 6
        && parts
            .iter()
            .all(|part| part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_hexdigit()));
    if !valid {
        return Err(wrong());
    }
    let first = u8::from_str_radix(parts[0], 16).map_err(|_| wrong())?;
    if first & 1 != 0 {
        return Err(format!(
            "{}: give the address of one card, not of a group",
            shown(text)
        ));
    }
    Ok(text.to_ascii_lowercase())
}

/// A word that goes into an option of the core.
pub(super) fn word(text: &str) -> Result<String, String> {
    let plain = text
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
    if text.is_empty() || text.len() > MAX_WORD || !plain {
        return Err(format!(
            "{}: give 1 to {MAX_WORD} letters, digits, '-', '_' or '.'",
            shown(text)
        ));
    }
    Ok(text.to_owned())
}

/// The address of a card that was given none: the same for the same machine and device.
pub(super) fn mac_of(uuid: &str, device: &str) -> String {
    let [a, b, c, ..] = hash(&format!("{uuid}/{device}"));
    format!("52:54:00:{a:02x}:{b:02x}:{c:02x}")
}

/// The UUID of a machine that was given none in its file.
pub(super) fn uuid_of_name(name: &MachineName) -> String {
    let [high, low] = [hash(name.as_str()), hash(&format!("godwit/{name}"))];
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&high);
    bytes[8..].copy_from_slice(&low);
    uuid::Builder::from_custom_bytes(bytes)
        .into_uuid()
        .to_string()
}

/// FNV-1a: no secret, and the same in every version.
fn hash(text: &str) -> [u8; 8] {
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    text.bytes().fold(0xcbf2_9ce4_8422_2325, step).to_be_bytes()
}
