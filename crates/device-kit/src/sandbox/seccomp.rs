//! The system calls of a device process at work.
//!
//! Two filters, of which the stricter answer counts. The list allows what serving needs. The one
//! before it answers `clone3` with ENOSYS: its flags lie in memory that a filter cannot read, and
//! the C library then uses `clone`, whose flags are checked to make threads and nothing else.

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

/// IORING_REGISTER_ENABLE_RINGS: rings are made before the sandbox, and enabled by their threads.
const IORING_REGISTER_ENABLE_RINGS: u64 = 12;

/// Calls that are allowed with any arguments.
const ANY: &[i64] = &[
    // descriptors that are open: data, events, state channels
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_lseek,
    libc::SYS_close,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_fstatfs,
    libc::SYS_statx,
    libc::SYS_fdatasync,
    libc::SYS_fsync,
    libc::SYS_fcntl,
    libc::SYS_dup,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_eventfd2,
    libc::SYS_timerfd_settime,
    // what is waited for by instances that were made before
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_io_uring_enter,
    // the front-end's messages and descriptors
    libc::SYS_accept4,
    libc::SYS_recvmsg,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_getsockname,
    // memory: the process's own, and the in-flight file
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_memfd_create,
    libc::SYS_ftruncate,
    // threads and time
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigreturn,
    libc::SYS_restart_syscall,
    libc::SYS_getrandom,
    // the end
    libc::SYS_tgkill,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// The filters, in the order in which they are installed.
pub(super) fn filters(ioctls: &[u32]) -> Result<[BpfProgram; 2], BackendError> {
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    let no_clone3 = SeccompFilter::new(
        BTreeMap::from([(libc::SYS_clone3, vec![])]),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS.unsigned_abs()),
        arch,
    )?;
    let allowed = SeccompFilter::new(
        rules(ioctls)?,
        SeccompAction::Errno(libc::EPERM.unsigned_abs()),
        SeccompAction::Allow,
        arch,
    )?;
    Ok([no_clone3.try_into()?, allowed.try_into()?])
}

fn rules(ioctls: &[u32]) -> Result<BTreeMap<i64, Vec<SeccompRule>>, BackendError> {
    // An empty list of rules allows a call with any arguments.
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        ANY.iter().map(|call| (*call, vec![])).collect();
    // So that the filter before this one has the word.
    rules.insert(libc::SYS_clone3, vec![]);
    let executable = libc::PROT_EXEC.unsigned_abs().into();
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![masked(2, executable, 0)?]);
    }
    let thread = u64::from(libc::CLONE_THREAD.unsigned_abs());
    rules.insert(libc::SYS_clone, vec![masked(0, thread, thread)?]);
    rules.insert(
        libc::SYS_io_uring_register,
        vec![equal(1, IORING_REGISTER_ENABLE_RINGS)?],
    );
    let name = libc::PR_SET_NAME.unsigned_abs().into();
    let vma_name = libc::PR_SET_VMA.unsigned_abs().into();
    rules.insert(libc::SYS_prctl, vec![equal(0, name)?, equal(0, vma_name)?]);
    if !ioctls.is_empty() {
        let requests = ioctls.iter().map(|request| equal(1, u64::from(*request)));
        rules.insert(libc::SYS_ioctl, requests.collect::<Result<_, _>>()?);
    }
    Ok(rules)
}

fn equal(argument: u8, value: u64) -> Result<SeccompRule, BackendError> {
    condition(argument, SeccompCmpOp::Eq, value)
}

fn masked(argument: u8, mask: u64, value: u64) -> Result<SeccompRule, BackendError> {
    condition(argument, SeccompCmpOp::MaskedEq(mask), value)
}

fn condition(
    argument: u8,
    operator: SeccompCmpOp,
    value: u64,
) -> Result<SeccompRule, BackendError> {
    SeccompRule::new(vec![SeccompCondition::new(
        argument,
        SeccompCmpArgLen::Dword,
        operator,
        value,
    )?])
}
