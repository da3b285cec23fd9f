//! What client and server tell each other of themselves (VFU, «VFIO_USER_VERSION»).

use serde::{Deserialize, Serialize};

/// Bytes of one data transfer, unless somebody says otherwise.
pub(crate) const DEFAULT_TRANSFER: u32 = 1 << 20;
/// Longest text that is read, in bytes.
pub(crate) const LONGEST: usize = 4096;

/// Capabilities of one side. What it does not name has the specification's default.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Capabilities {
    /// Descriptors that it receives in one message.
    #[serde(skip_serializing_if = "Option::is_none")]
    max_msg_fds: Option<u32>,
    /// Bytes of data that it receives, or sends, in one message.
    #[serde(skip_serializing_if = "Option::is_none")]
    max_data_xfer_size: Option<u32>,
    /// Sizes of pages that memory can consist of, or'ed together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pgsizes: Option<u64>,
    /// Ours: it knows the states of devices that start no new access to other devices.
    #[serde(rename = "org.godwit.p2p", skip_serializing_if = "Option::is_none")]
    p2p: Option<bool>,
}

/// What is in the message.
#[derive(Default, Serialize, Deserialize)]
struct Text {
    #[serde(default)]
    capabilities: Capabilities,
}

impl Capabilities {
    /// This side's.
    pub(crate) fn ours(most_descriptors: usize, page: u64) -> Self {
        Self {
            max_msg_fds: u32::try_from(most_descriptors).ok(),
            max_data_xfer_size: Some(DEFAULT_TRANSFER),
            pgsizes: Some(page),
            p2p: Some(true),
        }
    }

    /// Those of them that the client has named too: a server answers with no others.
    pub(crate) fn answer_to(self, client: &Self) -> Self {
        Self {
            max_msg_fds: self.max_msg_fds.filter(|_| client.max_msg_fds.is_some()),
            max_data_xfer_size: (self.max_data_xfer_size)
                .filter(|_| client.max_data_xfer_size.is_some()),
            pgsizes: self.pgsizes.filter(|_| client.pgsizes.is_some()),
            p2p: self.p2p.filter(|_| client.has_p2p()),
        }
    }

    /// Descriptors that it receives in one message.
    pub(crate) fn descriptors(&self) -> usize {
        self.max_msg_fds.unwrap_or(1) as usize
    }

    /// Bytes of data that it receives, or sends, in one message.
    pub(crate) fn transfer(&self) -> u32 {
        self.max_data_xfer_size.unwrap_or(DEFAULT_TRANSFER)
    }

    /// Whether it knows the states of devices that start no new access to other devices.
    pub(crate) fn has_p2p(&self) -> bool {
        self.p2p == Some(true)
    }

    /// As they are sent: JSON that a zero byte ends.
    pub(crate) fn text(&self) -> Vec<u8> {
        let text = Text {
            capabilities: self.clone(),
        };
        // Numbers have a text.
        let mut text = serde_json::to_vec(&text).unwrap_or_default();
        text.push(0);
        text
    }

    /// What came is a text of the specification's form, or empty.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn from_text(text: &[u8]) -> Result<Self, String> {
        if text.len() > LONGEST {
            return Err(format!("capabilities of {} bytes", text.len()));
        }
        let text = match text {
            [] | [0] => return Ok(Self::default()),
            [text @ .., 0] => text,
            text => text,
        };
        let text: Text = serde_json::from_slice(text).map_err(|e| format!("capabilities: {e}"))?;
        let it = text.capabilities;
        if it.descriptors() == 0 || it.transfer() == 0 {
            return Err("capabilities to receive nothing".into());
        }
        Ok(it)
    }
}
