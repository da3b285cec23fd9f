//! Whether a machine can be where another is: everything that two cores compare before anything is
//! copied.

use crate::wire::{CpuFeatures, Definition, Unit, same_frequency};

/// Features that are named, at most.
const MOST_NAMED: usize = 32;

fn differs(what: &str, there: &str, here: &str) -> String {
    format!("{what} is {there} at the source and {here} at the destination")
}

impl Definition {
    /// Everything that keeps a machine of the definition `source` from running as `self`.
    pub fn obstacles(&self, source: &Definition) -> Vec<String> {
        let mut reasons = Vec::new();
        if source.cpus != self.cpus {
            reasons.push(differs(
                "the number of vCPUs",
                &source.cpus.to_string(),
                &self.cpus.to_string(),
            ));
        }
        if source.memory != self.memory {
            let shape = |regions: &[(u64, u64)]| {
                let bytes: u64 = regions.iter().map(|(_, size)| size).sum();
                format!("{bytes} bytes in {} regions", regions.len())
            };
            reasons.push(differs(
                "memory",
                &shape(&source.memory),
                &shape(&self.memory),
            ));
        }
        for (name, number) in &source.schemas {
            match self.schemas.iter().find(|(known, _)| known == name) {
                Some((_, newest)) if number <= newest => {}
                Some((_, newest)) => reasons.push(differs(
                    &format!("the schema of {name}"),
                    &number.to_string(),
                    &newest.to_string(),
                )),
                None => reasons.push(format!("the destination knows no state of {name}")),
            }
        }
        self.processor_fits(source, &mut reasons);
        self.units_fit(source, &mut reasons);
        reasons
    }

    fn processor_fits(&self, source: &Definition, reasons: &mut Vec<String>) {
        if let (Some(there), Some(here)) = (&source.processor, &self.processor) {
            if there.level != here.level {
                reasons.push(differs("cpu", &there.level, &here.level));
            }
            if there.vendor != here.vendor {
                reasons.push(differs(
                    "the processor's vendor",
                    &there.vendor,
                    &here.vendor,
                ));
            }
            if there.address_bits > here.address_bits {
                reasons.push(format!(
                    "the guest may use {} bits of physical addresses, the destination's processor \
                     has {}",
                    there.address_bits, here.address_bits
                ));
            }
        }
        let missing = source.cpu_features.iter().flat_map(|there| {
            let is_it =
                |here: &&CpuFeatures| (here.leaf, &here.register) == (there.leaf, &there.register);
            let here = self.cpu_features.iter().find(is_it);
            let bits = there.bits & !here.map_or(0, |here| here.bits);
            let missing = CpuFeatures {
                bits,
                ..there.clone()
            };
            missing.names().collect::<Vec<_>>()
        });
        let mut missing: Vec<_> = missing.take(MOST_NAMED + 1).collect();
        if let Some(more) = missing.get_mut(MOST_NAMED) {
            *more = "more".into();
        }
        if !missing.is_empty() {
            reasons.push(format!(
                "the destination's processor, or its KVM, lacks {}: give the machine a cpu that \
                 both have",
                missing.join(", ")
            ));
        }
        if let (Some(there), Some(here)) = (source.tsc, self.tsc)
            && !(here.scales || same_frequency(there.khz, here.khz))
        {
            reasons.push(format!(
                "the time stamp counter runs at {} kHz at the source and at {} kHz at the \
                 destination, which cannot scale it",
                there.khz, here.khz
            ));
        }
    }

    fn units_fit(&self, source: &Definition, reasons: &mut Vec<String>) {
        let ids = |d: &Definition| d.units.iter().map(|u| u.id.clone()).collect::<Vec<_>>();
        let (there, here) = (ids(source), ids(self));
        if there != here {
            reasons.push(format!(
                "the devices are {there:?} at the source and {here:?} at the destination"
            ));
            return;
        }
        for (there, here) in source.units.iter().zip(&self.units) {
            let id = &there.id;
            let facts = |unit: &Unit| {
                [
                    ("its type", u64::from(unit.device_type)),
                    ("its number of queues", unit.queues.into()),
                    ("its queue size", unit.queue_size.into()),
                    ("whether it has state of its own", unit.has_state.into()),
                ]
            };
            for ((what, there), (_, here)) in facts(there).into_iter().zip(facts(here)) {
                if there != here {
                    reasons.push(format!(
                        "device {id}: {what} is {there} at the source and {here} at the destination"
                    ));
                }
            }
            let missing = there.features & !here.features;
            if missing != 0 {
                reasons.push(format!(
                    "device {id}: features {missing:#x} are not offered at the destination"
                ));
            }
            if there.identity != here.identity {
                reasons.push(format!(
                    "device {id}: it is another one at the destination: {:02x?} instead of {:02x?}",
                    here.identity, there.identity
                ));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{Processor, Tsc};

    fn definition() -> Definition {
        Definition {
            cpus: 2,
            cpu_features: vec![CpuFeatures {
                leaf: (7, 0),
                register: "ebx".into(),
                bits: 0b101,
            }],
            processor: Some(Processor {
                level: "x86-64-v2".into(),
                vendor: "GenuineIntel".into(),
                address_bits: 42,
            }),
            tsc: Some(Tsc {
                khz: 2_000_000,
                scales: false,
            }),
            memory: vec![(0, 1 << 30)],
            units: vec![Unit {
                id: "disk0".into(),
                device_type: 2,
                features: 0b11,
                queues: 4,
                queue_size: 256,
                has_state: true,
                identity: vec![8],
            }],
            schemas: vec![("core".into(), 1)],
        }
    }

    #[test]
    fn a_machine_fits_its_like_and_more() {
        let here = definition();
        assert_eq!(here.obstacles(&definition()), Vec::<String>::new());
        let mut more = definition();
        more.cpu_features[0].bits = !0;
        more.units[0].features = !0;
        more.schemas[0].1 = 2;
        assert_eq!(more.obstacles(&definition()), Vec::<String>::new());
    }

    #[test]
    fn a_counter_of_another_frequency_must_be_scaled() {
        let (mut here, mut there) = (definition(), definition());
        let tsc = |khz, scales| Some(Tsc { khz, scales });
        there.tsc = tsc(2_000_500, false);
        assert!(here.obstacles(&there).is_empty(), "within the tolerance");
        there.tsc = tsc(3_000_000, true);
        assert_eq!(
            here.obstacles(&there),
            [
                "the time stamp counter runs at 3000000 kHz at the source and at 2000000 kHz at the \
              destination, which cannot scale it"
            ]
        );
        here.tsc = tsc(2_000_000, true);
        assert!(here.obstacles(&there).is_empty());
    }

    #[test]
    fn a_processor_must_be_of_the_kind_that_the_guest_started_on() {
        let (mut here, there) = (definition(), definition());
        let mut processor = Processor {
            level: "host".into(),
            vendor: "AuthenticAMD".into(),
            address_bits: 39,
        };
        here.processor = Some(processor.clone());
        assert_eq!(
            here.obstacles(&there),
            [
                "cpu is x86-64-v2 at the source and host at the destination",
                "the processor's vendor is GenuineIntel at the source and AuthenticAMD at the \
                 destination",
                "the guest may use 42 bits of physical addresses, the destination's processor has \
                 39",
            ]
        );
        processor = there.processor.clone().unwrap();
        processor.address_bits = 52;
        here.processor = Some(processor);
        assert!(here.obstacles(&there).is_empty());
    }

    #[test]
    fn not_all_of_very_many_features_are_named() {
        let (mut here, mut there) = (definition(), definition());
        there.cpu_features[0].bits = !0;
        here.cpu_features.clear();
        let [reason] = &here.obstacles(&there)[..] else {
            panic!("one reason");
        };
        assert!(reason.contains(", AVX512VL: give"), "{reason}");
        there.cpu_features.push(CpuFeatures {
            leaf: (1, 0),
            register: "ecx".into(),
            bits: 1,
        });
        let [reason] = &here.obstacles(&there)[..] else {
            panic!("one reason");
        };
        assert!(reason.contains(", AVX512VL, more: give"), "{reason}");
    }

    #[test]
    fn everything_that_does_not_fit_is_named_at_once() {
        let mut there = definition();
        there.cpus = 3;
        there.memory[0].1 += 4096;
        there.schemas = vec![("core".into(), 2), ("toaster".into(), 1)];
        there.cpu_features[0].bits = 0b111;
        there.units[0].device_type = 1;
        there.units[0].queues = 5;
        there.units[0].queue_size = 128;
        there.units[0].has_state = false;
        there.units[0].features = 0b111;
        there.units[0].identity = vec![9];
        let reasons = definition().obstacles(&there);
        let expected = [
            "vCPUs",
            "memory",
            "core",
            "toaster",
            "lacks TSC_ADJUST: give",
            "type",
            "number of queues",
            "queue size",
            "state of its own",
            "0x4",
            "another one",
        ];
        assert_eq!(reasons.len(), expected.len(), "{reasons:#?}");
        for (reason, part) in reasons.iter().zip(expected) {
            assert!(reason.contains(part), "{part} in {reason}");
        }
        there = definition();
        there.units.clear();
        assert_eq!(definition().obstacles(&there).len(), 1);
    }
}
