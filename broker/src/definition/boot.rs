//! What a machine starts in.

use api::definition as keys;
use serde::{Deserialize, Serialize};

use super::DefinitionError;
use super::node::Fields;
use super::values;

/// What a machine starts in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Boot {
    /// A firmware, which boots from a disk.
    Firmware {
        /// Path of its image.
        firmware: String,
    },
    /// A kernel.
    Kernel {
        /// Path of the kernel.
        kernel: String,
        /// Path of the initial RAM disk.
        initrd: Option<String>,
        /// Kernel command line.
        cmdline: String,
    },
}

impl Boot {
    /// Takes its keys out of a definition.
    pub(super) fn take(fields: &mut Fields) -> Result<Self, DefinitionError> {
        if let Some(firmware) = fields.text(keys::FIRMWARE, values::path)? {
            for key in [keys::KERNEL, keys::INITRD, keys::CMDLINE] {
                fields.excluded(key, "not possible with firmware, which boots from a disk")?;
            }
            return Ok(Self::Firmware { firmware });
        }
        let kernel = fields.text(keys::KERNEL, values::path)?;
        let neither = || fields.wrong(keys::KERNEL, "it must be given, or firmware");
        Ok(Self::Kernel {
            kernel: kernel.ok_or_else(neither)?,
            initrd: fields.text(keys::INITRD, values::path)?,
            cmdline: fields
                .text(keys::CMDLINE, values::cmdline)?
                .unwrap_or_default(),
        })
    }

    /// Its keys and their values.
    pub(super) fn entries(&self) -> Vec<(&'static str, String)> {
        match self {
            Self::Firmware { firmware } => vec![(keys::FIRMWARE, firmware.clone())],
            Self::Kernel {
                kernel,
                initrd,
                cmdline,
            } => {
                let initrd = initrd.iter().map(|path| (keys::INITRD, path.clone()));
                let mut entries = vec![(keys::KERNEL, kernel.clone())];
                entries.extend(initrd);
                entries.push((keys::CMDLINE, cmdline.clone()));
                entries
            }
        }
    }

    /// Its files: what each is, which is also its key and the core's option, and its path.
    pub fn files(&self) -> Vec<(&'static str, &str)> {
        match self {
            Self::Firmware { firmware } => vec![(keys::FIRMWARE, firmware)],
            Self::Kernel { kernel, initrd, .. } => {
                let initrd = initrd.iter().map(|path| (keys::INITRD, path.as_str()));
                [(keys::KERNEL, kernel.as_str())]
                    .into_iter()
                    .chain(initrd)
                    .collect()
            }
        }
    }

    /// The paths of its files, to be changed.
    pub fn paths_mut(&mut self) -> impl Iterator<Item = &mut String> {
        let (first, second) = match self {
            Self::Firmware { firmware } => (firmware, None),
            Self::Kernel { kernel, initrd, .. } => (kernel, initrd.as_mut()),
        };
        [first].into_iter().chain(second)
    }
}
