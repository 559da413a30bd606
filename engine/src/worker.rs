//! The engine thread: admit, schedule, execute, commit; and what lies on the device.
