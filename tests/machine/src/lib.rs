//! Tests of whole machines on this computer's KVM.
