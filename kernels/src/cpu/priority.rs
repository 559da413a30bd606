//! Who goes first where there are fewer cores than threads with work.

/// Lets other threads go before this one and those that it starts from here on, for good. Where the system knows no priority of a thread's own,
/// nothing changes.
pub fn stand_back() {
    #[cfg(target_os = "linux")]
    {
        const NICE: libc::c_int = 10;
        // SAFETY: there is no pointer; on Linux, 0 is the calling thread. Should it fail, it costs somebody some time.
        unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) };
    }
}
